//! The sending session: one lane of one sender rank to one receiver, over one connection. Pure; driven by the pairs of
//! [`crate::Sender`]. A connection that fails may be replaced: a new machine, a new nonce, the lane's counts so far.

use std::ops::Range;
use std::time::{Duration, Instant};

use backend::Piece;

use crate::codec::Codec;
use crate::frame::{Head, Kind};
use crate::message::{Hello, Message};
use crate::proof::{End, prove, verify};
use crate::session::millis;
use crate::{Close, FailCode, SessionError, SessionId, Ticket};

/// What one sender rank has to say to one receiver.
#[derive(Clone, Debug)]
pub struct PairSpec {
    /// The session.
    pub session: SessionId,
    /// Its secret.
    pub ticket: Ticket,
    /// The router's id of the request.
    pub request: String,
    /// The request's attempt.
    pub attempt: u32,
    /// Epoch of the decode group.
    pub epoch: u64,
    /// This sender's rank.
    pub sender: u32,
    /// All senders that connect to this receiver, ascending.
    pub senders: Vec<u32>,
    /// Positions that are sent.
    pub tokens: Range<u32>,
    /// Bytes of cache of this pair in all.
    pub bytes: u64,
    /// The receiver's spec in words.
    pub spec: String,
    /// Longest silence of the receiver.
    pub deadline: Duration,
    /// Payload of a frame that is aimed at.
    pub frame_bytes: usize,
}

/// What a connection begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneStart {
    /// Which lane of the pair.
    pub lane: u16,
    /// Counts the lane's connections from 0.
    pub connection: u32,
    /// Data frames that the lane has sent; the receiver says how many of them have landed.
    pub frames: u64,
    /// Payload bytes of them.
    pub bytes: u64,
}

/// How a pair ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The receiver has everything, of all its senders.
    Acknowledged(Instant),
    /// It has not.
    Failed(SessionError),
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    /// Hello is sent, the receiver's challenge is awaited.
    Greeting,
    /// Our proof is sent, the first credit is awaited.
    Proving,
    /// Data may be sent within credit.
    Open,
    /// Done is sent, the acknowledgement is awaited.
    Closing,
    /// See [`Outcome`].
    Over(Outcome),
}

/// A session at one sender rank, towards one receiver.
#[derive(Debug)]
pub struct Sending {
    pair: PairSpec,
    start: LaneStart,
    hello: Vec<u8>,
    state: State,
    peer: String,
    /// The peer has proved that it holds the ticket.
    met: bool,
    number: u64,
    limit_bytes: u64,
    frame_bytes_max: usize,
    sent_bytes: u64,
    received_bytes: u64,
    received_frames: u64,
    frames: u64,
    heard: Instant,
    pinged: Instant,
    /// Since when credit has not sufficed for the next frame.
    starved: Option<Instant>,
}

impl Sending {
    /// A session on a connection to `peer`, and its first message.
    pub fn new(
        pair: PairSpec,
        start: LaneStart,
        peer: &str,
        nonce: [u8; 32],
        now: Instant,
    ) -> (Self, Message) {
        let hello = Message::Hello(Box::new(Hello {
            session: pair.session,
            epoch: pair.epoch,
            attempt: pair.attempt,
            sender: pair.sender,
            lane: start.lane,
            connection: start.connection,
            senders: pair.senders.clone(),
            tokens: pair.tokens.clone(),
            bytes: pair.bytes,
            nonce,
            request: pair.request.clone(),
            spec: pair.spec.clone(),
        }));
        let send = Sending {
            start,
            hello: hello.encode(),
            state: State::Greeting,
            peer: peer.to_owned(),
            met: false,
            number: 0,
            limit_bytes: 0,
            frame_bytes_max: pair.frame_bytes,
            sent_bytes: 0,
            received_bytes: 0,
            received_frames: 0,
            frames: 0,
            heard: now,
            pinged: now,
            starved: None,
            pair,
        };
        (send, hello)
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            State::Over(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Whether the receiver has accepted this sender.
    pub fn accepted(&self) -> bool {
        matches!(self.state, State::Open | State::Closing)
    }

    /// Whether the session's own receiver, and nobody else at its address, has refused it.
    pub fn refused(&self) -> bool {
        self.met && matches!(&self.state, State::Over(Outcome::Failed(SessionError::Refused { .. })))
    }

    /// Payload bytes sent on the lane.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Data frames sent on the lane.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Data frames that the receiver has reported as landed.
    pub fn received_frames(&self) -> u64 {
        self.received_frames
    }

    /// Payload bytes that the receiver has reported as landed.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// When the receiver last said something.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// Whether the receiver owes something: word of bytes that are sent, or the acknowledgement.
    pub fn owed(&self) -> bool {
        self.accepted() && (self.received_bytes < self.sent_bytes || self.state == State::Closing)
    }

    /// Payload bytes that a frame may have, once the receiver has said so.
    pub fn frame_bytes(&self) -> Option<usize> {
        (self.state == State::Open).then_some(self.frame_bytes_max)
    }

    /// Whether a frame of `payload_bytes` may be sent now. If not, the receiver has the deadline to grant more.
    pub fn may_send(&mut self, payload_bytes: usize, now: Instant) -> bool {
        let may = self.credit_bytes() >= payload_bytes as u64;
        self.starved = if may { None } else { self.starved.or(Some(now)) };
        may
    }

    fn credit_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.sent_bytes)
    }

    /// The head of a frame with `message`; frames leave in the order of their heads.
    pub fn head(&mut self, message: &Message, payload: &[u8]) -> Head {
        Head::control(message.kind(), self.pair.session.tag(), self.next_number(), payload)
    }

    /// The head of a data frame, within credit.
    pub fn data(&mut self, piece: &Piece, codec: Codec, payload_bytes: usize, payload_crc: u32) -> Head {
        debug_assert!(self.state == State::Open && payload_bytes as u64 <= self.credit_bytes());
        self.sent_bytes += payload_bytes as u64;
        self.frames += 1;
        Head {
            kind: Kind::Data,
            tag: self.pair.session.tag(),
            number: self.next_number(),
            layer: piece.layer as u32,
            plane: piece.plane as u32,
            heads: piece.heads.start as u32..piece.heads.end as u32,
            tokens: piece.tokens.clone(),
            codec,
            payload_bytes: payload_bytes as u32,
            payload_crc,
        }
    }

    fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number - 1
    }

    /// A frame of the receiver; what to answer.
    pub fn message(&mut self, message: Message, now: Instant) -> Option<Message> {
        if self.outcome().is_some() {
            return None;
        }
        self.heard = now;
        match (self.state.clone(), message) {
            (_, Message::Fail { code, reason }) => {
                self.end(SessionError::Refused { peer: self.peer.clone(), code, reason });
                None
            }
            (State::Greeting, Message::Challenge { nonce, proof }) => {
                if !verify(&self.pair.ticket, End::Receiver, &self.hello, &nonce, &proof) {
                    return self.fail(SessionError::Proof(self.peer.clone()));
                }
                (self.state, self.met) = (State::Proving, true);
                Some(Message::Proof { proof: prove(&self.pair.ticket, End::Sender, &self.hello, &nonce) })
            }
            (
                State::Proving | State::Open | State::Closing,
                Message::Credit { limit_bytes, received_bytes, received_frames, frame_bytes },
            ) => {
                if self.state == State::Proving {
                    // A lane that goes on begins behind what has landed of it.
                    let (frames, bytes) = (self.start.frames, self.start.bytes);
                    if received_frames > frames || received_bytes > bytes {
                        return self.fail(SessionError::Protocol(format!(
                            "{received_frames} frames of {received_bytes} bytes reported, {frames} of {bytes} sent"
                        )));
                    }
                    (self.frames, self.sent_bytes) = (received_frames, received_bytes);
                    self.state = State::Open;
                    self.frame_bytes_max = self.frame_bytes_max.min(frame_bytes as usize);
                }
                if limit_bytes > self.limit_bytes {
                    self.limit_bytes = limit_bytes;
                    self.starved = None;
                }
                self.received(received_frames, received_bytes)
            }
            (State::Open | State::Closing, Message::Pong { received_bytes, received_frames }) => {
                self.received(received_frames, received_bytes)
            }
            // Open: a lane that came when all was sent.
            (State::Open | State::Closing, Message::Ack { bytes }) => {
                if bytes != self.sent_bytes {
                    let sent = self.sent_bytes;
                    return self
                        .fail(SessionError::Protocol(format!("{bytes} of {sent} bytes acknowledged")));
                }
                (self.received_frames, self.received_bytes) = (self.frames, bytes);
                self.state = State::Over(Outcome::Acknowledged(now));
                None
            }
            (state, message) => {
                let kind = message.kind();
                self.fail(SessionError::Protocol(format!("{kind:?} of {} while {state:?}", self.peer)))
            }
        }
    }

    fn received(&mut self, frames: u64, bytes: u64) -> Option<Message> {
        if bytes > self.sent_bytes || frames > self.frames {
            let (sent, of) = (self.sent_bytes, self.frames);
            return self.fail(SessionError::Protocol(format!(
                "{frames} frames of {bytes} bytes reported, {of} of {sent} sent"
            )));
        }
        self.received_bytes = self.received_bytes.max(bytes);
        self.received_frames = self.received_frames.max(frames);
        None
    }

    /// Everything was sent, `pair_bytes` of cache on all `lanes`: the Done, or a Fail when it was not everything.
    pub fn done(&mut self, close: Close, lanes: u16, pair_bytes: u64) -> Option<Message> {
        if self.state != State::Open {
            return None;
        }
        if pair_bytes != self.pair.bytes {
            let (got_bytes, want_bytes) = (pair_bytes, self.pair.bytes);
            return self.fail(SessionError::Incomplete { got_bytes, want_bytes });
        }
        self.state = State::Closing;
        Some(Message::Done { frames: self.frames, bytes: self.sent_bytes, lanes, close })
    }

    /// Looks at the deadline and keeps the receiver's lease alive.
    pub fn tick(&mut self, now: Instant) -> Option<Message> {
        if self.outcome().is_some() {
            return None;
        }
        // An answer to the last ping is overdue: the connection is gone without a word, another may do.
        if self.accepted() && now >= self.heard + self.silence() {
            self.lost(&format!("nothing came for {} ms", millis(self.silence())));
            return None;
        }
        let late = |since: Instant| now >= since + self.pair.deadline;
        let what = match (late(self.heard), self.starved.is_some_and(late)) {
            (true, _) => Some("nothing came"),
            (false, true) => Some("no credit came"),
            (false, false) => None,
        };
        if let Some(what) = what {
            let (what, ms) = (format!("{what} from {}", self.peer), millis(self.pair.deadline));
            return self.fail(SessionError::Expired { what, ms });
        }
        if !self.accepted() || now < self.pinged + self.ping_every() {
            return None;
        }
        self.pinged = now;
        Some(Message::Ping)
    }

    /// When [`Sending::tick`] may find something.
    pub fn next_tick(&self) -> Instant {
        let expiry = self.starved.map_or(self.heard, |since| since.min(self.heard)) + self.pair.deadline;
        if !self.accepted() {
            return expiry;
        }
        expiry.min(self.pinged + self.ping_every()).min(self.heard + self.silence())
    }

    /// Longest silence on an accepted connection.
    fn silence(&self) -> Duration {
        self.pair.deadline / 2
    }

    /// Several pings per silence: one may be late without harm.
    fn ping_every(&self) -> Duration {
        self.pair.deadline / 8
    }

    /// The connection ended.
    pub fn lost(&mut self, reason: &str) {
        if self.outcome().is_none() {
            self.end(SessionError::Lost { peer: self.peer.clone(), reason: reason.to_owned() });
        }
    }

    /// Ends the session from this side: what to tell the receiver, once.
    pub fn fail(&mut self, error: SessionError) -> Option<Message> {
        if self.outcome().is_some() {
            return None;
        }
        let message = Message::fail(error.code(), &error.to_string());
        self.end(error);
        Some(message)
    }

    fn end(&mut self, error: SessionError) {
        self.state = State::Over(Outcome::Failed(error));
    }
}

/// Whether another connection may succeed where this one failed before it was accepted.
pub fn retryable(error: &SessionError) -> bool {
    matches!(
        error,
        SessionError::Connect { .. }
            | SessionError::Lost { .. }
            | SessionError::Refused { code: FailCode::Busy, .. }
    )
}
