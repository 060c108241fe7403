//! Placement over views of a cluster.

use proptest::prelude::*;

use super::*;

const STORE: Store = Store { block_tokens: 16, total: 1000, available: 1000 };

fn rules(disaggregation: Disaggregation) -> Rules {
    Rules { disaggregation, start_within_s: 2.0 }
}

fn ask(tokens: u32) -> Ask {
    Ask { tokens, one_token: false }
}

/// A fast prefill node, a slow decode group, 100 KB a token over 1 GB/s.
fn view() -> View {
    View {
        prefill: vec![Candidate { rate: Some(10_000.0), links: vec![(0, 1e9)], ..Candidate::default() }],
        decode: vec![Candidate {
            rate: Some(1_000.0),
            step_s: Some(0.02),
            store: Some(STORE),
            ..Candidate::default()
        }],
        kv_bytes_per_token: 100e3,
    }
}

fn placed(tokens: u32, view: &View, policy: Disaggregation) -> (Decision, Reason) {
    match place(ask(tokens), view, &rules(policy)) {
        Outcome::Place(placement) => (placement.decision(), placement.reason()),
        other => panic!("{other:?}"),
    }
}

/// Protects: the three policies, and that a group without prefill node serves itself under each.
#[test]
fn policies() {
    use Disaggregation::*;
    assert_eq!(placed(500, &view(), Always), (Decision::Handoff, Reason::Policy));
    assert_eq!(placed(500, &view(), Never), (Decision::Local, Reason::Policy));
    assert_eq!(placed(500, &view(), Auto), (Decision::Handoff, Reason::Sooner));
    let alone = View { prefill: vec![], ..view() };
    assert_eq!(placed(500, &alone, Always), (Decision::Local, Reason::NoPrefillNode));
    assert_eq!(placed(500, &alone, Auto), (Decision::Local, Reason::NoPrefillNode));
}

/// Protects: the estimate. 500 tokens: handoff 0.05 s compute hides 0.05 s of link, local 0.5 s.
#[test]
fn the_estimate_moves_with_what_is_measured() {
    use Disaggregation::Auto;
    // 9 s of queue before us on P: local is sooner.
    let mut busy = view();
    busy.prefill[0].queue_tokens = 90_000;
    assert_eq!(placed(500, &busy, Auto), (Decision::Local, Reason::Sooner));
    // The group holds all but 20 tokens, P none: 0.02 s against 0.05 s.
    let mut held = view();
    held.decode[0].cached_tokens = 480;
    assert_eq!(placed(500, &held, Auto), (Decision::Local, Reason::Sooner));
    // ... but four streams would pay 0.02 s each.
    held.decode[0].streams = 4;
    assert_eq!(placed(500, &held, Auto), (Decision::Handoff, Reason::Sooner));
    // A link of 50 MB/s takes 1 s for 50 MB: local at 0.5 s.
    let mut slow = view();
    slow.prefill[0].links = vec![(0, 50e6)];
    assert_eq!(placed(500, &slow, Auto), (Decision::Local, Reason::Sooner));
}

/// Protects: without measurements nothing is guessed: short tails measure the group, the rest travels.
#[test]
fn unknown_rates_are_measured() {
    use Disaggregation::Auto;
    let mut unknown = view();
    unknown.decode[0].rate = None;
    assert_eq!(placed(500, &unknown, Auto), (Decision::Handoff, Reason::Measuring));
    assert_eq!(placed(16, &unknown, Auto), (Decision::Local, Reason::Measuring));
    unknown.decode[0].rate = Some(1000.0);
    unknown.prefill[0].rate = None;
    assert_eq!(placed(500, &unknown, Auto), (Decision::Handoff, Reason::Measuring));
}

/// Protects: only the router's queue is long: nothing is reserved for a prompt that cannot start soon.
#[test]
fn a_late_start_waits_here() {
    let always = rules(Disaggregation::Always);
    let mut busy = view();
    busy.prefill[0].queue_tokens = 20_000;
    assert!(matches!(place(ask(500), &busy, &always), Outcome::Place(_)));
    busy.prefill[0].queue_tokens = 20_001;
    assert_eq!(place(ask(500), &busy, &always), Outcome::Wait(Wait::Prefill));
    // Another prefill node that can start is taken, though it is slower.
    busy.prefill.push(Candidate { rate: Some(100.0), ..Candidate::default() });
    assert!(matches!(place(ask(500), &busy, &always), Outcome::Place(Placement::Handoff { prefill: 1, .. })));
    let mut unmeasured = view();
    unmeasured.prefill[0].rate = None;
    unmeasured.prefill[0].queue_prompts = UNMEASURED_PROMPTS_MAX;
    assert_eq!(place(ask(500), &unmeasured, &always), Outcome::Wait(Wait::Prefill));
}

/// Protects: room. What a group holds of us is shared; what no group could ever hold is refused by name.
#[test]
fn room() {
    let always = rules(Disaggregation::Always);
    let mut small = view();
    small.decode[0].store = Some(Store { block_tokens: 16, total: 12, available: 10 });
    assert!(matches!(place(ask(144), &small, &always), Outcome::Place(_)));
    assert_eq!(place(ask(145), &small, &always), Outcome::Wait(Wait::Room));
    small.decode[0].cached_tokens = 32;
    assert!(matches!(place(ask(145), &small, &always), Outcome::Place(_)));
    assert!(matches!(place(ask(176), &small, &always), Outcome::Place(_)));
    assert_eq!(
        place(ask(177), &small, &always),
        Outcome::Never(
            "177 tokens do not fit: the largest decode group takes 176 and an answer (--kv-memory of its nodes)"
                .into()
        )
    );
    small.decode[0].full = true;
    assert_eq!(place(ask(1), &small, &always), Outcome::Wait(Wait::Room));
    small.decode.clear();
    assert_eq!(place(ask(1), &small, &always), Outcome::Wait(Wait::DecodeGroup));
}

/// Protects: one token reserves nothing, as long as a prefill node is there and the policy lets it work.
#[test]
fn one_token_needs_no_group() {
    let one = Ask { tokens: 10, one_token: true };
    let mut lone = view();
    lone.decode.clear();
    assert_eq!(
        place(one, &lone, &rules(Disaggregation::Auto)),
        Outcome::Place(Placement::PrefillOnly { prefill: 0 })
    );
    assert!(matches!(
        place(one, &view(), &rules(Disaggregation::Never)),
        Outcome::Place(Placement::Local { decode: 0, reason: Reason::Policy })
    ));
    lone.prefill.clear();
    assert_eq!(place(one, &lone, &rules(Disaggregation::Auto)), Outcome::Wait(Wait::DecodeGroup));
}

/// Protects: a conversation returns to its group, unless that is so busy that moving is sooner.
#[test]
fn affinity_against_load() {
    let mut two = view();
    two.decode.push(two.decode[0].clone());
    two.prefill[0].links = vec![(0, 1e9), (1, 1e9)];
    two.decode[1].cached_tokens = 4_000;
    let chosen = |view: &View| match place(ask(4_500), view, &rules(Disaggregation::Always)) {
        Outcome::Place(placement) => placement.decode(),
        other => panic!("{other:?}"),
    };
    assert_eq!(chosen(&two), Some(1));
    two.decode[1].streams = 10;
    assert_eq!(chosen(&two), Some(1));
    two.decode[1].streams = 40;
    assert_eq!(chosen(&two), Some(0));
}

fn candidate() -> impl Strategy<Value = Candidate> {
    (
        (0..2000u32, 0..100_000u64, 0..4u32, proptest::option::of(1.0..20_000.0f64)),
        (0..64u32, proptest::option::of(0.001..0.1f64), any::<bool>()),
        proptest::option::of((1..64u32, 1..400u32, 0..400u32)),
        proptest::option::of(1e6..1e10f64),
    )
        .prop_map(|((cached, queue, prompts, rate), (streams, step, full), store, link)| Candidate {
            cached_tokens: cached,
            queue_tokens: queue,
            queue_prompts: prompts,
            rate,
            streams,
            step_s: step,
            store: store.map(|(block_tokens, total, available)| Store {
                block_tokens,
                total,
                available: available.min(total),
            }),
            full,
            links: link.map(|rate| (0, rate)).into_iter().collect(),
        })
}

fn any_view() -> impl Strategy<Value = View> {
    (proptest::collection::vec(candidate(), 0..4), proptest::collection::vec(candidate(), 0..4), 1.0..1e6f64)
        .prop_map(|(prefill, decode, kv_bytes_per_token)| View { prefill, decode, kv_bytes_per_token })
}

proptest! {
    /// Protects: whatever is reported, a chosen group has room, a chosen prefill node can start, policies hold.
    #[test]
    fn choices_are_possible(view in any_view(), tokens in 1..4000u32, one_token: bool, policy in 0..3usize) {
        use Disaggregation::*;
        let policy = [Auto, Always, Never][policy];
        match place(Ask { tokens, one_token }, &view, &rules(policy)) {
            Outcome::Place(placement) => {
                if let Some(decode) = placement.decode() {
                    prop_assert!(has_room(ask(tokens), &view.decode[decode]));
                }
                if let Some(prefill) = placement.prefill() {
                    let node = &view.prefill[prefill];
                    prop_assert!(!node.full && policy != Never);
                    if let Some(rate) = node.rate {
                        prop_assert!(node.queue_tokens as f64 / rate <= 2.0);
                    }
                }
                if policy == Always && !view.prefill.is_empty() {
                    prop_assert_eq!(placement.decision(), Decision::Handoff);
                }
            }
            Outcome::Wait(Wait::DecodeGroup) => prop_assert!(view.decode.is_empty()),
            Outcome::Wait(Wait::Prefill) => prop_assert!(policy != Never && !view.prefill.is_empty()),
            Outcome::Wait(Wait::Room) => {
                prop_assert!(view.decode.iter().all(|group| !has_room(ask(tokens), group)));
            }
            Outcome::Never(_) => prop_assert!(view.decode.iter().all(|group| group.store.is_some())),
        }
    }

    /// Protects: a longer queue at the prefill node never draws a prompt to it.
    #[test]
    fn a_queue_repels(view in any_view(), tokens in 1..4000u32, more in 0..100_000u64) {
        let view = View { prefill: view.prefill.into_iter().take(1).collect(), ..view };
        let mut busier = view.clone();
        if let Some(node) = busier.prefill.first_mut() {
            node.queue_tokens += more;
        }
        let auto = rules(Disaggregation::Auto);
        let local =
            |view| matches!(place(ask(tokens), view, &auto), Outcome::Place(Placement::Local { .. }));
        if view.decode.len() == 1 && local(&view) {
            prop_assert!(local(&busier));
        }
    }
}
