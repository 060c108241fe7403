//! Promise: a client sees its whole answer whatever dies behind the router, to the bit the one it would have seen, and
//! nothing of a request outlives it.

use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::client::Said;
use crate::harness::{Cluster, PATIENCE, baton, output};
use crate::parts::{Parts, idle, ids};

/// What a request held is free within this.
const FREED_WITHIN: Duration = Duration::from_secs(1);

/// A report is as old as a heartbeat: that much later what was is known.
const HEARTBEAT: Duration = Duration::from_millis(600);

/// A completion of `prompt` tokens and exactly `output` more, with log probabilities.
fn ask(start: u32, prompt: usize, output: usize, sampling: Value) -> Value {
    let mut body = sampling;
    body["prompt"] = json!(ids(start, prompt));
    body["max_tokens"] = json!(output);
    body["ignore_eos"] = json!(true);
    body["logprobs"] = json!(0);
    body
}

fn greedy() -> Value {
    json!({ "temperature": 0 })
}

fn seeded(seed: u64) -> Value {
    json!({ "temperature": 1.0, "top_p": 0.9, "seed": seed })
}

/// The same request, sharing no cache with others.
fn salted(body: &Value, salt: &str) -> Value {
    let mut body = body.clone();
    body["cache_salt"] = json!(salt);
    body
}

/// A group of two ranks behind a prefill node, and what the router needs to hold every stream.
async fn parts(decode_tp: usize, flags: &[&str]) -> Parts {
    let mut parts = Parts::router(&["--disaggregation=always", "--drain=60"]);
    parts.prefill("p", 1, flags);
    parts.decode("d", decode_tp, flags);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    parts
}

/// With one decode group the stream waits until `up` has it back and goes on with the same tokens: whichever rank dies.
#[tokio::test]
async fn a_stream_survives_its_decode_ranks() {
    let mut cluster = Cluster::up(&[]).await;
    for (rank, sampling) in [("decode-0.1", greedy()), ("decode-0.0", seeded(3))] {
        let body = ask(1_000, 300, 3_000, sampling);
        let whole = Said::all(cluster.complete_begin(&salted(&body, "whole")).await).await;
        assert_eq!(whole.tokens.len(), 3_000);
        let lost = cluster.migrations("decode_lost").await;
        let mut stream = cluster.complete_begin(&salted(&body, rank)).await;
        let mut said = Said::default();
        said.read(&mut stream, 200).await;
        cluster.kill(rank);
        said.read(&mut stream, usize::MAX).await;
        said.assert_same(&whole, &format!("after the death of {rank}"));
        cluster.wait_for_line(&format!("{rank} was killed by signal 9")).await;
        // Killed before the end, or nothing would have had to go on.
        assert!(cluster.migrations("decode_lost").await > lost, "{rank} died after its answer");
    }
    cluster.wait_until_idle(PATIENCE).await;
}

/// A prompt whose node dies is computed by the decode group when there is no other node; an answer that has begun needs
/// its prefill node no more.
#[tokio::test]
async fn an_answer_survives_its_prefill_node() {
    let mut parts = parts(2, &["--chunk-tokens=128", "--step-tokens=128"]).await;
    let body = ask(2_000, 3_000, 500, seeded(4));
    let whole = Said::all(parts.complete_begin(&salted(&body, "whole")).await).await;
    assert_eq!(whole.tokens.len(), 500);

    let mut stream = parts.complete_begin(&salted(&body, "generating")).await;
    let mut said = Said::default();
    said.read(&mut stream, 50).await;
    parts.kill("p.0");
    said.read(&mut stream, usize::MAX).await;
    said.assert_same(&whole, "after the death of the prefill node, generating");
    assert_eq!(parts.migrations("").await, 0.0);

    // Several prompts at a node that computes them one by one: when the first is done, the others are not; again where this
    // test was held up until they were.
    for attempt in 0..5 {
        parts.restart("p.0");
        parts.wait_until_ready(&["p.0", "d.0"]).await;
        let mut streams = Vec::new();
        for salt in ["first", "second", "third"] {
            streams.push(parts.complete_begin(&salted(&body, &format!("{salt} {attempt}"))).await);
        }
        let mut said = Said::default();
        said.read(&mut streams[0], 1).await;
        parts.kill("p.0");
        said.read(&mut streams[0], usize::MAX).await;
        said.assert_same(&whole, "after the death of the prefill node, first");
        for stream in streams.drain(1..) {
            Said::all(stream).await.assert_same(&whole, "after the death of the prefill node, reading");
        }
        if parts.migrations("").await > 0.0 {
            break;
        }
    }
    let migrations = parts.migrations("prefill_lost").await + parts.migrations("session").await;
    assert!(migrations >= 1.0, "the prompts were computed before the death");

    // From now on there is none, and nobody notices.
    let local = || parts.metric("baton_placements_total", "decision=\"local\"");
    let before = local().await;
    assert!(before >= 1.0);
    Said::all(parts.complete_begin(&salted(&body, "alone")).await)
        .await
        .assert_same(&whole, "without a prefill node");
    assert_eq!(local().await, before + 1.0);
    parts.wait_until_idle().await;
}

/// A cache that travels in fewer bits may change an answer, but not whether there is one: whoever dies in the middle of transfers,
/// every client sees its whole answer, and nothing that was in flight stays behind.
#[tokio::test]
async fn coded_caches_survive_either_end() {
    let nodes = ["p.0", "d.0"];
    for codec in ["fp8", "int8", "int4"] {
        let flags = ["--chunk-tokens=128", "--step-tokens=128", &format!("--kv-codec={codec}")];
        let mut parts = parts(2, &flags).await;
        for victim in ["d.1", "d.0", "p.0"] {
            let mut streams = Vec::new();
            for number in 0..3 {
                let body = salted(&ask(6_000, 1_500, 20, seeded(number)), &format!("{victim} {number}"));
                streams.push(parts.complete_begin(&body).await);
            }
            // The node computes them one by one: when the first has begun to answer, others travel or have yet to.
            let mut first = Said::default();
            first.read(&mut streams[0], 1).await;
            parts.kill(victim);
            if victim != "p.0" {
                parts.restart(victim);
            }
            first.read(&mut streams[0], usize::MAX).await;
            assert_eq!(first.tokens.len(), 20, "{codec}, {victim}");
            for stream in streams.drain(1..) {
                assert_eq!(Said::all(stream).await.tokens.len(), 20, "{codec}, {victim}");
            }
            if victim == "p.0" {
                parts.restart(victim);
            }
            parts.wait_until_ready(&nodes).await;
            parts.wait_until_idle().await;
        }
        assert!(parts.migrations("").await >= 1.0, "{codec}: all had travelled before the deaths");
    }
}

/// More than fits: sequences are given up for room and continued, each to its own tokens.
#[tokio::test]
async fn preempted_answers_are_the_same() {
    // 16 MiB at 5 KiB per token, of which each rank holds half, are room for 3,276 tokens.
    let parts = parts(2, &["--kv-memory=8MiB", "--context=2048"]).await;
    let bodies: Vec<_> = (0..5).map(|i| ask(3_000 + i, 200, 1_200, seeded(u64::from(i)))).collect();
    let mut wanted = Vec::new();
    for body in &bodies {
        wanted.push(Said::all(parts.complete_begin(&salted(body, "alone")).await).await);
    }
    assert_eq!(parts.migrations("").await, 0.0);
    let answers = join_all(bodies.iter().map(async |body| Said::all(parts.complete_begin(body).await).await));
    for (i, (said, wanted)) in answers.await.iter().zip(&wanted).enumerate() {
        assert_eq!(wanted.tokens.len(), 1_200);
        said.assert_same(wanted, &format!("answer {i}"));
    }
    assert!(parts.migrations("preempted").await >= 1.0, "there was room for all");
    parts.wait_until_idle().await;
}

/// A client that goes away frees everything behind it within a second, be it in the prompt or in the answer.
#[tokio::test]
async fn a_dropped_stream_frees_everything() {
    let parts = parts(2, &["--chunk-tokens=128"]).await;
    parts.wait_until_idle().await;
    for read in [0, 20] {
        let mut stream = parts.complete_begin(&ask(4_000, 2_500, 1_500, greedy())).await;
        let mut said = Said::default();
        said.read(&mut stream, read).await;
        drop(stream);
        idle(FREED_WITHIN + HEARTBEAT, || parts.nodes()).await;
    }
    assert_eq!(parts.metric("vllm:request_success_total", "finished_reason=\"abort\"").await, 2.0);
}

/// A node that is told to stop ends what it has begun, then ends well; so does a router.
#[tokio::test]
async fn stopping_drains() {
    let mut parts = parts(2, &["--chunk-tokens=128", "--drain=60"]).await;
    let body = ask(5_000, 2_000, 2_000, greedy());
    let whole = Said::all(parts.complete_begin(&salted(&body, "whole")).await).await;

    let stream = parts.complete_begin(&salted(&body, "reading")).await;
    parts.signal("p.0", libc::SIGTERM);
    Said::all(stream).await.assert_same(&whole, "while its prefill node drains");
    let (status, log) = parts.wait_for_end("p.0").await;
    assert!(status.success(), "{status}: {log}");

    let mut stream = parts.complete_begin(&salted(&body, "generating")).await;
    let mut said = Said::default();
    said.read(&mut stream, 10).await;
    for part in ["d.1", "d.0", "router"] {
        parts.signal(part, libc::SIGTERM);
    }
    said.read(&mut stream, usize::MAX).await;
    said.assert_same(&whole, "while its decode group and its router drain");
    for part in ["d.1", "d.0", "router"] {
        let (status, log) = parts.wait_for_end(part).await;
        assert!(status.success(), "{part}, {status}: {log}");
    }
    assert!(!parts.log().contains("migrating"), "{}", parts.log());
}

impl Cluster {
    /// As [`idle`].
    async fn wait_until_idle(&self, limit: Duration) -> Vec<Value> {
        let port = self.port.to_string();
        let nodes = || {
            let (ok, text, stderr) = output(&mut baton(&["status", "--json", "--up", &port]));
            assert!(ok, "{stderr}");
            let status: Value = serde_json::from_str(&text).expect("JSON");
            status["nodes"].as_array().expect("nodes").clone()
        };
        idle(limit, nodes).await
    }
}
