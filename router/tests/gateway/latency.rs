//! What the gateway adds to a request. Run on a quiet machine, optimised:
//! `cargo test --release -p router --test gateway -- --ignored --nocapture added_latency`

use std::time::{Duration, Instant};

use futures::StreamExt;
use router::inference::FinishReason;
use serde_json::json;

use crate::mock::{Gateway, encode, script};

const REQUESTS: usize = 400;

/// The mock answers at once, so all of a request's time is the gateway's (and the client's, and loopback's).
// prompt of 200 words: JSON 20 us + template 50 us + tokenize 300 us + HTTP both ways 150 us => 0.5 ms
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn added_latency() {
    let ids = encode("Hello world, this is an answer of some tokens.");
    let tokens = ids.len();
    let gateway = Gateway::new(move |_| script(&ids, FinishReason::Length)).await;
    let content = "The quick brown fox jumps over the lazy dog. ".repeat(22);
    let body = json!({"messages": [{"role": "user", "content": content}], "stream": true, "max_tokens": 40, "baton_timings": true});
    let mut firsts = Vec::with_capacity(REQUESTS);
    let mut wholes = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let begun = Instant::now();
        let response = gateway.post("/v1/chat/completions", &body).await;
        let mut chunks = response.bytes_stream();
        chunks.next().await.unwrap().unwrap();
        firsts.push(begun.elapsed());
        while chunks.next().await.is_some() {}
        wholes.push(begun.elapsed());
    }
    let prompt = gateway.last().tokens.len();
    let (first, first_p99) = quantiles(&mut firsts[20..]);
    let (whole, whole_p99) = quantiles(&mut wholes[20..]);
    println!("prompt {prompt} tokens, answer {tokens} tokens, client and loopback included:");
    println!("  first event after {first:?} (median), {first_p99:?} (p99)");
    println!("  whole answer after {whole:?} (median), {whole_p99:?} (p99)");
    assert!(first < Duration::from_millis(1), "the gateway adds {first:?} to the first token");
}

fn quantiles(values: &mut [Duration]) -> (Duration, Duration) {
    values.sort();
    (values[values.len() / 2], values[values.len() * 99 / 100])
}
