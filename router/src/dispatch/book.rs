//! The router's queue and its accounts: who waits, who was given what. The only long queue of the cluster.
//!
//! Callers: [`super::request`] asks for a [`Grant`]; every change (a report, a grant given back) places those who can be.
//! Requests are served by priority, then by arrival. One that waits for a node kind lets none pass that needs the same
//! kind; a local prompt may pass one that waits for a prefill node.

mod grant;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cluster::{Members, Snapshot};
use proto::v1::Role;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::DispatchConfig;
use super::counts::Counts;
use super::field::Field;
use super::ledger::{GrantId, Ledger};
use super::prefix::PrefixMap;
use crate::inference::{BACKGROUND, InferenceError, Load};
use crate::placement::{self, Ask, Candidate, Outcome, Placement, Rules, Wait};

pub use grant::Grant;

/// Requests looked at behind one that must wait.
const LOOK_PAST_MAX: usize = 8;

/// Bounds of the advice when to come again.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// What a request asks for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Higher first.
    pub priority: i32,
    /// Lower first: a migrated request keeps its number and so goes before later ones.
    pub arrival: u64,
    /// Size and kind.
    pub ask: Ask,
    /// Hashes of its whole blocks.
    pub blocks: Arc<[u64]>,
    /// No node has accepted it yet: it counts against the queue's bound.
    pub fresh: bool,
    /// Not served by then: not at all.
    pub deadline: Instant,
}

type Turn = (Reverse<i32>, u64);

struct Waiting {
    wanted: Wanted,
    answer: oneshot::Sender<Result<Grant, InferenceError>>,
    wait: Wait,
}

#[derive(Default)]
struct State {
    waiting: BTreeMap<Turn, Waiting>,
    ledger: Ledger,
    prefixes: PrefixMap,
    grants_given: GrantId,
    grants_open: u32,
    /// When a decode group was last in the cluster.
    decode_seen: Option<Instant>,
    granted: Option<Instant>,
    /// Smoothed time between grants, for the advice when to come again.
    grant_interval: Duration,
}

/// The queue and the accounts, shared by all requests.
pub struct Book {
    state: Mutex<State>,
    members: Members,
    config: DispatchConfig,
    counts: Arc<Counts>,
    arrivals: AtomicU64,
    begun: Instant,
}

type Answers = Vec<(oneshot::Sender<Result<Grant, InferenceError>>, Result<Grant, InferenceError>)>;

impl Book {
    /// Empty.
    pub fn new(config: DispatchConfig, members: Members, counts: Arc<Counts>) -> Book {
        Book {
            state: Mutex::default(),
            members,
            config,
            counts,
            arrivals: AtomicU64::new(0),
            begun: Instant::now(),
        }
    }

    /// A number that is higher than all before.
    pub fn arrival(&self) -> u64 {
        self.arrivals.fetch_add(1, Ordering::Relaxed)
    }

    /// Requests with a grant, and requests waiting for one.
    pub fn load(&self) -> Load {
        let state = self.lock();
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        // Lines of batches are the last of the order.
        let background = (Reverse(BACKGROUND), 0);
        Load {
            running: state.grants_open,
            queued: count(state.waiting.len()),
            waiting: count(state.waiting.range(..background).count()),
        }
    }

    /// Waits for a place. Dropping the future leaves the queue.
    pub async fn place(self: &Arc<Self>, wanted: Wanted) -> Result<Grant, InferenceError> {
        let (answer, granted) = oneshot::channel();
        let turn = (Reverse(wanted.priority), wanted.arrival);
        let (fresh, deadline) = (wanted.fresh, wanted.deadline);
        if deadline <= Instant::now() {
            return Err(self.too_late(&self.lock(), Wait::DecodeGroup, fresh));
        }
        self.lock().waiting.insert(turn, Waiting { wanted, answer, wait: Wait::Room });
        let in_queue = InQueue { book: self, turn };
        self.refresh();
        if fresh && self.is_over_full(&turn) {
            drop(in_queue);
            self.counts.was_overloaded();
            return Err(InferenceError::Overloaded { retry_after: retry_after(&self.lock()) });
        }
        match tokio::time::timeout_at(deadline, granted).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(InferenceError::Internal("the router's queue let go of the request".into())),
            Err(_) => {
                let state = self.lock();
                let wait = state.waiting.get(&turn).map_or(Wait::Room, |waiting| waiting.wait);
                let error = self.too_late(&state, wait, fresh);
                // The guard leaves the queue, which takes the lock.
                drop(state);
                Err(error)
            }
        }
    }

    /// Places everyone who can be placed now. Called after every change.
    pub fn refresh(self: &Arc<Self>) {
        let answers = {
            let mut state = self.lock();
            let snapshot = self.members.snapshot();
            self.pump(&mut state, &snapshot, Instant::now())
        };
        for (answer, result) in answers {
            // Who has left the queue meanwhile drops the grant, which takes the lock again: hence out here.
            let _ = answer.send(result);
        }
    }

    fn pump(self: &Arc<Self>, state: &mut State, snapshot: &Snapshot, now: Instant) -> Answers {
        if snapshot.of(Role::Decode).next().is_some() {
            state.decode_seen = Some(now);
        }
        state.ledger.keep(|node_id| snapshot.find(node_id).is_some());
        let mut answers = Vec::new();
        let (mut prefill_blocked, mut decode_blocked, mut looked_past) = (false, false, 0);
        let mut after: Option<Turn> = None;
        while let Some((turn, blocks, ask)) = next_turn(&state.waiting, after) {
            after = Some(turn);
            let field =
                Field::new(snapshot, &mut state.ledger, &state.prefixes, ask, &blocks, now.into_std());
            let rules = Rules {
                disaggregation: self.config.disaggregation,
                start_within_s: self.config.start_within.as_secs_f64(),
            };
            let verdict = match placement::place(ask, &field.view, &rules) {
                Outcome::Place(placement) if placement.prefill().is_some() && prefill_blocked => {
                    Err(Wait::Prefill)
                }
                Outcome::Place(placement) if placement.decode().is_some() && decode_blocked => {
                    Err(Wait::Room)
                }
                Outcome::Place(placement) => Ok(Ok(placement)),
                Outcome::Wait(Wait::DecodeGroup) if self.nobody_comes(state, &turn, now) => {
                    Ok(Err(InferenceError::Unavailable("no decode group has joined the router".into())))
                }
                Outcome::Wait(wait) => Err(wait),
                Outcome::Never(why) => Ok(Err(InferenceError::Invalid(why))),
            };
            match verdict {
                Ok(answer) => {
                    let Some(waiting) = state.waiting.remove(&turn) else { continue };
                    let answer = answer.map(|placement| self.grant(state, &field, placement, ask, now));
                    answers.push((waiting.answer, answer));
                }
                Err(wait) => {
                    if let Some(waiting) = state.waiting.get_mut(&turn) {
                        waiting.wait = wait;
                    }
                    match wait {
                        Wait::Prefill => prefill_blocked = true,
                        Wait::Room | Wait::DecodeGroup => decode_blocked = true,
                    }
                    looked_past += 1;
                    if looked_past > LOOK_PAST_MAX || (prefill_blocked && decode_blocked) {
                        break;
                    }
                }
            }
        }
        answers
    }

    fn grant(
        self: &Arc<Self>,
        state: &mut State,
        field: &Field,
        placement: Placement,
        ask: Ask,
        now: Instant,
    ) -> Grant {
        state.grants_given += 1;
        state.grants_open += 1;
        let interval = state.granted.map_or(Duration::ZERO, |before| now.duration_since(before));
        state.grant_interval = (state.grant_interval * 7 + interval) / 8;
        state.granted = Some(now);
        self.counts.decided(placement.decision(), placement.reason());

        let id = state.grants_given;
        let prefill = placement.prefill().map(|index| (&field.prefill[index], &field.view.prefill[index]));
        let decode = placement.decode().map(|index| (&field.decode[index], &field.view.decode[index]));
        let uncached = |candidate: &Candidate| ask.tokens.saturating_sub(candidate.cached_tokens).max(1);
        if let Some(((member, _), candidate)) = prefill.or(decode) {
            state.ledger.prompt_given(&member.join.node_id, id, uncached(candidate));
        }
        if let Some(((member, _), candidate)) = decode {
            let blocks = candidate.store.map_or(0, |store| {
                let shared = candidate.cached_tokens.min(ask.tokens) / store.block_tokens.max(1);
                placement::blocks_for(ask.tokens, &store) - shared
            });
            state.ledger.sequence_given(&member.join.node_id, id, blocks);
        }
        Grant {
            placement,
            prefill: prefill.map(|((member, _), _)| member.clone()),
            decode: decode.map(|((member, _), _)| member.clone()),
            id,
            prefill_holder: prefill.map_or(0, |((_, holder), _)| *holder),
            decode_holder: decode.map_or(0, |((_, holder), _)| *holder),
            book: self.clone(),
        }
    }

    /// A new request need not wait where no decode group has been for as long as one may take to come back.
    fn nobody_comes(&self, state: &State, turn: &Turn, now: Instant) -> bool {
        let fresh = state.waiting.get(turn).is_some_and(|waiting| waiting.wanted.fresh);
        let (since, limit) = match state.decode_seen {
            Some(seen) => (seen, self.config.hold),
            None => (self.begun, self.config.start_grace),
        };
        fresh && now.duration_since(since) >= limit
    }

    fn is_over_full(&self, turn: &Turn) -> bool {
        let state = self.lock();
        state.waiting.len() > self.config.queue_max && state.waiting.contains_key(turn)
    }

    fn too_late(&self, state: &State, wait: Wait, fresh: bool) -> InferenceError {
        match (wait, fresh) {
            (Wait::DecodeGroup, _) => InferenceError::Unavailable("no decode group is ready".into()),
            (_, false) => {
                InferenceError::Unavailable("no node had room to go on with the request in time".into())
            }
            (Wait::Room | Wait::Prefill, true) => {
                self.counts.was_overloaded();
                InferenceError::Overloaded { retry_after: retry_after(state) }
            }
        }
    }

    fn change(self: &Arc<Self>, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Changed by whole operations that do not panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn in the queue. Dropping it leaves; whoever waited behind is looked at.
struct InQueue<'a> {
    book: &'a Arc<Book>,
    turn: Turn,
}

impl Drop for InQueue<'_> {
    fn drop(&mut self) {
        let left = self.book.lock().waiting.remove(&self.turn).is_some();
        if left {
            self.book.refresh();
        }
    }
}

fn next_turn(waiting: &BTreeMap<Turn, Waiting>, after: Option<Turn>) -> Option<(Turn, Arc<[u64]>, Ask)> {
    use std::ops::Bound::{Excluded, Unbounded};
    let from = after.map_or(Unbounded, Excluded);
    let (turn, waiting) = waiting.range((from, Unbounded)).next()?;
    Some((*turn, waiting.wanted.blocks.clone(), waiting.wanted.ask))
}

fn retry_after(state: &State) -> Duration {
    let waiting = u32::try_from(state.waiting.len()).unwrap_or(u32::MAX);
    state.grant_interval.saturating_mul(waiting).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
}

#[cfg(test)]
mod tests;
