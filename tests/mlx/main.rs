//! Promise: prompts read on a CPU node go on in a decode group of two MLX ranks behind the real router, to the tokens of the
//! CPU as far as two devices can agree; and a rank that dies or hangs is missed by nobody. Run by `.ci/run mlx`, with the feature
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

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::EventStream;
use crate::parts::{Parts, ids};

/// What two f32 implementations of one model differ by in a log probability, at the very least taken for granted.
const ERROR_MIN: f64 = 1e-4;

/// What a rank says that starts itself anew.
const ANEW: &str = "this rank starts anew";
/// What a rank says when it notices that another hangs.
const SILENT: &str = "lost: silent for";
/// Longest time to the notice: 2 s, and as much again for a machine that is busy with other things.
const NOTICE_MAX: Duration = Duration::from_secs(4);
/// Longest wait for a line of a log.
const PATIENCE: Duration = Duration::from_secs(60);

/// What becomes of a rank.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// kill -9.
    Killed,
    /// Stopped, and let go on when the others have noticed.
    Resumed,
    /// Stopped, and killed when the others have noticed.
    Hung,
}

/// Waits until `line` is there more than `times` times.
async fn wait_for_line(parts: &Parts, line: &str, times: usize) {
    let begun = Instant::now();
    while parts.log().matches(line).count() <= times {
        assert!(begun.elapsed() < PATIENCE, "no line {line:?}:\n{}", parts.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

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

/// A prompt that begins like one before: the group's own cache has that part of it, and the client's usage says so.
async fn what_is_held_is_not_sent_again(parts: &Parts) {
    let cached = |nodes: &[Value]| {
        let group = nodes.iter().find(|node| node["name"] == "d.0").expect("the group");
        group["counters"]["cached_tokens"].as_u64().expect("a number")
    };
    let before = cached(&parts.wait_until_idle().await);
    let prompt = [ids(1_000, 300), ids(9_000, 4)].concat();
    let body = json!({ "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": true });
    let (status, answer) = parts.post("/v1/completions", &client::with_model(&body)).await;
    assert_eq!(status, 200, "{answer}");
    // 300 tokens are 18 blocks of 16, and some.
    assert_eq!(cached(&parts.wait_until_idle().await) - before, 288);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 288, "{answer}");
}

/// The bench and the Python beside it speak to each other; here a stand-in that takes two
/// seconds for everything.
#[test]
fn the_bench_shows_both_sides() {
    let folder =
        std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let python = folder.join("python");
    let script = "#!/bin/sh\necho 9.9\nwhile read -r batch; do echo 2 1; done\n";
    std::fs::write(&python, script).expect("writes");
    std::fs::set_permissions(&python, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("may");
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama-gqa_tied-s1");
    let (model, python) = (format!("--model={}", model.display()), format!("--mlx-lm={}", python.display()));
    let flags = ["--batch=1,4", "--context=8", "--steps=4", "--rounds=1", "--dtype=f32", "--backend=mlx"];
    let mut command = harness::baton(&["bench", "decode", &model, &python]);
    let (ok, table, errors) = harness::output(command.args(flags));
    let _ = std::fs::remove_dir_all(&folder);
    assert!(ok, "{errors}");
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[1].contains("GB/s") && lines[1].contains("mlx_lm tok/s (mlx 9.9)"), "{table}");
    // 4 steps in 2 s, of 1 and of 4 sequences.
    assert!(lines[2].contains("2.0 (2.0 to 2.0)") && lines[3].contains("8.0 (8.0 to 8.0)"), "{table}");
    assert_eq!(lines.len(), 4, "{table}");
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
    what_is_held_is_not_sent_again(&parts).await;

    // Either rank fails in the middle of an answer. Whoever watches over the machines starts what has ended; the rank that is
    // left starts itself anew, and so does one that hung when it is let go on.
    for (rank, fault) in
        [("d.1", Fault::Killed), ("d.0", Fault::Killed), ("d.1", Fault::Resumed), ("d.0", Fault::Hung)]
    {
        let what = format!("{rank}, {fault:?}");
        let mut body = long.clone();
        body["cache_salt"] = json!(what);
        let lost = parts.migrations("decode_lost").await;
        let mut stream = parts.complete_begin(&body).await;
        let mut got = tokens(&mut stream, 50).await;
        let anew = parts.log().matches(ANEW).count();
        match fault {
            Fault::Killed => {
                parts.kill(rank);
                parts.restart(rank);
            }
            Fault::Resumed | Fault::Hung => {
                let notices = parts.log().matches(SILENT).count();
                let begun = Instant::now();
                parts.signal(rank, libc::SIGSTOP);
                wait_for_line(&parts, SILENT, notices).await;
                let noticed = begun.elapsed();
                println!("{what}: noticed after {noticed:.1?}");
                assert!(noticed < NOTICE_MAX, "{what}: noticed after {noticed:?}");
                wait_for_line(&parts, ANEW, anew).await;
                if let Fault::Resumed = fault {
                    parts.signal(rank, libc::SIGCONT);
                } else {
                    parts.kill(rank);
                    parts.restart(rank);
                }
            }
        }
        got.extend(tokens(&mut stream, usize::MAX).await);
        agree(&format!("the answer beside {what}"), &wanted[asks.len()], &got);
        assert!(parts.migrations("decode_lost").await > lost, "{what} after its answer");
        // The log of a process that was killed is gone with it: this is the other rank's line.
        let others = parts.log().matches(ANEW).count();
        assert!(others > 0, "the rank beside {what} went on alone:\n{}", parts.log());
    }
}
