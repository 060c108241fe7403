//! Promise: every process of a cluster can be restarted in turn while clients ask; none of their requests fails.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;

use crate::client::{Client, Said};
use crate::parts::{Parts, ids};

/// Clients that ask all the time.
const CLIENTS: u32 = 4;

/// Tokens of an answer.
const TOKENS: usize = 40;

#[tokio::test]
async fn no_request_fails() {
    // Whoever keeps the socket (`baton up`, systemd) outlives the router; this test does here.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let mut parts = Parts::router_on(listener, &["--drain=60"]);
    let nodes = ["p", "q", "d", "e"];
    for name in nodes {
        match name {
            "p" | "q" => parts.prefill(name, 1, &["--drain=60"]),
            _ => parts.decode(name, 1, &["--drain=60"]),
        }
    }
    let all: Vec<String> = nodes.iter().map(|name| format!("{name}.0")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    parts.wait_until_ready(&all).await;

    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = (0..CLIENTS).map(|number| {
        let (stop, answered, port) = (stop.clone(), answered.clone(), parts.port);
        tokio::spawn(async move {
            // A connection per request: what waits on one that is kept is the client's to try again.
            let client = Client::without_pool(port);
            for round in 0.. {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let prompt = ids(10_000 * number + 100 * round, 60);
                let body =
                    json!({ "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": true, "logprobs": 0 });
                let said = Said::all(client.complete_begin(&body).await).await;
                assert_eq!(said.tokens.len(), TOKENS, "client {number}, round {round}");
                answered.fetch_add(1, Ordering::Release);
            }
        })
    });
    let clients: Vec<_> = clients.collect();

    for name in all.iter().copied().chain(["router"]) {
        let before = answered.load(Ordering::Acquire);
        parts.signal(name, libc::SIGTERM);
        let (status, log) = parts.wait_for_end(name).await;
        assert!(status.success(), "{name}: {status}\n{log}");
        parts.restart(name);
        parts.wait_until_ready(&all).await;
        // The load goes on through every restart.
        while answered.load(Ordering::Acquire) <= before {
            assert!(clients.iter().all(|client| !client.is_finished()), "a client has failed");
            tokio::time::sleep(crate::harness::LOOK).await;
        }
    }
    stop.store(true, Ordering::Release);
    for client in clients {
        client.await.expect("no request fails");
    }
}
