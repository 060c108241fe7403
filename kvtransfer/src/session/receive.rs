//! The receiving session: all senders of one landing. Pure; driven by the slots of [`crate::Receiver`].

use std::collections::BTreeMap;
use std::time::Instant;

use backend::Piece;

use crate::coverage::Coverage;
use crate::frame::Head;
use crate::layout::{describe, relay};
use crate::limits::{PAYLOAD_BYTES_MAX, PEER_BASE};
use crate::message::{Hello, Message};
use crate::session::handshake::Handshake;
use crate::session::millis;
use crate::{Close, Expect, Limits, SessionError, Summary, Ticket};

/// Names a connection among those of one receiver.
pub type ConnId = u64;

/// What the shell has to do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send on that connection.
    Send(ConnId, Message),
    /// Tell that connection's sender why, then close it.
    Close(ConnId, SessionError),
    /// All of this rank's own senders are done: its share of the replicated planes is whole, tell the other ranks.
    Relayed(Close),
    /// The session is over. Comes once.
    End(Result<Summary, SessionError>),
}

/// Frames that a sender has used when it is proven: Hello and Proof.
const HANDSHAKE_FRAMES: u64 = 2;

/// A session at its receiver.
#[derive(Debug)]
pub struct Receiving {
    expect: Expect,
    coverage: Coverage,
    /// How far credit runs ahead of what has landed, per sender.
    window_bytes: u64,
    /// Largest payload taken.
    frame_bytes: u64,
    state: State,
    /// Senders that connect, as the first one said; empty before.
    senders: Vec<u32>,
    /// Ranks of the own group that pass replicated planes on, as sender ranks.
    peers: Vec<u32>,
    /// Proven senders.
    pairs: BTreeMap<u32, Pair>,
    began: Instant,
    first_pair: Option<Instant>,
    last_frame: Instant,
}

#[derive(Debug)]
enum State {
    /// No sender is proven yet.
    Expecting,
    /// At least one is; some bytes or some Done are missing.
    Receiving,
    /// All is there and acknowledged.
    Landed,
    /// Nothing of it may be used.
    Failed(SessionError),
}

/// One proven sender.
#[derive(Debug)]
struct Pair {
    conn: ConnId,
    heard: Instant,
    next_number: u64,
    total_bytes: u64,
    granted_bytes: u64,
    /// Announced by heads of frames.
    claimed_bytes: u64,
    /// Landed with a right checksum.
    received_bytes: u64,
    frames: u64,
    close: Option<Close>,
}

impl Receiving {
    /// Waits for the senders of `expect`.
    pub fn new(expect: Expect, limits: &Limits, now: Instant) -> Self {
        let row = expect.spec.planes.iter().map(|plane| plane.token_bytes() as u64).max().unwrap_or(0);
        let window_bytes = limits.window_bytes.max(4 * row);
        let peers = match &expect.peers {
            Some(peers) if !relay(&peers.specs(), peers.rank).is_empty() => (0..peers.targets.len())
                .filter(|rank| *rank != peers.rank)
                .map(|rank| PEER_BASE + rank as u32)
                .collect(),
            _ => Vec::new(),
        };
        Receiving {
            peers,
            coverage: Coverage::new(&expect.spec, expect.tokens.clone()),
            window_bytes,
            // Half a window, so that the next frame is under way while one is landing.
            frame_bytes: (window_bytes / 2).min(PAYLOAD_BYTES_MAX as u64),
            state: State::Expecting,
            senders: Vec::new(),
            pairs: BTreeMap::new(),
            began: now,
            first_pair: None,
            last_frame: now,
            expect,
        }
    }

    /// The session's secret.
    pub fn ticket(&self) -> &Ticket {
        &self.expect.ticket
    }

    /// When the last frame came.
    pub fn last_frame(&self) -> Instant {
        self.last_frame
    }

    /// Whether it has ended well.
    pub fn landed(&self) -> bool {
        matches!(self.state, State::Landed)
    }

    /// Whether it has ended.
    pub fn over(&self) -> bool {
        matches!(self.state, State::Landed | State::Failed(_))
    }

    /// Whether one sender sends everything (then payloads may be read straight into the landing).
    pub fn single(&self) -> bool {
        self.senders.len() == 1 && self.peers.is_empty()
    }

    /// Whether this rank passes replicated planes on to others of its group.
    pub fn relays(&self) -> bool {
        !self.peers.is_empty()
    }

    /// Whether the session's own senders have begun.
    pub fn begun(&self) -> bool {
        !self.senders.is_empty()
    }

    /// Whether `conn` is another rank of the own group.
    pub fn is_peer(&self, conn: ConnId) -> bool {
        self.pairs.iter().any(|(rank, pair)| pair.conn == conn && *rank >= PEER_BASE)
    }

    /// A connection presents its proof. An error concerns the connection alone, not the session.
    pub fn prove(
        &mut self,
        conn: ConnId,
        handshake: &Handshake,
        proof: &[u8; 32],
        now: Instant,
    ) -> Result<Vec<Action>, SessionError> {
        let hello = &handshake.hello;
        if !handshake.proves(&self.expect.ticket, proof) {
            return Err(SessionError::Proof(format!("sender rank {}", hello.sender)));
        }
        if self.over() {
            return Err(SessionError::Unknown(self.expect.session));
        }
        self.same(hello)?;
        if self.pairs.contains_key(&hello.sender) {
            return Err(SessionError::Protocol(format!("sender rank {} is connected already", hello.sender)));
        }
        let announced =
            self.pairs.values().map(|pair| pair.total_bytes).fold(hello.bytes, u64::saturating_add);
        if announced > self.coverage.wanted_bytes() {
            let got = announced.to_string();
            return Err(stale("number of bytes", got, self.coverage.wanted_bytes().to_string()));
        }
        self.state = State::Receiving;
        if hello.sender < PEER_BASE {
            self.senders = hello.senders.clone();
        }
        self.first_pair.get_or_insert(now);
        let mut pair = Pair {
            conn,
            heard: now,
            next_number: HANDSHAKE_FRAMES,
            total_bytes: hello.bytes,
            granted_bytes: 0,
            claimed_bytes: 0,
            received_bytes: 0,
            frames: 0,
            close: None,
        };
        pair.granted_bytes = pair.total_bytes.min(self.window_bytes);
        let credit = pair.credit(self.frame_bytes);
        self.pairs.insert(hello.sender, pair);
        Ok(vec![Action::Send(conn, credit)])
    }

    /// Whether the sender means this very session.
    fn same(&self, hello: &Hello) -> Result<(), SessionError> {
        let expect = &self.expect;
        let text = |range: &std::ops::Range<u32>| format!("{}..{}", range.start, range.end);
        let pairs = [
            ("request", hello.request.clone(), expect.request.clone()),
            ("attempt", hello.attempt.to_string(), expect.attempt.to_string()),
            ("epoch", hello.epoch.to_string(), expect.epoch.to_string()),
            ("token range", text(&hello.tokens), text(&expect.tokens)),
            ("cache", hello.spec.clone(), describe(&expect.spec)),
        ];
        for (what, got, want) in pairs {
            if got != want {
                return Err(stale(what, got, want));
            }
        }
        if hello.sender >= PEER_BASE && hello.senders == [hello.sender] && self.peers.contains(&hello.sender)
        {
            return Ok(());
        }
        let ascending = hello.senders.windows(2).all(|pair| pair[0] < pair[1]);
        let strange = hello.senders.last().is_none_or(|last| *last >= PEER_BASE);
        if !ascending || strange || !hello.senders.contains(&hello.sender) {
            return Err(SessionError::Protocol(format!(
                "sender rank {} of {:?}",
                hello.sender, hello.senders
            )));
        }
        if !self.senders.is_empty() && hello.senders != self.senders {
            return Err(stale(
                "list of senders",
                format!("{:?}", hello.senders),
                format!("{:?}", self.senders),
            ));
        }
        Ok(())
    }

    /// The head of a data frame: takes its place in the landing, where the shell puts the payload before it calls
    /// [`Receiving::payload`]. `Err`: the session has failed, the payload must not be landed.
    pub fn data(&mut self, conn: ConnId, head: &Head, now: Instant) -> Result<Piece, Vec<Action>> {
        self.proven(conn)?;
        self.claim(conn, head, now).map_err(|error| self.fail(error))
    }

    fn claim(&mut self, conn: ConnId, head: &Head, now: Instant) -> Result<Piece, SessionError> {
        let frame_bytes = self.frame_bytes;
        let (rank, pair) = self.heard(conn, head, now)?;
        if pair.close.is_some() {
            return Err(SessionError::Protocol(format!("data of sender rank {rank} after its done")));
        }
        let payload_bytes = u64::from(head.payload_bytes);
        pair.claimed_bytes += payload_bytes;
        if payload_bytes > frame_bytes || pair.claimed_bytes > pair.granted_bytes {
            return Err(SessionError::Protocol(format!(
                "frame of {payload_bytes} bytes (at most {frame_bytes}) to {} of {} bytes of credit",
                pair.claimed_bytes, pair.granted_bytes
            )));
        }
        let piece = Piece {
            layer: head.layer as usize,
            plane: head.plane as usize,
            heads: head.heads.start as usize..head.heads.end as usize,
            tokens: head.tokens.clone(),
        };
        let bytes = self.coverage.claim(&piece)?;
        if bytes != payload_bytes {
            return Err(SessionError::Protocol(format!(
                "payload of {payload_bytes} bytes for a place of {bytes}"
            )));
        }
        self.last_frame = now;
        Ok(piece)
    }

    /// The payload of the last data frame of `conn` is in its place, or could not be put there.
    pub fn payload(
        &mut self,
        conn: ConnId,
        bytes: u64,
        result: Result<(), SessionError>,
        now: Instant,
    ) -> Vec<Action> {
        if self.over() {
            return Vec::new();
        }
        if let Err(error) = result {
            return self.fail(error);
        }
        let (window_bytes, frame_bytes) = (self.window_bytes, self.frame_bytes);
        self.last_frame = now;
        let Some((_, pair)) = self.pair(conn) else { return Vec::new() };
        pair.heard = now;
        pair.received_bytes += bytes;
        pair.frames += 1;
        // A quarter window at a time: what is left unasked for is always room for one more frame.
        let limit = (pair.received_bytes + window_bytes).min(pair.total_bytes);
        let last = limit == pair.total_bytes && pair.granted_bytes < limit;
        if !last && limit - pair.granted_bytes < window_bytes / 4 {
            return Vec::new();
        }
        if limit == pair.granted_bytes {
            return Vec::new();
        }
        pair.granted_bytes = limit;
        vec![Action::Send(conn, pair.credit(frame_bytes))]
    }

    /// Any other frame of a proven sender.
    pub fn message(&mut self, conn: ConnId, head: &Head, message: Message, now: Instant) -> Vec<Action> {
        if self.over() {
            return Vec::new();
        }
        if let Err(actions) = self.proven(conn) {
            return actions;
        }
        self.take(conn, head, message, now).unwrap_or_else(|error| self.fail(error))
    }

    fn take(
        &mut self,
        conn: ConnId,
        head: &Head,
        message: Message,
        now: Instant,
    ) -> Result<Vec<Action>, SessionError> {
        let (rank, pair) = self.heard(conn, head, now)?;
        match message {
            Message::Ping => {
                Ok(vec![Action::Send(conn, Message::Pong { received_bytes: pair.received_bytes })])
            }
            Message::Fail { code, reason } => {
                Err(SessionError::Refused { peer: format!("sender rank {rank}"), code, reason })
            }
            Message::Done { frames, bytes, close } => {
                if pair.close.is_some() {
                    return Err(SessionError::Protocol(format!("two dones of sender rank {rank}")));
                }
                let (got, want) = ((frames, bytes), (pair.frames, pair.received_bytes));
                if got != want {
                    return Err(SessionError::Protocol(format!(
                        "sender rank {rank} counts {} frames of {} bytes, {} of {} came",
                        got.0, got.1, want.0, want.1
                    )));
                }
                if bytes != pair.total_bytes {
                    return Err(SessionError::Incomplete { got_bytes: bytes, want_bytes: pair.total_bytes });
                }
                pair.close = Some(close);
                self.last_frame = now;
                let own = rank < PEER_BASE && self.done(&self.senders);
                let mut actions = Vec::new();
                if own && self.relays() {
                    actions.push(Action::Relayed(close));
                }
                actions.extend(self.finish(close)?);
                Ok(actions)
            }
            other => Err(SessionError::Protocol(format!("{:?} of sender rank {rank}", other.kind()))),
        }
    }

    /// Ends the session when every sender is done.
    fn finish(&mut self, close: Close) -> Result<Vec<Action>, SessionError> {
        if let Some(other) = self.pairs.values().filter_map(|pair| pair.close).find(|other| *other != close) {
            return Err(SessionError::Protocol(format!(
                "senders disagree on the first token: {other:?}, {close:?}"
            )));
        }
        if !self.done(&self.senders) || !self.done(&self.peers) || self.senders.is_empty() {
            return Ok(Vec::new());
        }
        let received: u64 = self.pairs.values().map(|pair| pair.received_bytes).sum();
        if !self.coverage.complete() || received != self.coverage.wanted_bytes() {
            let want_bytes = self.coverage.wanted_bytes();
            return Err(SessionError::Incomplete { got_bytes: received, want_bytes });
        }
        self.state = State::Landed;
        let frames = self.pairs.values().map(|pair| pair.frames).sum();
        let gathered_bytes = self.pairs.range(PEER_BASE..).map(|(_, pair)| pair.received_bytes).sum();
        let mut actions = vec![Action::End(Ok(Summary { bytes: received, gathered_bytes, frames, close }))];
        actions.extend(
            self.pairs
                .values()
                .map(|pair| Action::Send(pair.conn, Message::Ack { bytes: pair.received_bytes })),
        );
        Ok(actions)
    }

    fn done(&self, ranks: &[u32]) -> bool {
        ranks.iter().all(|rank| self.pairs.get(rank).is_some_and(|pair| pair.close.is_some()))
    }

    /// A connection ended.
    pub fn lost(&mut self, conn: ConnId, reason: &str) -> Vec<Action> {
        match self.pair(conn) {
            Some((rank, _)) => {
                let peer = format!("sender rank {rank}");
                self.fail(SessionError::Lost { peer, reason: reason.to_owned() })
            }
            None => Vec::new(),
        }
    }

    /// Ends the session from this side. Nothing happens when it is over.
    pub fn fail(&mut self, error: SessionError) -> Vec<Action> {
        if self.over() {
            return Vec::new();
        }
        let mut actions: Vec<Action> =
            self.pairs.values().map(|pair| Action::Close(pair.conn, error.clone())).collect();
        actions.push(Action::End(Err(error.clone())));
        self.state = State::Failed(error);
        actions
    }

    /// A sender's frame came too late: what its connection is to be told.
    pub fn verdict(&self) -> Option<SessionError> {
        match &self.state {
            State::Failed(error) => Some(error.clone()),
            _ => None,
        }
    }

    /// Looks at the deadlines.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        if now < self.next_tick() {
            return Vec::new();
        }
        let deadline = self.expect.deadline;
        let expired = |what: String| SessionError::Expired { what, ms: millis(deadline) };
        let silent = self.pairs.iter().find(|(_, pair)| now >= pair.heard + deadline);
        let missing = self.missing();
        self.fail(match (silent, missing) {
            (Some((rank, _)), _) => expired(format!("nothing came from sender rank {rank}")),
            (None, Some(rank)) => expired(format!("sender rank {rank} did not connect")),
            (None, None) => expired("no sender connected".to_owned()),
        })
    }

    /// When [`Receiving::tick`] may find something.
    pub fn next_tick(&self) -> Instant {
        let deadline = self.expect.deadline;
        let Some(first) = self.first_pair else { return self.began + deadline };
        let heard = self.pairs.values().map(|pair| pair.heard);
        let missing = (self.senders.is_empty() || self.missing().is_some()).then_some(first);
        heard.chain(missing).min().unwrap_or(first) + deadline
    }

    /// A sender that has not connected, of those that are known.
    fn missing(&self) -> Option<&u32> {
        self.senders.iter().chain(&self.peers).find(|rank| !self.pairs.contains_key(rank))
    }

    /// What an unproven connection says concerns it alone.
    fn proven(&mut self, conn: ConnId) -> Result<(), Vec<Action>> {
        let session = self.expect.session;
        let stranger = || vec![Action::Close(conn, SessionError::Unknown(session))];
        self.pair(conn).map(|_| ()).ok_or_else(stranger)
    }

    fn pair(&mut self, conn: ConnId) -> Option<(u32, &mut Pair)> {
        self.pairs.iter_mut().find(|(_, pair)| pair.conn == conn).map(|(rank, pair)| (*rank, pair))
    }

    /// Notes a frame of `conn` and checks that it is its next one.
    fn heard(&mut self, conn: ConnId, head: &Head, now: Instant) -> Result<(u32, &mut Pair), SessionError> {
        if let State::Failed(error) = &self.state {
            return Err(error.clone());
        }
        let (session, tag) = (self.expect.session, self.expect.session.tag());
        let (rank, pair) = self.pair(conn).ok_or(SessionError::Unknown(session))?;
        if head.tag != tag {
            return Err(SessionError::Protocol(format!("frame of session {:016x} in {tag:016x}", head.tag)));
        }
        if head.number != pair.next_number {
            let next = pair.next_number;
            return Err(SessionError::Protocol(format!(
                "frame {} of sender rank {rank} after {next}",
                head.number
            )));
        }
        pair.next_number += 1;
        pair.heard = now;
        Ok((rank, pair))
    }
}

impl Pair {
    fn credit(&self, frame_bytes: u64) -> Message {
        let (limit_bytes, received_bytes) = (self.granted_bytes, self.received_bytes);
        Message::Credit { limit_bytes, received_bytes, frame_bytes: frame_bytes as u32 }
    }
}

fn stale(what: &'static str, got: String, want: String) -> SessionError {
    SessionError::Stale { what, got, want }
}
