//! A cluster that says what a test wants, and a gateway in front of it on a port of its own.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use router::batch::BatchConfig;
use router::inference::{
    Decision, FinishReason, Finished, GenerateRequest, Inference, InferenceError, Load, Served, Started,
    Timings, Token, TokenEvent, TokenStream,
};
use router::text::Tokenizer;
use router::{GatewayConfig, ServeError, serve};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Of every mock model.
pub const CONTEXT: usize = 600;

/// `<|im_end|>` of the fixture's tokenizer.
pub const END: u32 = 505;

/// A test that waits for longer than this has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a sequence does next.
#[derive(Debug, Clone)]
pub enum Step {
    /// Tells something.
    Event(TokenEvent),
    /// Fails.
    Fail(InferenceError),
    /// Goes on when the test says so with `Cluster::go`.
    Wait,
}

type Script = dyn Fn(&GenerateRequest) -> Vec<Step> + Send + Sync;

/// The mock cluster.
pub struct Cluster {
    script: Box<Script>,
    pub health: Mutex<Result<(), String>>,
    /// All requests that came, in order.
    pub seen: Mutex<Vec<GenerateRequest>>,
    dropped: mpsc::UnboundedSender<(String, bool)>,
    go: Arc<tokio::sync::Semaphore>,
}

/// Tells the test that its sequence is gone, and whether it had come to its end.
struct Gone(mpsc::UnboundedSender<(String, bool)>, String, bool);

impl Drop for Gone {
    fn drop(&mut self) {
        _ = self.0.send((std::mem::take(&mut self.1), self.2));
    }
}

impl Inference for Cluster {
    fn generate(&self, request: GenerateRequest) -> TokenStream {
        let steps = (self.script)(&request);
        let gone = Gone(self.dropped.clone(), request.id.clone(), false);
        self.seen.lock().unwrap().push(request);
        let state = (steps.into_iter(), gone, Arc::clone(&self.go));
        stream::unfold(state, |(mut steps, mut gone, go)| async move {
            loop {
                match steps.next() {
                    None => return None,
                    Some(Step::Wait) => go.acquire().await.unwrap().forget(),
                    Some(Step::Event(event)) => {
                        gone.2 = matches!(event, TokenEvent::Finished(_));
                        return Some((Ok(event), (steps, gone, go)));
                    }
                    Some(Step::Fail(error)) => return Some((Err(error), (steps, gone, go))),
                }
            }
        })
        .boxed()
    }

    fn health(&self) -> BoxFuture<'static, Result<(), String>> {
        let result = self.health.lock().unwrap().clone();
        Box::pin(async move { result })
    }

    fn load(&self) -> Load {
        Load { running: 3, queued: 0, waiting: 0 }
    }
}

pub fn fixture(family: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", family].iter().collect()
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::load(&fixture("qwen3").join("tokenizer.json")).unwrap()
}

pub fn encode(text: &str) -> Vec<u32> {
    tokenizer().encode(text, false).unwrap()
}

pub fn started() -> Step {
    Step::Event(TokenEvent::Started(Started { cached_tokens: 4, ..Started::default() }))
}

/// From a prefill node, of which half of the prompt was cached.
pub fn served() -> Step {
    Step::Event(TokenEvent::Served(Served {
        cached_tokens: 8,
        decision: Decision::Handoff,
        migrations: 0,
        timings: Timings { prefill: Duration::from_millis(5), ..Timings::default() },
    }))
}

pub fn token(index: usize, id: u32) -> Step {
    let top = vec![(id, -0.25), (END, -1.5)];
    Step::Event(TokenEvent::Token(Token {
        index: index as u32,
        id,
        logprob: Some(-0.25),
        top,
        predicted: false,
    }))
}

pub fn finished(reason: FinishReason, output_tokens: usize) -> Step {
    Step::Event(TokenEvent::Finished(Finished { reason, output_tokens: output_tokens as u32 }))
}

/// Says the ids, then ends for the reason.
pub fn script(ids: &[u32], reason: FinishReason) -> Vec<Step> {
    let tokens = ids.iter().enumerate().map(|(index, &id)| token(index, id));
    [started(), served()].into_iter().chain(tokens).chain([finished(reason, ids.len())]).collect()
}

/// Says the text and the end of text.
pub fn says(text: &str) -> Vec<Step> {
    let mut ids = encode(text);
    ids.push(END);
    script(&ids, FinishReason::Stop)
}

/// A gateway at work.
pub struct Gateway {
    pub url: String,
    pub cluster: Arc<Cluster>,
    pub shutdown: CancellationToken,
    pub served: JoinHandle<Result<(), ServeError>>,
    pub client: reqwest::Client,
    dropped: mpsc::UnboundedReceiver<(String, bool)>,
}

pub fn config() -> GatewayConfig {
    GatewayConfig::new(fixture("qwen3"), "tiny", CONTEXT)
}

/// With files and batches, in a folder of this test's own, which is empty at first.
pub fn batch_config(name: &str) -> GatewayConfig {
    let folder =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("gateway-{name}-{}", std::process::id()));
    _ = std::fs::remove_dir_all(&folder);
    let mut config = config();
    config.batch = Some(BatchConfig::new(folder));
    config
}

/// With this chat template, in a folder of this test's own.
pub fn template_config(name: &str, template: &str) -> GatewayConfig {
    let folder =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("template-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(fixture("qwen3").join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    GatewayConfig::new(folder, "tiny", CONTEXT)
}

impl Gateway {
    /// Every request gets the steps that the script makes of it.
    pub async fn new(script: impl Fn(&GenerateRequest) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::with(config(), script).await
    }

    pub async fn with(
        config: GatewayConfig,
        script: impl Fn(&GenerateRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let (sender, dropped) = mpsc::unbounded_channel();
        let cluster = Arc::new(Cluster {
            script: Box::new(script),
            health: Mutex::new(Ok(())),
            seen: Mutex::default(),
            dropped: sender,
            go: Arc::new(tokio::sync::Semaphore::new(0)),
        });
        // For clients; the first test's holds for all.
        _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let served = tokio::spawn(serve(listener, config, Arc::clone(&cluster), shutdown.clone()));
        Self { url, cluster, shutdown, served, client: reqwest::Client::new(), dropped }
    }

    /// To the served model, where the test does not say.
    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let url = format!("{}{path}", self.url);
        let mut body = body.clone();
        if let Some(fields) = body.as_object_mut() {
            fields.entry("model").or_insert("tiny".into());
        }
        self.client.post(url).json(&body).timeout(PATIENCE).send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("{}{path}", self.url)).timeout(PATIENCE).send().await.unwrap()
    }

    /// Status and JSON.
    pub async fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.post(path, body).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// The data of all events of a stream.
    pub async fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        let text = response.text().await.unwrap();
        assert!(text.ends_with("\n\n"), "{text:?}");
        text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap().to_string()).collect()
    }

    /// All events but `[DONE]`, which must be the last.
    pub async fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut events = self.events(path, body).await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Lets one waiting sequence go on.
    pub fn go(&self) {
        self.cluster.go.add_permits(1);
    }

    /// The next sequence that is gone: its id, and whether it had come to its end.
    pub async fn gone(&mut self) -> (String, bool) {
        tokio::time::timeout(PATIENCE, self.dropped.recv()).await.expect("a sequence is gone").unwrap()
    }

    /// The last request that the cluster got.
    pub fn last(&self) -> GenerateRequest {
        self.cluster.seen.lock().unwrap().last().unwrap().clone()
    }
}

/// `choices[0].delta.content` of all chunks.
pub fn content(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}
