//! The glue to [`kvtransfer`] on one rank: landings wait for their sessions, pushes take what layers give. Whatever
//! ends tells the leader by a notice, after this rank has let go of the memory.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backend::{Cut, KvExport, KvStore, Place};
use kvtransfer::{Close, Expect, Landed, Peers, Push, PushSpec, Receiver, Sender, SessionId, TargetSpec};

use crate::error::EngineError;
use crate::ledger::LeaseId;
use crate::tp::plan::{Arrived, Land, Notice, PushOp, Sent};

/// Takes notices to the leader, from any thread.
pub(crate) type Notify = Arc<dyn Fn(Notice) + Send + Sync>;

/// Landings that were not given up: `None` until the session is whole.
type Landings<L> = Arc<Mutex<HashMap<LeaseId, Option<L>>>>;

/// Transfers of one epoch on one rank.
pub(crate) struct Transfers<K: KvStore> {
    receiver: Receiver,
    sender: Sender,
    landings: Landings<K::Landing>,
    sessions: HashMap<LeaseId, SessionId>,
    /// Pushes that are not closed yet, with what their computation has made.
    pushes: HashMap<LeaseId, (Push, Mutex<Made>)>,
    /// How fast prompts make cache here, smoothed.
    made_bytes_per_s: Option<f64>,
    notify: Notify,
    epoch: u64,
    /// Every rank's cache and KV addresses, and this rank's index.
    targets: Vec<TargetSpec>,
    rank: usize,
    /// Rows of one prompt in a step, at most.
    chunk_tokens: u32,
}

impl<K: KvStore> Transfers<K> {
    pub fn new(
        receiver: Receiver,
        sender: Sender,
        notify: Notify,
        epoch: u64,
        targets: Vec<TargetSpec>,
        rank: usize,
        chunk_tokens: u32,
    ) -> Self {
        Transfers {
            receiver,
            sender,
            landings: Arc::default(),
            sessions: HashMap::new(),
            pushes: HashMap::new(),
            made_bytes_per_s: None,
            notify,
            epoch,
            targets,
            rank,
            chunk_tokens,
        }
    }

    /// Waits for the session of `land` in the background.
    pub fn expect(&mut self, land: &Land, landing: K::Landing) {
        let expect = Expect {
            session: land.session,
            ticket: land.ticket.clone(),
            request: land.request.clone(),
            attempt: land.attempt,
            epoch: self.epoch,
            spec: self.targets[self.rank].spec.clone(),
            tokens: land.tokens.clone(),
            deadline: land.deadline,
            peers: Some(Peers {
                rank: self.rank,
                targets: self.targets.clone(),
                sender: self.sender.clone(),
            }),
        };
        let lease = land.lease;
        lock(&self.landings).insert(lease, None);
        self.sessions.insert(lease, land.session);
        let (landings, notify) = (self.landings.clone(), self.notify.clone());
        let done = move |landed: Landed<K::Landing>| {
            let age = landed.last_frame.elapsed();
            let result = match landed.result {
                Ok(summary) => {
                    // Nobody waits for a landing that was given up: it is dropped here.
                    if let Some(place) = lock(&landings).get_mut(&lease) {
                        *place = Some(landed.landing);
                    }
                    // What crossed the link: the ranks of the group passed the rest on to each other.
                    let bytes = summary.bytes - summary.gathered_bytes;
                    Ok(Arrived { bytes, close: summary.close })
                }
                Err(error) => {
                    lock(&landings).remove(&lease);
                    drop(landed.landing);
                    Err(error.to_string())
                }
            };
            notify(Notice::Landed { lease, result, age });
        };
        if let Err(refused) = self.receiver.expect(expect, landing, done) {
            let reason = refused.error.to_string();
            drop(refused);
            self.forget(lease);
            (self.notify)(Notice::Landed { lease, result: Err(reason), age: Duration::ZERO });
        }
    }

    /// The filled landing of a session that is whole.
    pub fn landed(&mut self, lease: LeaseId) -> Option<K::Landing> {
        self.sessions.remove(&lease);
        lock(&self.landings).remove(&lease).flatten()
    }

    /// Begins a push.
    pub fn push(&mut self, op: &PushOp) {
        let handoff = &op.handoff;
        let spec = PushSpec {
            session: handoff.session,
            ticket: handoff.ticket.clone(),
            request: op.request.clone(),
            attempt: op.attempt,
            epoch: handoff.epoch,
            from: self.targets.iter().map(|target| target.spec.clone()).collect(),
            from_rank: self.rank,
            to: handoff
                .targets
                .iter()
                .map(|t| TargetSpec { rank: t.rank, addresses: t.addresses.clone(), spec: t.spec.clone() })
                .collect(),
            tokens: handoff.tokens.clone(),
            deadline: handoff.deadline,
            compute_bytes_per_s: self.made_bytes_per_s,
            chunk_tokens: self.chunk_tokens,
        };
        let (lease, notify) = (op.lease, self.notify.clone());
        let push = self.sender.open(spec, move |result| {
            let age = match &result {
                Ok(pushed) => Instant::now().saturating_duration_since(pushed.acknowledged),
                Err(_) => Duration::ZERO,
            };
            let result = result
                .map(|pushed| Sent { bytes: pushed.bytes, codec: pushed.codec, estimate: pushed.estimate })
                .map_err(|error| error.to_string());
            notify(Notice::Pushed { lease, result, age });
        });
        self.pushes.insert(lease, (push, Mutex::default()));
    }

    /// Queues the cache of `tokens` of every layer that is there already.
    pub fn push_cached(
        &self,
        lease: LeaseId,
        layers: usize,
        tokens: &Range<u32>,
        mut export: impl FnMut(usize) -> Result<K::Export, EngineError>,
    ) -> Result<(), EngineError> {
        if let Some((push, _)) = self.pushes.get(&lease).filter(|_| !tokens.is_empty()) {
            for layer in 0..layers {
                push.layer(export(layer)?);
            }
        }
        Ok(())
    }

    /// What the receivers of a push take, if all of them read memory of `place`: then its bytes may stay there.
    pub fn reads(&self, lease: LeaseId, place: Place) -> Option<Vec<Cut>> {
        self.pushes.get(&lease)?.0.reads(place)
    }

    /// Queues what a layer has just given.
    pub fn push_layer(&self, lease: LeaseId, export: K::Export) {
        if let Some((push, made)) = self.pushes.get(&lease) {
            let row = self.targets[self.rank].spec.layer_token_bytes();
            lock(made).add((export.tokens().len() * export.layers().len() * row) as u64, Instant::now());
            push.layer(export);
        }
    }

    /// Ends a push after all that is queued.
    pub fn close(&mut self, lease: LeaseId, close: Close) {
        if let Some((push, made)) = self.pushes.remove(&lease) {
            if let Some(rate) = lock(&made).bytes_per_s() {
                self.made_bytes_per_s =
                    Some(self.made_bytes_per_s.map_or(rate, |old| old + 0.3 * (rate - old)));
            }
            push.close(close);
        }
    }

    /// Gives a landing or push up, in whatever state it is. A push that was closed ends by itself: its receivers give
    /// up with the job, or its deadline passes.
    pub fn abort(&mut self, lease: LeaseId) {
        self.forget(lease);
        if let Some((push, _)) = self.pushes.remove(&lease) {
            push.cancel();
        }
    }

    /// Gives everything up.
    pub fn clear(&mut self) {
        let leases: Vec<LeaseId> = self.sessions.keys().chain(self.pushes.keys()).copied().collect();
        leases.into_iter().for_each(|lease| self.abort(lease));
    }

    fn forget(&mut self, lease: LeaseId) {
        // First out of the map, so that a session which ends now drops its landing.
        let landing = lock(&self.landings).remove(&lease);
        drop(landing);
        if let Some(session) = self.sessions.remove(&lease) {
            self.receiver.cancel(&session);
        }
    }
}

/// How fast one prompt makes cache: what came after its first layer, over the time since then.
#[derive(Default)]
struct Made {
    first: Option<Instant>,
    last: Option<Instant>,
    bytes: u64,
}

impl Made {
    fn add(&mut self, bytes: u64, now: Instant) {
        if self.first.is_none() {
            self.first = Some(now);
            return;
        }
        (self.last, self.bytes) = (Some(now), self.bytes + bytes);
    }

    fn bytes_per_s(&self) -> Option<f64> {
        let seconds = self.last?.saturating_duration_since(self.first?).as_secs_f64();
        (seconds > 0.0).then(|| self.bytes as f64 / seconds)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
