//! The bench itself, in a size for every day: what it prints must hold together.

use std::process::Command;

use serde_json::Value;

/// A run over real processes gives every figure, and the bytes on the wire are exactly the prompt's cache.
#[test]
fn figures_hold_together() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/tiny.json");
    let output = Command::new(env!("CARGO_BIN_EXE_handoff"))
        .args([
            "--config",
            config,
            "--prompt=70",
            "--output=12",
            "--runs=2",
            "--tp=2",
            "--chunk=32",
            "--threads=1",
        ])
        .arg("--json")
        .output()
        .expect("the bench starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let measured: Value = serde_json::from_slice(&output.stdout).expect("JSON on standard output");
    // 4 layers x 2 planes x 4 heads x 16 elements x 2 bytes
    assert_eq!(measured["cluster"]["token_bytes"], 1024, "{measured}");
    assert_eq!(measured["cluster"]["kv_bytes"], 70 * 1024, "{measured}");
    assert_eq!(measured["cluster"]["handoff"].as_array().map(Vec::len), Some(2), "{measured}");
    for figure in
        ["prefill_tokens_per_s", "decode_tokens_per_s_handoff", "decode_tokens_per_s_local", "decode_ratio"]
    {
        assert!(
            measured["figures"][figure].as_f64().is_some_and(|value| value > 0.0),
            "{figure}: {measured}"
        );
    }
    for run in measured["cluster"]["handoff"].as_array().into_iter().flatten() {
        let of = |key: &str| run[key].as_f64().expect("a number");
        assert!(of("prefill") > 0.0 && of("prefill") <= of("ttft"), "prefill is a part of TTFT: {run}");
        assert!(of("first_step") > 0.0, "{run}");
    }
}
