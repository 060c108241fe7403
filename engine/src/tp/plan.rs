//! What the leader tells every rank to do in one step, and what ranks tell the leader. All ranks run the same plans in
//! the same order on their own store; so a plan that comes later finds done what an earlier one said. Pure.

use std::ops::Range;
use std::time::Duration;

use backend::{Batch, Draw, Fork, SeqId};
use kvtransfer::{Close, Codec, SessionId, Ticket};

use crate::ledger::LeaseId;
use crate::request::Handoff;

/// One step: `ops` in order, then the rows of `batch`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Counts the plans of an epoch.
    pub step: u64,
    /// What happens to sequences and transfers before the rows are computed.
    pub ops: Vec<Op>,
    /// Rows to compute; may be none.
    pub batch: Batch,
    /// Rows whose logits are wanted, ascending; a later plan's [`Input::Drawn`] counts these.
    pub rows: Vec<Wanted>,
    /// What leaves after every layer.
    pub exports: Vec<Export>,
}

/// A row that something is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    /// Row of the batch.
    pub row: u32,
    /// What becomes of its logits.
    pub draw: Draw,
}

/// Newly computed positions that a push takes after every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The push.
    pub lease: LeaseId,
    /// Its sequence.
    pub seq: SeqId,
    /// Positions within the sequence's run of this step.
    pub tokens: Range<u32>,
}

/// One change of a rank's store or transfers.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// See [`backend::KvStore::open`].
    Open { seq: SeqId, tokens: u32 },
    /// See [`backend::KvStore::grow`].
    Grow { seq: SeqId, tokens: u32 },
    /// See [`backend::KvStore::fork`].
    Fork { from: SeqId, to: SeqId, tokens: u32, mode: Fork },
    /// See [`backend::KvStore::truncate`].
    Truncate { seq: SeqId, tokens: u32 },
    /// See [`backend::KvStore::close`].
    Close { seq: SeqId },
    /// Expect a KV session. Answered by [`Notice::Landed`].
    Land(Land),
    /// Take a landed session into its sequence; every rank has it.
    Commit { lease: LeaseId },
    /// Give a landing or push up, in whatever state it is.
    Abort { lease: LeaseId },
    /// Begin a push. Answered by [`Notice::Pushed`].
    Push(PushOp),
    /// End a push: everything has been queued.
    PushClose { lease: LeaseId, close: Close },
    /// Compare the idle store with the leader's book. Answered by [`Notice::Audited`].
    Audit { held: u32, total: u32 },
}

/// A session to expect.
#[derive(Clone, Debug, PartialEq)]
pub struct Land {
    /// Its number within the group.
    pub lease: LeaseId,
    /// Where it lands; the sequence has room.
    pub seq: SeqId,
    /// Positions that land.
    pub tokens: Range<u32>,
    /// Its name.
    pub session: SessionId,
    /// Its secret.
    pub ticket: Ticket,
    /// The router's id of the request.
    pub request: String,
    /// The request's attempt.
    pub attempt: u32,
    /// Longest silence.
    pub deadline: Duration,
}

/// A push to begin.
#[derive(Clone, Debug, PartialEq)]
pub struct PushOp {
    /// Its number within the group.
    pub lease: LeaseId,
    /// Where the bytes come from.
    pub seq: SeqId,
    /// Positions that are in the cache already and leave at once; may be empty.
    pub cached: Range<u32>,
    /// The router's id of the request.
    pub request: String,
    /// The request's attempt.
    pub attempt: u32,
    /// Where the bytes go.
    pub handoff: Handoff,
}

/// A push of one rank that every receiver has acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of cache.
    pub bytes: u64,
    /// How the numbers travelled.
    pub codec: Codec,
    /// What was estimated to be exposed of it.
    pub estimate: Option<Duration>,
}

/// What a rank tells the leader.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// The operations of this step's plan were carried out; its rows are computed, or under way.
    Executed { step: u64 },
    /// A landing ended, `age` ago by its last frame.
    Landed { lease: LeaseId, result: Result<Arrived, String>, age: Duration },
    /// A push ended, `age` ago by its last acknowledgement.
    Pushed { lease: LeaseId, result: Result<Sent, String>, age: Duration },
    /// The idle store was compared; what disagreed.
    Audited { disagreement: Option<String> },
    /// The rank cannot go on.
    Failed { reason: String },
}

/// A session that landed whole on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Payload bytes.
    pub bytes: u64,
    /// How the prompt's computation ended.
    pub close: Close,
}
