//! The session machines of all ranks on an imagined network: frames as bytes in queues, one event at a time in an order
//! drawn from a seed, and faults at moments of the test's choice. No threads, no sockets, no clock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::{KvExport, KvLanding, Piece, Sharding};
use kvtransfer::frame::{Head, Kind};
use kvtransfer::layout::{Part, bytes, cut, describe, plan, relay};
use kvtransfer::limits::{HEADER_BYTES, PEER_BASE, RESUMES_MAX};
use kvtransfer::message::Message;
use kvtransfer::session::{
    Action, Handshake, Outbox, Outcome, PairSpec, Receiving, Sending, parse, send::retryable,
};
use kvtransfer::{Close, Codec, Limits, SessionError, Summary};

use super::{CLOSE, Cache, Case, MemExport, MemLanding, Rng};

/// What goes wrong, at one moment, on a connection or at an end drawn from the seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// The connection breaks at once; of what is under way so many bytes arrive.
    Cut(usize),
    /// The sender's end closes after what is under way: end of stream without Done.
    Eof,
    /// The next frame to the receiver comes twice.
    Duplicate,
    /// The next frame to the receiver is lost, the connection stays.
    Skip,
    /// One bit of the next frame to the receiver flips.
    CorruptUp,
    /// One bit of the next frame to the sender flips.
    CorruptDown,
    /// The receiver cancels.
    CancelReceiver,
    /// The sender cancels.
    CancelSender,
    /// Nothing passes any more in either direction, and neither end hears of it.
    Hang,
    /// The receiver reads a frame now and then only.
    Slow,
    /// The receiver's process is another one: its sessions are unknown.
    RestartReceiver,
    /// The sender's process is gone.
    RestartSender,
    /// A sender of another attempt connects beside the right one.
    Race,
}

impl Fault {
    /// One of them.
    pub fn draw(rng: &mut Rng) -> Self {
        match rng.below(14) {
            0..=2 => Fault::Cut(rng.below(2000)),
            3 => Fault::Eof,
            4 => Fault::Duplicate,
            5 => Fault::Skip,
            6 => Fault::CorruptUp,
            7 => Fault::CorruptDown,
            8 => Fault::CancelReceiver,
            9 => Fault::CancelSender,
            10 => Fault::Hang,
            11 => Fault::Slow,
            12 => match rng.below(2) {
                0 => Fault::RestartReceiver,
                _ => Fault::RestartSender,
            },
            _ => Fault::Race,
        }
    }

    /// Whether sessions survive it.
    pub fn harmless(self) -> bool {
        matches!(self, Fault::None | Fault::Cut(_) | Fault::Eof | Fault::Hang | Fault::Slow | Fault::Race)
    }
}

/// Everything that a run depends on.
pub struct Setup {
    pub case: Case,
    pub seed: u64,
    /// With the number of events before each.
    pub faults: Vec<(usize, Fault)>,
    pub window_bytes: u64,
    pub frame_bytes: usize,
    /// Tokens of an export.
    pub chunk: u32,
    pub block_tokens: [u32; 2],
    /// Connections of each sender to each receiver.
    pub lanes: usize,
    /// Changes what one sender believes.
    pub lie: fn(&mut PairSpec),
}

/// How it went.
pub struct Report {
    pub receivers: Vec<Result<Summary, SessionError>>,
    /// Of prefill ranks and of ranks that pass planes on, as far as they began.
    pub senders: Vec<Outcome>,
    pub steps: usize,
}

/// One connection; both its ends.
struct Link {
    flow: usize,
    lane: usize,
    sending: Sending,
    /// The sender still listens to it.
    owned: bool,
    handshake: Option<Handshake>,
    up: VecDeque<Vec<u8>>,
    down: VecDeque<Vec<u8>>,
    /// Bytes that still arrive before the connection breaks.
    cut: Option<usize>,
    up_closed: bool,
    down_closed: bool,
    /// The receiver's end is done with it.
    shut: bool,
    hung: bool,
    slow: bool,
    began: Instant,
}

#[derive(Default)]
struct Lane {
    outbox: Outbox<(Piece, usize)>,
    link: Option<usize>,
    accepted: bool,
    late: bool,
    turns: u32,
    /// Since when it has no connection.
    since: Option<Instant>,
}

/// One sender and one receiver: what [`kvtransfer::Sender`] does with threads.
struct Flow {
    spec: PairSpec,
    receiver: usize,
    source: Source,
    queue: VecDeque<(Piece, usize)>,
    close: Option<Close>,
    lanes: Vec<Lane>,
    closing: Option<u16>,
    taken_bytes: u64,
    abort: Option<SessionError>,
    end: Option<Outcome>,
}

/// Where a flow's bytes come from.
enum Source {
    /// A prefill rank's cache.
    Export(MemExport),
    /// What this receiver has landed: it passes its share on to the others of its group.
    Landed(usize),
    /// Nothing: a sender that has no business here.
    Nothing,
}

struct Node {
    receiving: Receiving,
    landing: MemLanding,
    end: Option<Result<Summary, SessionError>>,
    /// Its process is another one.
    restarted: bool,
}

struct Sim<'s> {
    setup: &'s Setup,
    flows: Vec<Flow>,
    links: Vec<Link>,
    nodes: Vec<Node>,
    now: Instant,
    rng: Rng,
}

const STEPS_MAX: usize = 400_000;

/// Limits of a simulated sender and receiver.
fn limits(setup: &Setup) -> Limits {
    Limits { window_bytes: setup.window_bytes, resume: setup.case.deadline / 4, ..Limits::default() }
}

/// Plays a session to its end. Panics when it does not end or a wrong byte is reported as landed.
pub fn run(setup: &Setup) -> Report {
    let mut sim = Sim::new(setup);
    let step = setup.case.deadline / 64;
    for steps in 0..STEPS_MAX {
        if sim.over() {
            return sim.report(steps);
        }
        for (_, fault) in setup.faults.iter().filter(|(at, _)| *at == steps) {
            sim.break_something(*fault);
        }
        if !sim.event() {
            // Nothing can happen but time passing.
            sim.now += step;
            sim.tick();
        } else if sim.rng.chance(64) {
            sim.now += step / 16;
            sim.tick();
        }
    }
    let flows: Vec<_> = sim.flows.iter().map(|flow| (&flow.spec.sender, flow.receiver, &flow.end)).collect();
    let nodes: Vec<_> = sim.nodes.iter().map(|node| &node.end).collect();
    panic!("no end, seed {} faults {:?}: {flows:?} {nodes:?}", setup.seed, setup.faults);
}

impl<'s> Sim<'s> {
    fn new(setup: &'s Setup) -> Self {
        let case = &setup.case;
        let plan = plan(&case.from, &case.to).expect("a plan");
        let now = Instant::now();
        let nowhere = vec![Vec::new(); case.to.len()];
        let idle = kvtransfer::Sender::new(Limits::default());
        let nodes = (0..case.to.len())
            .map(|rank| Node {
                receiving: Receiving::new(case.expect_in(rank, &nowhere, &idle), &limits(setup), now),
                landing: MemLanding::new(&case.to[rank], case.tokens.clone(), setup.block_tokens[1], true),
                end: None,
                restarted: false,
            })
            .collect();
        let mut rng = Rng::new(setup.seed);
        let mut flows = Vec::new();
        for sender in 0..case.from.len() {
            let cache = Arc::new(Cache::full(&case.from[sender], case.tokens.clone(), setup.block_tokens[0]));
            for receiver in plan.receivers_of(sender) {
                let senders = plan.senders_of(receiver).into_iter().map(|sender| sender as u32).collect();
                let parts = plan.between(sender, receiver);
                let mut spec = pair_spec(setup, sender as u32, senders, receiver, &parts);
                (setup.lie)(&mut spec);
                let queue = shuffled(setup, &parts, &mut rng);
                let tokens = case.tokens.clone();
                let export =
                    MemExport { layers: 0..plan.layers, tokens, direct: false, cache: cache.clone() };
                flows.push(Flow::new(
                    spec,
                    receiver,
                    Source::Export(export),
                    queue,
                    Some(CLOSE),
                    setup.lanes,
                ));
            }
        }
        for rank in 0..case.to.len() {
            let parts = relay(&case.to, rank);
            for receiver in (0..case.to.len()).filter(|other| *other != rank && !parts.is_empty()) {
                let parts: Vec<_> = parts.iter().filter(|part| part.receiver == receiver).cloned().collect();
                let sender = PEER_BASE + rank as u32;
                let spec = pair_spec(setup, sender, vec![sender], receiver, &parts);
                flows.push(Flow::new(
                    spec,
                    receiver,
                    Source::Landed(rank),
                    VecDeque::new(),
                    None,
                    setup.lanes,
                ));
            }
        }
        Sim { setup, flows, links: Vec::new(), nodes, now, rng }
    }

    /// Whether a flow may begin: a rank passes nothing on before its own senders have come.
    fn begun(&self, flow: &Flow) -> bool {
        match flow.source {
            Source::Landed(rank) => self.nodes[rank].receiving.begun(),
            _ => true,
        }
    }

    fn over(&self) -> bool {
        let ended = |flow: &Flow| {
            let never = match flow.source {
                Source::Landed(rank) => !self.begun(flow) && self.nodes[rank].end.is_some(),
                _ => false,
            };
            flow.end.is_some() || never
        };
        self.flows.iter().all(ended) && self.nodes.iter().all(|node| node.end.is_some())
    }

    fn report(self, steps: usize) -> Report {
        for node in &self.nodes {
            if matches!(node.end, Some(Ok(_))) {
                assert!(node.landing.cache.is_right(), "wrong bytes were reported as landed");
            }
        }
        for flow in &self.flows {
            if matches!(flow.end, Some(Outcome::Acknowledged(_))) {
                let node = &self.nodes[flow.receiver];
                assert!(matches!(node.end, Some(Ok(_))), "acknowledged, but not landed");
            }
        }
        let real = |flow: Flow| if let Source::Nothing = flow.source { None } else { flow.end };
        Report {
            receivers: self.nodes.into_iter().map(|node| node.end.expect("ended")).collect(),
            senders: self.flows.into_iter().filter_map(real).collect(),
            steps,
        }
    }

    /// One event; `false` when none can happen.
    fn event(&mut self) -> bool {
        let lanes: usize = self.flows.iter().map(|flow| flow.lanes.len()).sum();
        let count = lanes + 3 * self.links.len();
        let start = self.rng.below(count.max(1));
        (0..count).map(|turn| (start + turn) % count).any(|at| match at.checked_sub(lanes) {
            None => self.connect_nth(at),
            Some(at) => match (at % 3, at / 3) {
                (0, link) => self.send(link),
                (1, link) => self.deliver_up(link),
                (_, link) => self.deliver_down(link),
            },
        })
    }

    fn connect_nth(&mut self, mut at: usize) -> bool {
        for flow in 0..self.flows.len() {
            let lanes = self.flows[flow].lanes.len();
            if at < lanes {
                return self.connect(flow, at);
            }
            at -= lanes;
        }
        false
    }

    /// Another connection for a lane that has none.
    fn connect(&mut self, index: usize, lane: usize) -> bool {
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
            hung: false,
            slow: false,
            began: self.now,
        };
        link.say(&hello);
        self.links.push(link);
        true
    }

    /// The sender's next data frame, or its Done.
    fn send(&mut self, at: usize) -> bool {
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

    fn deliver_up(&mut self, at: usize) -> bool {
        let link = &mut self.links[at];
        if link.hung || link.shut || link.slow && self.rng.below(32) > 0 && link.cut.is_none() {
            return false;
        }
        let Some(mut frame) = link.up.pop_front() else {
            if link.up_closed {
                self.lose(at, "closed");
                return true;
            }
            return false;
        };
        let mut whole = true;
        if let Some(left) = &mut link.cut {
            whole = frame.len() <= *left;
            frame.truncate(*left);
            *left -= frame.len();
        }
        if link.down_closed {
            return true; // the receiver reads and forgets
        }
        if !whole {
            self.part(at, &frame);
            self.lose(at, "cut");
            return true;
        }
        let actions = match self.receive(at, &frame) {
            Ok(actions) => actions,
            Err(error) => {
                // A connection that proved nothing fails alone; one that did takes its session along.
                let receiver = self.flows[self.links[at].flow].receiver;
                let proven =
                    self.links[at].handshake.is_none() && self.nodes[receiver].receiving.has(at as u64);
                let mut actions = Vec::new();
                if proven {
                    actions = self.nodes[receiver].receiving.fail(error.clone());
                }
                actions.push(Action::Close(at as u64, error));
                actions
            }
        };
        self.act(self.flows[self.links[at].flow].receiver, actions);
        true
    }

    /// A part of a frame has come, and no more will: a socket read puts it in place before it knows.
    fn part(&mut self, at: usize, part: &[u8]) {
        let node = &mut self.nodes[self.flows[self.links[at].flow].receiver];
        let Some((head, payload)) = part.split_first_chunk::<HEADER_BYTES>() else { return };
        let Ok(head) = Head::decode(head) else { return };
        if head.kind != Kind::Data || node.restarted {
            return;
        }
        if let Ok(piece) = node.receiving.data(at as u64, &head, self.now) {
            assert!(node.end.is_none(), "a session that is over takes data");
            let mut torn = payload.to_vec();
            torn.resize(head.payload_bytes as usize, 0xa5);
            node.landing.write(&piece, &torn).expect("a place");
        }
    }

    /// The receiver's end of a connection is over.
    fn lose(&mut self, at: usize, reason: &str) {
        let link = &mut self.links[at];
        (link.shut, link.down_closed, link.up_closed) = (true, true, true);
        link.up.clear();
        let receiver = self.flows[link.flow].receiver;
        let actions = self.nodes[receiver].receiving.lost(at as u64, reason, self.now);
        self.act(receiver, actions);
    }

    fn receive(&mut self, at: usize, frame: &[u8]) -> Result<Vec<Action>, SessionError> {
        let conn = at as u64;
        let link = &mut self.links[at];
        let receiver = self.flows[link.flow].receiver;
        let node = &mut self.nodes[receiver];
        let (head, payload) = frame.split_first_chunk().expect("a whole head");
        let head = Head::decode(head)?;
        if head.payload_bytes as usize != payload.len() {
            return Err(SessionError::Protocol("out of step".into()));
        }
        if node.restarted {
            return Err(SessionError::Unknown(self.setup.case.session));
        }
        let crc = crc32c::crc32c(payload);
        if head.kind == Kind::Data {
            return Ok(match node.receiving.data(conn, &head, self.now) {
                // In place, before the checksum is known: what a socket read does.
                Ok(piece) => {
                    assert!(node.end.is_none(), "a session that is over takes data");
                    node.landing.write(&piece, payload).expect("a place");
                    let result = head.check_payload(crc).map_err(SessionError::from);
                    let pass = result.is_ok() && node.receiving.relays() && !node.receiving.is_peer(conn);
                    let actions = node.receiving.payload(conn, result, self.now);
                    if pass {
                        self.pass(receiver, &piece);
                    }
                    actions
                }
                Err(actions) => actions,
            });
        }
        match parse(&head, payload, crc)? {
            Message::Hello(hello) => {
                let mut nonce = [0; 32];
                nonce[..8].copy_from_slice(&self.rng.next().to_le_bytes());
                let (handshake, challenge) = Handshake::begin(*hello, node.receiving.ticket(), nonce);
                link.handshake = Some(handshake);
                Ok(vec![Action::Send(conn, challenge)])
            }
            Message::Proof { proof } => {
                let handshake = link.handshake.take().ok_or(SessionError::Protocol("no hello".into()))?;
                node.receiving.prove(conn, &handshake, &proof, self.now).or_else(|rejected| {
                    let mut actions = rejected.actions;
                    actions.push(Action::Close(conn, rejected.error));
                    Ok(actions)
                })
            }
            other => Ok(node.receiving.message(conn, &head, other, self.now)),
        }
    }

    /// Queues what `rank` has landed for the other ranks, if it is its to pass on.
    fn pass(&mut self, rank: usize, piece: &Piece) {
        let plane = &self.nodes[rank].landing.cache.spec.planes[piece.plane];
        let (replicated, token_bytes) = (plane.sharding == Sharding::Replicated, plane.token_bytes());
        for flow in self.flows.iter_mut().filter(|flow| replicated && flow.relays(rank)) {
            flow.queue.push_back((piece.clone(), token_bytes));
        }
    }

    fn act(&mut self, receiver: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(conn, message) => self.links[conn as usize].answer(&message),
                Action::Close(conn, error) => {
                    let link = &mut self.links[conn as usize];
                    if !link.down_closed {
                        link.answer(&Message::fail(error.code(), &error.to_string()));
                        link.down_closed = true;
                    }
                }
                Action::Drop(conn) => self.lose(conn as usize, "another connection came"),
                Action::Relayed(close) => {
                    self.flows
                        .iter_mut()
                        .filter(|flow| flow.relays(receiver))
                        .for_each(|flow| flow.close = Some(close));
                }
                Action::End(result) => {
                    if result.is_err() {
                        self.give_up(|flow| flow.relays(receiver), &SessionError::Cancelled);
                    }
                    let end = &mut self.nodes[receiver].end;
                    assert!(end.is_none(), "ended twice");
                    *end = Some(result);
                }
            }
        }
    }

    /// Senders give up: they say so where they can.
    fn give_up(&mut self, which: impl Fn(&Flow) -> bool, error: &SessionError) {
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

    fn deliver_down(&mut self, at: usize) -> bool {
        let now = self.now;
        let link = &mut self.links[at];
        if link.hung || !link.owned {
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
    fn look(&mut self, at: usize) {
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

    fn tick(&mut self) {
        for at in 0..self.links.len() {
            if self.links[at].owned {
                let message = self.links[at].sending.tick(self.now);
                self.links[at].reply(message);
                let link = &mut self.links[at];
                if !link.sending.accepted() && self.now >= link.began + self.setup.case.deadline / 8 {
                    link.sending.lost("no answer to the handshake");
                }
                self.look(at);
            }
        }
        for receiver in 0..self.nodes.len() {
            let actions = self.nodes[receiver].receiving.tick(self.now);
            self.act(receiver, actions);
        }
    }

    fn break_something(&mut self, fault: Fault) {
        if self.links.is_empty() {
            return;
        }
        let at = self.rng.below(self.links.len());
        let bit = self.rng.next() as usize;
        let flip = |frame: Option<&mut Vec<u8>>| {
            if let Some(frame) = frame {
                let bit = bit % (frame.len() * 8);
                frame[bit / 8] ^= 1 << (bit % 8);
            }
        };
        let link = &mut self.links[at];
        let (flow, receiver) = (link.flow, self.flows[link.flow].receiver);
        match fault {
            Fault::None => {}
            Fault::Cut(bytes) => {
                link.cut.get_or_insert(bytes);
                link.down.clear();
                (link.up_closed, link.down_closed) = (true, link.down_closed);
                link.sending.lost("reset");
                self.look(at);
            }
            Fault::Eof => {
                link.sending.lost("closed here");
                self.look(at);
            }
            Fault::Duplicate => {
                if let Some(front) = link.up.front().cloned() {
                    link.up.push_front(front);
                }
            }
            Fault::Skip => drop(link.up.pop_front()),
            Fault::CorruptUp => flip(link.up.front_mut()),
            Fault::CorruptDown => flip(link.down.front_mut()),
            Fault::CancelReceiver => {
                let actions = self.nodes[receiver].receiving.fail(SessionError::Cancelled);
                self.act(receiver, actions);
            }
            Fault::CancelSender => {
                let sender = self.flows[flow].spec.sender;
                self.give_up(|flow| flow.spec.sender == sender, &SessionError::Cancelled);
            }
            Fault::Hang => link.hung = true,
            Fault::Slow => link.slow = true,
            Fault::RestartReceiver => {
                let actions = self.nodes[receiver].receiving.fail(SessionError::Stopped);
                self.act(receiver, actions);
                self.nodes[receiver].restarted = true;
                for at in 0..self.links.len() {
                    if self.flows[self.links[at].flow].receiver == receiver {
                        self.links[at].down.clear();
                        self.lose(at, "restarted");
                    }
                }
            }
            Fault::RestartSender => {
                let sender = self.flows[flow].spec.sender;
                for at in 0..self.links.len() {
                    let link = &mut self.links[at];
                    if self.flows[link.flow].spec.sender == sender {
                        (link.owned, link.up_closed) = (false, true);
                    }
                }
                for flow in self.flows.iter_mut().filter(|flow| flow.spec.sender == sender) {
                    flow.end.get_or_insert(Outcome::Failed(SessionError::Stopped));
                }
            }
            Fault::Race => {
                let spec = &self.flows[flow].spec;
                let spec = PairSpec { attempt: spec.attempt + 1, ..spec.clone() };
                self.flows.push(Flow::new(spec, receiver, Source::Nothing, VecDeque::new(), None, 1));
            }
        }
    }
}

impl Flow {
    fn new(
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
    fn relays(&self, rank: usize) -> bool {
        matches!(self.source, Source::Landed(from) if from == rank)
    }
}

impl Link {
    fn say(&mut self, message: &Message) {
        let payload = message.encode();
        let head = self.sending.head(message, &payload);
        self.up.push_back([&head.encode()[..], &payload].concat());
    }

    /// Says what the sender's machine wants said, and closes when that was a farewell.
    fn reply(&mut self, message: Option<Message>) {
        if let Some(message) = message {
            self.say(&message);
        }
        if matches!(self.sending.outcome(), Some(Outcome::Failed(_))) {
            self.up_closed = true;
        }
    }

    fn answer(&mut self, message: &Message) {
        if !self.down_closed {
            let payload = message.encode();
            let head = Head::control(message.kind(), 0, 0, &payload);
            self.down.push_back([&head.encode()[..], &payload].concat());
        }
    }
}

fn pair_spec(setup: &Setup, sender: u32, senders: Vec<u32>, receiver: usize, parts: &[Part]) -> PairSpec {
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
fn shuffled(setup: &Setup, parts: &[Part], rng: &mut Rng) -> VecDeque<(Piece, usize)> {
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

/// A deadline that no event alone exceeds.
pub const DEADLINE: Duration = Duration::from_secs(8);
