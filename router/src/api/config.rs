//! How one gateway is set up. Filled by the binary from flags, environment and file; printed by `config show`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cluster::Refusals;
use cluster::traces::Tracer;

use super::tls::TlsFiles;
use crate::batch::BatchConfig;
use crate::text::answer::Family;

/// One gateway, for one model.
#[derive(Clone)]
pub struct GatewayConfig {
    /// Folder with `tokenizer.json` and what belongs to it.
    pub model_dir: PathBuf,
    /// The name that clients give and responses carry.
    pub model: String,
    /// Other names that are accepted.
    pub aliases: Vec<String>,
    /// Prompt and answer together, in tokens, at the most.
    pub context_tokens: usize,
    /// API keys. Empty, and without a file of them: everybody may ask.
    pub keys: Vec<String>,
    /// Certificate for HTTPS; `None`: HTTP.
    pub tls: Option<TlsFiles>,
    /// File of keys with names and limits, which is followed.
    pub key_file: Option<PathBuf>,
    /// Names in `Host` that are served, without port. Empty: all. A list keeps web pages from reaching a gateway on this
    /// machine by a name of their own (DNS rebinding).
    pub allowed_hosts: Vec<String>,
    /// Origins of web pages that may call (CORS), such as `https://chat.example`; `*`: all. Empty: none.
    pub allowed_origins: Vec<String>,
    /// The form of the model's tool calls; `None`: as its chat template says; `Some(None)`: it calls no tools.
    pub tool_parser: Option<Option<Family>>,
    /// Whether what is between `<think>` tags is told apart; `None`: as the chat template says.
    pub reasoning_parser: Option<bool>,
    /// Where files and batches are kept; `None`: there are none.
    pub batch: Option<BatchConfig>,
    /// Opens a trace for every request.
    pub tracer: Tracer,
    /// Counts who is turned away.
    pub refusals: Arc<Refusals>,
    /// Bounds.
    pub limits: Limits,
}

impl GatewayConfig {
    /// Everybody may ask; the usual bounds.
    pub fn new(model_dir: impl Into<PathBuf>, model: impl Into<String>, context_tokens: usize) -> Self {
        Self {
            model_dir: model_dir.into(),
            model: model.into(),
            aliases: Vec::new(),
            context_tokens,
            keys: Vec::new(),
            tls: None,
            key_file: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            tool_parser: None,
            reasoning_parser: None,
            batch: None,
            tracer: Tracer::default(),
            refusals: Arc::default(),
            limits: Limits::for_context(context_tokens),
        }
    }
}

impl fmt::Debug for GatewayConfig {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayConfig")
            .field("model_dir", &self.model_dir)
            .field("model", &self.model)
            .field("aliases", &self.aliases)
            .field("context_tokens", &self.context_tokens)
            .field("keys", &format_args!("{} keys", self.keys.len()))
            .field("tls", &self.tls)
            .field("key_file", &self.key_file)
            .field("allowed_hosts", &self.allowed_hosts)
            .field("allowed_origins", &self.allowed_origins)
            .field("tool_parser", &self.tool_parser)
            .field("reasoning_parser", &self.reasoning_parser)
            .field("batch", &self.batch)
            .field("tracer", &self.tracer)
            .field("limits", &self.limits)
            .finish()
    }
}

/// What one client, or all together, may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Of a request's body. More: 413.
    pub body_bytes: usize,
    /// Open at once; further ones wait in the listener's queue.
    pub connections: usize,
    /// Of a request's head.
    pub head_bytes: usize,
    /// Header fields of a request.
    pub headers: usize,
    /// For a request's head to be complete, and for an idle connection.
    pub head_read: Duration,
    /// For a request's body to be complete.
    pub body_read: Duration,
    /// For a client to take in what is sent; one that reads nothing for so long is cut off.
    pub write_stall: Duration,
    /// Sequences of one request: prompts times `n`.
    pub sequences: usize,
    /// Stop strings of one request.
    pub stop_strings: usize,
    /// After a shutdown, for running requests to end.
    pub drain: Duration,
    /// For `/health`: one step on a node of each role.
    pub health: Duration,
}

impl Limits {
    /// A body has room for every token of the context four times over, escaped.
    pub fn for_context(context_tokens: usize) -> Self {
        Self {
            body_bytes: (1 << 20) + 32 * context_tokens,
            // Ten thousand idle ones, and those that work.
            connections: 16384,
            head_bytes: 64 << 10,
            headers: 100,
            head_read: Duration::from_secs(60),
            body_read: Duration::from_secs(60),
            write_stall: Duration::from_secs(60),
            sequences: 16,
            stop_strings: 16,
            drain: Duration::from_secs(30),
            health: Duration::from_secs(10),
        }
    }
}
