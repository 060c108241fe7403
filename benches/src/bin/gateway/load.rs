//! The clients: many streams at once, each token's arrival against its schedule; and requests one after the other on kept
//! connections, for what they cost. Plain sockets, so that the clients cost little themselves.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::mock::{MODEL, WORD, seed};

/// Connections of [`many`].
const CONNECTIONS: usize = 32;

/// A stream that is so much later than its schedule has failed.
const LATE_MAX: Duration = Duration::from_secs(60);

/// Tokens of a request of [`many`].
const TOKENS: u32 = 16;

/// What the streams of a run do.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// At once.
    pub streams: usize,
    /// Of each.
    pub tokens: u32,
    /// Seconds over which they begin, evenly; the first token is due so long after its request, so that all have
    /// begun when tokens come.
    pub ramp_s: f64,
    /// Between tokens.
    pub interval_ms: u64,
}

/// Seconds that tokens came after their schedule.
#[derive(Debug, Default)]
pub struct Late {
    /// First tokens.
    pub first: Vec<f64>,
    /// All others.
    pub others: Vec<f64>,
    /// Streams that broke off or came too late.
    pub failed: usize,
}

fn request(stream: bool, tokens: u32, seed: u64) -> Vec<u8> {
    let messages = json!([{"role": "user", "content": "What is a baton, and who carries it how far?"}]);
    let body =
        json!({"model": MODEL, "messages": messages, "stream": stream, "max_tokens": tokens, "seed": seed});
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer sk-bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    format!("{head}{body}").into_bytes()
}

/// All streams of a run.
pub async fn streams(port: u16, schedule: Schedule) -> Late {
    let first = Duration::from_secs_f64(schedule.ramp_s);
    let interval = Duration::from_millis(schedule.interval_ms);
    let begun = Instant::now() + Duration::from_millis(50);
    let mut all = JoinSet::new();
    for number in 0..schedule.streams {
        let at = begun + first.mul_f64(number as f64 / schedule.streams as f64);
        all.spawn(async move {
            sleep_until(at).await;
            let whole = first + interval * schedule.tokens + LATE_MAX;
            timeout(whole, one(port, schedule.tokens, first, interval)).await
        });
    }
    let mut late = Late::default();
    while let Some(ended) = all.join_next().await {
        match ended {
            Ok(Ok(Ok(times))) => {
                late.first.push(times[0]);
                late.others.extend_from_slice(&times[1..]);
            }
            _ => late.failed += 1,
        }
    }
    late
}

/// One stream: how late each token was.
async fn one(port: u16, tokens: u32, first: Duration, interval: Duration) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.set_nodelay(true)?;
    let asked = Instant::now();
    stream.write_all(&request(true, tokens, seed(first, interval))).await?;
    let (mut read, mut seen, mut times) = (Vec::with_capacity(8192), 0, Vec::with_capacity(tokens as usize));
    loop {
        let got = stream.read_buf(&mut read).await?;
        ensure!(got > 0, "the stream broke off: {}", String::from_utf8_lossy(&read));
        let now = Instant::now();
        // Heads name a server too.
        if seen == 0 {
            let Some(end) = find(&read, b"\r\n\r\n") else { continue };
            seen = end;
        }
        while let Some(at) = find(&read[seen..], WORD.as_bytes()) {
            seen += at + WORD.len();
            let due = asked + first + interval * times.len() as u32;
            times.push(now.saturating_duration_since(due).as_secs_f64());
        }
        if find(&read[seen..], b"[DONE]").is_some() {
            ensure!(times.len() == tokens as usize, "{} of {tokens} tokens came", times.len());
            return Ok(times);
        }
    }
}

/// Requests without streaming, answered at once.
pub async fn many(port: u16, requests: usize) -> Result<()> {
    let mut all = JoinSet::new();
    for number in 0..CONNECTIONS {
        let share = requests / CONNECTIONS + usize::from(number < requests % CONNECTIONS);
        all.spawn(async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
            stream.set_nodelay(true)?;
            let ask = request(false, TOKENS, 0);
            for _ in 0..share {
                stream.write_all(&ask).await?;
                answer(&mut stream).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    Ok(())
}

/// Reads one answer with a length.
async fn answer(stream: &mut TcpStream) -> Result<()> {
    let mut read = Vec::with_capacity(2048);
    loop {
        ensure!(stream.read_buf(&mut read).await? > 0, "the answer broke off");
        let Some(end) = find(&read, b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&read[..end]).to_ascii_lowercase();
        ensure!(head.contains(" 200 "), "refused: {}", String::from_utf8_lossy(&read));
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.context("no length")?.trim().parse()?;
        while read.len() < end + 4 + length {
            ensure!(stream.read_buf(&mut read).await? > 0, "the answer broke off");
        }
        return Ok(());
    }
}

fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len()).position(|window| window == needle)
}
