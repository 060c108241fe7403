//! One receiver of a push: what is queued for it, and the thread that sends it. The thread connects and proves itself
//! ([`super::connect`]), then writes while a second one reads credit; both step the same [`Sending`] machine.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use backend::{KvExport, Piece};

use crate::frame::Kind;
use crate::layout::{Part, cut};
use crate::message::Message;
use crate::sender::connect::{Connected, connect};
use crate::sender::pool::{Admission, Pool};
use crate::session::receive::parse;
use crate::session::{Outcome, PairSpec, Sending};
use crate::sync::lock;
use crate::wire::{Control, FrameSink, FrameSource, Incoming, WireError, control_payload};
use crate::{Close, SessionError};

/// After a failed write: how long the receiver's reason is waited for.
const REASON_WAIT: Duration = Duration::from_secs(1);

/// An export that several pairs send from.
pub(super) type SharedExport = Arc<Mutex<Box<dyn KvExport>>>;

/// Rectangles of one export for one receiver.
pub(super) struct Job {
    export: SharedExport,
    /// With the bytes of one token.
    rects: VecDeque<(Piece, usize)>,
    /// The device has produced the bytes.
    ready: bool,
}

impl Job {
    pub fn new(export: SharedExport, rects: VecDeque<(Piece, usize)>) -> Self {
        Job { export, rects, ready: false }
    }

    fn bytes(&self) -> u64 {
        self.rects.iter().map(|(piece, token_bytes)| piece.tokens.len() as u64 * *token_bytes as u64).sum()
    }
}

pub(super) struct Pair {
    pub spec: PairSpec,
    pub addresses: Vec<String>,
    pub parts: Vec<Part>,
    /// The push has this receiver only: its exports need not be shared, and may be written from where they lie.
    pub alone: bool,
    pub opened: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    backlog_bytes: u64,
    close: Option<Close>,
    abort: Option<SessionError>,
    /// Once connected.
    live: Option<Live>,
    /// The thread is done: what comes now is dropped at once.
    ended: bool,
}

struct Live {
    sending: Sending,
    address: String,
    control: Arc<dyn Control>,
    /// A frame is being written: the connection has to go if the push is given up now.
    writing: bool,
    /// The front job's export is waited for.
    waiting: bool,
    /// Data was sent after the last ping.
    unprobed: bool,
    /// The link's meter counts this pair as busy.
    busy: bool,
}

/// What the writing thread does next.
enum Step {
    Wait(SharedExport),
    Data(SharedExport, Piece, usize),
    Say(Message),
    Abort(SessionError),
    Over(Outcome),
}

impl Pair {
    pub fn new(
        spec: PairSpec,
        addresses: Vec<String>,
        parts: Vec<Part>,
        alone: bool,
        opened: Instant,
    ) -> Self {
        Pair { spec, addresses, parts, alone, opened, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Queues rectangles; dropped at once when the pair has ended.
    pub fn push(&self, job: Job) {
        let mut state = lock(&self.state);
        if !state.ended && state.abort.is_none() {
            state.backlog_bytes += job.bytes();
            state.queue.push_back(job);
            self.changed.notify_all();
        }
    }

    /// Nothing more will be queued.
    pub fn close(&self, close: Close) {
        lock(&self.state).close = Some(close);
        self.changed.notify_all();
    }

    /// Gives up: the queue is dropped now, the receiver told as soon as it can be.
    pub fn abort(&self, error: SessionError) {
        let queue = {
            let mut state = lock(&self.state);
            if state.ended || state.abort.is_some() {
                return;
            }
            state.abort = Some(error);
            if let Some(live) = state.live.as_ref().filter(|live| live.writing) {
                live.control.close(Shutdown::Both);
            }
            state.backlog_bytes = 0;
            std::mem::take(&mut state.queue)
        };
        self.changed.notify_all();
        drop(queue);
    }

    /// Why it was given up, if it was.
    pub fn aborted(&self) -> Option<SessionError> {
        lock(&self.state).abort.clone()
    }

    /// Bytes queued and not yet on their way.
    pub fn backlog_bytes(&self) -> u64 {
        lock(&self.state).backlog_bytes
    }

    /// Waits until `until` or until it is given up.
    pub fn pause(&self, until: Instant) {
        let mut state = lock(&self.state);
        while state.abort.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The whole life of the pair: bytes sent and when they were acknowledged.
    pub fn run(&self, pool: &Pool, admission: &Admission) -> Result<(u64, Instant), SessionError> {
        let result = self.live(pool, admission);
        let (queue, live) = {
            let mut state = lock(&self.state);
            state.ended = true;
            state.backlog_bytes = 0;
            (std::mem::take(&mut state.queue), state.live.take())
        };
        drop(queue);
        if let Some(live) = live.filter(|live| live.busy) {
            pool.measure(&live.address, |meter| meter.end(Instant::now()));
        }
        result
    }

    fn live(&self, pool: &Pool, admission: &Admission) -> Result<(u64, Instant), SessionError> {
        let until = self.opened + self.spec.deadline;
        if !pool.wait_turn(admission, until, || self.aborted().is_some()) {
            let max = pool.limits.connections_max;
            return Err(self.aborted().unwrap_or(SessionError::Busy { what: "connections", max }));
        }
        let Connected { address, mut wire, sending } = connect(self, pool)?;
        // The receiver's silence is bounded by the deadline, its slowness by what one write may take.
        wire.sink.set_stall(self.spec.deadline).map_err(|error| self.io(&error))?;
        lock(&self.state).live = Some(Live {
            sending,
            address: address.clone(),
            control: wire.control.clone(),
            writing: false,
            waiting: false,
            unprobed: false,
            busy: false,
        });
        let sink = Mutex::new(wire.sink);
        let (source, control) = (&mut *wire.source, &wire.control);
        let outcome = thread::scope(|scope| {
            let reader = thread::Builder::new()
                .name("kv-credit".into())
                .spawn_scoped(scope, || self.read(pool, source, &sink, &**control));
            let outcome = match reader {
                Ok(_) => self.write(pool, &sink),
                Err(error) => Outcome::Failed(self.io(&error)),
            };
            if outcome.failed() {
                control.close(Shutdown::Both);
            }
            outcome
        });
        match outcome {
            Outcome::Acknowledged(at) => {
                wire.sink = sink.into_inner().unwrap_or_else(PoisonError::into_inner);
                let sent = lock(&self.state).live.as_ref().map_or(0, |live| live.sending.sent_bytes());
                pool.put_idle(address, wire);
                Ok((sent, at))
            }
            // A connection that was closed because the push was given up is not the reason.
            Outcome::Failed(error) => Err(self.aborted().unwrap_or(error)),
        }
    }

    fn io(&self, error: &io::Error) -> SessionError {
        SessionError::Lost { peer: self.addresses.join(", "), reason: error.to_string() }
    }

    /// Changes the session, which is live while this is called.
    fn step<T>(&self, change: impl FnOnce(&mut Live) -> T) -> Option<T> {
        lock(&self.state).live.as_mut().map(change)
    }

    /// Writes until the session is over.
    fn write(&self, pool: &Pool, sink: &Mutex<Box<dyn FrameSink>>) -> Outcome {
        let mut staging = Vec::new();
        loop {
            let sent = match self.next() {
                Step::Over(outcome) => return outcome,
                Step::Abort(error) => {
                    let message = self.step(|live| live.sending.fail(error.clone())).flatten();
                    // Best effort: the connection closes next, which says the same.
                    let _ = message.map(|message| self.say(sink, &message));
                    return Outcome::Failed(error);
                }
                Step::Say(message) => self.say(sink, &message),
                Step::Wait(export) => match lock(&export).wait() {
                    Ok(()) => {
                        self.ready();
                        Ok(())
                    }
                    Err(error) => {
                        self.abort(SessionError::Device(error.to_string()));
                        Ok(())
                    }
                },
                Step::Data(export, piece, bytes) => {
                    self.data(pool, sink, &export, &piece, bytes, &mut staging)
                }
            };
            if let Err(error) = sent {
                return self.broken(&error);
            }
        }
    }

    /// Waits for something to do.
    fn next(&self) -> Step {
        let mut state = lock(&self.state);
        loop {
            let State { queue, backlog_bytes, close, abort, live, .. } = &mut *state;
            // `live` is set before this thread writes and taken after.
            let Some(live) = live else { return Step::Over(Outcome::Failed(SessionError::Cancelled)) };
            if let Some(outcome) = live.sending.outcome() {
                return Step::Over(outcome.clone());
            }
            if let Some(error) = abort {
                return Step::Abort(error.clone());
            }
            if let Some(frame_bytes) = live.sending.frame_bytes() {
                match queue.front_mut() {
                    Some(job) if job.rects.is_empty() => {
                        queue.pop_front();
                        continue;
                    }
                    Some(job) if !job.ready => {
                        live.waiting = true;
                        if std::mem::take(&mut live.unprobed) {
                            return Step::Say(Message::Ping);
                        }
                        return Step::Wait(job.export.clone());
                    }
                    Some(job) => {
                        if let Some((piece, bytes)) = job.cut(frame_bytes, &mut live.sending) {
                            *backlog_bytes -= bytes as u64;
                            return Step::Data(job.export.clone(), piece, bytes);
                        }
                    }
                    None => match close {
                        Some(close) => {
                            if let Some(message) = live.sending.done(*close) {
                                return Step::Say(message);
                            }
                            continue;
                        }
                        // Asks how much has landed, so that the link's rate is that of busy time alone.
                        None if std::mem::take(&mut live.unprobed) => return Step::Say(Message::Ping),
                        None => {}
                    },
                }
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The front job's export has its bytes.
    fn ready(&self) {
        let mut state = lock(&self.state);
        if let Some(job) = state.queue.front_mut() {
            job.ready = true;
        }
        if let Some(live) = &mut state.live {
            live.waiting = false;
        }
    }

    /// Sends one rectangle: from where it lies, or through `staging`.
    fn data(
        &self,
        pool: &Pool,
        sink: &Mutex<Box<dyn FrameSink>>,
        export: &SharedExport,
        piece: &Piece,
        bytes: usize,
        staging: &mut Vec<u8>,
    ) -> io::Result<()> {
        if let Some(pace) = &pool.pace {
            let at = lock(pace).book(bytes as u64, Instant::now());
            self.pause(at);
        }
        let lease = lock(export);
        let slices = lease
            .slices(piece)
            .filter(|slices| slices.iter().map(|slice| slice.len()).sum::<usize>() == bytes);
        if let (true, Some(slices)) = (self.alone, &slices) {
            return self.send_data(pool, sink, piece, bytes, slices);
        }
        staging.clear();
        match slices {
            Some(slices) => slices.iter().for_each(|slice| staging.extend_from_slice(slice)),
            None => {
                if let Err(error) = lease.read(piece, staging) {
                    self.abort(error.into());
                    return Ok(());
                }
                if staging.len() != bytes {
                    let got = staging.len();
                    self.abort(SessionError::Device(format!(
                        "export gave {got} of {bytes} bytes of {piece:?}"
                    )));
                    return Ok(());
                }
            }
        }
        // Other pairs read the same export while this one's bytes leave.
        drop(lease);
        self.send_data(pool, sink, piece, bytes, &[IoSlice::new(staging)])
    }

    fn send_data(
        &self,
        pool: &Pool,
        sink: &Mutex<Box<dyn FrameSink>>,
        piece: &Piece,
        bytes: usize,
        slices: &[IoSlice<'_>],
    ) -> io::Result<()> {
        let crc = slices.iter().fold(0, |crc, slice| crc32c::crc32c_append(crc, slice));
        let mut sink = lock(sink);
        let head = {
            let mut state = lock(&self.state);
            let State { abort, live, .. } = &mut *state;
            let Some(live) = live.as_mut().filter(|live| abort.is_none() && live.sending.outcome().is_none())
            else {
                return Ok(());
            };
            live.writing = true;
            live.unprobed = true;
            if !std::mem::replace(&mut live.busy, true) {
                pool.measure(&live.address, |meter| meter.begin(Instant::now()));
            }
            live.sending.data(piece, bytes, crc)
        };
        let sent = sink.send(&head, slices);
        self.step(|live| live.writing = false);
        sent
    }

    fn say(&self, sink: &Mutex<Box<dyn FrameSink>>, message: &Message) -> io::Result<()> {
        self.say_locked(&mut lock(sink), message)
    }

    /// Numbers and sends a message: frames get their numbers in the order in which they leave.
    fn say_locked(&self, sink: &mut MutexGuard<'_, Box<dyn FrameSink>>, message: &Message) -> io::Result<()> {
        let payload = message.encode();
        match self.step(|live| live.sending.head(message, &payload)) {
            Some(head) => sink.send(&head, &[IoSlice::new(&payload)]),
            None => Ok(()),
        }
    }

    /// A write failed: the receiver may have said why before it closed.
    fn broken(&self, error: &io::Error) -> Outcome {
        let until = Instant::now() + REASON_WAIT;
        let mut state = lock(&self.state);
        loop {
            if let Some(error) = &state.abort {
                return Outcome::Failed(error.clone());
            }
            let Some(live) = &mut state.live else { return Outcome::Failed(self.io(error)) };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || error.kind() == io::ErrorKind::TimedOut {
                live.sending.lost(&error.to_string());
            }
            if let Some(outcome) = live.sending.outcome() {
                return outcome.clone();
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reads the receiver's frames until the session is over, and keeps its lease alive meanwhile.
    fn read(
        &self,
        pool: &Pool,
        source: &mut dyn FrameSource,
        sink: &Mutex<Box<dyn FrameSink>>,
        control: &dyn Control,
    ) {
        loop {
            let until = self.step(|live| match live.sending.outcome() {
                Some(_) => None,
                None => Some(live.sending.next_tick()),
            });
            let Some(Some(until)) = until else { break };
            let reply = match source.head(Some(until)) {
                Ok(Incoming::Timeout) => self.step(|live| live.sending.tick(Instant::now())).flatten(),
                Ok(Incoming::Head(head)) if head.kind == Kind::Data => {
                    let error = SessionError::Protocol("data from a receiver".into());
                    self.step(|live| live.sending.fail(error)).flatten()
                }
                Ok(Incoming::Head(head)) => {
                    let message = control_payload(source, &head, Some(Instant::now() + self.spec.deadline))
                        .and_then(|(payload, crc)| Ok(parse(&head, &payload, crc)?));
                    match message {
                        Ok(message) => self.heard(pool, message),
                        Err(error) => self.unreadable(error),
                    }
                }
                Ok(Incoming::End) => {
                    self.step(|live| live.sending.lost("closed by the receiver"));
                    None
                }
                Err(error) => self.unreadable(error),
            };
            if let Some(message) = reply {
                // A writer at work is a sign of life itself; a Fail that cannot be said closes the connection instead.
                let failed = matches!(message, Message::Fail { .. });
                let said = match sink.try_lock() {
                    Ok(mut sink) => self.say_locked(&mut sink, &message).is_ok(),
                    Err(_) => !failed,
                };
                if failed && !said {
                    control.close(Shutdown::Both);
                }
            }
            self.changed.notify_all();
        }
        self.changed.notify_all();
    }

    fn unreadable(&self, error: WireError) -> Option<Message> {
        match error {
            WireError::Frame(error) => self.step(|live| live.sending.fail(error.into())).flatten(),
            WireError::Io(error) => {
                self.step(|live| live.sending.lost(&error.to_string()));
                None
            }
        }
    }

    /// A message of the receiver, and what it says about the link.
    fn heard(&self, pool: &Pool, message: Message) -> Option<Message> {
        let mut state = lock(&self.state);
        let State { queue, live, .. } = &mut *state;
        let live = live.as_mut()?;
        let now = Instant::now();
        let before = live.sending.received_bytes();
        let reply = live.sending.message(message, now);
        let landed = live.sending.received_bytes() - before;
        let drained = live.sending.received_bytes() == live.sending.sent_bytes();
        let quiet = live.busy && drained && (queue.is_empty() || live.waiting);
        if quiet {
            live.busy = false;
        }
        if landed > 0 || quiet {
            pool.measure(&live.address, |meter| {
                meter.landed(landed, now);
                if quiet {
                    meter.end(now);
                }
            });
        }
        reply
    }
}

impl Job {
    /// The next frame's rectangle, when its bytes are within credit.
    fn cut(&mut self, frame_bytes: usize, sending: &mut Sending) -> Option<(Piece, usize)> {
        let (rect, token_bytes) = self.rects.front_mut()?;
        let mut rest = rect.clone();
        let piece = cut(&mut rest, *token_bytes, frame_bytes)?;
        let bytes = piece.tokens.len() * *token_bytes;
        if !sending.may_send(bytes, Instant::now()) {
            return None;
        }
        *rect = rest;
        if rect.tokens.is_empty() {
            self.rects.pop_front();
        }
        Some((piece, bytes))
    }
}

impl Outcome {
    fn failed(&self) -> bool {
        matches!(self, Outcome::Failed(_))
    }
}
