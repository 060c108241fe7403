//! The router's HTTP side as a client sees it. Called by `chat` and `up`.

use std::collections::VecDeque;

use anyhow::{Context, Result, bail};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};

/// Longest event of a stream that is taken in; the router's are a few hundred bytes.
const EVENT_BYTES_MAX: usize = 1 << 20;

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
    /// A client of the server at `url`, with or without `/v1` at its end.
    pub fn new(url: &str, key: Option<String>) -> Result<Self> {
        let url = url.trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url).to_owned();
        if !url.starts_with("http://") {
            bail!("{url}: expected http://host:port");
        }
        let client = Client::builder().no_proxy().build().context("no HTTP client")?;
        Ok(Api { client, url, key })
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
        Ok(Answer { response: self.send(request).await?, events: Events::default() })
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.map_err(|error| {
            let why = if error.is_connect() {
                "nobody answers there (is `baton up` running?)"
            } else {
                "no answer"
            };
            anyhow::anyhow!("{}: {why}", self.url)
        })?;
        if response.status().is_success() { Ok(response) } else { bail!("{}", error_message(response).await) }
    }
}

/// What a refusal says: the message of the OpenAI error envelope, else the status.
pub async fn error_message(response: Response) -> String {
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    let body: Option<Value> = serde_json::from_str(&text).ok();
    let message = body.as_ref().and_then(|body| body["error"]["message"].as_str());
    message.map_or_else(|| status.to_string(), str::to_owned)
}

/// An answer on its way. Dropping it cancels the request.
pub struct Answer {
    response: Response,
    events: Events,
}

impl Answer {
    /// The next piece of text; `None` at the end. Errors when the server gives up, or the stream ends early.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            while let Some(event) = self.events.next() {
                if event == "[DONE]" {
                    return Ok(None);
                }
                let event: Value = serde_json::from_str(&event).context("the server's event is not JSON")?;
                if let Some(message) = event["error"]["message"].as_str() {
                    bail!("{message}");
                }
                if let Some(text) = event["choices"][0]["delta"]["content"].as_str().filter(|t| !t.is_empty())
                {
                    return Ok(Some(text.into()));
                }
            }
            match self.response.chunk().await.context("the answer broke off")? {
                Some(bytes) => self.events.push(&bytes)?,
                None => bail!("the answer broke off"),
            }
        }
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
