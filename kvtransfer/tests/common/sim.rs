//! The session machines of all ranks on an imagined network: frames as bytes in queues, one event at a time in an order
//! drawn from a seed, and at most one fault. No threads, no sockets, no clock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::{KvExport, KvLanding, Piece, Sharding};
use kvtransfer::frame::{Head, Kind};
use kvtransfer::layout::{Plan, bytes, cut, describe, plan, relay};
use kvtransfer::limits::PEER_BASE;
use kvtransfer::message::Message;
use kvtransfer::session::{Action, Handshake, Outcome, PairSpec, Receiving, Sending, parse};
use kvtransfer::{Close, Limits, SessionError, Summary};

use super::{CLOSE, Cache, Case, MemExport, MemLanding, Rng};

/// What goes wrong, on one connection, at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// The connection breaks; what is under way is lost.
    Cut,
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
    /// The peer falls silent, the connection stays.
    Hang,
}

pub const FAULTS: [Fault; 10] = [
    Fault::None,
    Fault::Cut,
    Fault::Eof,
    Fault::Duplicate,
    Fault::Skip,
    Fault::CorruptUp,
    Fault::CorruptDown,
    Fault::CancelReceiver,
    Fault::CancelSender,
    Fault::Hang,
];

/// Everything that a run depends on.
pub struct Setup {
    pub case: Case,
    pub seed: u64,
    pub fault: Fault,
    /// Events before the fault.
    pub fault_at: usize,
    pub window_bytes: u64,
    pub frame_bytes: usize,
    /// Tokens of an export.
    pub chunk: u32,
    pub block_tokens: [u32; 2],
    /// Changes what one sender believes.
    pub lie: fn(&mut PairSpec),
}

/// How it went.
pub struct Report {
    pub receivers: Vec<Result<Summary, SessionError>>,
    pub senders: Vec<Outcome>,
    pub steps: usize,
}

struct Link {
    receiver: usize,
    sending: Sending,
    rects: VecDeque<(Piece, usize)>,
    source: Source,
    /// Everything to send is queued.
    close: Option<Close>,
    /// Not yet said, of a rank that passes planes on.
    hello: Option<PairSpec>,
    handshake: Option<Handshake>,
    up: VecDeque<Vec<u8>>,
    down: VecDeque<Vec<u8>>,
    up_closed: bool,
    down_closed: bool,
    hung: bool,
}

/// Where a link's bytes come from.
enum Source {
    /// A prefill rank's cache.
    Export(MemExport),
    /// What this receiver has landed: it passes its share on to the others of its group.
    Landed(usize),
}

/// How a receiver's session ended.
type Landing = Result<Summary, SessionError>;

struct Sim {
    links: Vec<Link>,
    receivers: Vec<(Receiving, MemLanding, Option<Landing>)>,
    now: Instant,
    rng: Rng,
}

const STEPS_MAX: usize = 1_000_000;

/// Plays a session to its end. Panics when it does not end or a wrong byte is reported as landed.
pub fn run(setup: &Setup) -> Report {
    let mut sim = Sim::new(setup);
    let step = setup.case.deadline / 16;
    for steps in 0..STEPS_MAX {
        if sim.over() {
            return sim.report(steps);
        }
        if steps == setup.fault_at && setup.fault != Fault::None {
            sim.break_something(setup.fault);
        }
        if !sim.event() {
            // Nothing can happen but time passing.
            sim.now += step;
            sim.tick();
        } else if sim.rng.chance(64) {
            sim.now += step / 8;
            sim.tick();
        }
    }
    panic!("no end, seed {} fault {:?} at {}", setup.seed, setup.fault, setup.fault_at);
}

impl Sim {
    fn new(setup: &Setup) -> Self {
        let case = &setup.case;
        let plan = plan(&case.from, &case.to).expect("a plan");
        let now = Instant::now();
        let limits = Limits { window_bytes: setup.window_bytes, ..Limits::default() };
        let receivers = (0..case.to.len())
            .map(|rank| {
                let landing =
                    MemLanding::new(&case.to[rank], case.tokens.clone(), setup.block_tokens[1], true);
                let nowhere = vec![Vec::new(); case.to.len()];
                let expect = case.expect_in(rank, &nowhere, &kvtransfer::Sender::new(Limits::default()));
                (Receiving::new(expect, &limits, now), landing, None)
            })
            .collect();
        let mut rng = Rng::new(setup.seed);
        let mut links = Vec::new();
        for sender in 0..case.from.len() {
            let cache = Arc::new(Cache::full(&case.from[sender], case.tokens.clone(), setup.block_tokens[0]));
            for receiver in plan.receivers_of(sender) {
                links.push(link(setup, &plan, sender, receiver, cache.clone(), &mut rng, now));
            }
        }
        for rank in 0..case.to.len() {
            let parts = relay(&case.to, rank);
            for receiver in (0..case.to.len()).filter(|other| *other != rank && !parts.is_empty()) {
                let parts: Vec<_> = parts.iter().filter(|part| part.receiver == receiver).cloned().collect();
                let sender = PEER_BASE + rank as u32;
                let spec = PairSpec {
                    bytes: bytes(&parts, plan.layers, &case.tokens),
                    ..pair_spec(setup, sender, vec![sender], receiver)
                };
                let (sending, _) = Sending::new(spec.clone(), "receiver", [rank as u8; 32], now);
                let (rects, source) = (VecDeque::new(), Source::Landed(rank));
                let hello = Some(spec);
                links.push(Link { close: None, hello, ..Link::new(receiver, sending, rects, source) });
            }
        }
        Sim { links, receivers, now, rng }
    }

    fn over(&self) -> bool {
        let unopened = |link: &Link| match link.source {
            Source::Landed(rank) => link.hello.is_some() && matches!(self.receivers[rank].2, Some(Err(_))),
            Source::Export(_) => false,
        };
        self.links.iter().all(|link| link.sending.outcome().is_some() || unopened(link))
            && self.receivers.iter().all(|(_, _, end)| end.is_some())
    }

    fn report(self, steps: usize) -> Report {
        for (receiving, landing, end) in &self.receivers {
            if matches!(end, Some(Ok(_))) {
                assert!(receiving.landed());
                assert!(landing.cache.is_right(), "wrong bytes were reported as landed");
            }
        }
        for link in &self.links {
            if matches!(link.sending.outcome(), Some(Outcome::Acknowledged(_))) {
                assert!(
                    matches!(self.receivers[link.receiver].2, Some(Ok(_))),
                    "acknowledged, but not landed"
                );
            }
        }
        Report {
            receivers: self.receivers.into_iter().map(|(_, _, end)| end.expect("ended")).collect(),
            senders: self.links.iter().filter_map(|link| link.sending.outcome().cloned()).collect(),
            steps,
        }
    }

    /// One event of a random connection; `false` when none can happen.
    fn event(&mut self) -> bool {
        let (links, start, first) = (self.links.len(), self.rng.below(self.links.len()), self.rng.below(3));
        for turn in 0..links {
            let index = (start + turn) % links;
            for kind in 0..3 {
                let happened = match (first + kind) % 3 {
                    0 => self.send(index),
                    1 => self.deliver_up(index),
                    _ => self.deliver_down(index),
                };
                if happened {
                    return true;
                }
            }
        }
        false
    }

    /// The sender's next data frame, or its Done.
    fn send(&mut self, index: usize) -> bool {
        let link = &mut self.links[index];
        if let (Source::Landed(rank), true) = (&link.source, link.hello.is_some()) {
            let (receiving, _, end) = &self.receivers[*rank];
            if !receiving.begun() || matches!(end, Some(Err(_))) {
                return false;
            }
            let spec = link.hello.take().expect("not said");
            let (sending, hello) = Sending::new(spec, "receiver", [*rank as u8; 32], self.now);
            link.sending = sending;
            link.say(&hello);
            return true;
        }
        if link.hung || link.sending.outcome().is_some() {
            return false;
        }
        let Some(frame_bytes) = link.sending.frame_bytes() else { return false };
        let Some((rect, token_bytes)) = link.rects.front_mut() else {
            let Some(message) = link.close.and_then(|close| link.sending.done(close)) else { return false };
            link.say(&message);
            return true;
        };
        let mut rest = rect.clone();
        let piece = cut(&mut rest, *token_bytes, frame_bytes).expect("not empty");
        let bytes = piece.tokens.len() * *token_bytes;
        if !link.sending.may_send(bytes, self.now) {
            return false;
        }
        *rect = rest;
        if rect.tokens.is_empty() {
            link.rects.pop_front();
        }
        let mut payload = Vec::new();
        match &link.source {
            Source::Export(export) => export.read(&piece, &mut payload).expect("readable"),
            Source::Landed(rank) => self.receivers[*rank].1.cache.read(&piece, &mut payload),
        }
        let head = link.sending.data(&piece, bytes, crc32c::crc32c(&payload));
        link.up.push_back([&head.encode()[..], &payload].concat());
        true
    }

    fn deliver_up(&mut self, index: usize) -> bool {
        let link = &mut self.links[index];
        let Some(frame) = link.up.pop_front() else {
            if link.up_closed {
                let actions = self.receivers[self.links[index].receiver].0.lost(index as u64, "closed");
                self.links[index].down_closed = true;
                let acted = !actions.is_empty();
                self.act(index, actions);
                return acted;
            }
            return false;
        };
        if link.down_closed {
            return true; // the receiver reads and forgets
        }
        let receiver = link.receiver;
        let actions = match self.receive(index, &frame) {
            Ok(actions) => actions,
            Err(error) => {
                // A connection that proved nothing fails alone; one that did takes its session along.
                let known = self.links[index].sending.accepted();
                let mut actions = self.receivers[receiver].0.fail_if(known, error.clone());
                actions.push(Action::Close(index as u64, error));
                actions
            }
        };
        self.act(index, actions);
        true
    }

    fn receive(&mut self, index: usize, frame: &[u8]) -> Result<Vec<Action>, SessionError> {
        let conn = index as u64;
        let link = &mut self.links[index];
        let (receiving, landing, _) = &mut self.receivers[link.receiver];
        let (head, payload) = frame.split_first_chunk().expect("a whole head");
        let head = Head::decode(head)?;
        if head.payload_bytes as usize != payload.len() {
            return Err(SessionError::Lost { peer: "sender".into(), reason: "out of step".into() });
        }
        let crc = crc32c::crc32c(payload);
        if head.kind == Kind::Data {
            let mut passed = None;
            return Ok(match receiving.data(conn, &head, self.now) {
                // In place, before the checksum is known: what a socket read does.
                Ok(piece) => {
                    landing.write(&piece, payload).expect("a place");
                    let result = head.check_payload(crc).map_err(SessionError::from);
                    if result.is_ok() && receiving.relays() && !receiving.is_peer(conn) {
                        passed = Some(piece.clone());
                    }
                    let actions = receiving.payload(conn, payload.len() as u64, result, self.now);
                    self.pass(index, passed);
                    actions
                }
                Err(actions) => actions,
            });
        }
        let message = parse(&head, payload, crc)?;
        match message {
            Message::Hello(hello) => {
                let mut nonce = [0; 32];
                nonce[..8].copy_from_slice(&self.rng.next().to_le_bytes());
                let (handshake, challenge) = Handshake::begin(*hello, receiving.ticket(), nonce);
                link.handshake = Some(handshake);
                Ok(vec![Action::Send(conn, challenge)])
            }
            Message::Proof { proof } => {
                let handshake = link.handshake.take().ok_or(SessionError::Protocol("no hello".into()))?;
                receiving.prove(conn, &handshake, &proof, self.now)
            }
            other => Ok(receiving.message(conn, &head, other, self.now)),
        }
    }

    /// Queues what the receiver of link `index` has landed for the other ranks, if it is theirs to pass on.
    fn pass(&mut self, index: usize, piece: Option<Piece>) {
        let Some(piece) = piece else { return };
        let from = self.links[index].receiver;
        let plane = self.receivers[from].1.cache.spec.planes[piece.plane].clone();
        if plane.sharding == Sharding::Replicated {
            for link in self.links.iter_mut().filter(|link| link.relays(from)) {
                link.rects.push_back((piece.clone(), plane.token_bytes()));
            }
        }
    }

    fn act(&mut self, index: usize, actions: Vec<Action>) {
        let receiver = self.links[index].receiver;
        self.act_for(receiver, actions);
    }

    fn act_for(&mut self, receiver: usize, actions: Vec<Action>) {
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
                Action::Relayed(close) => {
                    self.links
                        .iter_mut()
                        .filter(|link| link.relays(receiver))
                        .for_each(|link| link.close = Some(close));
                }
                Action::End(result) => {
                    if result.is_err() {
                        for link in self.links.iter_mut().filter(|link| link.relays(receiver)) {
                            let message = link.sending.fail(SessionError::Cancelled);
                            if link.hello.is_none() {
                                link.reply(message);
                            }
                        }
                    }
                    let end = &mut self.receivers[receiver].2;
                    assert!(end.is_none(), "ended twice");
                    *end = Some(result);
                }
            }
        }
    }

    fn deliver_down(&mut self, index: usize) -> bool {
        let now = self.now;
        let link = &mut self.links[index];
        if link.hung {
            return false;
        }
        let Some(frame) = link.down.pop_front() else {
            if link.down_closed && link.sending.outcome().is_none() {
                link.sending.lost("closed");
                link.up_closed = true;
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
        let reply = match message {
            Ok(message) => link.sending.message(message, now),
            Err(error) => link.sending.fail(error.into()),
        };
        link.reply(reply);
        true
    }

    fn tick(&mut self) {
        for link in self.links.iter_mut().filter(|link| link.hello.is_none()) {
            let message = link.sending.tick(self.now);
            if !link.hung {
                link.reply(message);
            }
        }
        // A rank whose share does not get through has failed.
        let failed: Vec<(usize, SessionError)> = self
            .links
            .iter()
            .filter_map(|link| match (&link.source, link.sending.outcome()) {
                (Source::Landed(rank), Some(Outcome::Failed(error))) => Some((*rank, error.clone())),
                _ => None,
            })
            .collect();
        for (rank, error) in failed {
            let actions = self.receivers[rank].0.fail(error);
            self.act_for(rank, actions);
        }
        for receiver in 0..self.receivers.len() {
            let actions = self.receivers[receiver].0.tick(self.now);
            self.act_for(receiver, actions);
        }
    }

    fn break_something(&mut self, fault: Fault) {
        let index = self.rng.below(self.links.len());
        let bit = self.rng.next() as usize;
        let flip = |frame: Option<&mut Vec<u8>>| {
            if let Some(frame) = frame {
                let bit = bit % (frame.len() * 8);
                frame[bit / 8] ^= 1 << (bit % 8);
            }
        };
        let link = &mut self.links[index];
        match fault {
            Fault::None => {}
            Fault::Cut => {
                link.up.clear();
                link.down.clear();
                (link.up_closed, link.down_closed) = (true, true);
                link.sending.lost("reset");
                let receiver = link.receiver;
                let actions = self.receivers[receiver].0.lost(index as u64, "reset");
                self.act_for(receiver, actions);
            }
            Fault::Eof => {
                link.sending.lost("closed here");
                link.up_closed = true;
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
                let receiver = link.receiver;
                let actions = self.receivers[receiver].0.fail(SessionError::Cancelled);
                self.act_for(receiver, actions);
            }
            Fault::CancelSender => {
                let message = link.sending.fail(SessionError::Cancelled);
                link.reply(message);
            }
            Fault::Hang => link.hung = true,
        }
    }
}

/// Sessions fail with their proven connections only.
trait FailIf {
    fn fail_if(&mut self, known: bool, error: SessionError) -> Vec<Action>;
}

impl FailIf for Receiving {
    fn fail_if(&mut self, known: bool, error: SessionError) -> Vec<Action> {
        if known { self.fail(error) } else { Vec::new() }
    }
}

impl Link {
    fn new(receiver: usize, sending: Sending, rects: VecDeque<(Piece, usize)>, source: Source) -> Self {
        Link {
            receiver,
            sending,
            rects,
            source,
            close: Some(CLOSE),
            hello: None,
            handshake: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            up_closed: false,
            down_closed: false,
            hung: false,
        }
    }

    /// Whether it carries what `rank` passes on.
    fn relays(&self, rank: usize) -> bool {
        matches!(self.source, Source::Landed(from) if from == rank)
    }

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

fn link(
    setup: &Setup,
    plan: &Plan,
    sender: usize,
    receiver: usize,
    cache: Arc<Cache>,
    rng: &mut Rng,
    now: Instant,
) -> Link {
    let case = &setup.case;
    let senders = plan.senders_of(receiver).into_iter().map(|sender| sender as u32).collect();
    let mut spec = PairSpec {
        bytes: plan.bytes(sender, receiver, &case.tokens),
        ..pair_spec(setup, sender as u32, senders, receiver)
    };
    (setup.lie)(&mut spec);
    // Chunks of all layers in any order, as an engine with several steps in flight may push them.
    let parts = plan.between(sender, receiver);
    let mut rects: Vec<(Piece, usize)> = (0..plan.layers)
        .flat_map(|layer| case.tokens.clone().step_by(setup.chunk as usize).map(move |start| (layer, start)))
        .flat_map(|(layer, start)| {
            let tokens = start..(start + setup.chunk).min(case.tokens.end);
            parts.iter().flat_map(move |part| {
                part.pieces(layer, &tokens).map(|piece| (piece, part.token_bytes)).collect::<Vec<_>>()
            })
        })
        .collect();
    for last in (1..rects.len()).rev() {
        rects.swap(last, rng.below(last + 1));
    }
    let mut nonce = [0; 32];
    nonce[..8].copy_from_slice(&rng.next().to_le_bytes());
    let (sending, hello) = Sending::new(spec, "receiver", nonce, now);
    let export = MemExport { layers: 0..plan.layers, tokens: case.tokens.clone(), direct: false, cache };
    let mut link = Link::new(receiver, sending, rects.into(), Source::Export(export));
    link.say(&hello);
    link
}

fn pair_spec(setup: &Setup, sender: u32, senders: Vec<u32>, receiver: usize) -> PairSpec {
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
        bytes: 0,
        spec: describe(&case.to[receiver]),
        deadline: case.deadline,
        frame_bytes: setup.frame_bytes,
    }
}

/// A deadline that no event alone exceeds.
pub const DEADLINE: Duration = Duration::from_secs(8);
