//! The HTTP gateway: OpenAI's interface in front of `Inference`.
//!
//! A request passes `guard`, `body`, then `chat` or `completions` (parse with `fields`, `params`, `messages`; render and
//! tokenize on a text thread), `run` (one sequence per choice), `answer` with one `choice` each (tokens to text), and
//! leaves through `reply` in its `chat_format` or `completion_format`.

mod answer;
mod anthropic;
mod anthropic_format;
mod batch_lines;
mod batches;
mod body;
mod chat;
mod chat_format;
mod choice;
mod completion_format;
mod completions;
mod config;
mod error;
mod fields;
mod files;
mod form;
mod guard;
mod head;
mod keys;
mod linger;
mod logprobs;
mod messages;
mod multipart;
mod openapi;
mod params;
mod prompt_scores;
mod quota;
mod refused;
mod reply;
mod response_store;
mod responses;
mod responses_format;
mod run;
mod server;
mod stall;
mod status;
mod tls;
mod tokens;
mod translated;

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::Request;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use http::StatusCode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use config::{GatewayConfig, Limits};
pub use quota::Caller;
pub use tls::{TlsError, TlsFiles};

use crate::batch::Batches;
use crate::inference::Inference;
use crate::key_file::KeyFileError;
use crate::metrics::Metrics;
use crate::text::answer::Family;
use crate::text::{ModelText, TextError};
use error::ApiError;
use fields::Fields;
use keys::Keys;
use params::Rules;

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model's folder cannot be used.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The file of keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// A task of the gateway died.
    #[error("a task of the gateway broke off: {0}")]
    Load(#[from] tokio::task::JoinError),
}

/// One gateway, shared by all requests.
struct Gateway {
    config: GatewayConfig,
    model: Arc<str>,
    text: ModelText,
    /// The form of the model's calls; `None`: it gets no tools.
    tool_family: Option<Family>,
    /// The form of its answers, with tools or without.
    family: Option<Family>,
    /// The model reasons between tags.
    reasons: bool,
    compilers: form::Compilers,
    responses: response_store::ResponseStore,
    /// Files and batch jobs, if they are kept.
    batches: Option<Arc<Batches>>,
    /// Special ids that are marks of its answers.
    marks: Arc<[u32]>,
    knows_developer: bool,
    inference: Arc<dyn Inference>,
    metrics: Arc<Metrics>,
    keys: Arc<Keys>,
    health: status::Health,
    /// Templates and tokenizers that run at once: one per core, others wait here and not in the pool of threads.
    text_threads: Arc<Semaphore>,
    since: SystemTime,
    /// Cancelled when running answers must end.
    over: CancellationToken,
}

/// Serves OpenAI's interface on `listener` until `shutdown`, then lets running requests end (`limits.drain`); those that do not
/// are told so. Errors before
/// the first request: the model's folder or the configuration cannot be used.
pub async fn serve<I: Inference>(
    listener: TcpListener,
    config: GatewayConfig,
    inference: Arc<I>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    check(&config)?;
    let limits = config.limits.clone();
    let dir = config.model_dir.clone();
    let text = tokio::task::spawn_blocking(move || ModelText::load(&dir)).await??;
    let keys = Arc::new(Keys::new(&config.keys, config.key_file.clone())?);
    tokio::spawn(Arc::clone(&keys).watch(shutdown.clone()));
    let certificate = config.tls.clone().map(tls::Certificate::read).transpose()?;
    let acceptor = certificate.as_ref().map(tls::Certificate::acceptor).transpose()?;
    if let Some(certificate) = certificate {
        tokio::spawn(certificate.watch(shutdown.clone()));
    }
    let mut registry = Registry::default();
    inference.register(&mut registry);
    registry.register_collector(Box::new(refused::Refused(Arc::clone(&config.refusals))));
    let batches = config.batch.clone().map(Batches::new);
    if let Some(batches) = &batches {
        batches.register(&mut registry);
    }
    let cores = std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2));
    let tool_family = config.tool_parser.unwrap_or_else(|| text.family());
    let family = tool_family.or(text.family());
    let gateway = Gateway {
        model: config.model.as_str().into(),
        tool_family,
        family,
        reasons: config.reasoning_parser.unwrap_or_else(|| text.reasons()),
        compilers: form::Compilers::default(),
        responses: response_store::ResponseStore::default(),
        batches,
        marks: marks(&text, family),
        knows_developer: text.knows_developer(),
        text,
        inference,
        metrics: Metrics::new(registry, &config.model),
        keys: Arc::clone(&keys),
        health: status::Health::default(),
        text_threads: Arc::new(Semaphore::new(cores)),
        since: SystemTime::now(),
        over: CancellationToken::new(),
        config,
    };
    let gateway = Arc::new(gateway);
    let over = gateway.over.clone();
    let batches = gateway.batches.clone().map(|batches| {
        let lines = Arc::new(batch_lines::Lines(Arc::clone(&gateway)));
        tokio::spawn(batches.run(lines, shutdown.clone()))
    });
    let scheme = if acceptor.is_some() { "https" } else { "http" };
    let address = listener.local_addr().map_or_else(|_| "this socket".into(), |address| address.to_string());
    tracing::info!("serving {} at {scheme}://{address}", gateway.model);
    server::run(listener, acceptor, routes(gateway), &limits, shutdown, over).await;
    if let Some(batches) = batches {
        batches.await?;
    }
    Ok(())
}

fn marks(text: &ModelText, family: Option<Family>) -> Arc<[u32]> {
    let names = family.map(Family::marks).unwrap_or_default();
    names.iter().filter_map(|name| text.tokenizer.id(name)).collect()
}

fn check(config: &GatewayConfig) -> Result<(), ServeError> {
    let wrong = |text: &str| Err(ServeError::Config(text.into()));
    if config.model.is_empty() {
        return wrong("the served model has no name");
    }
    if config.context_tokens < 2 {
        let tokens = config.context_tokens;
        return wrong(&format!("context: {tokens} tokens, expected 2 at least: a prompt and an answer"));
    }
    if config.keys.iter().any(|key| key.trim().is_empty()) {
        return wrong("an API key is empty");
    }
    if config.limits.connections == 0 || config.limits.sequences == 0 {
        return wrong("a limit of zero would refuse every request");
    }
    // Less and the HTTP library refuses to start.
    if config.limits.head_bytes < 8192 {
        return wrong("the limit of a request's head is below 8192 bytes");
    }
    Ok(())
}

fn routes(gateway: Arc<Gateway>) -> axum::Router {
    let asks = axum::Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/responses", post(responses::handle))
        .route("/v1/responses/input_tokens", post(responses::count))
        .route("/v1/responses/{id}", get(responses::get).delete(responses::delete))
        .route("/v1/files", post(files::upload).get(files::list))
        .route("/v1/files/{id}", get(files::get).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::get))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/messages", post(anthropic::handle))
        .route("/v1/messages/count_tokens", post(anthropic::count))
        .route("/v1/embeddings", post(status::embeddings))
        .route("/v1/models", get(status::models))
        .route("/v1/models/{*name}", get(status::model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route_layer(from_fn(guard::path))
        .route_layer(from_fn_with_state(Arc::clone(&gateway), guard::key));
    let open = axum::Router::new()
        .route("/", get(status::root))
        .route("/health", get(status::health))
        .route("/live", get(status::live))
        .route("/ping", get(status::live).post(status::live))
        .route("/version", get(status::version))
        .route("/openapi.json", get(openapi::handle))
        .route("/metrics", get(status::metrics));
    asks.merge(open)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(Arc::clone(&gateway), guard::cors))
        .layer(from_fn_with_state(Arc::clone(&gateway), guard::host))
        .layer(from_fn_with_state(Arc::clone(&gateway), guard::observe))
        .with_state(gateway)
}

async fn no_route(request: Request) -> ApiError {
    ApiError::no_route(StatusCode::NOT_FOUND, request.method(), request.uri().path())
}

async fn no_method(request: Request) -> ApiError {
    ApiError::no_route(StatusCode::METHOD_NOT_ALLOWED, request.method(), request.uri().path())
}

impl Gateway {
    /// The served name and its aliases.
    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.config.model).chain(&self.config.aliases).map(String::as_str)
    }

    /// Reads `model`; absent, it is the served one, as with vLLM.
    fn check_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        fields.string("model")?.map_or(Ok(()), |name| self.check_name(&name))
    }

    /// Errors for a name that no model is served under.
    fn check_name(&self, name: &str) -> Result<(), ApiError> {
        match self.names().any(|known| known == name) {
            true => Ok(()),
            false => Err(ApiError::no_model(name, &self.config.model)),
        }
    }

    /// As `check_model`, for those interfaces that cannot do without.
    fn need_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        if fields.peek("model").is_none() {
            return Err(ApiError::missing("model"));
        }
        self.check_model(fields)
    }

    /// The model answers in channels, tools or not.
    fn has_channels(&self) -> bool {
        self.family == Some(Family::Harmony)
    }

    fn rules(&self) -> Rules<'_> {
        Rules {
            defaults: &self.text.defaults,
            vocab: self.text.tokenizer.pieces().len(),
            limits: &self.config.limits,
        }
    }

    /// Runs what takes time (JSON, templates, tokenizing) off the async threads.
    async fn on_text_thread<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Gateway) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.text_threads).acquire_owned().await.ok();
        let gateway = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit; // held until the work ends, even if nobody waits for it any more
            work(&gateway)
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!("a text thread failed: {error}");
            Err(ApiError::internal("the server failed on this request"))
        })
    }

    /// Ids of a prompt, which must be able to fit the context. `param`: where it came from, for the error.
    fn encode(&self, text: &str, add_special: bool, param: &str) -> Result<Vec<u32>, ApiError> {
        // Longer than the longest token for every place: known to be too long without tokenizing it.
        let longest = self.text.tokenizer.pieces().longest();
        let context = self.config.context_tokens;
        if text.len() > context.saturating_mul(longest) {
            let least = format!("at least {}", text.len().div_ceil(longest));
            return Err(ApiError::context(param, context, least, None));
        }
        self.encode_any(text, add_special)
    }

    fn encode_any(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        Ok(self.text.tokenizer.encode(text, add_special)?)
    }
}
