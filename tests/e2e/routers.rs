//! Promise: several routers share nodes; when one dies, what it had begun is given up and the others go on.

use serde_json::json;

use crate::client::Said;
use crate::parts::{Parts, ids};

#[tokio::test]
async fn two_routers_share_their_nodes() {
    let flags = ["--disaggregation=always"];
    let (mut doomed, mut other) = (Parts::router(&flags), Parts::router(&flags));
    // One more than the router that they were made for.
    let also = format!("--router={}", other.cluster());
    doomed.prefill("p", 1, &[&also, "--chunk-tokens=128", "--step-tokens=128"]);
    doomed.decode("d", 2, &[&also]);
    let nodes = ["p.0", "d.0"];
    doomed.wait_until_ready(&nodes).await;
    other.wait_until_ready(&nodes).await;

    let ask = |salt: &str, prompt: usize| {
        json!({
            "prompt": ids(1_000, prompt), "max_tokens": 400, "temperature": 0, "ignore_eos": true, "logprobs": 0,
            "cache_salt": salt,
        })
    };
    let body = ask("other", 300);
    let whole = Said::all(doomed.complete_begin(&ask("whole", 300)).await).await;
    assert_eq!(whole.tokens.len(), 400);

    // One router's request in its answer, and others in their prompts, when it dies in the middle of a request of the other's.
    let mut answering = doomed.complete_begin(&ask("answering", 300)).await;
    Said::default().read(&mut answering, 20).await;
    let mut reading = Vec::new();
    for salt in ["1", "2", "3"] {
        reading.push(doomed.complete_begin(&ask(salt, 3_000)).await);
    }
    let mut stream = other.complete_begin(&body).await;
    doomed.kill("router");
    let mut said = Said::default();
    said.read(&mut stream, usize::MAX).await;
    said.assert_same(&whole, "after the death of the other router");
    assert_eq!(other.migrations("").await, 0.0);
    other.wait_until_idle().await;

    // Back again, it has the nodes again.
    doomed.restart("router");
    doomed.wait_until_ready(&nodes).await;
    Said::all(doomed.complete_begin(&ask("again", 300)).await)
        .await
        .assert_same(&whole, "from a router that is back");
    doomed.wait_until_idle().await;
}
