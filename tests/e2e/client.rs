//! An HTTP client of one router, as its users are.

use serde_json::{Value, json};

use crate::harness::PATIENCE;

/// Name under which the tests serve the bundled model.
pub const MODEL: &str = "baton-demo";

/// A client of the router on this port.
pub struct Client {
    /// Where the router serves HTTP, on 127.0.0.1.
    pub port: u16,
    http: reqwest::Client,
}

impl Client {
    /// Of a router that need not be there yet.
    pub fn new(port: u16) -> Client {
        Client { port, http: builder().build().expect("a client") }
    }

    /// As [`Client::new`], with a connection of its own for every request.
    pub fn without_pool(port: u16) -> Client {
        let http = builder().pool_max_idle_per_host(0).build();
        Client { port, http: http.expect("a client") }
    }

    /// Address of `path` on the router.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// GET: status and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let answer = self.http.get(self.url(path)).timeout(PATIENCE).send().await.expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    }

    /// GET: whether the answer is one of success; false while nobody answers.
    pub async fn is_ok(&self, path: &str) -> bool {
        let answer = self.http.get(self.url(path)).timeout(PATIENCE).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// POST of JSON, answered with JSON.
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.post_text(path, body.to_string()).await
    }

    /// POST of anything said to be JSON, answered with JSON.
    pub async fn post_text(&self, path: &str, body: String) -> (u16, Value) {
        let request = self.http.post(self.url(path)).header("content-type", "application/json");
        let answer = request.body(body).timeout(PATIENCE).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    /// Uploads the input of a batch: status and answer.
    pub async fn upload(&self, content: &str) -> (u16, Value) {
        const BOUNDARY: &str = "------------------------0123456789abcdef";
        let part = |head: &str, body: &str| {
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n{body}\r\n")
        };
        let purpose = part("name=\"purpose\"", "batch");
        let file = part("name=\"file\"; filename=\"in.jsonl\"", content);
        let kind = format!("multipart/form-data; boundary={BOUNDARY}");
        let request = self.http.post(self.url("/v1/files")).header("content-type", kind);
        let body = format!("{purpose}{file}--{BOUNDARY}--\r\n");
        let answer = request.body(body).timeout(PATIENCE).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    /// Begins a batch of completions: status and answer.
    pub async fn begin_batch(&self, file: &str) -> (u16, Value) {
        let body =
            json!({ "input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h" });
        self.post("/v1/batches", &body).await
    }

    /// A batch as it is now.
    pub async fn batch(&self, id: &str) -> Value {
        let (status, text) = self.get(&format!("/v1/batches/{id}")).await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// A completion that must succeed: its only choice.
    pub async fn complete(&self, body: &Value) -> Value {
        let (status, answer) = self.post("/v1/completions", &with_model(body)).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0].clone()
    }

    /// A streamed completion that must be accepted, event by event. Dropping it cancels the request.
    pub async fn complete_begin(&self, body: &Value) -> EventStream {
        self.begin("/v1/completions", body).await
    }

    /// As [`Client::complete_begin`], on any path.
    pub async fn begin(&self, path: &str, body: &Value) -> EventStream {
        let mut body = with_model(body);
        body["stream"] = json!(true);
        let mut response = self.http.post(self.url(path)).json(&body).send().await.expect("an answer");
        if response.status() != 200 {
            panic!("{}: {:?}", response.status(), response.chunk().await);
        }
        EventStream { response, text: String::new(), bytes: Vec::new() }
    }

    /// Sum of a metric over its label sets that contain `label` (empty: all); 0 when there is none.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        let (status, text) = self.get("/metrics").await;
        assert_eq!(status, 200);
        let value = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, labels) = series.split_once('{').unwrap_or((series, ""));
            (found == name && labels.contains(label)).then(|| value.parse::<f64>().expect("a number"))
        };
        text.lines().filter_map(value).sum()
    }

    /// Requests that went on elsewhere, or again, by this cause (empty: all).
    pub async fn migrations(&self, cause: &str) -> f64 {
        self.metric("baton_migrations_by_cause_total", &format!("cause=\"{cause}")).await
    }
}

/// What HTTP clients are made of.
pub fn builder() -> reqwest::ClientBuilder {
    // The first one's holds for all.
    _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy()
}

/// The request with the model's name where it has none.
pub fn with_model(body: &Value) -> Value {
    let mut body = body.clone();
    if body.get("model").is_none() {
        body["model"] = json!(MODEL);
    }
    body
}

/// Events of a streamed completion.
pub struct EventStream {
    response: reqwest::Response,
    text: String,
    bytes: Vec<u8>,
}

impl EventStream {
    /// The next event; `None` after `[DONE]`. A stream that ends without it fails the test.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let event: String = self.text.drain(..end + 2).collect();
                match event.trim().strip_prefix("data: ") {
                    Some("[DONE]") => return None,
                    Some(data) => return Some(serde_json::from_str(data).expect("JSON in an event")),
                    None => continue,
                }
            }
            let chunk =
                self.response.chunk().await.expect("the stream goes on").expect("[DONE] before the end");
            self.bytes.extend_from_slice(&chunk);
            // A cut within a character waits for its rest.
            let whole = match std::str::from_utf8(&self.bytes) {
                Ok(text) => text.len(),
                Err(error) => error.valid_up_to(),
            };
            self.text.push_str(&String::from_utf8_lossy(&self.bytes[..whole]));
            self.bytes.drain(..whole);
        }
    }
}

/// What a streamed completion with log probabilities has said so far.
#[derive(Debug, Default, PartialEq)]
pub struct Said {
    /// Text of all events.
    pub text: String,
    /// (token, log probability) of each token; bits, for they are shown in the shortest form that is exact.
    pub tokens: Vec<(Value, Value)>,
    /// Why it ended.
    pub finish: Option<Value>,
}

impl Said {
    /// Reads on until `count` tokens were said in all, or to the end.
    pub async fn read(&mut self, stream: &mut EventStream, count: usize) {
        while self.tokens.len() < count {
            let Some(event) = stream.next().await else { return };
            assert!(event.get("error").is_none(), "after {} tokens: {event}", self.tokens.len());
            let choice = &event["choices"][0];
            self.text.push_str(choice["text"].as_str().unwrap_or_default());
            let list = |name: &str| choice["logprobs"][name].as_array().cloned().unwrap_or_default();
            self.tokens.extend(list("tokens").into_iter().zip(list("token_logprobs")));
            if !choice["finish_reason"].is_null() {
                self.finish = Some(choice["finish_reason"].clone());
            }
        }
    }

    /// A whole stream.
    pub async fn all(mut stream: EventStream) -> Said {
        let mut said = Said::default();
        said.read(&mut stream, usize::MAX).await;
        said
    }

    /// Fails with the first token that differs.
    pub fn assert_same(&self, wanted: &Said, what: &str) {
        let differ = |i: &usize| self.tokens.get(*i) != wanted.tokens.get(*i);
        let most = self.tokens.len().max(wanted.tokens.len());
        if let Some(i) = (0..most).find(differ) {
            let (got, wanted) = (self.tokens.get(i), wanted.tokens.get(i));
            panic!("{what}: token {i} of {most} is {got:?}, not {wanted:?}");
        }
        assert_eq!(self, wanted, "{what}");
    }
}
