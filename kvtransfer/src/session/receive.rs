//! The receiving session: all senders of one landing. Pure; driven by the slots of [`crate::Receiver`].

mod admit;
mod deadline;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use backend::Piece;

use crate::codec::Row;
use crate::coverage::Coverage;
use crate::frame::Head;
use crate::layout::relay;
use crate::limits::{PAYLOAD_BYTES_MAX, PEER_BASE};
use crate::message::Message;
use crate::session::lane::Lane;
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
    /// Close the connection without a word: another one takes its place once its thread has let go.
    Drop(ConnId),
    /// All of this rank's own senders are done: its share of the replicated planes is whole, tell the other ranks.
    Relayed(Close),
    /// The session is over. Comes once.
    End(Result<Summary, SessionError>),
}

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
    /// How long a lane may be without a connection.
    resume: Duration,
    /// Connections that took the place of others.
    resumed: u32,
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
    /// Cache that it sends.
    total_bytes: u64,
    lanes: BTreeMap<u16, Lane>,
}

/// A connection that is not let into the session: why, and what to do about it.
#[derive(Debug)]
pub struct Rejected {
    /// Concerns the connection alone.
    pub error: SessionError,
    /// See [`Action`].
    pub actions: Vec<Action>,
}

impl From<SessionError> for Rejected {
    fn from(error: SessionError) -> Self {
        Rejected { error, actions: Vec::new() }
    }
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
            resume: limits.resume.min(expect.deadline),
            resumed: 0,
            senders: Vec::new(),
            pairs: BTreeMap::new(),
            began: now,
            first_pair: None,
            last_frame: now,
            expect: Expect { peers: None, ..expect },
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

    /// Whether one connection brings everything (then payloads may be read straight into the landing).
    pub fn single(&self) -> bool {
        self.peers.is_empty()
            && self.senders.len() == 1
            && self.pairs.values().all(|pair| pair.lanes.len() == 1)
    }

    /// Whether `conn` has proved itself and not been lost since.
    pub fn has(&self, conn: ConnId) -> bool {
        self.lanes().any(|lane| lane.conn == Some(conn))
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
        self.pairs.range(PEER_BASE..).any(|(_, pair)| pair.lanes.values().any(|lane| lane.conn == Some(conn)))
    }

    /// The head of a data frame: takes its place in the landing, where the shell puts the payload before it calls
    /// [`Receiving::payload`]. `Err`: the session has failed, the payload must not be landed.
    pub fn data(&mut self, conn: ConnId, head: &Head, now: Instant) -> Result<Piece, Vec<Action>> {
        self.proven(conn)?;
        self.claim(conn, head, now).map_err(|error| self.fail(error))
    }

    fn claim(&mut self, conn: ConnId, head: &Head, now: Instant) -> Result<Piece, SessionError> {
        let frame_bytes = self.frame_bytes;
        let (rank, lane) = self.heard(conn, head, now)?;
        if lane.done.is_some() {
            return Err(SessionError::Protocol(format!("data of sender rank {rank} after its done")));
        }
        let payload_bytes = u64::from(head.payload_bytes);
        let claimed_bytes = lane.claimed_bytes + payload_bytes;
        if payload_bytes > frame_bytes || claimed_bytes > lane.granted_bytes {
            return Err(SessionError::Protocol(format!(
                "frame of {payload_bytes} bytes (at most {frame_bytes}) to {claimed_bytes} of {} bytes of credit",
                lane.granted_bytes
            )));
        }
        lane.claimed_bytes = claimed_bytes;
        let piece = Piece {
            layer: head.layer as usize,
            plane: head.plane as usize,
            heads: head.heads.start as usize..head.heads.end as usize,
            tokens: head.tokens.clone(),
        };
        let bytes = self.coverage.claim(&piece)?;
        let row = Row::of(&self.expect.spec.planes[piece.plane]);
        let wire_bytes = head.codec.wire_bytes(row, piece.heads.len(), piece.tokens.len()) as u64;
        if wire_bytes != payload_bytes {
            return Err(SessionError::Protocol(format!(
                "payload of {payload_bytes} bytes for a place of {wire_bytes}"
            )));
        }
        if let Some((_, lane)) = self.lane(conn) {
            lane.under_way = Some((piece.clone(), bytes, payload_bytes));
        }
        self.last_frame = now;
        Ok(piece)
    }

    /// The payload of the last data frame of `conn` is in its place, or could not be put there.
    pub fn payload(&mut self, conn: ConnId, result: Result<(), SessionError>, now: Instant) -> Vec<Action> {
        if self.over() {
            return Vec::new();
        }
        if let Err(error) = result {
            return self.fail(error);
        }
        let (window_bytes, frame_bytes) = (self.window_bytes, self.frame_bytes);
        self.last_frame = now;
        let Some((rank, lane)) = self.lane(conn) else { return Vec::new() };
        let Some((_, bytes, payload_bytes)) = lane.under_way.take() else { return Vec::new() };
        lane.heard = now;
        lane.received_bytes += payload_bytes;
        lane.landed_bytes += bytes;
        lane.frames += 1;
        let total_bytes = self.pairs.get(&rank).map_or(0, |pair| pair.total_bytes);
        let Some((_, lane)) = self.lane(conn) else { return Vec::new() };
        if !lane.grant(window_bytes, total_bytes) {
            return Vec::new();
        }
        vec![Action::Send(conn, lane.credit(frame_bytes))]
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
        let (rank, lane) = self.heard(conn, head, now)?;
        match message {
            Message::Ping => Ok(vec![Action::Send(conn, lane.pong())]),
            Message::Fail { code, reason } => {
                Err(SessionError::Refused { peer: format!("sender rank {rank}"), code, reason })
            }
            Message::Done { frames, bytes, lanes, close } => {
                if lane.done.is_some() {
                    return Err(SessionError::Protocol(format!("two dones of sender rank {rank}")));
                }
                let (got, want) = ((frames, bytes), (lane.frames, lane.received_bytes));
                if got != want {
                    return Err(SessionError::Protocol(format!(
                        "sender rank {rank} counts {} frames of {} bytes, {} of {} came",
                        got.0, got.1, want.0, want.1
                    )));
                }
                lane.done = Some((close, lanes));
                self.last_frame = now;
                self.whole(rank)?;
                let mut actions = Vec::new();
                if rank < PEER_BASE && self.relays() && self.done(&self.senders) {
                    actions.push(Action::Relayed(close));
                }
                actions.extend(self.finish(close)?);
                Ok(actions)
            }
            other => Err(SessionError::Protocol(format!("{:?} of sender rank {rank}", other.kind()))),
        }
    }

    /// Checks a sender's bytes once all its lanes are done.
    fn whole(&self, rank: u32) -> Result<(), SessionError> {
        let Some(pair) = self.pairs.get(&rank) else { return Ok(()) };
        let got_bytes = pair.lanes.values().map(|lane| lane.landed_bytes).sum();
        let want_bytes = pair.total_bytes;
        match pair.done() && got_bytes != want_bytes {
            true => Err(SessionError::Incomplete { got_bytes, want_bytes }),
            false => Ok(()),
        }
    }

    /// Ends the session when every sender is done.
    fn finish(&mut self, close: Close) -> Result<Vec<Action>, SessionError> {
        let other = self.lanes().filter_map(|lane| lane.done).find(|(other, _)| *other != close);
        if let Some((other, _)) = other {
            return Err(SessionError::Protocol(format!(
                "senders disagree on the first token: {other:?}, {close:?}"
            )));
        }
        if !self.done(&self.senders) || !self.done(&self.peers) || self.senders.is_empty() {
            return Ok(Vec::new());
        }
        let bytes: u64 = self.lanes().map(|lane| lane.landed_bytes).sum();
        if !self.coverage.complete() || bytes != self.coverage.wanted_bytes() {
            let want_bytes = self.coverage.wanted_bytes();
            return Err(SessionError::Incomplete { got_bytes: bytes, want_bytes });
        }
        self.state = State::Landed;
        self.coverage.forget();
        let peers = || self.pairs.range(PEER_BASE..).flat_map(|(_, pair)| pair.lanes.values());
        let summary = Summary {
            bytes,
            gathered_bytes: peers().map(|lane| lane.landed_bytes).sum(),
            wire_bytes: self.lanes().map(|lane| lane.received_bytes).sum(),
            frames: self.lanes().map(|lane| lane.frames).sum(),
            resumed: self.resumed,
            close,
        };
        let mut actions = vec![Action::End(Ok(summary))];
        let ack = |lane: &Lane| {
            lane.conn.map(|conn| Action::Send(conn, Message::Ack { bytes: lane.received_bytes }))
        };
        actions.extend(self.lanes().filter_map(ack));
        Ok(actions)
    }

    fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.pairs.values().flat_map(|pair| pair.lanes.values())
    }

    fn done(&self, ranks: &[u32]) -> bool {
        ranks.iter().all(|rank| self.pairs.get(rank).is_some_and(Pair::done))
    }

    /// A connection ended, and nobody writes to the landing on its behalf any more. The lane may come back over another;
    /// a frame that was under way will come again.
    pub fn lost(&mut self, conn: ConnId, reason: &str, now: Instant) -> Vec<Action> {
        if self.over() {
            return Vec::new();
        }
        let Some((_, lane)) = self.lane(conn) else { return Vec::new() };
        (lane.conn, lane.lost) = (None, Some((now, reason.to_owned())));
        lane.claimed_bytes = lane.received_bytes;
        if let Some((piece, ..)) = lane.under_way.take() {
            self.coverage.give_back(&piece);
        }
        self.tick(now)
    }

    /// Ends the session from this side. Nothing happens when it is over.
    pub fn fail(&mut self, error: SessionError) -> Vec<Action> {
        if self.over() {
            return Vec::new();
        }
        let conns = self.lanes().filter_map(|lane| lane.conn);
        let mut actions: Vec<Action> = conns.map(|conn| Action::Close(conn, error.clone())).collect();
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

    /// What an unproven connection says concerns it alone.
    fn proven(&mut self, conn: ConnId) -> Result<(), Vec<Action>> {
        let session = self.expect.session;
        let stranger = || vec![Action::Close(conn, SessionError::Unknown(session))];
        self.lane(conn).map(|_| ()).ok_or_else(stranger)
    }

    fn lane(&mut self, conn: ConnId) -> Option<(u32, &mut Lane)> {
        self.pairs.iter_mut().find_map(|(rank, pair)| {
            Some((*rank, pair.lanes.values_mut().find(|lane| lane.conn == Some(conn))?))
        })
    }

    /// Notes a frame of `conn` and checks that it is its next one.
    fn heard(&mut self, conn: ConnId, head: &Head, now: Instant) -> Result<(u32, &mut Lane), SessionError> {
        if let State::Failed(error) = &self.state {
            return Err(error.clone());
        }
        let (session, tag) = (self.expect.session, self.expect.session.tag());
        let (rank, lane) = self.lane(conn).ok_or(SessionError::Unknown(session))?;
        if head.tag != tag {
            return Err(SessionError::Protocol(format!("frame of session {:016x} in {tag:016x}", head.tag)));
        }
        if head.number != lane.next_number {
            let next = lane.next_number;
            return Err(SessionError::Protocol(format!(
                "frame {} of sender rank {rank} after {next}",
                head.number
            )));
        }
        lane.next_number += 1;
        lane.heard = now;
        Ok((rank, lane))
    }
}

impl Pair {
    /// Whether as many lanes are done as the sender says there are.
    fn done(&self) -> bool {
        let mut done = self.lanes.values().filter_map(|lane| lane.done);
        let Some((_, lanes)) = done.next() else { return false };
        done.try_fold(1, |count, (_, other)| (other == lanes).then_some(count + 1)) == Some(lanes)
    }

    /// Lanes from which something has to come: not those that are gone after their Done, nor those that brought nothing
    /// while others do.
    fn open(&self) -> impl Iterator<Item = &Lane> {
        let others = self.done() || self.lanes.values().any(|lane| lane.conn.is_some());
        self.lanes
            .values()
            .filter(move |lane| lane.conn.is_some() || lane.done.is_none() && !(others && lane.frames == 0))
    }
}
