//! What the gateway asks of the cluster: generate, probe, load.
//!
//! The gateway (`api`) calls it; `dispatch` implements it over gRPC, tests and benches implement it with mock engines.
//! Tokens in, tokens out: no text, no tensors, no addresses cross here.

use std::sync::Arc;
use std::time::Duration;

use cluster::traces::Scope;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use prometheus_client::registry::Registry;

/// The cluster, as the gateway sees it.
pub trait Inference: Send + Sync + 'static {
    /// Starts one sequence. The stream yields `Started` once, then `Scored` until all of the prompt is, where asked for,
    /// then `Token`s with indices 0, 1, 2, ... without gaps, then `Finished` once; or an error, which ends it. `Served` comes
    /// before the first token and again with what is learned later. Nothing is sent anywhere before the stream is first polled.
    /// Dropping the stream cancels everything behind it: the group frees its blocks, the prefill stops.
    fn generate(&self, request: GenerateRequest) -> TokenStream;

    /// Runs one real engine step on a node of each role that requests need. The error says which role cannot serve and why.
    fn health(&self) -> BoxFuture<'static, Result<(), String>>;

    /// Requests in the cluster at this moment.
    fn load(&self) -> Load;

    /// Adds metrics of its own to those of `GET /metrics`. Called once, before the first request.
    fn register(&self, registry: &mut Registry) {
        _ = registry;
    }
}

/// The priority of what nobody waits for: below whatever a client can ask for.
pub const BACKGROUND: i32 = i32::MIN;

/// What `Inference::generate` returns.
pub type TokenStream = BoxStream<'static, Result<TokenEvent, InferenceError>>;

/// One sequence to generate, validated by the gateway: `tokens.len() + max_tokens` is within the context.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Unique in the cluster; seen in every node's log. Several sequences of one HTTP request (`n`) have one each.
    pub id: String,
    /// The prompt. Never empty.
    pub tokens: Arc<[u32]>,
    /// Output tokens at most, at least 1.
    pub max_tokens: u32,
    /// Output tokens before which no stop id ends the answer.
    pub min_tokens: u32,
    /// Ids that end the answer (end of sequence, and the client's). The ending id is delivered as a `Token` too.
    pub stop_ids: Vec<u32>,
    /// Nothing but `max_tokens` ends the answer. The gateway sets it only when `stop_ids` is empty.
    pub ignore_eos: bool,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Prefixes are shared only between requests of equal salt. Empty: the common one.
    pub cache_salt: Vec<u8>,
    /// Lower runs later; 0 is interactive, [`BACKGROUND`] a line of a batch.
    pub priority: i32,
    /// What the output must look like, in the dialect of the room `grammar`; checked by the gateway.
    pub grammar: Option<Arc<str>>,
    /// Tell how likely each token of the prompt is, with this many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// What the client expects of the output, at most [`proto::PREDICTION_TOKENS_MAX`] tokens; changes none of it.
    pub prediction: Arc<[u32]>,
    /// Where its spans belong.
    pub trace: Scope,
}

/// How tokens are drawn. Ranges as in `common.proto`; the gateway has checked them.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// (0, 1].
    pub top_p: f32,
    /// 0: all.
    pub top_k: u32,
    /// [0, 1].
    pub min_p: f32,
    /// [-2, 2].
    pub presence_penalty: f32,
    /// [-2, 2].
    pub frequency_penalty: f32,
    /// > 0; 1: none.
    pub repetition_penalty: f32,
    /// Always pinned, so that every attempt draws the same numbers.
    pub seed: u64,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report the log probability of every chosen token.
    pub logprobs: bool,
    /// How many alternatives to report beside it.
    pub top_logprobs: u32,
}

impl Default for Sampling {
    /// Greedy, seed 0, nothing reported.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: false,
            top_logprobs: 0,
        }
    }
}

/// What a sequence tells on its way.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The prompt is admitted and being computed. Before the first token.
    Started(Started),
    /// How likely the next tokens of the prompt are: from position 1 on, in order, each once.
    Scored(Vec<Score>),
    /// The prompt is computed, or more is known of how: each takes the place of the one before.
    Served(Served),
    /// One output token.
    Token(Token),
    /// The answer is complete. The last event.
    Finished(Finished),
}

/// How a sequence began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Started {
    /// Prompt tokens that the decode group held already.
    pub cached_tokens: u32,
    /// In the router's queue, before a node was asked.
    pub queue: Duration,
    /// From asking the decode group to its reservation.
    pub admission: Duration,
}

/// How a sequence is served, as far as it is known. Told on the way, so that whoever leaves before the end knows it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Prompt tokens that were not computed for this request, on whichever node.
    pub cached_tokens: u32,
    /// Who computed the prompt.
    pub decision: Decision,
    /// Attempts after the first: a node failed, or the group was out of room.
    pub migrations: u32,
    /// Where the time went.
    pub timings: Timings,
}

/// One output token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Position in the output; 0 is the first.
    pub index: u32,
    /// Vocabulary id.
    pub id: u32,
    /// With `Sampling::logprobs`: the natural logarithm of its probability.
    pub logprob: Option<f32>,
    /// With `Sampling::top_logprobs`: the likeliest ids, best first.
    pub top: Vec<(u32, f32)>,
    /// It was guessed by the request's prediction, and cost no step of its own.
    pub predicted: bool,
}

/// How likely the model holds a token of the prompt to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// 1: no id is more likely.
    pub rank: u32,
    /// The likeliest ids, best first.
    pub top: Vec<(u32, f32)>,
}

/// How a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens delivered.
    pub output_tokens: u32,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop id.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

/// Who computed the prompt of the first attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// A prefill node; its KV travelled to the decode group.
    Handoff,
    /// The decode group itself.
    Local,
}

impl Decision {
    /// The label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Decision::Handoff => "handoff",
            Decision::Local => "local",
        }
    }
}

/// How the numbers of a cache travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCodec {
    /// Bit for bit.
    Exact,
    /// See the prefill node's `--kv-codec`.
    Fp8,
    /// As above.
    Int8,
    /// As above.
    Int4,
}

impl KvCodec {
    /// As a prefill node says it.
    pub fn parse(text: &str) -> Option<Self> {
        [KvCodec::Exact, KvCodec::Fp8, KvCodec::Int8, KvCodec::Int4]
            .into_iter()
            .find(|codec| codec.as_str() == text)
    }

    /// As clients see it.
    pub fn as_str(self) -> &'static str {
        match self {
            KvCodec::Exact => "exact",
            KvCodec::Fp8 => "fp8",
            KvCodec::Int8 => "int8",
            KvCodec::Int4 => "int4",
        }
    }
}

/// Parts of a request's time; zero where a part did not happen or is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// In the router's queue, before a node was asked.
    pub queue: Duration,
    /// From asking the decode group to its reservation.
    pub admission: Duration,
    /// Waiting in the node's own queue and computing the prompt, up to the first token.
    pub prefill: Duration,
    /// From the end of the prompt's compute to the cache being usable by the decode group.
    pub transfer_exposed: Duration,
    /// What that was estimated to be when the push began.
    pub transfer_estimated: Duration,
    /// How the numbers of the cache travelled; `None`: they did not.
    pub kv_codec: Option<KvCodec>,
    /// From the cache being usable to the first decode step's start.
    pub first_step_wait: Duration,
    /// The first decode step.
    pub first_step: Duration,
}

/// Requests in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Admitted by a node.
    pub running: u32,
    /// In the router's queue.
    pub queued: u32,
    /// Of these, the interactive ones; the others are lines of batches.
    pub waiting: u32,
}

/// Why a sequence could not be served, or not to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InferenceError {
    /// The queue is full or its deadline passed: 429 with `Retry-After`.
    #[error("the server is at capacity, try again in {} s", .retry_after.as_secs().max(1))]
    Overloaded {
        /// When a new try has a chance.
        retry_after: Duration,
    },
    /// No node can serve now: 503.
    #[error("{0}")]
    Unavailable(String),
    /// Never possible on this cluster, for instance more tokens than any group's store holds: 400.
    #[error("{0}")]
    Invalid(String),
    /// A fault of ours: 500.
    #[error("{0}")]
    Internal(String),
}
