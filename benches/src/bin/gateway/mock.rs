//! The mock engine: tokens by a schedule, whatever the prompt. Behind the router as its `Inference`, and over HTTP as a server
//! with OpenAI's interface for gateways that want one. A request's `seed` says how: 0 tells all at once, else the first token
//! after `seed >> 32` ms and the others every `seed & 0xffff_ffff` ms.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster::Shutdown;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use router::inference::{
    FinishReason, Finished, GenerateRequest, Inference, Load, Started, Token, TokenEvent, TokenStream,
};
use router::text::Tokenizer;
use router::{GatewayConfig, serve};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};

/// The text of every token; nothing else in an answer has it.
pub const WORD: &str = "server";

/// The served name.
pub const MODEL: &str = "mock";

/// The bundled model's text files.
const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo/weights");

/// The seed of a schedule.
pub fn seed(first: Duration, interval: Duration) -> u64 {
    ((first.as_millis() as u64) << 32) | (interval.as_millis() as u64 & 0xffff_ffff)
}

/// When token `index` is due.
fn due(begun: Instant, seed: u64, index: u32) -> Instant {
    begun + Duration::from_millis(seed >> 32) + Duration::from_millis(seed & 0xffff_ffff) * index
}

struct Mock {
    token: u32,
}

impl Inference for Mock {
    fn generate(&self, request: GenerateRequest) -> TokenStream {
        let (begun, seed, tokens, id) =
            (Instant::now(), request.sampling.seed, request.max_tokens, self.token);
        let body = stream::iter(0..tokens).then(move |index| async move {
            if seed != 0 {
                sleep_until(due(begun, seed, index)).await;
            }
            Ok(TokenEvent::Token(Token { index, id, logprob: None, top: Vec::new(), predicted: false }))
        });
        let finished = TokenEvent::Finished(Finished { reason: FinishReason::Length, output_tokens: tokens });
        stream::iter([Ok(TokenEvent::Started(Started::default()))])
            .chain(body)
            .chain(stream::iter([Ok(finished)]))
            .boxed()
    }

    fn health(&self) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }

    fn load(&self) -> Load {
        Load::default()
    }
}

/// Serves the router, and says on which port.
pub async fn behind_the_router() -> Result<()> {
    let dir = Path::new(TEXT);
    let ids = Tokenizer::load(&dir.join("tokenizer.json"))?.encode(&format!(" {WORD}"), false)?;
    let [token] = ids[..] else { anyhow::bail!("the word is {} tokens", ids.len()) };
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no port")?;
    println!("{}", listener.local_addr()?.port());
    let config = GatewayConfig::new(dir, MODEL, 4096);
    Ok(serve(listener, config, Arc::new(Mock { token }), Shutdown::new()).await?)
}

/// Serves the mock itself, and says on which port.
pub async fn over_http() -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no port")?;
    println!("{}", listener.local_addr()?.port());
    loop {
        let (stream, _) = listener.accept().await?;
        _ = stream.set_nodelay(true);
        // A client that leaves is no news.
        tokio::spawn(async move { _ = connection(stream).await });
    }
}

async fn connection(stream: TcpStream) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut line, mut length) = (String::new(), 0);
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = text.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let begun = Instant::now();
        let (seed, tokens) =
            (body["seed"].as_u64().unwrap_or(0), body["max_tokens"].as_u64().unwrap_or(1) as u32);
        match body["stream"].as_bool() {
            Some(true) => events(stream.get_mut(), begun, seed, tokens).await?,
            _ => whole(stream.get_mut(), tokens).await?,
        }
    }
}

async fn whole(stream: &mut TcpStream, tokens: u32) -> Result<()> {
    let message = json!({"role": "assistant", "content": format!(" {WORD}").repeat(tokens as usize)});
    let body = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": tokens + 8},
    });
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    Ok(stream.write_all(format!("{head}{body}").as_bytes()).await?)
}

async fn events(stream: &mut TcpStream, begun: Instant, seed: u64, tokens: u32) -> Result<()> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let chunk = |delta: Value, finish: Value| {
        let data = json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
        let event = format!("data: {data}\n\n");
        format!("{:x}\r\n{event}\r\n", event.len())
    };
    stream.write_all(chunk(json!({"role": "assistant", "content": ""}), Value::Null).as_bytes()).await?;
    for index in 0..tokens {
        if seed != 0 {
            sleep_until(due(begun, seed, index)).await;
        }
        let text = format!(" {WORD}");
        stream.write_all(chunk(json!({"content": text}), Value::Null).as_bytes()).await?;
    }
    let done = "data: [DONE]\n\n";
    let end = format!("{}{:x}\r\n{done}\r\n0\r\n\r\n", chunk(json!({}), "length".into()), done.len());
    Ok(stream.write_all(end.as_bytes()).await?)
}
