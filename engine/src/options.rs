//! Settings of an engine, the same struct for both roles.

use std::net::SocketAddr;
use std::time::Duration;

use crate::error::EngineError;
use crate::scheduler::Limits;

/// Bounds and addresses of one rank's engine. What concerns scheduling is read on the leader only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Bytes of this rank's KV store.
    pub kv_bytes: u64,
    /// Longest sequence, prompt and output.
    pub context_tokens: u32,
    /// Sequences running or reserved at once.
    pub batch_max: usize,
    /// Rows of a step; more than `batch_max`, so that prompts go on while all sequences generate.
    pub step_tokens: usize,
    /// Rows of one prompt in a step.
    pub chunk_tokens: usize,
    /// How much longer than a decode step a step may take for the prompts in it, while sequences generate: what a
    /// running stream feels of a long prompt.
    pub stall_max: Duration,
    /// Tokens that are guessed ahead per sequence and step, at most; 0: none.
    pub draft_max: usize,
    /// Prompts that may wait for room or rows.
    pub waiting_max: usize,
    /// KV pushes open at once.
    pub pushes_max: usize,
    /// Where KV is received; port 0 picks one.
    pub kv_bind: SocketAddr,
    /// `host:port` or `host` by which prefill nodes reach `kv_bind`, best first; a host alone gets the bound port.
    /// None: the bound address itself.
    pub kv_advertise: Vec<String>,
    /// TLS on the KV wire, with certificates of both ends; `None`: in clear.
    pub kv_tls: Option<kvtransfer::transport::tls::Tls>,
    /// Hears of connections to the KV port that are turned away.
    pub kv_turned: kvtransfer::OnTurned,
    /// Keep ended sequences for the prompts that begin like them.
    pub prefix_cache: bool,
    /// A reservation without progress lapses after this.
    pub land_deadline: Duration,
    /// Pace of KV pushes in bytes per second; `None`: all that the link gives.
    pub pace: Option<u64>,
    /// How the numbers of KV pushes travel.
    pub kv_codec: kvtransfer::CodecPolicy,
    /// Connections per path of a KV push.
    pub kv_streams: usize,
    /// Ways that KV payloads may take beside their connections.
    pub kv_ways: kvtransfer::Ways,
    /// The cluster's secret for probes of KV links; without one nothing is probed.
    pub kv_probe: Option<kvtransfer::Ticket>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            kv_bytes: 1 << 30,
            context_tokens: 4096,
            batch_max: 64,
            step_tokens: 1024,
            chunk_tokens: 512,
            stall_max: Duration::from_millis(150),
            draft_max: 16,
            waiting_max: 1024,
            pushes_max: 64,
            kv_bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            kv_advertise: Vec::new(),
            kv_tls: None,
            kv_turned: kvtransfer::OnTurned::default(),
            prefix_cache: true,
            land_deadline: Duration::from_secs(10),
            pace: None,
            kv_codec: kvtransfer::CodecPolicy::Always(kvtransfer::Codec::Exact),
            kv_streams: 1,
            kv_ways: kvtransfer::Ways::NONE,
            kv_probe: None,
        }
    }
}

impl EngineOptions {
    /// Errors name the settings that do not go together.
    pub fn validate(&self) -> Result<(), EngineError> {
        let wrong = |text: String| Err(EngineError::Options(text));
        if self.batch_max == 0 || self.chunk_tokens == 0 || self.context_tokens < 2 {
            return wrong(format!(
                "batch of {}, chunk of {} and context of {} tokens: each must be positive, the context at least 2",
                self.batch_max, self.chunk_tokens, self.context_tokens
            ));
        }
        if self.step_tokens <= self.batch_max {
            return wrong(format!(
                "step of {} tokens for a batch of {}: prompts would never run",
                self.step_tokens, self.batch_max
            ));
        }
        if self.waiting_max == 0 || self.pushes_max == 0 {
            return wrong("waiting_max and pushes_max must be positive".into());
        }
        Ok(())
    }

    /// The bounds of a step.
    pub fn limits(&self) -> Limits {
        Limits { step_tokens: self.step_tokens, chunk_tokens: self.chunk_tokens }
    }
}
