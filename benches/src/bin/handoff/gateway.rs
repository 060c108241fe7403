//! The router alone: real HTTP, real tokenizer and template, and an engine that answers at once, so that all of the time
//! is the gateway's, the client's and loopback's.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster::Shutdown;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use router::inference::{
    FinishReason, Finished, GenerateRequest, Inference, Load, Started, Token, TokenEvent, TokenStream,
};
use router::text::Tokenizer;
use router::{GatewayConfig, serve};
use serde::{Deserialize, Serialize};

/// The bundled model's text files.
const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo/weights");

/// Requests; the first tenth is not counted.
const REQUESTS: usize = 300;

/// Tokens of the mock's answers.
const ANSWER: u32 = 16;

/// Milliseconds.
#[derive(Debug, Serialize, Deserialize)]
pub struct GatewayTimes {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Rendering nothing, encoding the prompt alone.
    pub tokenize: f64,
    /// From sending a request to its first event: median and 99th percentile.
    pub first: [f64; 2],
    /// The same with a prompt of a few tokens: what is left is HTTP and the gateway's own work.
    pub first_short: [f64; 2],
}

/// Measures with a prompt of about `prompt` tokens.
pub async fn measure(prompt: u32) -> Result<GatewayTimes> {
    let dir = Path::new(TEXT);
    let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
    let sentence = "The quick brown fox jumps over the lazy dog. ";
    let per_sentence = tokenizer.encode(&sentence.repeat(8), false)?.len() as f64 / 8.0;
    let text = sentence.repeat(((f64::from(prompt) / per_sentence) as usize).max(1));
    let mut encodes = Vec::new();
    let mut tokens = 0;
    for _ in 0..20 {
        let begun = Instant::now();
        tokens = tokenizer.encode(&text, false)?.len();
        encodes.push(begun.elapsed());
    }

    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.context("no port")?;
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().context("no port")?);
    let stop = Shutdown::new();
    let config = GatewayConfig::new(dir, "mock", tokens + 4096);
    let serving = tokio::spawn(serve(listener, config, Arc::new(AtOnce), stop.clone()));
    let first = requests(&url, &text).await?;
    let first_short = requests(&url, "Hello.").await?;
    stop.cancel();
    serving.await.context("gateway")??;
    let tokenize = quantiles(&mut encodes)[0];
    Ok(GatewayTimes { prompt: tokens, tokenize, first, first_short })
}

async fn requests(url: &str, content: &str) -> Result<[f64; 2]> {
    // The client wants one, though it speaks HTTP only.
    _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::new();
    let body = serde_json::json!({
        "model": "mock", "messages": [{"role": "user", "content": content}], "stream": true, "max_tokens": ANSWER
    });
    let mut firsts = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let begun = Instant::now();
        let response = client.post(url).json(&body).send().await?.error_for_status()?;
        let mut chunks = response.bytes_stream();
        chunks.next().await.context("an empty answer")??;
        firsts.push(begun.elapsed());
        while let Some(chunk) = chunks.next().await {
            chunk?;
        }
    }
    Ok(quantiles(&mut firsts[REQUESTS / 10..]))
}

/// Median and 99th percentile in milliseconds.
fn quantiles(values: &mut [Duration]) -> [f64; 2] {
    values.sort();
    [values[values.len() / 2], values[values.len() * 99 / 100]].map(|d| d.as_secs_f64() * 1e3)
}

/// A cluster that answers every prompt at once with the same tokens.
struct AtOnce;

impl Inference for AtOnce {
    fn generate(&self, request: GenerateRequest) -> TokenStream {
        let tokens = request.max_tokens.min(ANSWER);
        let token = |index| {
            TokenEvent::Token(Token {
                index,
                id: 300 + index,
                logprob: None,
                top: Vec::new(),
                predicted: false,
            })
        };
        let finished = TokenEvent::Finished(Finished { reason: FinishReason::Length, output_tokens: tokens });
        let started = TokenEvent::Started(Started::default());
        let all: Vec<_> =
            std::iter::once(started).chain((0..tokens).map(token)).chain([finished]).map(Ok).collect();
        stream::iter(all).boxed()
    }

    fn health(&self) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }

    fn load(&self) -> Load {
        Load::default()
    }
}
