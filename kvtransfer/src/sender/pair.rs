//! One receiver of a push: what is queued for it, and the thread that sends it. The thread connects and proves itself
//! ([`super::connect`]), then writes while a second one reads credit; both step the same [`Sending`] machine.

mod read;
mod write;

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use backend::{KvExport, Piece};

use crate::layout::Part;
use crate::sender::connect::{Connected, connect};
use crate::sender::pool::{Admission, Pool};
use crate::session::{Outcome, PairSpec, Sending};
use crate::sync::lock;
use crate::wire::Control;
use crate::{Close, SessionError};

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

    /// Waits until at most `bytes` are queued, or the pair has ended.
    pub fn wait_room(&self, bytes: u64) {
        let mut state = lock(&self.state);
        while state.backlog_bytes > bytes && !state.ended && state.abort.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
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
            self.changed.notify_all();
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
}

impl Outcome {
    fn failed(&self) -> bool {
        matches!(self, Outcome::Failed(_))
    }
}
