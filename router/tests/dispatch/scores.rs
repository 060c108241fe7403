//! Prompts whose tokens are scored: by whoever computes them, each token once, whatever happens to that node.

use std::sync::atomic::Ordering;

use proto::v1::Role;
use router::dispatch::counts::Cause;
use router::inference::{Decision, GenerateRequest, Score};
use router::placement::Disaggregation;

use super::mock::score;
use super::{World, request, whole};

fn scored(prompt: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { prompt_logprobs: Some(2), ..request(prompt, max_tokens) }
}

/// A token's log probability, its rank, and the likeliest tokens with theirs.
type Scored = (f32, u32, Vec<(u32, f32)>);

fn expected(request: &GenerateRequest) -> Vec<Scored> {
    (1..request.tokens.len() as u32).map(|position| score(position, 2)).collect()
}

fn told(scores: &[Score]) -> Vec<Scored> {
    scores.iter().map(|s| (s.logprob, s.rank, s.top.clone())).collect()
}

/// Protects: on each way the node that computes the prompt scores it, before the first token.
#[tokio::test]
async fn whoever_computes_scores() {
    let both = [Disaggregation::Always, Disaggregation::Never];
    for (policy, max_tokens) in both.into_iter().flat_map(|policy| [(policy, 1), (policy, 5)]) {
        let world = World::new(policy, |_| {}).await;
        let _nodes = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
        let asked = scored(50, max_tokens);
        let mut client = world.ask(&asked);
        client.rest().await.unwrap();
        let served = client.served.unwrap();
        assert_eq!((told(&client.scores), client.seen), (expected(&asked), whole(&asked)), "{policy}");
        let local = policy == Disaggregation::Never;
        assert_eq!(served.decision, if local { Decision::Local } else { Decision::Handoff });
        assert_eq!(served.migrations, 0);
    }
}

/// Protects: a node that dies in the middle of a prompt: the next begins again, the client hears of each token once; and
/// of a prompt that is scored nobody asks it again.
#[tokio::test]
async fn a_loss_scores_nothing_twice() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (mut prefill, decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    prefill.script.scores.close();
    prefill.script.scores.permit(2);
    let asked = scored(50, 5);
    let mut client = world.ask(&asked);
    while client.scores.is_empty() {
        assert_eq!(client.event().await, Ok(None));
    }
    prefill.kill();
    decode.script.token.close();
    decode.script.token.permit(2);
    client.tokens(2).await;
    assert_eq!(told(&client.scores), expected(&asked));
    let migrations = world.migrations();
    assert!(matches!(migrations[..], [(Cause::PrefillLost | Cause::Session, 1)]), "{migrations:?}");

    *decode.script.preempt.lock().unwrap() = (4, 1);
    decode.script.token.permit(100);
    client.rest().await.unwrap();
    assert_eq!((told(&client.scores), client.seen), (expected(&asked), whole(&asked)));
    let asks: Vec<bool> = decode.script.calls().iter().map(|call| call.scores).collect();
    assert_eq!(asks.last(), Some(&false), "{asks:?}");
    assert!(asks[0], "{asks:?}");
}

/// Protects: a node that does not score what it was asked to is not believed: the request goes on elsewhere.
#[tokio::test]
async fn an_unscored_prompt_is_a_broken_promise() {
    let world = World::new(Disaggregation::Always, |_| {}).await;
    let (prefill, _decode) = (world.node("p0", Role::Prefill).await, world.node("d0", Role::Decode).await);
    prefill.script.mute.store(true, Ordering::SeqCst);
    let asked = scored(50, 5);
    let mut client = world.ask(&asked);
    client.rest().await.unwrap();
    assert_eq!((told(&client.scores), client.seen), (expected(&asked), whole(&asked)));
    let migrations = world.migrations();
    assert!(matches!(migrations[..], [(Cause::Protocol, _)]), "{migrations:?}");
    assert!(client.served.unwrap().migrations > 0);
}
