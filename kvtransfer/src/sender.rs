//! The sending end of a rank process: a bounded pool of connections, and pushes over it. Prefill ranks use it.
//!
//! Threads: two per lane of an open push, one that writes and one that reads credit.

mod connect;
mod export;
mod pair;
pub mod path;
mod pool;
pub mod probe;
mod push;
mod stripe;
pub mod watch;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::KvSpec;

use crate::receiver::Peers;
use crate::sender::path::Path;
use crate::sender::pool::Pool;
use crate::transport::Dialer;
use crate::transport::tcp::TcpDialer;
use crate::transport::ucx::Way;
use crate::{Codec, Expect, Limits, SessionError, SessionId, Ticket};

pub use push::Push;

/// Pushes KV to receivers over a bounded pool of connections. A clone is another handle on the same pool; idle connections
/// close with the last handle and push.
#[derive(Clone)]
pub struct Sender(Arc<Pool>);

/// One session as this rank sees it.
#[derive(Clone, Debug)]
pub struct PushSpec {
    /// Its name.
    pub session: SessionId,
    /// Its secret.
    pub ticket: Ticket,
    /// The router's id of the request, at most 256 bytes.
    pub request: String,
    /// The request's attempt.
    pub attempt: u32,
    /// Epoch of the decode group.
    pub epoch: u64,
    /// Every sender rank's cache.
    pub from: Vec<KvSpec>,
    /// This rank, an index into `from`.
    pub from_rank: usize,
    /// Every receiver.
    pub to: Vec<TargetSpec>,
    /// Positions that the receivers want.
    pub tokens: Range<u32>,
    /// Longest silence of a receiver; also the time to connect.
    pub deadline: Duration,
    /// At which rate the prompt's computation makes bytes of cache, where that is known: the codec policy needs it.
    pub compute_bytes_per_s: Option<f64>,
    /// Tokens that are computed at once: those of the last piece cannot leave before the end.
    pub chunk_tokens: u32,
}

/// One receiver.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetSpec {
    /// Its rank.
    pub rank: usize,
    /// `host:port` of its KV port, best first.
    pub addresses: Vec<String>,
    /// What it holds.
    pub spec: KvSpec,
}

/// A session that every receiver has acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Bytes of cache that this rank sent.
    pub bytes: u64,
    /// Connections that were lost and replaced.
    pub resumed: u32,
    /// How the numbers travelled.
    pub codec: Codec,
    /// What the time from the end of the computation to the acknowledgement was estimated to be when the push began.
    pub estimate: Option<Duration>,
    /// When the last acknowledgement came.
    pub acknowledged: Instant,
}

/// Measured use of the link to one peer.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkStat {
    /// `host:port`.
    pub peer: String,
    /// Smoothed rate while there was something to send, in 1e9 bytes per second; 0: not yet known.
    pub gbytes_per_s: f32,
    /// Payload bytes received there so far.
    pub bytes: u64,
    /// What carried payloads there last.
    pub way: Way,
    /// What probes have shown of the path.
    pub path: Path,
    /// Used together with other paths to the same receiver.
    pub striped: bool,
}

impl Sender {
    /// An empty pool of TCP connections.
    pub fn new(limits: Limits) -> Self {
        Sender::with_dialer(limits, Box::new(TcpDialer))
    }

    /// An empty pool of connections of another transport.
    pub fn with_dialer(limits: Limits, dialer: Box<dyn Dialer>) -> Self {
        let probe_by = limits.probe.clone();
        let pool = Arc::new(Pool::new(limits, dialer));
        if let Some(ticket) = probe_by {
            probe::watch(&pool, ticket);
        }
        Sender(pool)
    }

    /// Begins a session; connecting goes on in the background. `done` is called exactly once, on a thread of the
    /// sender, when every receiver has acknowledged or the session has failed; it must not block for long.
    pub fn open(
        &self,
        push: PushSpec,
        done: impl FnOnce(Result<Pushed, SessionError>) + Send + 'static,
    ) -> Push {
        Push::open(&self.0, push, Box::new(done))
    }

    /// Begins to pass a rank's share of replicated planes on to the other ranks of its group.
    pub(crate) fn relay(
        &self,
        expect: &Expect,
        peers: &Peers,
        done: impl FnOnce(Result<Pushed, SessionError>) + Send + 'static,
    ) -> Push {
        Push::relay(&self.0, expect, peers, Box::new(done))
    }

    /// Connections of all pushes so far that were lost and replaced.
    pub fn resumed(&self) -> u64 {
        self.0.resumed.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Connections of all pushes so far that were left, and replaced, because their path had fallen silent.
    pub fn silent(&self) -> u64 {
        self.0.silent.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Connections whose payloads went by UCX and that were lost: replaced by ones that carry their payloads themselves.
    pub fn fallbacks(&self) -> u64 {
        self.0.fallbacks.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Payload bytes of all pushes so far that receivers were let read out of a device's memory: no copy on the host.
    pub fn unstaged_bytes(&self) -> u64 {
        self.0.unstaged_bytes.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Makes receivers known that may be pushed to, so that their paths are probed before: each by all its addresses.
    pub fn know(&self, peers: impl IntoIterator<Item = Vec<String>>) {
        peers.into_iter().for_each(|addresses| self.0.know(&addresses));
    }

    /// What was measured per peer, by name.
    pub fn links(&self) -> Vec<LinkStat> {
        self.0.links()
    }
}
