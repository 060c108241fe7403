//! Both ends of a session as pure state machines: (state, frame or tick or loss, now) -> messages and endings. The shells in
//! [`crate::receiver`] and [`crate::sender`] own threads and sockets; the simulator in `tests/` owns neither.
//!
//! ```text
//! sender                         receiver
//! Hello (who, which, nonce)  ->
//!                            <-  Challenge (nonce, proof)
//! Proof                      ->  bound to (request, attempt, epoch, tokens, spec), or refused
//!                            <-  Credit
//! Data ... Ping              ->  each cell once, checksum right   <- Credit ... Pong
//! Done (counts, close)       ->  counts right; all senders done; every cell covered
//!                            <-  Ack; the connection is free for another Hello
//! ```
//!
//! Either end may send Fail at any time; a silence or a bad frame ends the session the same way. A sender may have several
//! connections with a receiver, its lanes. One that is lost is replaced by another, which hears with its first Credit what
//! has landed and goes on behind it; only when none comes in time is the session lost too.

pub mod handshake;
mod lane;
pub mod outbox;
pub mod receive;
pub mod send;

use std::time::Duration;

use crate::frame::{FrameError, Head};
use crate::message::Message;

pub use handshake::Handshake;
pub use outbox::Outbox;
pub use receive::{Action, ConnId, Receiving, Rejected};
pub use send::{LaneStart, Outcome, PairSpec, Sending};

/// Checks a control payload and parses it: what both shells do with every frame that is not data.
pub fn parse(head: &Head, payload: &[u8], crc: u32) -> Result<Message, FrameError> {
    head.check_payload(crc)?;
    Message::decode(head.kind, payload)
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
