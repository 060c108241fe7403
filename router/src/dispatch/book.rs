//! The router's queue and its accounts: who waits, who was given what. The only long queue of the cluster.
//!
//! Callers: [`super::request`] asks for a [`Grant`]; every change (a report, a grant given back) places those who can be.
//! Requests are served by priority, then by arrival. One that waits for a node kind lets none pass that needs the same
//! kind; a local prompt may pass one that waits for a prefill node.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cluster::{Member, Members, Snapshot};
use proto::v1::Role;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::DispatchConfig;
use super::counts::Counts;
use super::field::Field;
use super::ledger::{GrantId, Ledger};
use super::prefix::{Holder, PrefixMap};
use crate::inference::{BACKGROUND, InferenceError, Load};
use crate::placement::{self, Ask, Candidate, Outcome, Placement, Rules, Wait};

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

/// A place in the cluster. Dropping it gives everything back.
pub struct Grant {
    /// Who does what.
    pub placement: Placement,
    /// The prefill node, if one is used.
    pub prefill: Option<Arc<Member>>,
    /// The decode group, if one is used.
    pub decode: Option<Arc<Member>>,
    id: GrantId,
    prefill_holder: Holder,
    decode_holder: Holder,
    book: Arc<Book>,
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

impl Grant {
    /// The group has reserved room and holds `cached_tokens` of the sequence.
    pub fn admitted(&self, cached_tokens: u32, blocks: &[u64]) {
        let Some(decode) = &self.decode else { return };
        self.book.change(|state| {
            state.ledger.worked(&decode.join.node_id);
            state.ledger.sequence_admitted(&decode.join.node_id, self.id, Instant::now().into_std());
            state.prefixes.correct(self.decode_holder, blocks, cached_tokens);
        });
    }

    /// The prompt is computed: the first token is there. `cached_tokens`: what its computer said it held before.
    pub fn computed(&self, cached_tokens: Option<u32>, blocks: &[u64]) {
        let (member, holder) = match (&self.prefill, &self.decode) {
            (Some(prefill), _) => (prefill, self.prefill_holder),
            (None, Some(decode)) => (decode, self.decode_holder),
            (None, None) => return,
        };
        self.book.change(|state| {
            state.ledger.worked(&member.join.node_id);
            state.ledger.prompt_done(&member.join.node_id, self.id);
            if let Some(cached_tokens) = cached_tokens {
                state.prefixes.correct(holder, blocks, cached_tokens);
            }
            state.prefixes.record(holder, blocks);
        });
        // A prefill node that has one prompt less may start another.
        self.book.refresh();
    }

    /// The decode group holds these blocks now.
    pub fn held_by_decode(&self, blocks: &[u64]) {
        if self.decode.is_some() {
            self.book.change(|state| state.prefixes.record(self.decode_holder, blocks));
        }
    }

    /// The node of this role refused for want of room: nobody is sent there before something changes.
    pub fn refused(&self, role: Role) {
        self.blame(role, Ledger::refused);
    }

    /// A call to the node of this role failed: nobody is sent there for a moment.
    pub fn failed(&self, role: Role) {
        self.blame(role, Ledger::failed);
    }

    fn blame(&self, role: Role, note: impl FnOnce(&mut Ledger, &str, std::time::Instant)) {
        let member = match role {
            Role::Prefill => &self.prefill,
            _ => &self.decode,
        };
        if let Some(member) = member {
            let now = Instant::now().into_std();
            self.book.change(|state| note(&mut state.ledger, &member.join.node_id, now));
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.book.change(|state| {
            state.grants_open -= 1;
            for member in [&self.prefill, &self.decode].into_iter().flatten() {
                state.ledger.returned(&member.join.node_id, self.id);
            }
        });
        self.book.refresh();
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
mod tests {
    use cluster::MembershipConfig;
    use proto::v1::{Identity, JoinRequest, KvBlocks, KvPlane, KvSpec, NodeReport};

    use super::*;
    use crate::inference::Decision;
    use crate::placement::{Disaggregation, Reason};

    struct World {
        book: Arc<Book>,
        members: Members,
        counts: Arc<Counts>,
    }

    impl World {
        fn new(change: impl FnOnce(&mut DispatchConfig)) -> World {
            let mut config =
                DispatchConfig { disaggregation: Disaggregation::Always, ..DispatchConfig::default() };
            change(&mut config);
            let members = Members::new(MembershipConfig::default());
            let counts = Arc::new(Counts::default());
            let book = Arc::new(Book::new(config, members.clone(), counts.clone()));
            World { book, members, counts }
        }

        /// A node joins; the returned report is ready, with a store of `blocks` free blocks of 16 tokens.
        fn join(&self, node_id: &str, role: Role, blocks: u32) -> NodeReport {
            let plane = KvPlane { heads_total: 4, dim: 64, dtype: "bf16".into(), ..KvPlane::default() };
            let reply = self.members.join(JoinRequest {
                node_id: node_id.into(),
                name: node_id.into(),
                role: role.into(),
                version: env!("CARGO_PKG_VERSION").into(),
                protocol: proto::PROTOCOL,
                model: "m".into(),
                identity: Some(Identity { graph: "g".into(), vocab: "v".into(), weights: "w".into() }),
                kv_spec: Some(KvSpec { layers: 2, planes: vec![plane] }),
                grpc_address: "127.0.0.1:1".into(),
                ranks: 1,
                context_tokens: 4096,
                ..JoinRequest::default()
            });
            NodeReport {
                member_id: reply.unwrap().member_id,
                ready: true,
                kv: Some(KvBlocks { block_tokens: 16, total: blocks, free: blocks, ..KvBlocks::default() }),
                ..NodeReport::default()
            }
        }

        fn report(&self, report: &NodeReport) {
            self.members.report(report.clone()).unwrap();
            self.book.refresh();
        }

        fn wanted(&self, tokens: u32, priority: i32) -> Wanted {
            Wanted {
                priority,
                arrival: self.book.arrival(),
                ask: Ask { tokens, one_token: false },
                blocks: Arc::new([]),
                fresh: true,
                deadline: Instant::now() + Duration::from_secs(30),
            }
        }

        fn spawn(&self, wanted: Wanted) -> tokio::task::JoinHandle<Result<Grant, InferenceError>> {
            let book = self.book.clone();
            tokio::spawn(async move { book.place(wanted).await })
        }

        /// Until so many wait. Time is held: a pause lets the other tasks run until they wait.
        async fn until_waiting(&self, count: u32) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(self.book.load().queued, count);
        }
    }

    /// Protects: priority, then arrival; whoever needs room does not pass one that waits for it.
    #[tokio::test(start_paused = true)]
    async fn order() {
        let world = World::new(|_| {});
        let group = world.join("d0", Role::Decode, 10);
        world.report(&group);
        let first = world.book.place(world.wanted(100, 0)).await.unwrap();
        let large = world.spawn(world.wanted(120, 0));
        world.until_waiting(1).await;
        let batch = world.spawn(world.wanted(10, -1));
        world.until_waiting(2).await;
        let small = world.spawn(world.wanted(10, 0));
        world.until_waiting(3).await;
        drop(first);
        let large = large.await.unwrap().unwrap();
        assert_eq!(world.book.load(), Load { running: 1, queued: 2, waiting: 2 });
        drop(large);
        let (small, batch) = (small.await.unwrap().unwrap(), batch.await.unwrap().unwrap());
        assert!(small.id < batch.id);
        drop((small, batch));
        assert_eq!(world.book.load(), Load::default());
    }

    /// Protects: a full queue and a late turn are answers with advice, and leave nothing behind.
    #[tokio::test(start_paused = true)]
    async fn overload() {
        let world = World::new(|config| config.queue_max = 1);
        let group = world.join("d0", Role::Decode, 10);
        world.report(&group);
        let held = world.book.place(world.wanted(140, 0)).await.unwrap();
        let waits = world.spawn(world.wanted(140, 0));
        world.until_waiting(1).await;
        let full = world.book.place(world.wanted(140, 0)).await.err();
        assert!(matches!(full, Some(InferenceError::Overloaded { .. })), "{full:?}");
        let late = waits.await.unwrap().err();
        assert!(matches!(late, Some(InferenceError::Overloaded { .. })), "{late:?}");
        assert_eq!(world.counts.overloaded(), 2);
        drop(held);
        assert_eq!(world.book.load(), Load::default());
    }

    /// Protects: where no decode group ever was, a request hears so; not just after the start, and where one just left, it is
    /// held.
    #[tokio::test(start_paused = true)]
    async fn nobody_and_somebody() {
        let world = World::new(|config| config.start_grace = Duration::from_secs(10));
        let early = world.spawn(world.wanted(10, 0));
        world.until_waiting(1).await;
        tokio::time::advance(Duration::from_secs(10)).await;
        let error = world.book.place(world.wanted(10, 0)).await.err();
        let nobody = Some(InferenceError::Unavailable("no decode group has joined the router".into()));
        assert_eq!((early.await.unwrap().err(), error), (nobody.clone(), nobody));
        let group = world.join("d0", Role::Decode, 10);
        world.report(&group);
        world.members.leave(&group.member_id);
        let waits = world.spawn(world.wanted(10, 0));
        world.until_waiting(1).await;
        let group = world.join("d0", Role::Decode, 10);
        world.report(&group);
        assert!(waits.await.unwrap().is_ok());
        world.members.leave(&group.member_id);
        let late = world.book.place(world.wanted(10, 0)).await.err();
        assert_eq!(late, Some(InferenceError::Unavailable("no decode group is ready".into())));
    }

    /// Protects: a group that refused is asked again after its next report, not before.
    #[tokio::test(start_paused = true)]
    async fn refusals_wait_for_a_report() {
        let world = World::new(|_| {});
        let group = world.join("d0", Role::Decode, 10);
        world.report(&group);
        let grant = world.book.place(world.wanted(10, 0)).await.unwrap();
        grant.refused(Role::Decode);
        drop(grant);
        let waits = world.spawn(world.wanted(10, 0));
        world.until_waiting(1).await;
        tokio::time::advance(Duration::from_millis(1)).await;
        world.report(&group);
        assert!(waits.await.unwrap().is_ok());
    }

    /// Protects: decisions are counted with their reason, and a prompt goes back to whom it was recorded for.
    #[tokio::test(start_paused = true)]
    async fn decisions_and_affinity() {
        let world = World::new(|_| {});
        for (id, role) in [("d0", Role::Decode), ("d1", Role::Decode), ("p0", Role::Prefill)] {
            let report = world.join(id, role, 1000);
            world.report(&report);
        }
        let blocks: Arc<[u64]> = (0..20).collect();
        // The first choice is arbitrary: what was given is kept, so that the other group is taken next.
        let mut given = Vec::new();
        while given.last().is_none_or(|grant: &Grant| grant.decode.as_ref().unwrap().join.node_id != "d1") {
            assert!(given.len() < 2);
            let wanted = Wanted { blocks: blocks.clone(), ..world.wanted(650, 0) };
            given.push(world.book.place(wanted).await.unwrap());
        }
        given.last().unwrap().held_by_decode(&blocks);
        given.clear();
        let wanted = Wanted { blocks: blocks.clone(), ..world.wanted(650, 0) };
        let grant = world.book.place(wanted).await.unwrap();
        assert_eq!(grant.decode.as_ref().unwrap().join.node_id, "d1");
        assert!(world.counts.decisions_of(Decision::Handoff, Reason::Policy) >= 2);
        assert_eq!(world.counts.decisions_of(Decision::Local, Reason::NoPrefillNode), 0);
    }
}
