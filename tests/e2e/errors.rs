//! Promise: what cannot be done is answered, or ends the command, with one line that names what is wrong; nothing panics.
//! Nodes that do not belong to a cluster: see `joining`. Settings: see `settings`.

use std::net::{Ipv4Addr, TcpListener};

use cluster::{ClusterToken, channel, connect_lazy};
use proto::v1::JoinRequest;
use serde_json::{Value, json};

use crate::client::{MODEL, Said};
use crate::harness::{baton, free_port, model, output};
use crate::parts::{Parts, TOKEN, ids};

/// Runs a role that cannot start; its last line must hold all of `parts`.
fn ends(role: &str, flags: &[&str], parts: &[&str]) {
    let mut command = baton(&[role, "--log=off"]);
    // Variables give way to flags.
    command.env("BATON_MODEL", model()).env("BATON_SERVED_NAME", MODEL).env("BATON_TOKEN", TOKEN).args(flags);
    let (ok, _, stderr) = output(&mut command);
    assert!(!ok, "{role} {flags:?} succeeded");
    assert!(stderr.starts_with("baton: ") && stderr.lines().count() == 1, "{role} {flags:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{role} {flags:?} does not say {part:?}: {stderr}");
    }
}

#[test]
fn taken_ports_are_named() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let flag = |name: &str| format!("--{name}=127.0.0.1:{port}");
    let free = format!("--cluster-bind=127.0.0.1:{}", free_port());
    ends("router", &[&format!("--port={port}"), &free], &["port taken", &port]);
    ends("router", &[&format!("--port={}", free_port()), &flag("cluster-bind")], &["port taken", &port]);
    ends("prefill", &[&flag("bind")], &["port taken", &port]);
    ends("decode", &[&flag("kv-bind")], &["kv port", &port, "in use"]);
    ends("decode", &["--tp=2", &flag("leader")], &["leader address", &port, "in use"]);
}

#[test]
fn what_a_model_or_machine_cannot_do_is_named() {
    ends("decode", &["--block-tokens=24"], &["block-tokens is 24: a power of two"]);
    ends("decode", &["--context=5000"], &["context of 5000 tokens", "4096"]);
    ends("decode", &["--kv-memory=1"], &["out of memory", "1 free"]);
    ends("decode", &["--threads=100000"], &["threads is 100000"]);
    ends(
        "decode",
        &["--tp=9", "--rank=8", "--leader=127.0.0.1:1"],
        &["9 tensor-parallel ranks", "there are 8"],
    );
    ends("prefill", &["--router=nowhere"], &["router address: `nowhere` is not an address"]);
    let file = concat!("--model=", env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    ends("router", &[file], &["Cargo.toml: neither a model's directory nor a GGUF file"]);
}

/// A rank that does not belong to its group ends; one leader is told of several.
#[tokio::test]
async fn a_rank_of_another_group_is_refused() {
    let mut parts = Parts::router(&[]);
    parts.decode("d", 1, &["--tp=2"]);
    let leader = parts.leader("d");
    let follow = |flags: &[&str], wanted: &[&str]| {
        let all: Vec<_> = ["--tp=2", "--rank=1", leader.as_str()].iter().chain(flags).copied().collect();
        ends("decode", &all, wanted);
    };
    follow(&["--dtype=f32"], &["refused by the leader", "f32", "bf16"]);
    follow(&["--block-tokens=16"], &["refused by the leader", "tokens per kv block", "32", "16"]);
    follow(&[&format!("--token={}", "0".repeat(64))], &["does not hold the cluster's token"]);
}

/// A node of another version of baton or of the protocol is told both.
#[tokio::test]
async fn another_version_is_refused() {
    let mut parts = Parts::router(&["--disaggregation=never"]);
    parts.decode("d", 1, &[]);
    parts.wait_until_ready(&["d.0"]).await;
    let token = ClusterToken::parse(TOKEN).expect("a token");
    let channel = connect_lazy(&parts.cluster(), &token).expect("an address");
    let join = |protocol: u32, version: &str| {
        let request =
            JoinRequest { name: "n".into(), protocol, version: version.into(), ..JoinRequest::default() };
        let mut client = channel::cluster_client(channel.clone());
        async move { client.join(request).await.expect_err("a refusal").message().to_owned() }
    };
    let (protocol, version) = (proto::PROTOCOL, env!("CARGO_PKG_VERSION"));
    let refusal = join(protocol + 1, version).await;
    let (theirs, ours) =
        (format!("protocol of node n is {}", protocol + 1), format!("router's is {protocol}"));
    assert!(refusal.contains(&theirs) && refusal.contains(&ours), "{refusal}");
    let refusal = join(protocol, "0.0.0").await;
    assert!(refusal.contains("version of node n is 0.0.0") && refusal.contains(version), "{refusal}");
}

/// Every refused request is answered in OpenAI's form, and none leaves anything behind.
#[tokio::test]
async fn refused_requests() {
    let mut parts = Parts::router(&["--disaggregation=always"]);
    parts.prefill("p", 1, &[]);
    // 2 MiB at 5 KiB per token: 384 tokens in whole blocks.
    parts.decode("d", 1, &["--kv-memory=2MiB"]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    let completions = "/v1/completions";
    let with = |name: &str, value: Value| {
        let mut body = json!({ "model": MODEL, "prompt": "Hi" });
        body[name] = value;
        body.to_string()
    };
    for (body, status, code, part) in [
        ("{\"prompt\": ".into(), 400, "invalid_json", "not valid JSON"),
        ("[]".into(), 400, "invalid_type", "an object"),
        (with("model", json!("gpt-9")), 404, "model_not_found", "'gpt-9'"),
        (with("prompt", json!(ids(1, 5_000))), 400, "context_length_exceeded", "5000 tokens"),
        (with("prompt", json!([1, -1])), 400, "invalid_value", "prompt[1]"),
        (with("prompt", json!({})), 400, "invalid_type", "prompt"),
        (with("max_tokens", json!("many")), 400, "invalid_type", "max_tokens"),
        (with("max_tokens", json!(4_096)), 400, "context_length_exceeded", "4096 tokens"),
        (with("temperature", json!(3)), 400, "invalid_value", "temperature"),
        (with("temprature", json!(1)), 400, "unknown_parameter", "temprature"),
        // Fits the model, but no store.
        (with("prompt", json!(ids(1, 1_000))), 400, "invalid_request", "takes 352 and an answer"),
    ] {
        let (got, answer) = parts.post_text(completions, body).await;
        let error = &answer["error"];
        assert_eq!((got, error["code"].as_str()), (status, Some(code)), "{answer}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(part)), "{answer}");
    }
    parts.wait_until_idle().await;
    assert_eq!(parts.metric("baton_placements_total", "").await, 0.0, "a refused request reached a node");
    // Each client knows; the log is for what the operator has to see.
    assert!(!parts.log().contains("request failed"), "{}", parts.log());
}

/// An answer that grows until its store is full ends there, as one that fills the context: by its length.
#[tokio::test]
async fn an_answer_larger_than_the_store_ends() {
    let mut parts = Parts::router(&["--disaggregation=always"]);
    parts.prefill("p", 1, &[]);
    parts.decode("d", 1, &["--kv-memory=2MiB"]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    let body = json!({
        "prompt": ids(6_000, 200), "max_tokens": 2_000, "ignore_eos": true, "temperature": 0, "logprobs": 0,
    });
    let said = Said::all(parts.complete_begin(&body).await).await;
    // 384 tokens of KV, and the last token needs none.
    assert_eq!((said.tokens.len(), said.finish), (384 - 200 + 1, Some(json!("length"))));
    parts.wait_until_idle().await;
}
