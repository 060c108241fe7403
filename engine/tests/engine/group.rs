//! Ranks in lock-step: the same tokens from any number of them, and a group that lives on after losing one.

use backend::DType;
use engine::{Event, Job, JobError, Refusal};

use crate::node::{Node, Outcome, SEED, Spec, direct, request, seeded, until};

#[test]
fn any_number_of_ranks_gives_the_models_own_tokens() {
    for (world, dtype) in [(2, DType::BF16), (4, DType::F32)] {
        let node = Node::start(&Spec { dtype, ..Spec::world(world) });
        for asked in [request(1, 3, 6), seeded(2, 120, 10, 8)] {
            let outcome = node.generate(&asked);
            assert_eq!(outcome.ids(), direct(&asked, dtype), "{world} ranks, {dtype}: {:?}", outcome.end);
        }
        node.quiet();
    }
}

#[test]
fn a_lost_follower_ends_the_epoch_and_the_next_one_works() {
    let draft = Some(SEED);
    let mut node = Node::start(&Spec { draft, ..Spec::world(2) }.with(|o| o.prefix_cache = false));
    let epoch = node.engine.report().epoch;
    let asked = seeded(1, 30, 900, 3);
    let mut generating = node.submit(Job::Generate(asked.clone()));
    let mut landing = node.submit(Job::Land(request(2, 60, 5)));
    let mut outcome = Outcome::default();
    while outcome.tokens.len() < 5 {
        outcome.take(generating.blocking_recv().expect("tokens"));
    }
    let Some(Event::Admitted { .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let runner = node.ranks[1].stop().expect("a running rank");
    while let Some(event) = generating.blocking_recv() {
        outcome.take(event);
    }
    assert!(matches!(outcome.error(), JobError::Engine(_)), "{:?}", outcome.end);
    assert!(matches!(Outcome::of(landing).error(), JobError::Engine(_)));
    until("the leader refuses", || !node.engine.ready());
    let refused = node.engine.submit(Job::Generate(request(1, 5, 5)));
    assert!(matches!(refused, Err(Refusal::Unavailable(_))));

    node.restart(1, runner);
    until("the group is back", || node.engine.ready());
    assert!(node.engine.report().epoch > epoch);
    // The stream goes on to the tokens that it would have had.
    let so_far = outcome.ids();
    let mut rest = asked.clone();
    rest.tokens.extend(&so_far);
    rest.max_tokens = so_far.len() + 10;
    let whole = direct(&seeded(1, 30, so_far.len() + 10, 3), DType::F32);
    assert_eq!(so_far[..], whole[..so_far.len()]);
    assert_eq!(node.generate(&rest).ids(), whole[so_far.len()..]);
    node.quiet();
    let blocks = node.engine.report().blocks;
    assert_eq!((blocks.free, blocks.audit_errors), (blocks.total, 0));
}

#[test]
fn an_idle_group_notices_a_lost_follower() {
    let mut node = Node::start(&Spec::world(3));
    node.ranks[2].stop();
    until("the leader refuses", || !node.engine.ready());
}
