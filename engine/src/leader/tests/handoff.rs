//! Landings and pushes.

use std::time::Duration;

use kvtransfer::{Close, Codec};

use super::sim::{Sim, events, expected, handoff, options, request, tokens};
use crate::request::{Event, Finish, Job, JobError};
use crate::tp::plan::{Arrived, Notice, Op};

#[test]
fn a_landed_prompt_goes_on_from_the_prefill_nodes_token() {
    let mut sim = Sim::new(2, 16, options());
    let asked = request(&[3; 9], 5);
    let wanted = expected(&asked);
    let (_, mut receiver) = sim.submit(Job::Land(asked));
    assert!(events(&mut receiver).is_empty(), "told when every rank expects the session");
    sim.run();
    let Event::Admitted { cached_tokens: 0, handoff: Some(handoff) } = events(&mut receiver).remove(0) else {
        panic!("not admitted");
    };
    assert_eq!((handoff.tokens, handoff.targets.len()), (0..9, 2));
    sim.land(Close { token: wanted[0], finish: 0 });
    sim.run();
    let events = events(&mut receiver);
    assert!(matches!(events[0], Event::Landed { bytes: 200, .. }));
    assert_eq!(tokens(&events), wanted[1..]);
    let steps = |event: &&Event| matches!(event, Event::FirstStep { .. });
    assert!(steps(&&events[1]) && events.iter().filter(steps).count() == 1, "{events:?}");
    let Event::Token(first) = &events[2] else { panic!("{:?}", events[2]) };
    assert_eq!(first.index, 1, "index 0 came from the prefill node");
}

#[test]
fn an_answer_that_the_prefill_node_ended_ends_with_the_landing() {
    let mut sim = Sim::new(1, 16, options());
    let (_, mut receiver) = sim.submit(Job::Land(request(&[3; 9], 5)));
    sim.run();
    sim.land(Close { token: 4, finish: 1 });
    sim.run();
    let events = events(&mut receiver);
    assert!(
        matches!(events[2], Event::Finished { reason: Finish::Stop, output_tokens: 1, .. }),
        "{events:?}"
    );
    assert_eq!(sim.blocks().cached, 2);
}

#[test]
fn a_failed_session_gives_everything_back() {
    let mut sim = Sim::new(2, 16, options());
    let (_, mut receiver) = sim.submit(Job::Land(request(&[3; 9], 5)));
    sim.run();
    let lease = sim.landings[0];
    // Rank 0 has all of it, rank 1 fails.
    let arrived = Ok(Arrived { bytes: 1, close: Close { token: 1, finish: 0 } });
    sim.core.notice(sim.now, 0, Notice::Landed { lease, result: arrived, age: Duration::ZERO });
    let (_, page) = sim.ranks[1].leases.remove(&lease).unwrap();
    sim.ranks[1].pages.release(page);
    sim.core.notice(sim.now, 1, Notice::Landed { lease, result: Err("late".into()), age: Duration::ZERO });
    sim.run();
    let events = events(&mut receiver);
    assert!(matches!(&events[1], Event::Failed(JobError::Session(text)) if text == "rank 1: late"));
    assert_eq!(sim.blocks().free, 16);
    assert_eq!(sim.core.totals.counters.failed_sessions, 1);
}

#[test]
fn a_prefill_waits_for_rows_pushes_and_ends_when_it_is_acknowledged() {
    let mut sim = Sim::new(1, 16, options());
    let asked = request(&[5; 21], 4);
    let (_, mut receiver) = sim.submit(Job::Prefill(asked.clone(), handoff(4..21)));
    sim.run();
    let events = events(&mut receiver);
    assert!(matches!(events[0], Event::Started { cached_tokens: 0, .. }));
    assert_eq!(tokens(&events), expected(&asked)[..1]);
    assert_eq!(events.len(), 2);
    sim.pushed();
    sim.run();
    let Ok(Event::Pushed { bytes: 50, codec: Codec::Int4, .. }) = receiver.try_recv() else {
        panic!("not pushed")
    };
    assert_eq!(sim.blocks().cached, 5);
}

#[test]
fn chunks_export_what_the_handoff_wants_and_the_cache_leaves_first() {
    let mut sim = Sim::new(1, 32, options());
    let prompt: Vec<u32> = (0..30).collect();
    sim.submit(Job::Prefill(request(&prompt[..13], 1), None));
    sim.run();
    // The node holds [0, 12), the group wants [8, 30).
    sim.submit(Job::Prefill(request(&prompt, 1), handoff(8..30)));
    let first = sim.core.plan(sim.now).unwrap();
    let cached = first.plan.ops.iter().find_map(|op| match op {
        Op::Push(push) => Some(push.cached.clone()),
        _ => None,
    });
    assert_eq!(cached, Some(8..12));
    assert_eq!(first.plan.exports[0].tokens, 12..20);
}

#[test]
fn a_slow_link_shows_as_queue() {
    let mut sim = Sim::new(1, 12, options());
    let prompt = |i: u32| request(&[i; 20], 1);
    let mut receivers: Vec<_> =
        (0..3).map(|i| sim.submit(Job::Prefill(prompt(i), handoff(0..20))).1).collect();
    sim.run();
    // Two prompts of five blocks fit; unsent they cannot be evicted for the third.
    assert!(events(&mut receivers[2]).is_empty());
    assert_eq!(sim.core.sequences.len(), 3);
    sim.pushed();
    sim.run();
    assert_eq!(tokens(&events(&mut receivers[2])).len(), 1);
}
