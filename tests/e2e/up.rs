//! Promise: one command serves a chat through router, prefill node and decode group; what dies comes back; Ctrl-C ends all.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use serde_json::{Value, json};

use crate::client::builder;
use crate::harness::{Cluster, baton, output, signal, text_of, wait_until_gone};

fn question() -> Value {
    json!({ "messages": [{ "role": "user", "content": "What is baton?" }], "max_tokens": 24, "temperature": 0 })
}

/// The answer is the same whether it is streamed or not, its prompt was computed by a prefill node, and `chat` and `status`
/// find the cluster.
#[tokio::test]
async fn serves() {
    let cluster = Cluster::up(&[]).await;
    assert!(!cluster.log().contains("WARN"), "a start worth a warning:\n{}", cluster.log());
    let answer = cluster.chat(question()).await;
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(!text.is_empty());
    assert!(answer["usage"]["completion_tokens"].as_u64().is_some_and(|n| (1..=24).contains(&n)), "{answer}");

    let events = cluster.chat_stream(question()).await;
    assert_eq!(text_of(&events), text);

    let (status, models) = cluster.get("/v1/models").await;
    assert!(status == 200 && models.contains("baton-demo"), "{models}");

    let port = cluster.port.to_string();
    let (ok, table, stderr) = output(&mut baton(&["status", "--up", &port]));
    assert!(ok && table.contains("prefill-0") && table.contains("decode-0"), "{table}{stderr}");
    let (ok, json, stderr) = output(&mut baton(&["status", "--json", "--up", &port]));
    assert!(ok, "{stderr}");
    let status: Value = serde_json::from_str(&json).expect("JSON");
    let nodes = status["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 2);
    assert_eq!(cluster.metric("baton_request_decisions_total", "decision=\"handoff\"").await, 2.0);
    assert_eq!(cluster.metric("baton_request_decisions_total", "decision=\"local\"").await, 0.0);

    let url = cluster.url("");
    let asked = ["chat", "--url", &url, "--temperature=0", "--max-tokens=24", "What is baton?"];
    let (ok, said, stderr) = output(&mut baton(&asked));
    assert!(ok, "{stderr}");
    assert_eq!(said.trim_end(), text.trim_end());
}

/// Whatever carries the cache, the answer is the same, and status says what carried it. Shared memory needs UCX: without it there
/// is TCP alone to ask for.
#[tokio::test]
async fn the_answer_is_the_same_whatever_carries_the_cache() {
    let mut answers = Vec::new();
    let ucx = kvtransfer::transport::ucx::available();
    assert!(ucx.is_ok() || std::env::var_os("BATON_NEEDS_UCX").is_none(), "{ucx:?}");
    let ways: &[(&str, &str)] =
        if ucx.is_ok() { &[("tcp", "tcp"), ("ucx", "shm")] } else { &[("tcp", "tcp")] };
    if let Err(why) = &ucx {
        println!("skipped: shared memory, {why}");
    }
    for (transport, way) in ways {
        let cluster = Cluster::up(&["--kv-transport", transport]).await;
        // The ends agree on a way while the first cache goes over the connection.
        for _ in 0..2 {
            let answer = cluster.chat(question()).await;
            answers.push(answer["choices"][0]["message"]["content"].clone());
        }
        let long = "What does a runner do with the baton? ".repeat(12);
        let body =
            json!({ "messages": [{ "role": "user", "content": long }], "max_tokens": 16, "temperature": 0 });
        answers.push(cluster.chat(body).await["choices"][0]["message"]["content"].clone());
        let port = cluster.port.to_string();
        let begun = std::time::Instant::now();
        loop {
            let (ok, table, stderr) = output(&mut baton(&["status", "--links", "--up", &port]));
            assert!(ok, "{stderr}");
            if table.lines().skip(1).any(|line| line.split_whitespace().any(|word| word == *way)) {
                break;
            }
            assert!(begun.elapsed() < crate::harness::PATIENCE, "{way} carried nothing:\n{table}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        assert_eq!(cluster.metric("baton_kv_fallbacks_total", "prefill-0").await, 0.0);
    }
    assert!(answers.chunks(3).all(|of| of == &answers[..3]), "{answers:?}");
}

/// A part that dies is started again and said so; then the cluster serves as before.
#[tokio::test]
async fn what_dies_comes_back() {
    let mut cluster = Cluster::up(&[]).await;
    let before = cluster.chat(question()).await["choices"][0]["message"]["content"].clone();
    for (killed, name) in ["prefill-0", "decode-0.1", "router"].into_iter().enumerate() {
        let pid = cluster.pid(name);
        cluster.kill(name);
        cluster.wait_for_line(&format!("{name} was killed by signal 9; starting it again")).await;
        wait_until_gone(&[pid]).await;
        wait_until_healthy(&cluster).await;
        let after = cluster.chat(question()).await["choices"][0]["message"]["content"].clone();
        assert_eq!(after, before, "after {} deaths", killed + 1);
    }
}

async fn wait_until_healthy(cluster: &Cluster) {
    let begun = std::time::Instant::now();
    let client = builder().build().expect("a client");
    loop {
        match client.get(cluster.url("/health")).send().await {
            Ok(answer) if answer.status().is_success() => return,
            _ => assert!(begun.elapsed() < crate::harness::PATIENCE, "not healthy again:\n{}", cluster.log()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn ctrl_c_stops_all() {
    let cluster = Cluster::up(&[]).await;
    let children = cluster.pids();
    assert_eq!(children.len(), 4);
    let port = cluster.port;
    let (status, log) = cluster.end(libc::SIGINT).await;
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("killed"), "a process had to be killed:\n{log}");
    wait_until_gone(&children).await;
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the port is free again");
}

/// Whose answer takes longer than `up` waits is told so; who comes while it waits is refused.
#[tokio::test]
async fn a_long_answer_is_cut_short_when_up_stops() {
    let cluster = Cluster::up(&["--tp=1"]).await;
    let mut body = question();
    (body["max_tokens"], body["ignore_eos"]) = (json!(4000), json!(true));
    let mut stream = cluster.chat_begin(body).await;
    stream.next().await.expect("an event");
    // However fast this machine is, it takes longer.
    let (port, decode) = (cluster.port, cluster.pid("decode-0.0"));
    signal(decode, libc::SIGSTOP);
    let ended = tokio::spawn(cluster.end(libc::SIGINT));
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
        assert!(!ended.is_finished(), "connections are taken to the end");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let mut last = Value::Null;
    while let Some(event) = stream.next().await {
        last = event;
    }
    let message = last["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("The server is stopping"), "{last}");
    signal(decode, libc::SIGCONT);
    assert!(ended.await.expect("ends").0.success());
}

/// Not even kill -9 of `up` leaves a process behind.
#[tokio::test]
async fn nothing_outlives_up() {
    let cluster = Cluster::up(&["--tp=1"]).await;
    let children = cluster.pids();
    assert_eq!(children.len(), 3);
    cluster.end(libc::SIGKILL).await;
    wait_until_gone(&children).await;
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let (ok, _, stderr) = output(&mut baton(&["up", "--port", &port.to_string()]));
    assert!(!ok);
    assert_eq!(stderr, format!("baton: port {port} is taken by another process: choose one with --port\n"));
}

/// A model that cannot be read ends `up` with the reason instead of a loop of restarts.
#[tokio::test]
async fn a_broken_model_ends_up() {
    let folder = crate::harness::folder("broken-model");
    std::fs::write(folder.join("config.json"), "{").expect("writes");
    let port = crate::harness::free_port().to_string();
    let (ok, _, stderr) =
        output(&mut baton(&["up", "--model", &folder.display().to_string(), "--port", &port]));
    assert!(!ok);
    assert!(stderr.contains("config.json"), "{stderr}");
    assert!(stderr.contains("before it served; stopping the others"), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    std::fs::remove_dir_all(folder).expect("cleans up");
}
