//! Promise: a client sees its whole answer whatever dies behind the router, and nothing of a request outlives it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Cluster, EventStream, baton, output};

/// A whole answer, of `tokens` tokens whatever the model wants to say.
fn story(tokens: u32, prompt: &str) -> Value {
    json!({
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": tokens, "ignore_eos": true, "temperature": 0,
    })
}

const PROMPT: &str = "Tell me a story about a brave fox.";

async fn rest(mut stream: EventStream, mut text: String) -> String {
    while let Some(piece) = stream.next_text().await {
        text.push_str(&piece);
    }
    text
}

/// Reads until `count` pieces of text have come.
async fn begin(cluster: &Cluster, body: Value, count: usize) -> (EventStream, String) {
    let mut stream = cluster.chat_begin(body).await;
    let mut text = String::new();
    for _ in 0..count {
        text.push_str(&stream.next_text().await.expect("a long answer"));
    }
    (stream, text)
}

/// With one decode group the stream waits for it and goes on with the same tokens: whichever rank dies.
#[tokio::test]
async fn a_stream_survives_its_decode_ranks() {
    let mut cluster = Cluster::up(&[]).await;
    let whole = rest(cluster.chat_begin(story(300, PROMPT)).await, String::new()).await;
    for rank in ["decode-0.1", "decode-0.0"] {
        let (stream, text) = begin(&cluster, story(300, PROMPT), 20).await;
        cluster.kill(rank);
        assert_eq!(rest(stream, text).await, whole, "after the death of {rank}");
        cluster.wait_for_line(&format!("{rank} was killed by signal 9")).await;
    }
    assert!(cluster.metric("baton_request_migrations_total", "").await >= 2.0);
    is_idle_within(&cluster, Duration::from_secs(10)).await;
}

/// A prompt that its prefill node did not finish is computed elsewhere: by the decode group when there is no other node.
#[tokio::test]
async fn an_answer_survives_its_prefill_node() {
    let mut cluster = Cluster::up(&["--tp=1"]).await;
    let long = format!("{} {PROMPT}", "The fox ran over the hill and saw the river. ".repeat(250));
    let stream = cluster.chat_begin(story(40, &long)).await;
    cluster.kill("prefill-0");
    let survived = rest(stream, String::new()).await;
    cluster.wait_for_line("prefill-0 was killed by signal 9").await;
    // The same request once more, undisturbed: the same tokens.
    let undisturbed = rest(cluster.chat_begin(story(40, &long)).await, String::new()).await;
    assert!(!survived.is_empty());
    assert!(cluster.metric("baton_request_migrations_total", "").await >= 1.0, "it had finished before");
    assert_eq!(survived, undisturbed);
    is_idle_within(&cluster, Duration::from_secs(10)).await;
}

/// A client that goes away frees everything behind it within a second.
#[tokio::test]
async fn a_dropped_stream_frees_everything() {
    let cluster = Cluster::up(&["--tp=1"]).await;
    let (stream, _) = begin(&cluster, story(2000, PROMPT), 5).await;
    drop(stream);
    is_idle_within(&cluster, Duration::from_secs(1)).await;
}

/// Every node reports no running work, no block in a sequence's hands, and a store whose sum is right.
async fn is_idle_within(cluster: &Cluster, limit: Duration) {
    // A report is as old as a heartbeat: that much later the state within the limit is known.
    const HEARTBEAT: Duration = Duration::from_millis(600);
    let begun = Instant::now();
    loop {
        let nodes = nodes(cluster);
        let counts =
            ["/running", "/waiting", "/kv/used", "/kv/reserved", "/kv/quarantined", "/kv/audit_errors"];
        let busy = nodes.iter().any(|node| counts.iter().any(|count| node.pointer(count) != Some(&json!(0))));
        if !busy && !nodes.is_empty() {
            return;
        }
        assert!(begun.elapsed() < limit + HEARTBEAT, "not idle: {nodes:#?}\n{}", cluster.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn nodes(cluster: &Cluster) -> Vec<Value> {
    let (ok, text, stderr) = output(&mut baton(&["status", "--json", "--up", &cluster.port.to_string()]));
    assert!(ok, "{stderr}");
    let status: Value = serde_json::from_str(&text).expect("JSON");
    status["nodes"].as_array().expect("nodes").clone()
}
