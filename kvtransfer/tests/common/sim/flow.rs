//! One sender and one receiver, from the sender's end: what [`kvtransfer::Sender`] does with threads.

use std::collections::VecDeque;
use std::time::Instant;

use backend::{KvExport, Piece};
use kvtransfer::frame::Head;
use kvtransfer::layout::{Part, bytes, cut, describe};
use kvtransfer::limits::RESUMES_MAX;
use kvtransfer::sender::watch::Watch;
use kvtransfer::session::{Outbox, Outcome, PairSpec, Sending, parse, send::retryable};
use kvtransfer::{Close, Codec, SessionError};

use super::link::Link;
use super::{MemExport, Rng, Setup, Sim, limits};

#[derive(Default)]
pub(super) struct Lane {
    pub(super) outbox: Outbox<(Piece, usize)>,
    pub(super) link: Option<usize>,
    pub(super) accepted: bool,
    pub(super) late: bool,
    pub(super) turns: u32,
    /// Since when it has no connection.
    pub(super) since: Option<Instant>,
}

/// A sender rank towards one receiver.
pub(super) struct Flow {
    pub(super) spec: PairSpec,
    pub(super) receiver: usize,
    pub(super) source: Source,
    pub(super) queue: VecDeque<(Piece, usize)>,
    pub(super) close: Option<Close>,
    pub(super) lanes: Vec<Lane>,
    pub(super) closing: Option<u16>,
    pub(super) taken_bytes: u64,
    pub(super) abort: Option<SessionError>,
    pub(super) end: Option<Outcome>,
}

/// Where a flow's bytes come from.
pub(super) enum Source {
    /// A prefill rank's cache.
    Export(MemExport),
    /// What this receiver has landed: it passes its share on to the others of its group.
    Landed(usize),
    /// Nothing: a sender that has no business here.
    Nothing,
}

impl Flow {
    pub(super) fn new(
        spec: PairSpec,
        receiver: usize,
        source: Source,
        queue: VecDeque<(Piece, usize)>,
        close: Option<Close>,
        lanes: usize,
    ) -> Self {
        let lanes = (0..lanes).map(|_| Lane::default()).collect();
        let (closing, abort, end) = (None, None, None);
        Flow { spec, receiver, source, queue, close, lanes, closing, taken_bytes: 0, abort, end }
    }

    /// Whether it carries what `rank` passes on.
    pub(super) fn relays(&self, rank: usize) -> bool {
        matches!(self.source, Source::Landed(from) if from == rank)
    }
}

impl Sim<'_> {
    /// Another connection for a lane that has none.
    pub(super) fn connect(&mut self, index: usize, lane: usize) -> bool {
        let flow = &self.flows[index];
        let idle =
            flow.end.is_some() || flow.lanes[lane].link.is_some() || flow.lanes[lane].turns > RESUMES_MAX;
        if idle || !self.begun(flow) || flow.abort.is_some() {
            return false;
        }
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        let flow = &mut self.flows[index];
        let start = flow.lanes[lane].outbox.start(lane as u16);
        let (sending, hello) = Sending::new(flow.spec.clone(), start, "receiver", nonce, self.now);
        flow.lanes[lane].link = Some(self.links.len());
        let mut link = Link {
            flow: index,
            lane,
            sending,
            owned: true,
            handshake: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            cut: None,
            up_closed: false,
            down_closed: false,
            shut: false,
            hung: None,
            watch: Watch::new(self.now),
            slow: false,
            began: self.now,
        };
        link.say(&hello);
        self.links.push(link);
        true
    }

    /// The sender's next data frame, or its Done.
    pub(super) fn send(&mut self, at: usize) -> bool {
        let link = &mut self.links[at];
        let flow = &mut self.flows[link.flow];
        if !link.owned || link.sending.outcome().is_some() || flow.end.is_some() {
            return false;
        }
        let Some(frame_bytes) = link.sending.frame_bytes() else { return false };
        let accepted = flow.lanes.iter().filter(|lane| lane.accepted).count() as u16;
        let lane = &mut flow.lanes[link.lane];
        let (piece, bytes) = if let Some(bytes) = lane.outbox.pending() {
            if !link.sending.may_send(bytes as usize, self.now) {
                return false;
            }
            lane.outbox.again().expect("pending")
        } else if let Some((rect, token_bytes)) = flow.queue.front_mut() {
            let mut rest = rect.clone();
            let piece = cut(&mut rest, *token_bytes, frame_bytes).expect("not empty");
            let bytes = piece.tokens.len() * *token_bytes;
            if !link.sending.may_send(bytes, self.now) {
                return false;
            }
            *rect = rest;
            if rect.tokens.is_empty() {
                flow.queue.pop_front();
            }
            flow.taken_bytes += bytes as u64;
            lane.outbox.sent((piece.clone(), bytes), bytes as u64);
            (piece, bytes)
        } else {
            let Some(close) = flow.close.filter(|_| !lane.late) else { return false };
            let lanes = *flow.closing.get_or_insert(accepted);
            let Some(message) = link.sending.done(close, lanes, flow.taken_bytes) else { return false };
            link.say(&message);
            self.look(at);
            return true;
        };
        let mut payload = Vec::new();
        match &flow.source {
            Source::Export(export) => export.read(&piece, &mut payload).expect("readable"),
            Source::Landed(rank) => self.nodes[*rank].landing.cache.read(&piece, &mut payload),
            Source::Nothing => {}
        }
        let head = link.sending.data(&piece, Codec::Exact, bytes, crc32c::crc32c(&payload));
        link.up.push_back([&head.encode()[..], &payload].concat());
        true
    }

    pub(super) fn deliver_down(&mut self, at: usize) -> bool {
        let now = self.now;
        let link = &mut self.links[at];
        if link.hung.is_some() || !link.owned {
            return false;
        }
        let Some(frame) = link.down.pop_front() else {
            if link.down_closed && link.sending.outcome().is_none() {
                link.sending.lost("closed");
                link.up_closed = true;
                self.look(at);
                return true;
            }
            return false;
        };
        let (head, payload) = frame.split_first_chunk().expect("a whole head");
        let message = Head::decode(head).and_then(|head| {
            if head.payload_bytes as usize == payload.len() {
                parse(&head, payload, crc32c::crc32c(payload))
            } else {
                Err(kvtransfer::frame::FrameError::Message("out of step"))
            }
        });
        let before = link.sending.accepted();
        let reply = match message {
            Ok(message) => link.sending.message(message, now),
            Err(error) => link.sending.fail(error.into()),
        };
        link.reply(reply);
        let flow = &mut self.flows[link.flow];
        let lane = &mut flow.lanes[link.lane];
        if link.sending.accepted() && !before {
            lane.late |= flow.closing.is_some() && !lane.accepted;
            (lane.accepted, lane.since) = (true, None);
            lane.outbox.resume(link.sending.received_frames());
        } else {
            lane.outbox.landed(link.sending.received_frames());
        }
        self.look(at);
        true
    }

    /// What follows from a connection's end for its flow: an end, or another connection.
    pub(super) fn look(&mut self, at: usize) {
        let link = &mut self.links[at];
        let Some(outcome) = link.sending.outcome().cloned() else { return };
        if !std::mem::take(&mut link.owned) {
            return;
        }
        link.up_closed = true;
        let flow = &mut self.flows[link.flow];
        let others = flow.lanes.iter().any(|lane| lane.accepted);
        let lane = &mut flow.lanes[link.lane];
        lane.link = None;
        let error = match outcome {
            Outcome::Acknowledged(_) => {
                flow.end.get_or_insert(outcome);
                return;
            }
            Outcome::Failed(error) => error,
        };
        let resumes = retryable(&error) && flow.abort.is_none();
        let since = *lane.since.get_or_insert(self.now);
        // Before it is accepted a lane may try for its deadline, after that for the time to come back.
        let patience = if lane.accepted { limits(self.setup).resume } else { flow.spec.deadline };
        if lane.accepted && matches!(error, SessionError::Lost { .. }) {
            lane.turns += 1;
        }
        if !resumes || self.now >= since + patience || lane.turns > RESUMES_MAX {
            if lane.accepted || link.lane == 0 && !others {
                let index = link.flow;
                self.fail(index, error);
            } else {
                lane.turns = RESUMES_MAX + 1; // the others carry everything
            }
        }
    }

    /// A flow has failed; with it the rank whose share it passes on.
    fn fail(&mut self, index: usize, error: SessionError) {
        let rank = match self.flows[index].source {
            Source::Landed(rank) => Some(rank),
            _ => None,
        };
        if self.flows[index].end.is_some() {
            return;
        }
        self.flows[index].end = Some(Outcome::Failed(error.clone()));
        for at in self.flows[index].lanes.iter().filter_map(|lane| lane.link).collect::<Vec<_>>() {
            let message = self.links[at].sending.fail(error.clone());
            self.links[at].reply(message);
        }
        if let Some(rank) = rank {
            let actions = self.nodes[rank].receiving.fail(error);
            self.act(rank, actions);
        }
    }

    /// Senders give up: they say so where they can.
    pub(super) fn give_up(&mut self, which: impl Fn(&Flow) -> bool, error: &SessionError) {
        for index in 0..self.flows.len() {
            if !which(&self.flows[index]) || self.flows[index].end.is_some() {
                continue;
            }
            self.flows[index].abort.get_or_insert(error.clone());
            for at in self.flows[index].lanes.iter().filter_map(|lane| lane.link).collect::<Vec<_>>() {
                let message = self.links[at].sending.fail(error.clone());
                self.links[at].reply(message);
            }
            self.flows[index].end = Some(Outcome::Failed(error.clone()));
        }
    }
}

pub(super) fn pair_spec(
    setup: &Setup,
    sender: u32,
    senders: Vec<u32>,
    receiver: usize,
    parts: &[Part],
) -> PairSpec {
    let case = &setup.case;
    PairSpec {
        session: case.session,
        ticket: case.ticket.clone(),
        request: case.request.clone(),
        attempt: case.attempt,
        epoch: case.epoch,
        sender,
        senders,
        tokens: case.tokens.clone(),
        bytes: bytes(parts, case.to[receiver].layers, &case.tokens),
        spec: describe(&case.to[receiver]),
        deadline: case.deadline,
        frame_bytes: setup.frame_bytes,
    }
}

/// Chunks of all layers in any order, as an engine with several steps in flight may push them.
pub(super) fn shuffled(setup: &Setup, parts: &[Part], rng: &mut Rng) -> VecDeque<(Piece, usize)> {
    let case = &setup.case;
    let mut rects = Vec::new();
    for layer in 0..case.from[0].layers {
        for start in case.tokens.clone().step_by(setup.chunk as usize) {
            let tokens = start..(start + setup.chunk).min(case.tokens.end);
            for part in parts {
                rects.extend(part.pieces(layer, &tokens).map(|piece| (piece, part.token_bytes)));
            }
        }
    }
    for last in (1..rects.len()).rev() {
        rects.swap(last, rng.below(last + 1));
    }
    rects.into()
}
