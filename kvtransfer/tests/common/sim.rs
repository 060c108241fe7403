//! The session machines of all ranks on an imagined network: frames as bytes in queues, one event at a time in an order
//! drawn from a seed, and at most one fault. No threads, no sockets, no clock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::{KvExport, KvLanding, Piece};
use kvtransfer::frame::{Head, Kind};
use kvtransfer::layout::{Plan, cut, describe, plan};
use kvtransfer::message::Message;
use kvtransfer::session::{Action, Handshake, Outcome, PairSpec, Receiving, Sending, parse};
use kvtransfer::{Limits, SessionError, Summary};

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
    export: MemExport,
    handshake: Option<Handshake>,
    up: VecDeque<Vec<u8>>,
    down: VecDeque<Vec<u8>>,
    up_closed: bool,
    down_closed: bool,
    hung: bool,
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
                (Receiving::new(case.expect(rank), &limits, now), landing, None)
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
        Sim { links, receivers, now, rng }
    }

    fn over(&self) -> bool {
        self.links.iter().all(|link| link.sending.outcome().is_some())
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
            senders: self.links.iter().map(|link| link.sending.outcome().cloned().expect("ended")).collect(),
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
        if link.hung || link.sending.outcome().is_some() {
            return false;
        }
        let Some(frame_bytes) = link.sending.frame_bytes() else { return false };
        let Some((rect, token_bytes)) = link.rects.front_mut() else {
            let Some(message) = link.sending.done(CLOSE) else { return false };
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
        link.export.read(&piece, &mut payload).expect("readable");
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
            return Ok(match receiving.data(conn, &head, self.now) {
                // In place, before the checksum is known: what a socket read does.
                Ok(piece) => {
                    landing.write(&piece, payload).expect("a place");
                    let result = head.check_payload(crc).map_err(SessionError::from);
                    receiving.payload(conn, payload.len() as u64, result, self.now)
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
                Action::End(result) => {
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
        for link in &mut self.links {
            let message = link.sending.tick(self.now);
            if !link.hung {
                link.reply(message);
            }
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
    let mut spec = PairSpec {
        session: case.session,
        ticket: case.ticket.clone(),
        request: case.request.clone(),
        attempt: case.attempt,
        epoch: case.epoch,
        sender: sender as u32,
        senders: plan.senders_of(receiver).into_iter().map(|sender| sender as u32).collect(),
        tokens: case.tokens.clone(),
        bytes: plan.bytes(sender, receiver, case.tokens.len() as u64),
        spec: describe(&case.to[receiver]),
        deadline: case.deadline,
        frame_bytes: setup.frame_bytes,
    };
    (setup.lie)(&mut spec);
    // Chunks of all layers in any order, as an engine with several steps in flight may push them.
    let parts = plan.between(sender, receiver);
    let mut rects: Vec<(Piece, usize)> = (0..plan.layers)
        .flat_map(|layer| case.tokens.clone().step_by(setup.chunk as usize).map(move |start| (layer, start)))
        .flat_map(|(layer, start)| {
            let tokens = start..(start + setup.chunk).min(case.tokens.end);
            parts.iter().map(move |part| (part.piece(layer, tokens.clone()), part.token_bytes))
        })
        .collect();
    for last in (1..rects.len()).rev() {
        rects.swap(last, rng.below(last + 1));
    }
    let mut nonce = [0; 32];
    nonce[..8].copy_from_slice(&rng.next().to_le_bytes());
    let (sending, hello) = Sending::new(spec, "receiver", nonce, now);
    let mut link = Link {
        receiver,
        sending,
        rects: rects.into(),
        export: MemExport { layers: 0..plan.layers, tokens: case.tokens.clone(), direct: false, cache },
        handshake: None,
        up: VecDeque::new(),
        down: VecDeque::new(),
        up_closed: false,
        down_closed: false,
        hung: false,
    };
    link.say(&hello);
    link
}

/// A deadline that no event alone exceeds.
pub const DEADLINE: Duration = Duration::from_secs(8);
