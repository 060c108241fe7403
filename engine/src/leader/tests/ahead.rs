//! Steps that are planned while the one before runs.

use backend::{Draw, Input, Rule};
use tokio::sync::oneshot;

use super::sim::{Sim, events, expected, handoff, options, request, tokens};
use crate::leader::Step;
use crate::request::{Event, Finish, Job, Request, Sampling};

fn sim(blocks: u32) -> Sim {
    Sim::new(1, blocks, options()).ahead(true)
}

/// Plans and begins the next step; what its batch takes.
fn begin(sim: &mut Sim) -> Option<Vec<Input>> {
    let step: Step = sim.core.plan(sim.now)?;
    let inputs = step.plan.batch.ids.clone();
    sim.begin(step);
    Some(inputs)
}

/// Protects: the device has its next step before it has ended one, and never more than one.
#[test]
fn the_next_step_takes_the_token_that_this_one_draws() {
    let mut sim = sim(16);
    let asked = Request {
        sampling: Sampling { temperature: 0.5, seed: 3, ..Sampling::default() },
        ..request(&[1, 2, 3], 4)
    };
    let (_, mut receiver) = sim.submit(Job::Generate(asked));
    assert_eq!(begin(&mut sim), Some(vec![Input::Id(1), Input::Id(2), Input::Id(3)]));
    assert_eq!(begin(&mut sim), Some(vec![Input::Drawn(0)]));
    let plan = &sim.running[1].step.plan;
    assert_eq!(plan.batch.runs[0].start, 3);
    // It computes position 3, and draws the token at position 4.
    let rule = Rule { temperature: 0.5, seed: 3, position: 4, ..Rule::GREEDY };
    assert_eq!(plan.rows[0].draw, Draw::Token(rule));
    assert_eq!(begin(&mut sim), None, "a third step");
    assert!(tokens(&events(&mut receiver)).is_empty());
    sim.finish();
    assert_eq!(tokens(&events(&mut receiver)).len(), 1);
    assert_eq!(begin(&mut sim), Some(vec![Input::Drawn(0)]));
    sim.finish();
    assert_eq!(begin(&mut sim), Some(vec![Input::Drawn(0)]), "the fourth and last token");
    sim.finish();
    assert_eq!(begin(&mut sim), None, "a row for a token that is one too many");
    sim.finish();
    assert_eq!(tokens(&events(&mut receiver)).len(), 3);
    assert!(sim.running.is_empty());
}

/// Protects: answers, and what is kept of them, are those of a device that does not run ahead.
#[test]
fn a_row_too_many_leaves_nothing() {
    // Each place of a block at which a stop id may come.
    for stop in 0..6 {
        let run = |ahead| {
            let mut sim = sim(16).ahead(ahead);
            let mut asked = request(&[1; 5], 12);
            asked.stop_ids = vec![expected(&asked)[stop]];
            let (_, mut receiver) = sim.submit(Job::Generate(asked));
            sim.run();
            let events = events(&mut receiver);
            assert!(
                matches!(events.last(), Some(Event::Finished { reason: Finish::Stop, .. })),
                "{events:?}"
            );
            let counters = sim.core.report(Default::default(), vec![]).counters;
            (tokens(&events), sim.blocks(), counters.generated_tokens)
        };
        assert_eq!(run(true), run(false), "stop id at {stop}");
    }
}

#[test]
fn an_answer_that_nobody_wants_any_more_is_dropped_with_two_steps_under_way() {
    let mut sim = sim(16);
    let (job, mut left) = sim.submit(Job::Generate(request(&[1; 6], 12)));
    let (_, mut stays) = sim.submit(Job::Generate(request(&[2; 6], 12)));
    begin(&mut sim).unwrap();
    begin(&mut sim).unwrap();
    sim.core.cancel(job);
    sim.run();
    assert!(tokens(&events(&mut left)).is_empty());
    assert_eq!(tokens(&events(&mut stays)), expected(&request(&[2; 6], 12)));
    assert_eq!(sim.blocks().used, 0);
}

/// Protects: a draw that needs the host sees the tokens before it, and nobody overtakes it.
#[test]
fn draws_on_the_host_are_waited_for() {
    let mut sim = sim(32);
    let sampling = Sampling { logprobs: true, ..Sampling::default() };
    let on_host = Request { sampling, ..request(&[1; 3], 5) };
    let (_, mut host) = sim.submit(Job::Generate(on_host.clone()));
    let (_, mut device) = sim.submit(Job::Generate(request(&[2; 3], 9)));
    begin(&mut sim).unwrap();
    assert_eq!(sim.running[0].step.plan.rows[0].draw, Draw::Logits);
    assert_eq!(begin(&mut sim), None);
    sim.finish();
    let first = |request: &Request| Input::Id(expected(request)[0]);
    assert_eq!(begin(&mut sim), Some(vec![first(&on_host), first(&request(&[2; 3], 9))]));
    sim.run();
    assert_eq!(tokens(&events(&mut host)), expected(&on_host));
    assert_eq!(tokens(&events(&mut device)), expected(&request(&[2; 3], 9)));
}

/// Protects: a prefill node computes the next prompt while it waits for the token of the one before, whoever draws it.
#[test]
fn prompts_follow_each_other_without_a_gap() {
    for logprobs in [false, true] {
        let mut sim = sim(32);
        let sampling = Sampling { logprobs, ..Sampling::default() };
        let first = Request { sampling, ..request(&[5; 12], 4) };
        let (_, mut receiver) = sim.submit(Job::Prefill(first, handoff(0..12)));
        sim.submit(Job::Prefill(request(&[6; 12], 4), handoff(0..12)));
        let rows = |sim: &mut Sim| begin(sim).map(|inputs| inputs.len());
        // Chunks of 8, 16 rows in a step.
        assert_eq!((rows(&mut sim), rows(&mut sim)), (Some(16), Some(8)));
        let exports = sim.running[1].step.plan.exports.iter().map(|export| export.tokens.clone());
        assert_eq!(exports.collect::<Vec<_>>(), [8..12, 8..12]);
        assert_eq!(rows(&mut sim), None);
        sim.finish();
        sim.submit(Job::Prefill(request(&[7; 6], 4), None));
        assert_eq!(rows(&mut sim), Some(6));
        sim.finish();
        assert_eq!(tokens(&events(&mut receiver)), expected(&request(&[5; 12], 4))[..1]);
        sim.run();
    }
}

/// Protects: a sequence is given up with all of its tokens told.
#[test]
fn nobody_is_preempted_while_his_token_is_drawn() {
    let mut sim = sim(6);
    let asked = [request(&[1; 7], 12), request(&[2; 7], 20)];
    let mut receivers = [0, 1].map(|i| sim.submit(Job::Generate(asked[i].clone())).1);
    let mut flights = 0;
    while let Some(sequence) = sim.core.sequences.get(&2) {
        flights = sequence.flights.len();
        assert!(sim.step(), "never preempted");
    }
    assert_eq!(flights, 0);
    let told = events(&mut receivers[1]);
    assert!(matches!(told.last(), Some(Event::Preempted)), "{told:?}");
    let told = tokens(&told);
    assert_eq!(told[..], expected(&asked[1])[..told.len()]);
    sim.run();
    assert_eq!(tokens(&events(&mut receivers[0])), expected(&asked[0]));
}

#[test]
fn one_step_serves_the_probes_that_came_before_it() {
    let mut sim = sim(8);
    let probe = |sim: &mut Sim| {
        let (reply, answer) = oneshot::channel();
        sim.core.probe(reply);
        answer
    };
    let mut first = probe(&mut sim);
    assert_eq!(begin(&mut sim).map(|inputs| inputs.len()), Some(1));
    let mut second = probe(&mut sim);
    assert_eq!(begin(&mut sim), None);
    sim.finish();
    assert!(first.try_recv().is_ok() && second.try_recv().is_err());
    sim.run();
    assert!(second.try_recv().is_ok());
    assert_eq!(sim.blocks().free, 8);
}
