//! One receiver of a push: what is queued for it, and the lanes that send it. Every lane is a connection with a thread of its
//! own, which connects and proves itself ([`super::connect`]), then writes while a second one reads credit; both step the
//! same [`Sending`] machine. All lanes take from one queue, so a faster path carries more. A lane that loses its connection
//! comes back over another, on whichever path is left, and sends again what had not landed.

mod lane;
mod read;
mod write;

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use backend::{Piece, Place};

use crate::layout::Part;
use crate::limits::RESUMES_MAX;
use crate::sender::connect::{Connected, connect};
use crate::sender::export::SharedExport;
use crate::sender::pool::{Admission, Pool};
use crate::session::{LaneStart, Outcome, PairSpec};
use crate::sync::lock;
use crate::transport::ucx::{Way, Ways};
use crate::{Close, Codec, SessionError};

use lane::{Lane, Left, Live};

/// Rectangles of one export for one receiver.
pub(super) struct Job {
    export: Arc<SharedExport>,
    /// With the bytes of one token.
    rects: VecDeque<(Piece, usize)>,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Progress {
    /// Nobody has asked the device yet.
    New,
    /// A lane waits for the device.
    Waited,
    /// The bytes are there.
    Ready,
}

impl Job {
    pub fn new(export: Arc<SharedExport>, rects: VecDeque<(Piece, usize)>) -> Self {
        Job { export, rects, progress: Progress::New }
    }

    fn bytes(&self) -> u64 {
        self.rects.iter().map(|(piece, token_bytes)| piece.tokens.len() as u64 * *token_bytes as u64).sum()
    }
}

/// The piece of a push that is made last, see [`crate::estimate::Last`].
pub(super) struct Tail {
    /// The model's last layer.
    pub layer: usize,
    /// First token of the last chunk.
    pub token: u32,
    /// Payload of its frames that is aimed at.
    pub frame_bytes: usize,
}

impl Tail {
    fn has(&self, piece: &Piece) -> bool {
        piece.layer == self.layer && piece.tokens.end > self.token
    }
}

pub(super) struct Pair {
    pub spec: PairSpec,
    /// Every address of the receiver.
    pub addresses: Vec<String>,
    /// The address that each lane tries first.
    pub paths: Vec<String>,
    /// What each lane's path carries, as far as it is known.
    rates: Vec<Option<f64>>,
    pub parts: Vec<Part>,
    pub codec: Codec,
    pub opened: Instant,
    /// What is made last and in which frames it travels, where that is known.
    tail: Option<Tail>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    backlog_bytes: u64,
    /// Cache taken off the queue by all lanes.
    taken_bytes: u64,
    close: Option<Close>,
    abort: Option<SessionError>,
    lanes: Vec<Lane>,
    /// Lanes that say Done, once the first one has.
    closing: Option<u16>,
    /// The pair has ended: what comes now is dropped at once.
    ended: bool,
    resumed: u32,
}

/// How a pair ended: bytes of cache, and when they were acknowledged.
pub(super) type Ended = Result<(u64, Instant), SessionError>;

impl Pair {
    pub fn new(
        spec: PairSpec,
        addresses: Vec<String>,
        paths: Vec<String>,
        parts: Vec<Part>,
        codec: Codec,
        opened: Instant,
    ) -> Self {
        let lanes = paths.iter().map(|_| Lane::default()).collect();
        let state = Mutex::new(State { lanes, ..State::default() });
        let (rates, tail, changed) = (Vec::new(), None, Condvar::new());
        Pair { spec, addresses, paths, rates, parts, codec, opened, tail, state, changed }
    }

    /// The same, of which it is known what each of some paths carries: a slower one leaves the end of the queue to the others.
    pub fn rated(self, rates: Vec<Option<f64>>) -> Self {
        Pair { rates, ..self }
    }

    /// The same, of which it is known what is made last.
    pub fn ending(self, tail: Tail) -> Self {
        Pair { tail: Some(tail), ..self }
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
            for live in state.lanes.iter().filter_map(|lane| lane.live.as_ref()).filter(|live| live.writing) {
                live.control.close(Shutdown::Both);
            }
            state.backlog_bytes = 0;
            std::mem::take(&mut state.queue)
        };
        self.changed.notify_all();
        drop(queue);
    }

    /// Ends it from outside a lane.
    pub fn fail(&self, error: SessionError) -> Ended {
        self.abort(error.clone());
        lock(&self.state).ended = true;
        self.changed.notify_all();
        Err(error)
    }

    /// Why it was given up, if it was.
    pub fn aborted(&self) -> Option<SessionError> {
        lock(&self.state).abort.clone()
    }

    /// Whether lanes need not connect any more.
    pub fn over(&self) -> bool {
        let state = lock(&self.state);
        state.ended || state.abort.is_some()
    }

    /// Bytes queued and not yet on their way.
    pub fn backlog_bytes(&self) -> u64 {
        lock(&self.state).backlog_bytes
    }

    /// Lanes that lost a connection and went on over another.
    pub fn resumed(&self) -> u32 {
        lock(&self.state).resumed
    }

    /// Whether the receiver reads memory of `place` over every connection that there is, and there is one.
    pub fn reads(&self, place: Place) -> bool {
        let state = lock(&self.state);
        let mut live = state.lanes.iter().filter_map(|lane| lane.live.as_ref()).peekable();
        self.codec == Codec::Exact && live.peek().is_some() && live.all(|live| live.way.reads(place))
    }

    /// Waits until at most `bytes` are queued, or the pair has ended.
    pub fn wait_room(&self, bytes: u64) {
        let mut state = lock(&self.state);
        while state.backlog_bytes > bytes && !state.ended && state.abort.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until `until` or until it is over.
    pub fn pause(&self, until: Instant) {
        let mut state = lock(&self.state);
        while state.abort.is_none() && !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The whole life of a lane. The first lane that knows how the pair ended returns it; the others return nothing.
    pub fn run(&self, index: usize, pool: &Pool, admission: &Admission) -> Option<Ended> {
        let result = self.live(index, pool, admission);
        let mut state = lock(&self.state);
        let lane = &mut state.lanes[index];
        let (live, sent) = (lane.live.take(), lane.outbox.clear());
        let first = !state.ended && !matches!(result, Ok(None));
        let mut queue = VecDeque::new();
        if first {
            state.ended = true;
            state.backlog_bytes = 0;
            queue = std::mem::take(&mut state.queue);
        }
        drop(state);
        self.changed.notify_all();
        drop((sent, queue));
        if let Some(live) = live.filter(|live| live.busy) {
            pool.measure(&live.address, |meter| meter.end(Instant::now()));
        }
        match result {
            Ok(at) if first => Some(Ok((self.spec.bytes, at?))),
            Err(error) if first => Some(Err(error)),
            _ => None,
        }
    }

    /// Connects, sends, and comes back where the connection was lost. `None`: a lane that was not needed.
    fn live(
        &self,
        index: usize,
        pool: &Pool,
        admission: &Admission,
    ) -> Result<Option<Instant>, SessionError> {
        let opened = self.opened + self.spec.deadline;
        if !pool.wait_turn(admission, opened, || self.over()) {
            let max = pool.limits.connections_max;
            return Err(self.aborted().unwrap_or(SessionError::Busy { what: "connections", max }));
        }
        let mut until = opened;
        // A lane that lost a connection whose payloads went beside it comes back without that.
        let mut ways = pool.limits.ways;
        let mut slow = None;
        for turn in 0..=RESUMES_MAX {
            // A lane beside the first is for its own path; once it has sent something, that has to get there.
            let alone = turn == 0 && index > 0;
            let connected = match connect(self, index, pool, ways, alone, slow.as_deref(), until) {
                Ok(connected) => connected,
                // The other lanes carry everything, or have done so.
                Err(_) if turn == 0 && (index > 0 || self.accepted()) => return Ok(None),
                Err(error) => return Err(self.aborted().unwrap_or(error)),
            };
            let (address, way) = (connected.address.clone(), connected.wire.way.clone());
            match self.converse(index, pool, connected) {
                Outcome::Acknowledged(at) => return Ok(Some(at)),
                Outcome::Failed(error) => {
                    if let Some(aborted) = self.aborted() {
                        // A connection that was closed because the push was given up is not the reason.
                        return Err(aborted);
                    }
                    if !matches!(error, SessionError::Lost { .. }) || turn == RESUMES_MAX {
                        return Err(error);
                    }
                    let left = lock(&self.state).lanes[index].left.take();
                    tracing::debug!(address, %error, ?left, "kv lane lost its connection");
                    match left {
                        Some(Left::Slow) => slow = Some(address),
                        Some(Left::Silent) => pool.fell_silent(&address),
                        None => pool.note(&address, false),
                    }
                    if way.get() != Way::Stream {
                        ways = Ways::NONE;
                    }
                }
            }
            if self.over() {
                return Ok(None);
            }
            until = Instant::now() + pool.limits.resume.min(self.spec.deadline);
        }
        Ok(None)
    }

    /// Whether the receiver has accepted any lane.
    fn accepted(&self) -> bool {
        lock(&self.state).lanes.iter().any(|lane| lane.accepted)
    }

    /// One connection, from its acceptance to its end.
    fn converse(&self, index: usize, pool: &Pool, connected: Connected) -> Outcome {
        let Connected { address, mut wire, sending } = connected;
        let way = wire.way.clone();
        // The receiver's silence is bounded by the deadline, its slowness by what one write may take.
        if let Err(error) = wire.sink.set_stall(self.spec.deadline) {
            return Outcome::Failed(self.io(&error));
        }
        self.attach(index, Live::new(sending, address.clone(), &wire));
        let sink = Mutex::new(wire.sink);
        let (source, control) = (&mut *wire.source, &wire.control);
        let outcome = thread::scope(|scope| {
            let reader = thread::Builder::new()
                .name("kv-credit".into())
                .spawn_scoped(scope, || self.read(index, pool, source, &sink, &**control));
            let outcome = match reader {
                Ok(_) => self.write(index, pool, &sink),
                Err(error) => Outcome::Failed(self.io(&error)),
            };
            if outcome.failed() {
                control.close(Shutdown::Both);
            }
            outcome
        });
        self.detach(index, pool);
        if let Outcome::Failed(SessionError::Lost { .. }) = outcome
            && self.aborted().is_none()
        {
            pool.fell_back(&address, way.get());
        }
        if let Outcome::Acknowledged(_) = outcome {
            wire.sink = sink.into_inner().unwrap_or_else(PoisonError::into_inner);
            pool.put_idle(address, wire);
        }
        outcome
    }

    /// What the next connection of a lane begins with.
    pub fn start(&self, index: usize) -> LaneStart {
        let mut state = lock(&self.state);
        state.lanes[index].outbox.start(index as u16)
    }

    /// A lane has a connection: what the receiver has not had of the last one will be sent again.
    fn attach(&self, index: usize, live: Live) {
        let mut state = lock(&self.state);
        let late = state.closing.is_some();
        let lane = &mut state.lanes[index];
        let again = lane.attach(live, late);
        state.resumed += u32::from(again);
    }

    fn detach(&self, index: usize, pool: &Pool) {
        let live = lock(&self.state).lanes[index].live.take();
        if let Some(live) = live.filter(|live| live.busy) {
            pool.measure(&live.address, |meter| meter.end(Instant::now()));
        }
    }

    fn io(&self, error: &io::Error) -> SessionError {
        SessionError::Lost { peer: self.addresses.join(", "), reason: error.to_string() }
    }

    /// Changes the session of a lane that is connected.
    fn step<T>(&self, index: usize, change: impl FnOnce(&mut Live) -> T) -> Option<T> {
        lock(&self.state).lanes[index].live.as_mut().map(change)
    }
}

impl Outcome {
    fn failed(&self) -> bool {
        matches!(self, Outcome::Failed(_))
    }
}

/// Longest wait for a receiver's reason after a failed write.
const REASON_WAIT: Duration = Duration::from_secs(1);
