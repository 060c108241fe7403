//! The receiving end of a rank process.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use backend::{KvLanding, KvSpec};

use crate::{Close, Limits, SessionError, SessionId, Ticket};

/// Owns the KV port of one rank process. A clone is another handle on the same port.
#[derive(Clone)]
pub struct Receiver;

/// A session that is about to come.
#[derive(Clone, Debug)]
pub struct Expect {
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
    /// What this rank holds.
    pub spec: KvSpec,
    /// Positions that land; those of the landing.
    pub tokens: Range<u32>,
    /// Longest silence: until the first sender has proved itself, and then of every sender.
    pub deadline: Duration,
}

/// The end of an expected session. The landing is back; nobody writes to it any more.
#[derive(Debug)]
pub struct Landed<L> {
    /// What was given to [`Receiver::expect`].
    pub landing: L,
    /// `Ok`: every byte is there, verified. Otherwise nothing of it may be used.
    pub result: Result<Summary, SessionError>,
    /// When the last frame came (the beginning of the wait, if none came).
    pub last_frame: Instant,
}

/// A session that landed whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Payload bytes.
    pub bytes: u64,
    /// Data frames.
    pub frames: u64,
    /// How the prompt's computation ended.
    pub close: Close,
}

/// A session that is not expected after all; the landing is handed back.
pub struct Refused<L> {
    /// Why.
    pub error: SessionError,
    /// What was given to [`Receiver::expect`].
    pub landing: L,
}

impl<L> fmt::Debug for Refused<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Refused({})", self.error)
    }
}

impl<L> fmt::Display for Refused<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Receiver {
    /// Listens on `addr` (port 0: any free one).
    pub fn bind(_addr: SocketAddr, _limits: Limits) -> std::io::Result<Self> {
        Ok(Receiver)
    }

    /// The address listened on.
    pub fn local_addr(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    /// Waits for a session in the background. `done` is called exactly once, on a thread of the receiver, when the
    /// session has ended in whatever way. Errors hand the landing back at once and `done` is dropped.
    pub fn expect<L: KvLanding + 'static>(
        &self,
        expect: Expect,
        landing: L,
        _done: impl FnOnce(Landed<L>) + Send + 'static,
    ) -> Result<(), Refused<L>> {
        Err(Refused { error: SessionError::Known(expect.session), landing })
    }

    /// Ends a session; its `done` is called with [`SessionError::Cancelled`] unless it had ended before.
    pub fn cancel(&self, _session: &SessionId) {}

    /// Closes the port, ends all sessions and waits for their landings to be handed back (at most 5 s).
    pub fn stop(self) {}
}
