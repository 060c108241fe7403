//! The router's HTTP side as a client sees it. Called by `chat`, `batch` and `up`.

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cluster::small_file::{self, TEXT_BYTES_MAX};
use futures::stream::{self, StreamExt};
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::{certificate, dirs};

/// Longest event of a stream that is taken in; the router's are a few hundred bytes.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// Read from the disk and sent at once.
const PIECE_BYTES: usize = 256 << 10;

/// Which server, and how it is trusted.
#[derive(Clone, Debug, clap::Args)]
pub struct Server {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8000", env = "BATON_URL")]
    url: String,
    /// API key, if the server asks for one
    #[arg(long, value_name = "KEY", env = "BATON_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Certificate to trust for https, in PEM [default: this machine's own of --tls-self-signed, and the system's]
    #[arg(long, value_name = "FILE", env = "BATON_CA")]
    ca: Option<PathBuf>,
}

impl Server {
    /// Its client.
    pub fn api(&self) -> Result<Api> {
        Api::new(&self.url, self.api_key.clone(), self.ca.as_deref())
    }

    /// As the user wrote it.
    pub fn url(&self) -> &str {
        &self.url
    }
}

/// An OpenAI-style server.
pub struct Api {
    client: Client,
    /// Without a slash at the end.
    url: String,
    key: Option<String>,
}

/// What the model may do with one answer.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// 0: always the likeliest token; the server's default when `None`.
    pub temperature: Option<f32>,
    /// The server's default when `None`.
    pub max_tokens: Option<u32>,
}

impl Api {
    /// A client of the server at `url`, with or without `/v1` at its end. `ca`: the only certificate that is trusted for https.
    pub fn new(url: &str, key: Option<String>, ca: Option<&Path>) -> Result<Self> {
        let url = url.trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url).to_owned();
        let mut builder = Client::builder().no_proxy();
        if url.starts_with("https://") {
            let own = dirs::data().map(|dir| dir.join(certificate::FILE)).ok().filter(|path| path.exists());
            builder = match (ca, own) {
                (Some(path), _) => builder.tls_certs_only(certificates(path)?),
                (None, Some(path)) => builder.tls_certs_merge(certificates(&path)?),
                (None, None) => builder,
            };
        } else if !url.starts_with("http://") {
            bail!("{url}: expected http://host:port or https://host:port");
        }
        ensure!(
            key.iter().all(|key| key.bytes().all(|byte| byte.is_ascii_graphic())),
            "the API key has characters that no key has, such as a space or an end of line"
        );
        let client = builder.build().context("no HTTP client")?;
        Ok(Api { client, url, key })
    }

    /// Where it is, without `/v1`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What is at `path`.
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.try_get(path).await.map_err(|(_, error)| error)
    }

    /// As [`Api::get`]; the error comes with the server's status, if it answered.
    pub async fn try_get(&self, path: &str) -> Result<Value, (Option<StatusCode>, anyhow::Error)> {
        self.json(self.client.get(format!("{}{path}", self.url))).await
    }

    /// The answer to `body` at `path`.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.try_post(path, body).await.map_err(|(_, error)| error)
    }

    /// As [`Api::post`]; the error comes with the server's status, if it answered.
    pub async fn try_post(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<Value, (Option<StatusCode>, anyhow::Error)> {
        self.json(self.client.post(format!("{}{path}", self.url)).json(body)).await
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, (Option<StatusCode>, anyhow::Error)> {
        let none = |error: anyhow::Error| (None, error);
        let response = self.answer(request).await.map_err(none)?;
        let status = response.status();
        if !status.is_success() {
            return Err((Some(status), refusal(response).await));
        }
        response.json().await.context("the server's answer is not JSON").map_err(none)
    }

    /// Uploads a file for a batch: its id there.
    pub async fn upload(&self, path: &Path) -> Result<String> {
        const BOUNDARY: &str = "baton-2c1d9a4e7f3b4c0f8e5a6d7b9c0e1f2a";
        let at = || format!("cannot read {}", path.display());
        let mut file = tokio::fs::File::open(path).await.with_context(at)?;
        let bytes = file.metadata().await.with_context(at)?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().replace('"', "%22");
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--{BOUNDARY}\r\n\
             Content-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: application/jsonl\r\n\r\n"
        );
        let tail = format!("\r\n--{BOUNDARY}--\r\n");
        let length = head.len() as u64 + bytes + tail.len() as u64;
        file.set_max_buf_size(PIECE_BYTES);
        // A file that grows meanwhile must not.
        let content = stream::try_unfold(file.take(bytes), |mut file| async move {
            let mut piece = vec![0; PIECE_BYTES];
            let read = file.read(&mut piece).await?;
            piece.truncate(read);
            Ok::<_, std::io::Error>((read > 0).then_some((piece, file)))
        });
        let whole = |text: String| stream::once(async { Ok(text.into_bytes()) });
        let body = whole(head).chain(content).chain(whole(tail));
        let request = self
            .client
            .post(format!("{}/v1/files", self.url))
            .header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"))
            .header("content-length", length)
            .body(reqwest::Body::wrap_stream(body));
        let file: Value =
            self.send(request).await?.json().await.context("the server's answer is not JSON")?;
        Ok(file["id"].as_str().context("the server's file has no id")?.to_owned())
    }

    /// Writes what is at `path` to `to`, as it comes.
    pub async fn download(&self, path: &str, to: &mut impl Write) -> Result<()> {
        let mut response = self.send(self.client.get(format!("{}{path}", self.url))).await?;
        while let Some(piece) = response.chunk().await.context("the download broke off")? {
            to.write_all(&piece).context("cannot write the answers")?;
        }
        to.flush().context("cannot write the answers")
    }

    /// The first model that the server names.
    pub async fn model(&self) -> Result<String> {
        let answer = self.send(self.client.get(format!("{}/v1/models", self.url))).await?;
        let models: Value = answer.json().await.context("list of models")?;
        match models["data"][0]["id"].as_str() {
            Some(id) => Ok(id.into()),
            None => bail!("{} serves no model", self.url),
        }
    }

    /// Asks for an answer to `messages`, piece by piece.
    pub async fn chat(&self, model: &str, messages: &[Value], choice: &Choice) -> Result<Answer> {
        let mut body = json!({ "model": model, "messages": messages, "stream": true });
        if let Some(temperature) = choice.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(tokens) = choice.max_tokens {
            body["max_tokens"] = json!(tokens);
        }
        let request = self.client.post(format!("{}/v1/chat/completions", self.url)).json(&body);
        Ok(Answer {
            response: self.send(request).await?,
            events: Events::default(),
            pieces: VecDeque::new(),
            is_cut: false,
        })
    }

    /// An answer that is no refusal.
    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let response = self.answer(request).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Response> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        request.send().await.map_err(|error| {
            let mut causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
            let last = causes.by_ref().last().map(ToString::to_string).unwrap_or_default();
            if last.contains("certificate") {
                // No other file makes a certificate one of another name.
                let help = if last.contains("not valid for name") { "" } else { ": give --ca FILE" };
                return anyhow::anyhow!("{}: not trusted ({last}){help}", self.url);
            }
            let why = if last.contains("InvalidContentType") {
                "no TLS there: try http://".into()
            } else if last.contains("invalid HTTP version") {
                "no plain HTTP there: try https://".into()
            } else if error.is_connect() {
                "nobody answers there (is `baton up` running?)".into()
            } else {
                format!("no answer ({last})")
            };
            anyhow::anyhow!("{}: {why}", self.url)
        })
    }
}

/// What a refusal says, and how a key is given where one is missing.
async fn refusal(response: Response) -> anyhow::Error {
    let help = match response.status() {
        StatusCode::UNAUTHORIZED => " (--api-key or BATON_API_KEY)",
        _ => "",
    };
    anyhow::anyhow!("{}{help}", error_message(response).await)
}

fn certificates(path: &Path) -> Result<Vec<Certificate>> {
    let pem = small_file::bytes(path, TEXT_BYTES_MAX);
    let pem = pem.with_context(|| format!("cannot read {}", path.display()))?;
    let all = Certificate::from_pem_bundle(&pem).with_context(|| path.display().to_string())?;
    ensure!(!all.is_empty(), "{} has no certificate in PEM", path.display());
    Ok(all)
}

/// What a refusal says: the message of the OpenAI error envelope, else the status.
pub async fn error_message(response: Response) -> String {
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    let body: Option<Value> = serde_json::from_str(&text).ok();
    let message = body.as_ref().and_then(|body| body["error"]["message"].as_str());
    message.map_or_else(|| status.to_string(), str::to_owned)
}

/// What an answer is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Of the reasoning before the answer.
    Thought(String),
    /// Of the answer itself.
    Text(String),
}

/// An answer on its way. Dropping it cancels the request.
pub struct Answer {
    response: Response,
    events: Events,
    pieces: VecDeque<Piece>,
    is_cut: bool,
}

impl Answer {
    /// The next piece; `None` at the end. Errors when the server gives up, or the stream ends early.
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Ok(Some(piece));
            }
            if let Some(event) = self.events.next() {
                if event == "[DONE]" {
                    return Ok(None);
                }
                let event: Value = serde_json::from_str(&event).context("the server's event is not JSON")?;
                if let Some(message) = event["error"]["message"].as_str() {
                    bail!("{message}");
                }
                let choice = &event["choices"][0];
                self.is_cut |= choice["finish_reason"] == "length";
                let text = |name: &str| {
                    choice["delta"][name].as_str().filter(|text| !text.is_empty()).map(str::to_owned)
                };
                self.pieces.extend(text("reasoning_content").map(Piece::Thought));
                self.pieces.extend(text("content").map(Piece::Text));
                continue;
            }
            match self.response.chunk().await.context("the answer broke off")? {
                Some(bytes) => self.events.push(&bytes)?,
                None => bail!("the answer broke off"),
            }
        }
    }

    /// It ended for lack of room.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }
}

/// Server-sent events out of a stream of bytes, cut anywhere.
#[derive(Default)]
struct Events {
    /// The line that has not ended yet.
    line: Vec<u8>,
    /// Data lines of the event that has not ended yet, joined.
    data: Option<String>,
    ready: VecDeque<String>,
}

impl Events {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() + self.data.as_ref().map_or(0, String::len) > EVENT_BYTES_MAX {
                    bail!("an event of more than {EVENT_BYTES_MAX} bytes");
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(&line)).into_owned();
            if line.is_empty() {
                self.ready.extend(self.data.take());
            } else if let Some(data) = line.strip_prefix("data:") {
                let data = data.strip_prefix(' ').unwrap_or(data);
                match &mut self.data {
                    Some(so_far) => so_far.extend(["\n", data]),
                    None => self.data = Some(data.into()),
                }
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Option<String> {
        self.ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The network cuts the stream anywhere, also within a character; the events are the same.
    #[test]
    fn events_from_any_cut() {
        let stream = ": hello\r\ndata: {\"a\": \"\u{1f680}\"}\r\n\r\ndata: one\ndata:two\n\ndata: [DONE]\n\ndata: unfinished";
        let expected = ["{\"a\": \"\u{1f680}\"}", "one\ntwo", "[DONE]"];
        for size in 1..stream.len() {
            let mut events = Events::default();
            for part in stream.as_bytes().chunks(size) {
                events.push(part).expect("small events");
            }
            let all: Vec<_> = std::iter::from_fn(|| events.next()).collect();
            assert_eq!(all, expected, "cut every {size} bytes");
        }
    }

    /// A server that never ends its line cannot fill the memory.
    #[test]
    fn events_are_bounded() {
        let mut events = Events::default();
        let part = vec![b'x'; EVENT_BYTES_MAX];
        assert!(events.push(&part).is_ok());
        assert!(events.push(&part).is_err());
    }
}
