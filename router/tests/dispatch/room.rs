//! Who waits for room, leaves, or is refused.

use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::ClusterToken;
use proto::v1::Role;
use router::inference::{Inference, InferenceError};
use router::placement::Disaggregation;
use tokio::time::timeout;

use super::mock::Node;
use super::{PATIENCE, World, request, until};

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
    assert!(
        matches!(&never, InferenceError::Invalid(why) if why.contains("takes 304 and an answer")),
        "{never:?}"
    );
    assert_eq!(world.dispatch.counts().overloaded(), 2);
    decode.script.invalid.store(true, Ordering::SeqCst);
    let invalid = world.ask(&request(10, 10)).rest().await.unwrap_err();
    assert_eq!(invalid, InferenceError::Invalid("node d0: the mock takes no such thing".into()));
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
