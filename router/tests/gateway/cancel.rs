//! What happens when a client or the server goes away.

use std::time::Duration;

use futures::StreamExt;
use router::inference::FinishReason;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::mock::{Gateway, PATIENCE, Step, config, finished, says, started, token};

fn endless() -> Vec<Step> {
    vec![started(), token(0, 40), Step::Wait, token(1, 41), finished(FinishReason::Length, 2)]
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_its_sequences() {
    let mut gateway = Gateway::new(|_| endless()).await;
    let body = json!({"prompt": "x", "stream": true, "n": 2});
    let response = gateway.post("/v1/completions", &body).await;
    let mut chunks = response.bytes_stream();
    chunks.next().await.unwrap().unwrap();
    drop(chunks);
    assert!(!gateway.gone().await.1);
    assert!(!gateway.gone().await.1);
    // The meters of the sequences are dropped with them.
    let metrics = gateway.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("finished_reason=\"abort\"} 2"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_cancels_it() {
    let mut gateway = Gateway::new(|_| vec![Step::Wait]).await;
    let body = r#"{"model": "tiny", "prompt": "x"}"#;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut connection = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
    connection.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    tokio::time::timeout(PATIENCE, async {
        while gateway.cluster.seen.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the request arrives");
    drop(connection);
    assert!(!gateway.gone().await.1);
}

#[tokio::test]
async fn tokens_leave_when_they_come() {
    let gateway = Gateway::new(|_| endless()).await;
    let response = gateway.post("/v1/completions", &json!({"prompt": "x", "stream": true})).await;
    let mut chunks = response.bytes_stream();
    let first = chunks.next().await.unwrap().unwrap();
    assert!(first.starts_with(b"data: ") && !first.ends_with(b"[DONE]\n\n"), "{first:?}");
    gateway.go();
    let mut rest = Vec::new();
    while let Some(chunk) = chunks.next().await {
        rest.extend_from_slice(&chunk.unwrap());
    }
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_shutdown_lets_running_requests_end_and_takes_no_new_ones() {
    let gateway = Gateway::new(|_| endless()).await;
    let response = gateway.post("/v1/completions", &json!({"prompt": "x", "stream": true})).await;
    gateway.shutdown.cancel();
    let address = gateway.url.trim_start_matches("http://").to_string();
    tokio::time::timeout(PATIENCE, async { while TcpStream::connect(&address).await.is_ok() {} })
        .await
        .expect("no new connections");
    gateway.go();
    let text = response.text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    tokio::time::timeout(PATIENCE, gateway.served).await.expect("it ends").unwrap().unwrap();
}

/// Protects: whose answer takes longer than a shutdown waits is told so, in a stream and in place of a whole answer.
#[tokio::test]
async fn what_does_not_end_after_a_shutdown_is_cut_short() {
    let mut config = config();
    config.limits.drain = Duration::from_millis(100);
    let mut gateway = Gateway::with(config, |_| endless()).await;
    let stream = gateway.post("/v1/completions", &json!({"prompt": "x", "stream": true})).await;
    let whole = gateway.client.post(format!("{}/v1/completions", gateway.url));
    let whole = tokio::spawn(whole.json(&json!({"model": "tiny", "prompt": "x"})).send());
    while gateway.cluster.seen.lock().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    gateway.shutdown.cancel();
    assert!(!gateway.gone().await.1);
    let text = stream.text().await.unwrap();
    assert!(text.contains("The server is stopping") && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert_eq!(whole.await.unwrap().unwrap().status(), 503);
    tokio::time::timeout(PATIENCE, gateway.served).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn a_slow_head_does_not_hold_a_connection_for_ever() {
    let mut config = config();
    config.limits.head_read = Duration::from_millis(50);
    let gateway = Gateway::with(config, |_| says("x")).await;
    let mut connection = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
    connection.write_all(b"GET /live HTTP/1.1\r\nhost: ").await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, connection.read_to_end(&mut answer)).await.expect("it is closed").unwrap();
}

/// Protects: a client that asks for a stream and then reads nothing of it is cut off, and what it had in the cluster is freed.
#[tokio::test]
async fn a_client_that_reads_no_more_is_cut_off() {
    let mut config = config();
    config.limits.write_stall = Duration::from_millis(200);
    // More than the sockets of both sides hold.
    let mut gateway = Gateway::with(config, |_| {
        std::iter::once(started()).chain((0..200_000).map(|i| token(i, 40))).collect()
    })
    .await;
    let body = r#"{"model": "tiny", "prompt": "x", "stream": true}"#;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address = gateway.url.trim_start_matches("http://").parse().unwrap();
    let mut connection = socket.connect(address).await.unwrap();
    connection.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    assert!(!gateway.gone().await.1, "it was not sent to its end");
}

/// Protects: a client that begins a body and does not go on gets an answer and loses its connection.
#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let mut config = config();
    config.limits.body_read = Duration::from_millis(50);
    let gateway = Gateway::with(config, |_| says("x")).await;
    let mut connection = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, connection.read_to_string(&mut answer)).await.expect("an answer").unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("request_timeout"), "{answer}");
}
