//! Promise: prompts read on a CPU node go on in a decode group of two MLX ranks behind the real router, to the tokens of the
//! CPU as far as two devices can agree; and a rank that dies is missed by nobody. Run by `.ci/run mlx`, with the feature
//! `mlx`: the executable's ranks compute with MLX's CPU library on Linux.
#![cfg(feature = "mlx")]

#[allow(dead_code)]
#[path = "../e2e/client.rs"]
mod client;
#[allow(dead_code)]
#[path = "../e2e/harness.rs"]
mod harness;
#[allow(dead_code)]
#[path = "../e2e/parts.rs"]
mod parts;

use serde_json::{Value, json};

use crate::client::EventStream;
use crate::parts::{Parts, ids};

/// What two f32 implementations of one model differ by in a log probability, at the very least taken for granted.
const ERROR_MIN: f64 = 1e-4;

/// One generated token.
#[derive(Debug)]
struct Token {
    text: String,
    log_probability: f64,
    /// By how much it was more likely than the next.
    margin: f64,
}

/// Tokens of `stream` up to `count`, or all.
async fn tokens(stream: &mut EventStream, count: usize) -> Vec<Token> {
    let mut all = Vec::new();
    while all.len() < count {
        let Some(event) = stream.next().await else { break };
        assert!(event.get("error").is_none(), "after {} tokens: {event}", all.len());
        let told = &event["choices"][0]["logprobs"];
        let list = |name: &str| told[name].as_array().cloned().unwrap_or_default();
        let (texts, numbers, tops) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
        for ((text, number), top) in texts.iter().zip(&numbers).zip(&tops) {
            let mut top: Vec<f64> =
                top.as_object().into_iter().flatten().filter_map(|(_, number)| number.as_f64()).collect();
            top.sort_by(|a, b| b.total_cmp(a));
            all.push(Token {
                text: text.as_str().unwrap_or_default().to_owned(),
                log_probability: number.as_f64().expect("a number"),
                margin: top.first().zip(top.get(1)).map_or(f64::INFINITY, |(first, second)| first - second),
            });
        }
    }
    all
}

/// Fails unless both say the same up to a token that was no clearer than twice what the devices differ by. Returns how many
/// tokens are the same.
fn agree(what: &str, wanted: &[Token], got: &[Token]) -> usize {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let mut error = ERROR_MIN;
    for (at, (wanted, got)) in wanted.iter().zip(got).enumerate() {
        if wanted.text != got.text {
            assert!(
                wanted.margin < 2.0 * error,
                "{what}: token {at} is {got:?}, not {wanted:?}, error {error}"
            );
            return at;
        }
        error = error.max((wanted.log_probability - got.log_probability).abs());
    }
    assert!(error < 0.05, "{what}: log probabilities differ by {error}");
    wanted.len()
}

fn ask(start: u32, prompt: usize, output: usize) -> Value {
    json!({
        "prompt": ids(start, prompt),
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": true,
        "logprobs": 2,
    })
}

/// A prefill node on the CPU and a decode group.
async fn cluster(tp: usize, backend: &str) -> Parts {
    let mut parts = Parts::router(&["--disaggregation=always"]);
    parts.prefill("p", 1, &["--dtype=f32", "--backend=cpu"]);
    parts.decode("d", tp, &["--dtype=f32", backend]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    parts
}

#[tokio::test]
async fn mlx_ranks_go_on_where_a_cpu_node_left_off_and_survive_each_other() {
    let asks = [ask(1_000, 300, 60), ask(2_000, 33, 60), ask(3_000, 1, 30)];
    let long = ask(4_000, 200, 400);
    let mut wanted = Vec::new();
    {
        let cpu = cluster(1, "--backend=cpu").await;
        for body in asks.iter().chain([&long]) {
            wanted.push(tokens(&mut cpu.complete_begin(body).await, usize::MAX).await);
        }
    }
    let mut parts = cluster(2, "--backend=mlx").await;
    let mut same = 0;
    for (at, body) in asks.iter().enumerate() {
        let got = tokens(&mut parts.complete_begin(body).await, usize::MAX).await;
        same += agree(&format!("answer {at}"), &wanted[at], &got);
    }
    assert!(same > 60, "only {same} tokens could be compared");

    // kill -9 of either rank in the middle of an answer. Whoever watches over the machines starts it again; the rank that is
    // left starts itself anew.
    for rank in ["d.1", "d.0"] {
        let mut body = long.clone();
        body["cache_salt"] = json!(rank);
        let lost = parts.migrations("decode_lost").await;
        let mut stream = parts.complete_begin(&body).await;
        let mut got = tokens(&mut stream, 50).await;
        parts.kill(rank);
        parts.restart(rank);
        got.extend(tokens(&mut stream, usize::MAX).await);
        agree(&format!("the answer during which {rank} died"), &wanted[asks.len()], &got);
        assert!(parts.migrations("decode_lost").await > lost, "{rank} died after its answer");
        // A rank's log begins with its process: this line is the other rank's.
        assert!(
            parts.log().contains("this rank starts anew"),
            "the rank beside {rank} went on alone:\n{}",
            parts.log()
        );
    }
}
