//! What fails is told, and gives everything back.

use std::time::Duration;

use engine::{Event, Job, JobError};

use crate::node::{Node, Outcome, Spec, Trip, direct, request};

fn no_cache(world: usize) -> Spec {
    Spec::world(world).with(|o| o.prefix_cache = false)
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
    let (p, d) = (Node::start(&no_cache(2)), Node::start(&no_cache(1)));
    let asked = request(1, 900, 5);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff, .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let mut prefill = p.submit(Job::Prefill(asked, handoff));
    let Some(Event::Started { .. }) = prefill.blocking_recv() else { panic!("not started") };
    drop(prefill);
    let outcome = Outcome::of(landing);
    assert!(matches!(outcome.error(), JobError::Session(_)), "{outcome:?}");
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
    let p = Node::start(&no_cache(1).with(|o| o.pace = Some(50_000)));
    let d = Node::start(&no_cache(1));
    let asked = request(1, 300, 5);
    let mut landing = d.submit(Job::Land(asked.clone()));
    let Some(Event::Admitted { handoff, .. }) = landing.blocking_recv() else { panic!("not admitted") };
    let mut prefill = p.submit(Job::Prefill(asked.clone(), handoff));
    let Some(Event::Started { .. }) = prefill.blocking_recv() else { panic!("not started") };
    drop(p);
    assert!(matches!(Outcome::of(landing).error(), JobError::Session(_)));
    assert!(matches!(Outcome::of(prefill).error(), JobError::Engine(_)));
    all_free(&d);
    let p = Node::start(&no_cache(1));
    assert_eq!(Trip::make(&p, &d, &asked).ids(), direct(&asked, backend::DType::F32));
}
