//! Nodes that die, freeze, come back or give a sequence up: the stream goes on as the one that would have been.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::v1::Role;
use router::dispatch::counts::Cause;
use router::inference::{Decision, Inference, InferenceError};
use router::placement::{Disaggregation, Reason};

use super::{World, request, until};

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
    let served = done.await.unwrap();
    assert_eq!((served.migrations, served.decision), (1, Decision::Handoff));
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
