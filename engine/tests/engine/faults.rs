//! What fails is told, and gives everything back.

use std::time::Duration;

use engine::{Event, Job, JobError, Request};

use crate::node::{Node, Outcome, Spec, Trip, direct, request, seeded, until};

fn no_cache(world: usize) -> Spec {
    Spec::world(world).with(|o| o.prefix_cache = false)
}

/// The other side of a job that ended early: it failed too, unless all of its KV was on its way already.
fn failed_or_landed(events: engine::Events, asked: &Request) {
    let outcome = Outcome::of(events);
    match &outcome.end {
        Some(Event::Failed(JobError::Session(_))) => assert!(outcome.tokens.is_empty()),
        Some(Event::Finished { .. }) => assert_eq!(outcome.ids(), direct(asked, backend::DType::F32)[1..]),
        other => panic!("ended with {other:?}"),
    }
}

fn all_free(node: &Node) {
    node.quiet();
    let blocks = node.engine.report().blocks;
    assert_eq!(blocks.free, blocks.total, "{blocks:?}");
}

#[test]
fn a_session_that_never_comes_lapses() {
    let d = Node::start(&no_cache(2).with(|o| o.land_deadline = Duration::from_millis(200)));
    let outcome = Outcome::of(d.submit(Job::Land(request(1, 100, 5))));
    assert!(matches!(outcome.error(), JobError::Session(_)), "{outcome:?}");
    all_free(&d);
    assert_eq!(d.engine.report().counters.failed_sessions, 1);
}

#[test]
fn a_landing_can_be_dropped_before_and_while_it_arrives() {
    let p = Node::start(&no_cache(1).with(|o| o.pace = Some(200_000)));
    let d = Node::start(&no_cache(2));
    let asked = request(1, 300, 5);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff: Some(_), .. }) = landing.blocking_recv() else {
        panic!("not admitted")
    };
    drop(landing);
    all_free(&d);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff, .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let mut prefill = p.submit(Job::Prefill(asked, handoff));
    let Some(Event::Started { .. }) = prefill.blocking_recv() else { panic!("not started") };
    drop(landing);
    let outcome = Outcome::of(prefill);
    assert!(matches!(outcome.error(), JobError::Session(_)), "{outcome:?}");
    all_free(&d);
    all_free(&p);
}

#[test]
fn a_prefill_dropped_in_its_prompt_fails_the_landing() {
    // Hundreds of steps: the prompt is far from computed when it is dropped.
    let p = Node::start(&no_cache(2).with(|o| o.chunk_tokens = 2));
    let d = Node::start(&no_cache(1));
    let asked = request(1, 900, 5);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff, .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let mut prefill = p.submit(Job::Prefill(asked.clone(), handoff));
    let Some(Event::Started { .. }) = prefill.blocking_recv() else { panic!("not started") };
    drop(prefill);
    failed_or_landed(landing, &asked);
    all_free(&p);
    all_free(&d);
}

#[test]
fn a_ticket_is_good_for_one_session() {
    let (p, d) = (Node::start(&no_cache(1)), Node::start(&no_cache(1)));
    let asked = request(1, 50, 5);
    let trip = Trip::make(&p, &d, &asked);
    let again = Outcome::of(p.submit(Job::Prefill(asked, trip.decode.handoff)));
    assert!(matches!(again.error(), JobError::Session(_)), "{again:?}");
    all_free(&p);
    all_free(&d);
}

#[test]
fn a_stopped_prefill_node_fails_what_it_was_sending() {
    let p = Node::start(&no_cache(1).with(|o| o.pace = Some(400_000)));
    let d = Node::start(&no_cache(1));
    let asked = request(1, 300, 5);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff, .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let mut prefill = p.submit(Job::Prefill(asked.clone(), handoff));
    let Some(Event::Started { .. }) = prefill.blocking_recv() else { panic!("not started") };
    drop(p);
    assert!(matches!(Outcome::of(prefill).error(), JobError::Engine(_)));
    failed_or_landed(landing, &asked);
    all_free(&d);
    let p = Node::start(&no_cache(1));
    assert_eq!(Trip::make(&p, &d, &asked).ids(), direct(&asked, backend::DType::F32));
}

#[test]
fn a_prefill_group_that_loses_a_rank_fails_its_jobs_and_comes_back() {
    let mut p = Node::start(&no_cache(2).with(|o| o.pace = Some(400_000)));
    let d = Node::start(&no_cache(2));
    let asked = request(1, 300, 5);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff, .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let mut prefill = p.submit(Job::Prefill(asked.clone(), handoff));
    let Some(Event::Started { .. }) = prefill.blocking_recv() else { panic!("not started") };
    let runner = p.ranks[1].stop().expect("a running rank");
    assert!(matches!(Outcome::of(prefill).error(), JobError::Engine(_)));
    failed_or_landed(landing, &asked);
    all_free(&d);
    p.restart(1, runner);
    until("the group is back", || p.engine.ready());
    all_free(&p);
    let short = request(2, 20, 5);
    assert_eq!(Trip::make(&p, &d, &short).ids(), direct(&short, backend::DType::F32));
}

#[test]
fn a_storm_of_trips_and_departures_leaves_nothing_behind() {
    let p = Node::start(&Spec::world(2).blocks_of(16, 64));
    let d = Node::start(&Spec::world(2).blocks_of(32, 40).with(|o| o.batch_max = 8));
    std::thread::scope(|scope| {
        for client in 0..6 {
            let (p, d) = (&p, &d);
            scope.spawn(move || (0..8).for_each(|turn| visit(p, d, client * 8 + turn)));
        }
    });
    p.quiet();
    d.quiet();
    let asked = seeded(1, 120, 8, 1);
    assert_eq!(Trip::make(&p, &d, &asked).ids(), direct(&asked, backend::DType::F32));
}

/// A client that may leave at any point; what it has heard until then is right.
fn visit(p: &Node, d: &Node, number: u32) {
    let asked = seeded(number % 7, 10 + (number as usize * 37) % 200, 12, number.into());
    let patience = number % 5;
    let mut landing = d.submit(Job::Land(asked.clone()));
    let mut decode = Outcome::default();
    decode.take(landing.blocking_recv().expect("an answer"));
    let Some(handoff) = decode.handoff.clone() else {
        assert!(matches!(decode.error(), JobError::Refused(_)), "{decode:?}");
        return;
    };
    if patience == 0 {
        return;
    }
    let mut prefill = Outcome::default();
    let mut events = p.submit(Job::Prefill(asked.clone(), Some(handoff)));
    for _ in 0..patience {
        if let Some(event) = events.blocking_recv() {
            prefill.take(event);
        }
    }
    if patience == 4 {
        while let Some(event) = landing.blocking_recv() {
            decode.take(event);
        }
    }
    let heard = [prefill.ids(), decode.ids()].concat();
    let right = direct(&asked, backend::DType::F32);
    assert_eq!(heard, right[..heard.len()], "client {number}");
}
