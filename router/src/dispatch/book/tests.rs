//! Who is served when: order, bounds, and what happens when nodes come, go or refuse.

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
