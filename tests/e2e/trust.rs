//! Promise: machines join by a token, talk over TLS with certificates of both ends, and whoever has none stays out.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use serde_json::json;

use crate::client::Said;
use crate::harness::{LOOK, PATIENCE, baton, free_port, model, output};
use crate::parts::{Parts, TOKEN, ids};

/// A whole cluster with certificates answers as it should; strangers are refused with a reason, and a token that is revoked lets
/// nobody in.
#[tokio::test]
async fn by_token_and_certificate() {
    let [grpc, kv, metrics] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
    let mut parts = Parts::certified(&["--disaggregation=always"]);
    let doors = [format!("--bind={grpc}"), format!("--kv-bind={kv}"), format!("--metrics-bind={metrics}")];
    parts.prefill("p", 1, &doors.each_ref().map(String::as_str));
    // Its ranks are on one machine, where links are in clear unless asked for.
    parts.decode("d", 2, &["--rank-encryption=always"]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    let body = json!({ "prompt": ids(1, 40), "max_tokens": 12, "temperature": 0, "ignore_eos": true, "logprobs": 0 });
    let choice = parts.complete(&body).await;
    assert_eq!(choice["finish_reason"], "length");
    // The same as one rank says that talks to nobody.
    let mut alone = Parts::router(&["--disaggregation=never"]);
    alone.decode("e", 1, &[]);
    alone.wait_until_ready(&["e.0"]).await;
    assert_eq!(choice, alone.complete(&body).await);
    drop(alone);

    // A node's own page counts who is turned away at its doors.
    for (door, address) in [("grpc", &grpc), ("kv", &kv)] {
        let mut stranger = TcpStream::connect(address).expect("a port of the node");
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("writes");
        let wanted = format!("door=\"{door}\",reason=\"not TLS\"}} 1");
        let begun = Instant::now();
        loop {
            let mut page = String::new();
            let mut reader = TcpStream::connect(&metrics).expect("the node's metrics");
            reader.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("writes");
            reader.read_to_string(&mut page).expect("a page");
            if page.lines().any(|line| line.starts_with("baton_refused_total{") && line.ends_with(&wanted)) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "no {wanted} in\n{page}");
            tokio::time::sleep(LOOK).await;
        }
    }

    // The KV cache travelled in TLS: who speaks something else on that port hears an alert, record type 21.
    let begun = Instant::now();
    let peer = loop {
        let nodes = parts.nodes();
        let prefill = nodes.iter().find(|node| node["name"] == "p.0").expect("the prefill node");
        if let Some(peer) = prefill["links"][0]["peer"].as_str() {
            break peer.to_owned();
        }
        assert!(begun.elapsed() < PATIENCE, "no link is reported: {nodes:?}");
        tokio::time::sleep(LOOK).await;
    };
    let mut stranger = TcpStream::connect(&peer).expect("the KV port");
    stranger.write_all(&[0; 64]).expect("writes");
    let mut heard = Vec::new();
    let _ = stranger.read_to_end(&mut heard);
    assert_eq!(heard.first(), Some(&21), "{heard:?}");

    let router = format!("--router={}", parts.cluster());
    let model = format!("--model={}", model().display());
    let refused = |token: &str, wanted: &str| {
        let token = format!("--token={}", token.trim());
        let (ok, _, stderr) = output(&mut baton(&["prefill", &model, &router, &token, "--log=off"]));
        let last = stderr.lines().last().unwrap_or_default().to_owned();
        assert!(!ok && last.starts_with("baton: ") && last.contains(wanted), "{stderr}");
    };
    let spare = parts.token(&["create", "spare"]);
    let list = parts.token(&["list"]);
    assert!(list.contains("nodes  active") && list.contains("spare  active"), "{list}");
    parts.token(&["revoke", "spare"]);
    refused(&spare, "wrong join token, or one that has expired or was revoked");
    // The right shape, another cluster's fingerprint.
    let (head, _) = spare.trim().rsplit_once('-').expect("a join token");
    refused(&format!("{head}-{}", "0".repeat(64)), "its certificate is of another cluster");
    // In clear: the router speaks TLS only.
    let (ok, _, stderr) = output(&mut baton(&["status", &router, &format!("--token={TOKEN}")]));
    assert!(!ok, "{stderr}");
    parts.wait_until_ready(&["p.0", "d.0"]).await;
}

/// A machine whose token is revoked is out in the middle of its work, and says why; who was served by it does not notice, and who
/// came in by another token stays.
#[tokio::test]
async fn a_revoked_machine_is_out() {
    let mut parts = Parts::certified(&["--disaggregation=always"]);
    let lent = parts.token_file("lent");
    parts.prefill("p", 1, &[&lent, "--chunk-tokens=128", "--step-tokens=128"]);
    parts.decode("d", 2, &["--rank-encryption=always"]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    let body = |salt: &str| {
        json!({
            "prompt": ids(7, 3_000), "max_tokens": 40, "temperature": 0, "ignore_eos": true, "logprobs": 0,
            "cache_salt": salt,
        })
    };
    let whole = Said::all(parts.complete_begin(&body("whole")).await).await;
    assert_eq!(whole.tokens.len(), 40);
    // One prompt after the other: while the first is answered, the others are still computed and sent.
    let mut streams = Vec::new();
    for salt in ["first", "second", "third", "fourth"] {
        streams.push(parts.complete_begin(&body(salt)).await);
    }
    let mut said = Said::default();
    said.read(&mut streams[0], 1).await;
    parts.token(&["revoke", "lent"]);
    let (ended, log) = parts.wait_for_end("p.0").await;
    let last = log.lines().last().unwrap_or_default();
    assert!(
        !ended.success() && last.ends_with("refused this node: the join token of this node was revoked"),
        "{log}"
    );
    said.read(&mut streams[0], usize::MAX).await;
    said.assert_same(&whole, "of the first");
    for stream in streams.drain(1..) {
        Said::all(stream).await.assert_same(&whole, "of the others");
    }
    let log = parts.log();
    assert!(log.contains("taken out: its join token was revoked"), "{log}");
    assert!(log.contains("a join token was revoked: who came in by it is cut off"), "{log}");
    // Another token lets the machine in again.
    parts.restart_with("p.0", &parts.token_file("again"));
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    assert_eq!(Said::all(parts.complete_begin(&body("again")).await).await.tokens, whole.tokens);
}
