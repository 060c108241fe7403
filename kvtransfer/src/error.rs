//! Why a session ends without its bytes, in the words of the end that reports it.

use backend::KvError;

use crate::SessionId;
use crate::coverage::CoverageError;
use crate::frame::FrameError;
use crate::layout::PlanError;

/// The end of a session that did not succeed. Nothing that landed may be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The two sides' caches do not fit together.
    #[error("plan: {0}")]
    Plan(#[from] PlanError),
    /// The call made no sense; nothing was started.
    #[error("{0}")]
    Invalid(String),
    /// A bound of [`crate::Limits`] is reached.
    #[error("{what} at its bound of {max}")]
    Busy {
        /// What there are too many of.
        what: &'static str,
        /// The bound.
        max: usize,
    },
    /// A session of this name is expected or was.
    #[error("session {0} is known already")]
    Known(SessionId),
    /// No address could be reached within the deadline.
    #[error("cannot connect to {peer}: {reason}")]
    Connect {
        /// Addresses tried.
        peer: String,
        /// The last attempt's failure.
        reason: String,
    },
    /// The connection ended too early.
    #[error("connection with {peer} lost: {reason}")]
    Lost {
        /// The other end.
        peer: String,
        /// What was seen.
        reason: String,
    },
    /// The other end does not belong to the cluster any more.
    #[error("the join token of {peer} was revoked")]
    Revoked {
        /// The other end.
        peer: String,
    },
    /// The other end was silent for too long.
    #[error("{what} for {ms} ms")]
    Expired {
        /// What did not come.
        what: String,
        /// The deadline.
        ms: u64,
    },
    /// The other end gave the session up.
    #[error("{peer} gave up: {reason}")]
    Refused {
        /// The other end.
        peer: String,
        /// Its kind of reason.
        code: FailCode,
        /// Its words.
        reason: String,
    },
    /// The other end could not prove the ticket.
    #[error("{0} does not hold the ticket")]
    Proof(String),
    /// A frame that cannot be trusted.
    #[error("bad frame: {0}")]
    Frame(#[from] FrameError),
    /// A frame that is well formed but not allowed here.
    #[error("protocol: {0}")]
    Protocol(String),
    /// A frame for a place that is not free.
    #[error("layout: {0}")]
    Coverage(#[from] CoverageError),
    /// A proven sender of another request, attempt, epoch, range or cache.
    #[error("stale: {what} is {got}, expected {want}")]
    Stale {
        /// What differs.
        what: &'static str,
        /// The sender's.
        got: String,
        /// The receiver's.
        want: String,
    },
    /// No session of this name is expected here, or not any more.
    #[error("session {0} is not expected")]
    Unknown(SessionId),
    /// Closed before everything was there.
    #[error("closed after {got_bytes} of {want_bytes} bytes")]
    Incomplete {
        /// Bytes sent or landed.
        got_bytes: u64,
        /// Bytes that the plan has.
        want_bytes: u64,
    },
    /// This end's store refused.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// This end's device failed.
    #[error("device: {0}")]
    Device(String),
    /// This end cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The push was dropped before it was closed.
    #[error("dropped before it was closed")]
    Dropped,
    /// This end is shutting down.
    #[error("stopped")]
    Stopped,
}

/// Kinds of reasons in a Fail frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FailCode {
    /// Something that has no code of its own.
    Other = 0,
    /// No such session, or not any more.
    Unknown = 1,
    /// Too many connections; try again later.
    Busy = 2,
    /// The ticket was not proved.
    Proof = 3,
    /// Another request, attempt, epoch, range or spec.
    Stale = 4,
    /// A frame broke the rules.
    Protocol = 5,
    /// A checksum did not match.
    Checksum = 6,
    /// Cancelled.
    Cancelled = 7,
    /// Silent for too long.
    Expired = 8,
    /// The store or device failed.
    Store = 9,
    /// Shutting down.
    Stopped = 10,
}

impl FailCode {
    /// The code with this number; unknown numbers are [`FailCode::Other`].
    pub fn from_number(number: u16) -> Self {
        use FailCode::*;
        [Unknown, Busy, Proof, Stale, Protocol, Checksum, Cancelled, Expired, Store, Stopped]
            .into_iter()
            .find(|code| *code as u16 == number)
            .unwrap_or(Other)
    }
}

impl SessionError {
    /// The code that tells the other end about this error.
    pub fn code(&self) -> FailCode {
        match self {
            SessionError::Busy { .. } => FailCode::Busy,
            SessionError::Known(_) | SessionError::Unknown(_) => FailCode::Unknown,
            SessionError::Expired { .. } => FailCode::Expired,
            SessionError::Refused { code, .. } => *code,
            SessionError::Proof(_) | SessionError::Revoked { .. } => FailCode::Proof,
            SessionError::Frame(FrameError::PayloadChecksum { .. } | FrameError::HeadChecksum { .. }) => {
                FailCode::Checksum
            }
            SessionError::Stale { .. } => FailCode::Stale,
            SessionError::Frame(_)
            | SessionError::Protocol(_)
            | SessionError::Coverage(_)
            | SessionError::Incomplete { .. } => FailCode::Protocol,
            SessionError::Kv(_) | SessionError::Device(_) => FailCode::Store,
            SessionError::Cancelled | SessionError::Dropped => FailCode::Cancelled,
            SessionError::Stopped => FailCode::Stopped,
            SessionError::Plan(_)
            | SessionError::Invalid(_)
            | SessionError::Connect { .. }
            | SessionError::Lost { .. } => FailCode::Other,
        }
    }
}
