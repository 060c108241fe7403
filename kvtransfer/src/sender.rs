//! The sending end of a rank process.

use std::ops::Range;
use std::time::{Duration, Instant};

use backend::{KvExport, KvSpec};

use crate::{Close, Limits, SessionError, SessionId, Ticket};

/// Pushes KV to receivers over a bounded pool of connections. A clone is another handle on the same pool.
#[derive(Clone)]
pub struct Sender;

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
    /// Payload bytes that this rank sent.
    pub bytes: u64,
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
}

/// An open push. Dropped without [`Push::close`] it aborts the session at the receivers.
pub struct Push;

impl Sender {
    /// An empty pool.
    pub fn new(_limits: Limits) -> Self {
        Sender
    }

    /// Begins a session; connecting goes on in the background. `done` is called exactly once, on a thread of the
    /// sender, when every receiver has acknowledged or the session has failed.
    pub fn open(&self, _push: PushSpec, _done: impl FnOnce(Result<Pushed, SessionError>) + Send + 'static) -> Push {
        Push
    }

    /// What was measured per peer, by name.
    pub fn links(&self) -> Vec<LinkStat> {
        Vec::new()
    }
}

impl Push {
    /// Queues what `export` covers of the session's positions and layers, in any order of (layer, tokens), each once.
    /// Never blocks; the export is dropped when its bytes are on their way.
    pub fn layer(&self, _export: impl KvExport + 'static) {}

    /// Ends the session after everything that is queued.
    pub fn close(self, _close: Close) {}

    /// Payload bytes queued and not yet on their way.
    pub fn backlog_bytes(&self) -> u64 {
        0
    }

    /// Gives the session up, here and at the receivers.
    pub fn cancel(self) {}
}
