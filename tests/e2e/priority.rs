//! Promise: interactive requests stay quick beside a batch that fills the cluster, and the batch fills it.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::Said;
use crate::harness::PATIENCE;
use crate::parts::{Parts, ids};

/// Sequences that the cluster holds.
const PLACES: usize = 4;

/// Tokens of an interactive answer.
const TOKENS: usize = 24;

/// Lines of a batch: more than a turn can answer.
const LINES: usize = 4000;

/// What a client felt, in seconds.
#[derive(Default)]
struct Felt {
    /// Until the first token.
    first: Vec<f64>,
    /// Between later ones, per request.
    between: Vec<f64>,
}

/// The value that half of them are below.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn ask(parts: &Parts, felt: &mut Felt, requests: u32, seed: u32) {
    for request in 0..requests {
        // Prompts of their own: what the prefix cache saves is not what is asked here.
        let prompt = ids(seed + 1000 * request, 48);
        let body = json!({ "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": true, "logprobs": 0 });
        let begun = Instant::now();
        let mut stream = parts.complete_begin(&body).await;
        let mut said = Said::default();
        said.read(&mut stream, 1).await;
        let first = Instant::now();
        said.read(&mut stream, usize::MAX).await;
        assert_eq!(said.tokens.len(), TOKENS);
        felt.first.push((first - begun).as_secs_f64());
        felt.between.push(first.elapsed().as_secs_f64() / (TOKENS - 1) as f64);
    }
}

/// Turns with and without a batch, each of so many requests one after the other; and the lines that were answered meanwhile.
async fn turns(count: u32, requests: u32) -> ([Felt; 2], u64) {
    let folder = crate::harness::folder("priority");
    let kept = folder.join("kept").display().to_string();
    let mut parts = Parts::router(&["--disaggregation=never", &format!("--batch-dir={kept}")]);
    parts.decode("d", 1, &[&format!("--max-batch={PLACES}")]);
    parts.wait_until_ready(&["d.0"]).await;
    let line = |i: usize| {
        let body = json!({ "model": "baton-demo", "prompt": format!("Line {i}:"), "max_tokens": 64, "ignore_eos": true });
        json!({ "custom_id": format!("id-{i}"), "method": "POST", "url": "/v1/completions", "body": body })
    };
    let text: String = (0..LINES).map(|i| format!("{}\n", line(i))).collect();
    let (status, file) = parts.upload(&text).await;
    assert_eq!(status, 200, "{file}");
    let file = file["id"].as_str().expect("an id");
    let (mut felt, mut answered) = ([Felt::default(), Felt::default()], 0);
    let until = async |id: &str, is_so: &dyn Fn(&serde_json::Value) -> bool| {
        let begun = Instant::now();
        loop {
            let batch = parts.batch(id).await;
            if is_so(&batch) {
                return batch["request_counts"]["completed"].as_u64().unwrap_or(0);
            }
            assert!(begun.elapsed() < PATIENCE, "{batch}\n{}", parts.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // The first answer of a process is slow.
    ask(&parts, &mut Felt::default(), 1, 1).await;
    for turn in 0..count {
        ask(&parts, &mut felt[0], requests, 100_000 * (turn + 1)).await;
        let (status, batch) = parts.begin_batch(file).await;
        assert_eq!(status, 200, "{batch}");
        let id = batch["id"].as_str().expect("an id").to_owned();
        // It has taken all places, and more wait.
        let before =
            until(&id, &|batch| batch["request_counts"]["completed"].as_u64() > Some(2 * PLACES as u64))
                .await;
        ask(&parts, &mut felt[1], requests, 10_000_000 + 100_000 * turn).await;
        let running = parts.batch(&id).await;
        assert_eq!(running["status"], "in_progress", "the batch ended before the turn: {running}");
        // Counted as they are committed, which is some at a time: at the latest now, with nobody before them.
        answered +=
            until(&id, &|batch| batch["request_counts"]["completed"].as_u64() > Some(before)).await - before;
        let (status, cancelled) = parts.post(&format!("/v1/batches/{id}/cancel"), &json!({})).await;
        assert_eq!(status, 200, "{cancelled}");
        until(&id, &|batch| batch["status"] == "cancelled").await;
        parts.wait_until_idle().await;
    }
    drop(parts);
    std::fs::remove_dir_all(folder).expect("cleans up");
    (felt, answered)
}

/// Generous, for machines that do much else: what it protects from is a request that waits for the lines before it, which would
/// be some seconds here for the shortest queue.
#[tokio::test]
async fn interactive_requests_pass_a_batch() {
    let ([alone, beside], _) = turns(1, 4).await;
    let (first, first_beside) = (median(&alone.first), median(&beside.first));
    assert!(first_beside < 1.0 + 10.0 * first, "first token after {first_beside:.3} s, alone {first:.3} s");
    let (between, between_beside) = (median(&alone.between), median(&beside.between));
    assert!(
        between_beside < 0.05 + 10.0 * between,
        "{between_beside:.4} s between tokens, alone {between:.4} s"
    );
}

/// What a batch costs those who wait, by turns with and without. Run by hand on a quiet machine:
/// `cargo test --release --test e2e -- --ignored --nocapture what_a_batch_costs`
#[tokio::test]
#[ignore = "a measurement"]
async fn what_a_batch_costs() {
    let ([alone, beside], answered) = turns(5, 12).await;
    for (what, alone, beside) in
        [("TTFT", &alone.first, &beside.first), ("TPOT", &alone.between, &beside.between)]
    {
        let (a, b) = (median(alone), median(beside));
        let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        println!(
            "{what}: alone {:.1} ms (at most {:.1}), beside a batch {:.1} ms (at most {:.1}): {:.2} times",
            a * 1e3,
            most(alone) * 1e3,
            b * 1e3,
            most(beside) * 1e3,
            b / a
        );
    }
    println!("{answered} lines of the batch were answered meanwhile");
}
