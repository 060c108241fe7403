//! Dispatch against mock nodes over real sockets: where requests go, what clients see when nodes die, freeze, refuse.
//! Every answer is compared with the one that a single undisturbed model would have given.

mod mock;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::{ClusterService, ClusterToken, Members, MembershipConfig, Shutdown};
use futures::StreamExt;
use mock::{Fabric, Node, answer};
use proto::v1::Role;
use router::dispatch::counts::Cause;
use router::dispatch::{Dispatch, DispatchConfig};
use router::inference::{
    Decision, FinishReason, Finished, GenerateRequest, Inference, InferenceError, Load, Sampling, Started,
    TokenEvent, TokenStream,
};
use router::placement::{Disaggregation, Reason};
use tokio::time::timeout;
use tonic::service::Routes;

/// Nothing here takes this long; it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    dispatch: Dispatch,
    members: Members,
    token: ClusterToken,
    router: std::net::SocketAddr,
    fabric: Arc<Fabric>,
    shutdown: Shutdown,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl World {
    async fn new(disaggregation: Disaggregation, change: impl FnOnce(&mut DispatchConfig)) -> World {
        let mut config = DispatchConfig { disaggregation, ..DispatchConfig::default() };
        change(&mut config);
        let token = ClusterToken::generate().unwrap();
        let members = Members::new(MembershipConfig {
            heartbeat: Duration::from_millis(20),
            lease: Duration::from_secs(2),
            ..MembershipConfig::default()
        });
        let listener = cluster::server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let router = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let dispatch = Dispatch::new(config, members.clone(), token.clone());
        let service = ClusterService::new(members.clone(), Arc::new(|| (0, 0)), shutdown.clone());
        let routes = Routes::new(cluster::server::cluster(service));
        let (serve_token, stop) = (token.clone(), shutdown.clone());
        tokio::spawn(async move {
            cluster::server::serve(listener, &serve_token, routes, stop, Duration::ZERO).await.unwrap();
        });
        let (leases, stop) = (members.clone(), shutdown.clone());
        tokio::spawn(async move { leases.expire_leases(stop).await });
        let (watcher, stop) = (dispatch.clone(), shutdown.clone());
        tokio::spawn(async move { watcher.watch(stop).await });
        World { dispatch, members, token, router, fabric: Arc::default(), shutdown }
    }

    /// A node that has joined and is ready.
    async fn node(&self, id: &str, role: Role) -> Node {
        let node = Node::start(id, role, self.router, &self.token, &self.token, &self.fabric);
        self.until_ready(id).await;
        node
    }

    async fn until_ready(&self, id: &str) {
        let mut changes = self.members.subscribe();
        let ready = changes.wait_for(|now| now.find(id).is_some_and(|member| member.ready()));
        timeout(PATIENCE, ready).await.expect("a ready node").unwrap();
    }

    /// Until the node's next report, and the one after: what a test changed in its script is known.
    async fn until_reported(&self, id: &str) {
        let reported = |now: &Arc<cluster::Snapshot>| now.find(id).map(|member| member.reported);
        let mut changes = self.members.subscribe();
        for _ in 0..2 {
            let before = reported(&changes.borrow_and_update());
            timeout(PATIENCE, changes.wait_for(|now| reported(now) > before))
                .await
                .expect("a report")
                .unwrap();
        }
    }

    fn ask(&self, request: &GenerateRequest) -> Client {
        Client { stream: self.dispatch.generate(request.clone()), seen: Vec::new(), started: None }
    }

    fn migrations(&self) -> Vec<(Cause, u64)> {
        self.dispatch.counts().migrations().filter(|(_, count)| *count > 0).collect()
    }

    async fn until_idle(&self) {
        until("an idle router", || self.dispatch.load() == Load::default()).await;
    }
}

/// Looks again and again: for state that nobody announces.
async fn until(what: &str, mut wanted: impl FnMut() -> bool) {
    let look = async {
        while !wanted() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, look).await.expect(what);
}

/// A client that reads its stream.
struct Client {
    stream: TokenStream,
    seen: Vec<u32>,
    started: Option<Started>,
}

impl Client {
    /// Reads one event; tokens are checked for their index.
    async fn event(&mut self) -> Result<Option<Finished>, InferenceError> {
        match timeout(PATIENCE, self.stream.next())
            .await
            .expect("an event")
            .expect("no end without Finished")?
        {
            TokenEvent::Started(started) => {
                assert!(self.started.is_none() && self.seen.is_empty(), "started late or twice");
                self.started = Some(started);
                Ok(None)
            }
            TokenEvent::Token(token) => {
                assert!(self.started.is_some(), "a token before the start");
                assert_eq!(token.index as usize, self.seen.len(), "an index missing or twice");
                self.seen.push(token.id);
                Ok(None)
            }
            TokenEvent::Finished(finished) => {
                assert_eq!(finished.output_tokens as usize, self.seen.len());
                assert!(self.stream.next().await.is_none(), "something after the end");
                Ok(Some(finished))
            }
        }
    }

    async fn tokens(&mut self, count: usize) {
        while self.seen.len() < count {
            assert_eq!(self.event().await, Ok(None));
        }
    }

    async fn rest(&mut self) -> Result<Finished, InferenceError> {
        loop {
            if let Some(finished) = self.event().await? {
                return Ok(finished);
            }
        }
    }

    /// Reads to the end and compares with the undisturbed answer.
    async fn finish(mut self, request: &GenerateRequest) -> Finished {
        let finished = self.rest().await.unwrap();
        assert_eq!(self.seen, whole(request));
        finished
    }
}

fn request(prompt: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        id: format!("request-{prompt}"),
        tokens: (0..prompt).map(|at| at * 7 + prompt).collect(),
        max_tokens,
        min_tokens: 0,
        stop_ids: vec![],
        ignore_eos: true,
        sampling: Sampling { seed: 42, ..Sampling::default() },
        cache_salt: vec![],
        priority: 0,
        grammar: None,
        trace: Default::default(),
    }
}

fn whole(request: &GenerateRequest) -> Vec<u32> {
    answer(&request.tokens, request.sampling.seed, request.max_tokens as usize)
}

/// Protects: the way of a request: room first, the first token from the prefill node, the rest from the group; the
/// times that each reports; nothing left behind.
#[tokio::test]
async fn a_handoff() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    let asked = request(100, 20);
    let mut client = world.ask(&asked);
    client.tokens(1).await;
    assert_eq!(client.started.unwrap().cached_tokens, 2);
    let finished = client.finish(&asked).await;
    assert_eq!((finished.reason, finished.decision), (FinishReason::Length, Decision::Handoff));
    assert_eq!((finished.migrations, finished.cached_tokens), (0, 3));
    let timings = finished.timings;
    assert_eq!(timings.first_step_wait, Duration::from_micros(13));
    assert_eq!(timings.first_step, Duration::from_micros(17));
    assert!(timings.prefill > Duration::ZERO && timings.admission > Duration::ZERO);

    let call = prefill.script.calls().pop().unwrap();
    assert_eq!(
        (call.attempt, call.tokens, call.output_start, call.seed, call.alone),
        (0, 100, 100, 42, false)
    );
    assert_eq!(decode.script.calls(), [call]);
    assert_eq!(world.dispatch.counts().decisions_of(Decision::Handoff, Reason::Policy), 1);
    assert_eq!(world.dispatch.counts().finished(), 1);
    world.until_idle().await;

    // What the push took is told by the prefill node; a group that is done before that is heard does not wait for it.
    for _ in 0..50 {
        let timings = world.ask(&asked).finish(&asked).await.timings;
        if timings.transfer_exposed == Duration::from_micros(11) {
            assert_eq!(timings.transfer_estimated, Duration::from_micros(7));
            assert_eq!(timings.kv_codec.map(|codec| codec.as_str()), Some("int8"));
            return;
        }
    }
    panic!("the exposed transfer was never told");
}

/// Protects: `never`, and `always` without a prefill node: the group computes the prompt, and that is counted.
#[tokio::test]
async fn local_prompts() {
    let world = World::new(Disaggregation::Never, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    let asked = request(40, 5);
    let finished = world.ask(&asked).finish(&asked).await;
    assert_eq!((finished.decision, finished.cached_tokens), (Decision::Local, 2));
    assert!(prefill.script.calls().is_empty() && decode.script.calls()[0].alone);
    assert_eq!(world.dispatch.counts().decisions_of(Decision::Local, Reason::Policy), 1);

    let world = World::new(Disaggregation::Always, |_| {}).await;
    let _decode = world.node("d0", Role::Decode).await;
    assert_eq!(world.ask(&asked).finish(&asked).await.decision, Decision::Local);
    assert_eq!(world.dispatch.counts().decisions_of(Decision::Local, Reason::NoPrefillNode), 1);
}

/// Protects: `auto` follows what the nodes report.
#[tokio::test]
async fn auto_follows_reports() {
    let world = World::new(Disaggregation::Auto, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    let rates = async |of_prefill: f32, of_decode: f32| {
        prefill.script.report.lock().unwrap().prefill_tokens_per_s = of_prefill;
        decode.script.report.lock().unwrap().prefill_tokens_per_s = of_decode;
        world.until_reported("p0").await;
        world.until_reported("d0").await;
    };
    rates(10_000.0, 100.0).await;
    let asked = request(500, 3);
    assert_eq!(world.ask(&asked).finish(&asked).await.decision, Decision::Handoff);
    rates(100.0, 10_000.0).await;
    // Another prompt: the group holds the first one by now.
    let asked = request(501, 3);
    assert_eq!(world.ask(&asked).finish(&asked).await.decision, Decision::Local);
    let counts = world.dispatch.counts();
    assert_eq!(counts.decisions_of(Decision::Handoff, Reason::Sooner), 1);
    assert_eq!(counts.decisions_of(Decision::Local, Reason::Sooner), 1);
}

/// Protects: one token reserves nothing.
#[tokio::test]
async fn one_token_asks_no_group() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    let asked = request(50, 1);
    let finished = world.ask(&asked).finish(&asked).await;
    assert_eq!((finished.reason, finished.decision), (FinishReason::Length, Decision::Handoff));
    assert!(decode.script.calls().is_empty() && prefill.script.calls()[0].alone);
}

/// Protects: a first token that ends the answer ends the stream; the group ends by itself, uncancelled.
#[tokio::test]
async fn the_first_token_may_be_the_last() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    prefill.script.push.close();
    let mut asked = request(50, 10);
    asked.stop_ids = vec![whole(&asked)[0]];
    let mut client = world.ask(&asked);
    let finished = client.rest().await.unwrap();
    assert_eq!((finished.reason, finished.output_tokens), (FinishReason::Stop, 1));
    assert_eq!(client.seen, whole(&asked)[..1]);
    drop(client);
    // Still open: the session is not closed yet.
    assert_eq!(decode.script.open.load(Ordering::SeqCst), 1);
    prefill.script.push.permit(1);
    until("the group's end", || decode.script.open.load(Ordering::SeqCst) == 0).await;
    until("the prefill's end", || prefill.script.open.load(Ordering::SeqCst) == 0).await;
}

/// Protects: order, when the group is ahead of the first token's message.
#[tokio::test]
async fn the_group_may_be_ahead() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    prefill.script.push_first.store(true, Ordering::SeqCst);
    prefill.script.token.close();
    let asked = request(50, 10);
    let (mut client, group) = (world.ask(&asked), decode.script.clone());
    // The whole answer but its first token is generated before that is told.
    let done = tokio::spawn(async move {
        let finished = client.rest().await.unwrap();
        (client.seen, finished)
    });
    until("the group's end", || group.calls().len() == 1 && group.open.load(Ordering::SeqCst) == 0).await;
    prefill.script.token.permit(1);
    let (seen, finished) = done.await.unwrap();
    assert_eq!(seen, whole(&asked));
    assert_eq!(finished.migrations, 0);
}

/// Protects: a prefill node that dies before its first token: the request goes on elsewhere, here in the group itself.
#[tokio::test]
async fn the_prefill_node_dies_before_the_first_token() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (mut prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    prefill.script.token.close();
    let asked = request(50, 10);
    let client = world.ask(&asked);
    let expected = asked.clone();
    let done = tokio::spawn(async move { client.finish(&expected).await });
    let script = prefill.script.clone();
    until("the prefill call", || script.open.load(Ordering::SeqCst) == 1).await;
    prefill.kill();
    let finished = done.await.unwrap();
    assert_eq!((finished.migrations, finished.decision), (1, Decision::Handoff));
    // Whichever of the two is heard first: the call that broke or the session that failed.
    let migrations = world.migrations();
    assert!(matches!(migrations[..], [(Cause::PrefillLost | Cause::Session, 1)]), "{migrations:?}");
    // After a failed session the dead node may be asked once more.
    let calls = decode.script.calls();
    assert!(!calls[0].alone && calls.last().unwrap().alone, "{calls:?}");
    assert!(calls.windows(2).all(|pair| pair[0].attempt < pair[1].attempt), "{calls:?}");
    assert_eq!(world.dispatch.counts().decisions_of(Decision::Local, Reason::NoPrefillNode), 1);
}

/// Protects: the first token is committed: a prefill node that dies before its push ends costs a migration, no token.
#[tokio::test]
async fn the_prefill_node_dies_after_the_first_token() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (mut prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    prefill.script.push.close();
    let asked = request(50, 10);
    let mut client = world.ask(&asked);
    client.tokens(1).await;
    prefill.kill();
    assert_eq!(client.finish(&asked).await.migrations, 1);
    let migrations = world.migrations();
    assert!(matches!(migrations[..], [(Cause::PrefillLost | Cause::Session, 1)]), "{migrations:?}");
    let call = decode.script.calls().pop().unwrap();
    assert_eq!((call.tokens, call.output_start, call.seed), (51, 50, 42));
}

/// Protects: once everything has landed the prefill node may die without a trace.
#[tokio::test]
async fn the_prefill_node_dies_when_it_is_done() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (mut prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    decode.script.token.close();
    decode.script.token.permit(1);
    let asked = request(50, 10);
    let mut client = world.ask(&asked);
    client.tokens(2).await;
    prefill.kill();
    decode.script.token.permit(100);
    assert_eq!(client.finish(&asked).await.migrations, 0);
}

/// Protects: with one group the stream is held while that is away, and is then the stream that would have been.
#[tokio::test]
async fn the_group_dies_and_comes_back() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, mut decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    decode.script.token.close();
    decode.script.token.permit(4);
    let asked = request(50, 30);
    let mut client = world.ask(&asked);
    client.tokens(5).await;
    decode.kill();
    let expected = asked.clone();
    let done = tokio::spawn(async move { client.finish(&expected).await });
    until("a held stream", || world.dispatch.load().queued == 1).await;
    let back = world.node("d0", Role::Decode).await;
    assert_eq!(done.await.unwrap().migrations, 1);
    assert_eq!(world.migrations(), [(Cause::DecodeLost, 1)]);
    let call = back.script.calls().pop().unwrap();
    assert_eq!((call.tokens, call.output_start, call.seed, call.alone), (55, 50, 42, false));
    assert!(call.attempt >= 1);
    assert_eq!(prefill.script.calls().last(), Some(&call));
    world.until_idle().await;
}

/// Protects: streams are held for a bounded time, and the error says why.
#[tokio::test]
async fn a_group_that_stays_away() {
    let world = World::new(Disaggregation::Always, |config| config.hold = Duration::from_millis(300)).await;
    let mut decode = world.node("d0", Role::Decode).await;
    decode.script.token.close();
    decode.script.token.permit(2);
    let mut client = world.ask(&request(50, 30));
    client.tokens(2).await;
    decode.kill();
    let error = client.rest().await.unwrap_err();
    let InferenceError::Unavailable(reason) = &error else { panic!("{error:?}") };
    assert!(reason.starts_with("no decode group is ready; before that: node d0: "), "{reason}");
    assert_eq!(world.dispatch.counts().failed(), 1);
    world.until_idle().await;
}

/// Protects: preemption is a migration like any other, and a request that is always preempted ends with a reason.
#[tokio::test]
async fn preemption() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (_prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    *decode.script.preempt.lock().unwrap() = (3, 1);
    decode.script.token.close();
    let asked = request(50, 10);
    let mut client = world.ask(&asked);
    client.tokens(1).await;
    decode.script.token.permit(100);
    assert_eq!(client.finish(&asked).await.migrations, 1);
    assert_eq!(world.migrations(), [(Cause::Preempted, 1)]);
    let calls = decode.script.calls();
    assert_eq!((calls[1].attempt, calls[1].tokens, calls[1].output_start), (1, 53, 50));

    // Locally computed, so that not even the first token comes.
    let world = World::new(Disaggregation::Never, |config| config.migrations_without_token_max = 2).await;
    let decode = world.node("d0", Role::Decode).await;
    *decode.script.preempt.lock().unwrap() = (0, u32::MAX);
    let error = world.ask(&asked).rest().await.unwrap_err();
    assert_eq!(
        error,
        InferenceError::Unavailable(
            "gave up after 3 attempts without a new token: node d0 preempted: no room".into()
        )
    );
}

/// Protects: a refusal for want of room is no failure: the same attempt is made when something has changed, or at once
/// at another group.
#[tokio::test]
async fn no_room_then_room() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    decode.script.refuse_full.store(3, Ordering::SeqCst);
    prefill.script.refuse_full.store(1, Ordering::SeqCst);
    let asked = request(50, 10);
    assert_eq!(world.ask(&asked).finish(&asked).await.migrations, 0);
    let attempts: Vec<u32> = decode.script.calls().iter().map(|call| call.attempt).collect();
    // What the group refuses leaves nothing there; what it reserved for the prefill node in vain is another attempt.
    assert_eq!(attempts, [0, 0, 0, 0, 1]);
    assert_eq!(world.dispatch.counts().refusals_decode(), 3);
    assert_eq!(world.dispatch.counts().refusals_prefill(), 1);

    let other = world.node("d1", Role::Decode).await;
    decode.script.refuse_full.store(u32::MAX, Ordering::SeqCst);
    let asked = request(60, 10);
    assert_eq!(world.ask(&asked).finish(&asked).await.migrations, 0);
    assert_eq!(other.script.calls().len(), 1);
}

/// Protects: a client that leaves frees both nodes, wherever its request is; one that waits leaves the queue.
#[tokio::test]
async fn leaving_cancels() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    decode.script.token.close();
    prefill.script.push.close();
    let mut client = world.ask(&request(50, 10));
    client.tokens(1).await;
    let open = |node: &Node| node.script.open.load(Ordering::SeqCst);
    assert_eq!((open(&prefill), open(&decode)), (1, 1));
    drop(client);
    until("freed nodes", || open(&prefill) == 0 && open(&decode) == 0).await;
    prefill.script.push.permit(100);
    let mut client = world.ask(&request(51, 10));
    client.tokens(1).await;
    until("the push", || open(&prefill) == 0).await;
    drop(client);
    until("a freed group", || open(&decode) == 0).await;
    assert_eq!(world.dispatch.counts().cancelled(), 2);
    world.until_idle().await;

    // A stream that nobody polls asks nobody.
    let calls = decode.script.calls().len();
    drop(world.ask(&request(52, 10)));
    assert_eq!(decode.script.calls().len(), calls);
}

/// Protects: the queue is bounded in length and time, and says when to come again.
#[tokio::test]
async fn a_full_queue() {
    let world = World::new(Disaggregation::Always, |config| {
        config.queue_max = 1;
        config.queue_deadline = Duration::from_millis(400);
    })
    .await;
    let decode = world.node("d0", Role::Decode).await;
    {
        let mut report = decode.script.report.lock().unwrap();
        let kv = report.kv.as_mut().unwrap();
        (kv.total, kv.free) = (20, 4);
    }
    world.until_reported("d0").await;
    let large = request(200, 10);
    let mut waits = world.ask(&large);
    let waits = tokio::spawn(async move { waits.rest().await });
    until("a full queue", || world.dispatch.load().queued == 1).await;
    let refused = world.ask(&large).rest().await.unwrap_err();
    assert!(matches!(refused, InferenceError::Overloaded { retry_after } if !retry_after.is_zero()));
    assert!(matches!(waits.await.unwrap(), Err(InferenceError::Overloaded { .. })));
    let never = world.ask(&request(400, 10)).rest().await.unwrap_err();
    assert!(matches!(&never, InferenceError::Invalid(why) if why.contains("320 tokens of KV")), "{never:?}");
    assert_eq!(world.dispatch.counts().overloaded(), 2);
    decode.script.invalid.store(true, Ordering::SeqCst);
    let invalid = world.ask(&request(10, 10)).rest().await.unwrap_err();
    assert_eq!(invalid, InferenceError::Invalid("node d0: the mock takes no such thing".into()));
    world.until_idle().await;
}

/// Protects: a group whose connection stays up but that stands still is left when its lease is over.
#[tokio::test]
async fn a_frozen_group() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (_prefill, frozen) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    frozen.script.token.close();
    frozen.script.token.permit(3);
    let asked = request(50, 10);
    let mut client = world.ask(&asked);
    client.tokens(4).await;
    frozen.script.frozen.store(true, Ordering::SeqCst);
    let other = world.node("d1", Role::Decode).await;
    assert_eq!(client.finish(&asked).await.migrations, 1);
    // Its lease, or the silence of its connection: whichever ends first.
    let migrations = world.migrations();
    assert!(matches!(migrations[..], [(Cause::LeaseExpired | Cause::DecodeLost, 1)]), "{migrations:?}");
    assert_eq!(other.script.calls().pop().unwrap().tokens, 54);
    assert!(world.members.snapshot().find("d0").is_none());
}

/// Protects: many at once over a group that dies: every stream is complete and right, and nothing is left behind.
#[tokio::test]
async fn many_streams_outlive_a_group() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let prefill = world.node("p0", Role::Prefill).await;
    let (mut first, second) = (world.node("d0", Role::Decode).await, world.node("d1", Role::Decode).await);
    for group in [&first, &second] {
        group.script.token.close();
        group.script.token.permit(40);
    }
    let clients: Vec<_> = (0..16)
        .map(|at| {
            let asked = request(50 + at, 20);
            let client = world.ask(&asked);
            tokio::spawn(async move { client.finish(&asked).await.migrations })
        })
        .collect();
    until("a busy group", || first.script.open.load(Ordering::SeqCst) >= 4).await;
    first.kill();
    second.script.token.permit(1000);
    let mut migrations = 0;
    for client in clients {
        migrations += client.await.unwrap();
    }
    assert!(migrations >= 1, "the dead group had requests");
    until("freed nodes", || {
        second.script.open.load(Ordering::SeqCst) == 0 && prefill.script.open.load(Ordering::SeqCst) == 0
    })
    .await;
    world.until_idle().await;
}

/// Protects: health runs a step on both roles and names who cannot; a token that is not the cluster's is named.
#[tokio::test]
async fn health_and_tokens() {
    let world = World::new(Disaggregation::Always, |config| {
        config.queue_deadline = Duration::from_millis(400);
    })
    .await;
    assert_eq!(world.dispatch.health().await, Err("no decode group is ready".into()));
    let other = ClusterToken::generate().unwrap();
    let mut stranger = Node::start("d9", Role::Decode, world.router, &other, &world.token, &world.fabric);
    let refused = timeout(PATIENCE, stranger.joined.take().unwrap()).await.unwrap().unwrap().unwrap_err();
    assert!(refused.to_string().ends_with("refused this node: wrong cluster token"), "{refused}");

    let decode = world.node("d0", Role::Decode).await;
    assert_eq!(world.dispatch.health().await, Ok(()));
    // It joins rightly, but lets nobody call it.
    let _prefill = Node::start("p0", Role::Prefill, world.router, &world.token, &other, &world.fabric);
    world.until_ready("p0").await;
    assert_eq!(
        world.dispatch.health().await,
        Err("prefill cannot serve: node p0: wrong cluster token".into())
    );
    // Requests go on without it: refused there, they are computed in the group.
    let asked = request(50, 5);
    assert_eq!(world.ask(&asked).finish(&asked).await.migrations, 0);
    assert!(decode.script.calls().last().unwrap().alone);
}
