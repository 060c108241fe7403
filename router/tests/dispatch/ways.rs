//! The ways a request takes through the nodes: handoff, locally, one token alone; what comes early or late.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::v1::Role;
use router::inference::{Decision, FinishReason};
use router::placement::{Disaggregation, Reason};

use super::{World, request, until, whole};

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
    // Known to who leaves early.
    client.tokens(2).await;
    assert_eq!(client.served.unwrap().timings.first_step, Duration::from_micros(17));
    let served = client.finish(&asked).await;
    assert_eq!((served.decision, served.migrations, served.cached_tokens), (Decision::Handoff, 0, 3));
    let timings = served.timings;
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
    let served = world.ask(&asked).finish(&asked).await;
    assert_eq!((served.decision, served.cached_tokens), (Decision::Local, 2));
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
    assert_eq!(world.ask(&asked).finish(&asked).await.decision, Decision::Handoff);
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
        client.rest().await.unwrap();
        (client.seen, client.served.unwrap())
    });
    until("the group's end", || group.calls().len() == 1 && group.open.load(Ordering::SeqCst) == 0).await;
    prefill.script.token.permit(1);
    let (seen, served) = done.await.unwrap();
    assert_eq!(seen, whole(&asked));
    assert_eq!(served.migrations, 0);
}
