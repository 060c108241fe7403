//! One session at one sender rank: hands rectangles to its pairs, one per receiver, and tells when all have ended.

mod prepare;

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use backend::{Cut, KvExport, Piece, Place};

use crate::coverage::{CoverageError, Intervals};
use crate::layout::Part;
use crate::receiver::Peers;
use crate::sender::export::SharedExport;
use crate::sender::pair::{Ended, Job, Pair};
use crate::sender::pool::{Admission, Pool};
use crate::sender::{PushSpec, Pushed};
use crate::sync::lock;
use crate::{Close, Codec, Expect, SessionError};

use prepare::{estimate, prepare, prepare_relay};

type Done = Box<dyn FnOnce(Result<Pushed, SessionError>) + Send>;

/// An open push. Dropped without [`Push::close`] it aborts the session at the receivers.
pub struct Push {
    shared: Arc<Shared>,
    tokens: Range<u32>,
    /// Tokens pushed, per layer.
    pushed: Mutex<Vec<Intervals>>,
    closed: AtomicBool,
}

struct Shared {
    pool: Arc<Pool>,
    pairs: Vec<Arc<Pair>>,
    end: Mutex<End>,
}

struct End {
    /// Pairs that have not ended; the push itself, until closed, where it has none.
    left: usize,
    bytes: u64,
    resumed: u32,
    codec: Codec,
    estimate: Option<Duration>,
    acknowledged: Option<Instant>,
    error: Option<SessionError>,
    done: Option<Done>,
}

impl Push {
    pub(super) fn open(pool: &Arc<Pool>, spec: PushSpec, done: Done) -> Push {
        let prepared = prepare(pool, &spec, Instant::now());
        let estimate = prepared.as_ref().ok().and_then(|(_, pairs)| estimate(pool, &spec, pairs));
        Push::start(pool, spec.tokens, prepared, estimate, done)
    }

    /// A push to the other ranks of the own group, whose rectangles come by [`Push::piece`].
    pub(super) fn relay(pool: &Arc<Pool>, expect: &Expect, peers: &Peers, done: Done) -> Push {
        let prepared = prepare_relay(pool, expect, peers, Instant::now());
        Push::start(pool, expect.tokens.clone(), prepared.map(|pairs| (0, pairs)), None, done)
    }

    fn start(
        pool: &Arc<Pool>,
        tokens: Range<u32>,
        prepared: Result<(usize, Vec<Arc<Pair>>), SessionError>,
        estimate: Option<Duration>,
        done: Done,
    ) -> Push {
        let prepared = prepared.and_then(|(layers, pairs)| {
            let admission = pool.enter(pairs.iter().map(|pair| pair.paths.len()).sum())?;
            Ok((layers, pairs, admission))
        });
        let (layers, pairs, admission, error) = match prepared {
            Ok((layers, pairs, admission)) => (layers, pairs, Some(admission), None),
            Err(error) => (0, Vec::new(), None, Some(error)),
        };
        let codec = pairs.first().map_or(Codec::Exact, |pair| pair.codec);
        let end = End {
            left: pairs.len(),
            bytes: 0,
            resumed: 0,
            codec,
            estimate,
            acknowledged: None,
            error: None,
            done: Some(done),
        };
        let shared = Arc::new(Shared { pool: pool.clone(), pairs, end: Mutex::new(end) });
        if let Some(error) = error {
            shared.finish_alone(Err(error));
        }
        if let Some(admission) = admission {
            shared.spawn(&admission);
        }
        let pushed = Mutex::new(vec![Intervals::default(); layers]);
        Push { shared, tokens, pushed, closed: AtomicBool::new(false) }
    }

    /// Queues one rectangle for every receiver, from a lease of its own each.
    pub(crate) fn piece<E: KvExport + 'static>(
        &self,
        piece: &Piece,
        token_bytes: usize,
        export: impl Fn() -> E,
    ) {
        for pair in &self.shared.pairs {
            let export = Arc::new(SharedExport::new(Box::new(export())));
            pair.push(Job::new(export, [(piece.clone(), token_bytes)].into()));
        }
    }

    /// Waits until no receiver has more than `bytes` queued, or has ended.
    pub(crate) fn wait_room(&self, bytes: u64) {
        self.shared.pairs.iter().for_each(|pair| pair.wait_room(bytes));
    }

    /// As [`Push::close`], of a shared handle.
    pub(crate) fn finish(&self, close: Close) {
        self.closed.store(true, Ordering::Release);
        self.shared.pairs.iter().for_each(|pair| pair.close(close));
        if self.shared.pairs.is_empty() {
            // A rank without a share: nothing was to be sent, and all of that was.
            self.shared.finish_alone(Ok(Pushed {
                bytes: 0,
                resumed: 0,
                codec: Codec::Exact,
                estimate: None,
                acknowledged: Instant::now(),
            }));
        }
    }

    /// Gives the session up, here and at the receivers, with this reason.
    pub(crate) fn give_up(&self, error: SessionError) {
        self.closed.store(true, Ordering::Release);
        self.shared.give_up(error);
    }

    /// Queues what `export` covers of the session's positions and layers, in any order of (layer, tokens), each once.
    /// Never blocks; the export is dropped when its bytes are on their way, or with the session.
    pub fn layer(&self, export: impl KvExport + 'static) {
        let (held, wanted) = (export.tokens(), &self.tokens);
        let tokens = held.start.max(wanted.start)..held.end.min(wanted.end);
        let mut pushed = lock(&self.pushed);
        let layers = export.layers();
        let layers = layers.start..layers.end.min(pushed.len());
        if tokens.is_empty() || layers.is_empty() {
            return;
        }
        for layer in layers.clone() {
            if pushed[layer].overlaps(&tokens) {
                let twice =
                    CoverageError::Twice { layer, plane: 0, head: 0, start: tokens.start, end: tokens.end };
                self.shared.abort(&twice.into());
                return;
            }
            pushed[layer].add(tokens.clone());
        }
        drop(pushed);
        let export = Arc::new(SharedExport::new(Box::new(export)));
        for pair in self.shared.pairs.iter().filter(|pair| !pair.parts.is_empty()) {
            let of = |part: &Part, layer| {
                let token_bytes = part.token_bytes;
                part.pieces(layer, &tokens).map(move |piece| (piece, token_bytes))
            };
            let rects: VecDeque<_> = layers
                .clone()
                .flat_map(|layer| pair.parts.iter().map(move |part| (part, layer)))
                .flat_map(|(part, layer)| of(part, layer))
                .collect();
            // A chunk may hold nothing of a receiver's share.
            if !rects.is_empty() {
                pair.push(Job::new(export.clone(), rects));
            }
        }
    }

    /// What the receivers take, heads of planes, if all of them can read it out of memory of `place` now: then an export may leave it
    /// there ([`backend::Step::export_there`]). A connection that is lost after is no harm: bytes are copied to the host then.
    pub fn reads(&self, place: Place) -> Option<Vec<Cut>> {
        let pairs = || self.shared.pairs.iter().filter(|pair| !pair.parts.is_empty());
        if pairs().next().is_none() || !pairs().all(|pair| pair.reads(place)) {
            return None;
        }
        let mut cuts: Vec<Cut> = Vec::new();
        for part in pairs().flat_map(|pair| &pair.parts) {
            let cut = Cut { plane: part.plane, heads: part.heads.clone() };
            if !cuts.contains(&cut) {
                cuts.push(cut);
            }
        }
        Some(cuts)
    }

    /// Ends the session after everything that is queued.
    pub fn close(self, close: Close) {
        self.finish(close);
    }

    /// Payload bytes queued and not yet on their way, over all receivers.
    pub fn backlog_bytes(&self) -> u64 {
        self.shared.pairs.iter().map(|pair| pair.backlog_bytes()).sum()
    }

    /// Gives the session up, here and at the receivers.
    pub fn cancel(self) {
        self.give_up(SessionError::Cancelled);
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::Acquire) {
            self.shared.give_up(SessionError::Dropped);
        }
    }
}

impl Shared {
    /// One thread per lane.
    fn spawn(self: &Arc<Self>, admission: &Arc<Admission>) {
        for pair in &self.pairs {
            for lane in 0..pair.paths.len() {
                let (shared, own, own_admission) = (self.clone(), pair.clone(), admission.clone());
                let spawned = thread::Builder::new().name("kv-push".into()).spawn(move || {
                    // A lease or device that panics must not keep the session open for ever.
                    let run = catch_unwind(AssertUnwindSafe(|| own.run(lane, &shared.pool, &own_admission)));
                    shared.pool.leave(&own_admission);
                    let result = run.unwrap_or_else(|_| {
                        Some(own.fail(SessionError::Device("the export panicked".into())))
                    });
                    if let Some(result) = result {
                        shared.ended(&own, result);
                    }
                });
                if let Err(error) = spawned {
                    self.pool.leave(admission);
                    if lane == 0 {
                        let error = SessionError::Invalid(format!("no thread for a push: {error}"));
                        self.ended(pair, pair.fail(error));
                    }
                }
            }
        }
    }

    /// A pair has ended; the first failure takes the others along.
    fn ended(&self, pair: &Pair, result: Ended) {
        let failed = result.as_ref().err().cloned();
        let resumed = pair.resumed();
        self.pool.resumed.fetch_add(resumed.into(), Ordering::Relaxed);
        let mut end = lock(&self.end);
        end.resumed += resumed;
        match result {
            Ok((bytes, at)) => {
                end.bytes += bytes;
                end.acknowledged = end.acknowledged.max(Some(at));
            }
            Err(error) => drop(end.error.get_or_insert(error)),
        }
        end.left -= 1;
        let finished = if end.left == 0 { end.finish() } else { None };
        drop(end);
        if let Some(error) = failed {
            self.abort(&error);
        }
        if let Some((done, result)) = finished {
            done(result);
        }
    }

    fn abort(&self, error: &SessionError) {
        self.pairs.iter().for_each(|pair| pair.abort(error.clone()));
        self.pool.look();
    }

    fn give_up(self: &Arc<Self>, error: SessionError) {
        self.abort(&error);
        if self.pairs.is_empty() {
            self.finish_alone(Err(error));
        }
    }

    /// Ends a push without pairs, on a thread of its own: the caller may hold locks that `done` takes.
    fn finish_alone(self: &Arc<Self>, result: Result<Pushed, SessionError>) {
        let Some(done) = lock(&self.end).done.take() else { return };
        let call = Arc::new(Mutex::new(Some((done, result))));
        let own = call.clone();
        let finish = move || {
            let taken = lock(&own).take();
            if let Some((done, result)) = taken {
                done(result);
            }
        };
        if thread::Builder::new().name("kv-push-end".into()).spawn(finish).is_err()
            && let Some((done, result)) = lock(&call).take()
        {
            done(result);
        }
    }
}

impl End {
    fn finish(&mut self) -> Option<(Done, Result<Pushed, SessionError>)> {
        let done = self.done.take()?;
        let result = match self.error.take() {
            Some(error) => Err(error),
            None => {
                let acknowledged = self.acknowledged.unwrap_or_else(Instant::now);
                Ok(Pushed {
                    bytes: self.bytes,
                    resumed: self.resumed,
                    codec: self.codec,
                    estimate: self.estimate,
                    acknowledged,
                })
            }
        };
        Some((done, result))
    }
}
