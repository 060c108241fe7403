//! Answers: what is computed, drawn and told, and how they end.

use backend::Drawn;
use tokio::sync::oneshot;

use super::sim::{Sim, VOCABULARY, events, expected, next_token, options, request, tokens};
use crate::request::{Event, Finish, Job, JobError, Request, Sampling};

#[test]
fn a_generation_is_admitted_computed_and_kept() {
    let mut sim = Sim::new(1, 16, options());
    let asked = request(&(0..19).collect::<Vec<_>>(), 6);
    let (_, mut receiver) = sim.submit(Job::Generate(asked.clone()));
    sim.step();
    assert_eq!(sim.blocks().free, 16 - 6, "prompt and one block");
    sim.run();
    let events = events(&mut receiver);
    assert!(matches!(events[0], Event::Admitted { cached_tokens: 0, handoff: None }));
    assert_eq!(tokens(&events), expected(&asked));
    let last = Event::is_last;
    assert!(matches!(events.last(), Some(Event::Finished { reason: Finish::Length, output_tokens: 6, .. })));
    assert_eq!(events.iter().filter(|e| last(e)).count(), 1);
    // 24 of 25 positions are computed: six full blocks.
    let blocks = sim.blocks();
    assert_eq!((blocks.free, blocks.cached, blocks.used), (10, 6, 0));
    let (_, mut again) = sim.submit(Job::Generate(request(&asked.tokens, 6)));
    sim.run();
    let events = self::events(&mut again);
    assert!(matches!(events[0], Event::Admitted { cached_tokens: 16, .. }), "{:?}", events[0]);
    assert_eq!(tokens(&events), expected(&asked));
    assert_eq!(sim.blocks().cached, 6, "the same sequence is kept once");
}

#[test]
fn a_long_prompt_does_not_stall_a_stream() {
    let mut sim = Sim::new(1, 64, options());
    let (_, mut stream) = sim.submit(Job::Generate(request(&[1, 2], 40)));
    sim.step();
    sim.submit(Job::Generate(request(&(0..50).map(|i| i % VOCABULARY as u32).collect::<Vec<_>>(), 1)));
    events(&mut stream);
    for _ in 0..7 {
        sim.step();
        assert_eq!(tokens(&events(&mut stream)).len(), 1);
    }
}

#[test]
fn stop_ids_end_an_answer_unless_told_otherwise() {
    let mut sim = Sim::new(1, 32, options());
    let mut asked = request(&[1; 5], 6);
    let wanted = expected(&asked);
    asked.stop_ids = vec![wanted[2]];
    let (_, mut receiver) = sim.submit(Job::Generate(asked.clone()));
    sim.run();
    let events_of = events(&mut receiver);
    let stop = wanted.iter().position(|id| *id == wanted[2]).unwrap();
    assert_eq!(tokens(&events_of), wanted[..=stop]);
    assert!(matches!(events_of.last(), Some(Event::Finished { reason: Finish::Stop, .. })));
    asked.ignore_eos = true;
    let (_, mut receiver) = sim.submit(Job::Generate(asked));
    sim.run();
    assert_eq!(tokens(&events(&mut receiver)), wanted);
}

#[test]
fn a_full_context_ends_an_answer() {
    let mut sim = Sim::new(1, 32, options());
    let (_, mut receiver) = sim.submit(Job::Generate(request(&[1; 60], 100)));
    sim.run();
    let events = events(&mut receiver);
    assert_eq!(tokens(&events).len(), 4);
    assert!(matches!(events.last(), Some(Event::Finished { reason: Finish::Length, .. })));
}

/// Protects: every token of a scored prompt but the first is scored once, in order, before the answer, over chunks and
/// whatever the cache holds; and who waits for a landing leaves it to the node that computes.
#[test]
fn a_scored_prompt_is_computed_whole() {
    for ahead in [false, true] {
        let mut sim = Sim::new(1, 32, options()).ahead(ahead);
        let asked = request(&(0..19).collect::<Vec<_>>(), 3);
        sim.submit(Job::Generate(asked.clone()));
        sim.run();
        let scored = Request { prompt_logprobs: Some(1), ..asked.clone() };
        for job in [Job::Generate(scored.clone()), Job::Prefill(scored.clone(), None)] {
            let drawn = if matches!(job, Job::Prefill(..)) { 1 } else { 3 };
            let (_, mut receiver) = sim.submit(job);
            sim.run();
            let events = events(&mut receiver);
            assert!(
                matches!(
                    events[0],
                    Event::Admitted { cached_tokens: 0, .. } | Event::Started { cached_tokens: 0, .. }
                ),
                "{:?}",
                events[0]
            );
            let mut position = 1;
            for event in &events {
                match event {
                    Event::Scored { start, scores } => {
                        assert_eq!(*start, position);
                        for score in scores {
                            assert_eq!(score.top[0].0, next_token(&asked.tokens[..position]));
                            assert_eq!(score.rank == 1, score.top[0].0 == asked.tokens[position]);
                            position += 1;
                        }
                    }
                    Event::Token(_) => assert_eq!(position, 19),
                    _ => {}
                }
            }
            assert_eq!(position, 19);
            assert_eq!(tokens(&events), expected(&asked)[..drawn]);
        }
        let (_, mut landing) = sim.submit(Job::Land(scored));
        sim.step();
        let events = events(&mut landing);
        assert!(matches!(events[0], Event::Admitted { cached_tokens: 16, .. }), "{:?}", events[0]);
    }
}

#[test]
fn a_probe_is_a_real_step_that_leaves_nothing() {
    let mut sim = Sim::new(1, 4, options());
    let (reply, mut answer) = oneshot::channel();
    sim.core.probe(reply);
    sim.run();
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(sim.blocks().free, 4);
}

#[test]
fn one_bad_row_fails_one_job() {
    let mut sim = Sim::new(1, 32, options());
    let sampling = Sampling { logprobs: true, ..Sampling::default() };
    let (_, mut on_host) = sim.submit(Job::Generate(Request { sampling, ..request(&[1; 5], 6) }));
    let (_, mut on_device) = sim.submit(Job::Generate(request(&[2; 5], 6)));
    let (_, mut good) = sim.submit(Job::Generate(request(&[3; 5], 6)));
    let step = sim.core.plan(sim.now).unwrap();
    sim.begin(step);
    let Drawn::Logits(logits) = &mut sim.running[0].drawn[0] else { panic!("no logits") };
    logits[3] = f32::NAN;
    sim.running[0].drawn[1] = Drawn::NotFinite { id: 3 };
    sim.finish();
    let text = |receiver| match events(receiver).last() {
        Some(Event::Failed(JobError::Engine(text))) => text.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(text(&mut on_host), "logit of id 3 at position 5 is NaN");
    assert_eq!(text(&mut on_device), "logit of id 3 at position 5 is not finite");
    sim.run();
    assert_eq!(tokens(&events(&mut good)), expected(&request(&[3; 5], 6)));
}

/// Protects: what is cached of a sequence whose logits were no numbers serves nobody, nor what it had from another's cache, where the
/// fault may lie; what has nothing in common with it does.
#[test]
fn what_may_be_no_numbers_is_not_cached() {
    let mut sim = Sim::new(1, 64, options());
    let cached = |sim: &mut Sim, text: &[u32]| {
        let (_, mut receiver) = sim.submit(Job::Generate(request(text, 1)));
        let Some(Event::Admitted { cached_tokens, .. }) = events(&mut receiver).first().cloned() else {
            panic!("not admitted")
        };
        sim.run();
        cached_tokens
    };
    let (shared, other): (Vec<u32>, Vec<u32>) = ((0..7).collect(), (10..17).collect());
    let longer: Vec<u32> = (0..9).collect();
    assert_eq!([&shared, &other].map(|text| cached(&mut sim, text)), [0, 0]);
    // Of two that begin alike one fails; the other runs on, and what it draws tells of its own.
    let (_, mut good) = sim.submit(Job::Generate(request(&shared, 6)));
    let (_, mut bad) = sim.submit(Job::Generate(request(&longer, 6)));
    let step = sim.core.plan(sim.now).unwrap();
    sim.begin(step);
    sim.running[0].drawn[1] = Drawn::NotFinite { id: 3 };
    sim.finish();
    assert!(matches!(events(&mut bad).last(), Some(Event::Failed(JobError::Engine(_)))));
    assert_eq!([&longer, &other].map(|text| cached(&mut sim, text)), [0, 4]);
    assert_eq!(tokens(&events(&mut good)), expected(&request(&shared, 6)));
    sim.run();
    let blocks = sim.blocks();
    assert_eq!((blocks.used, blocks.free + blocks.cached), (0, 64));
}

#[test]
fn seeded_draws_depend_on_seed_and_position_alone() {
    let seeded = |seed| {
        let sampling = Sampling { temperature: 5.0, seed, ..Sampling::default() };
        let asked = Request { sampling, ..request(&[1; 5], 12) };
        let mut sim = Sim::new(1, 32, options());
        let (_, mut receiver) = sim.submit(Job::Generate(asked.clone()));
        sim.run();
        let whole = tokens(&events(&mut receiver));
        let mut rest = asked;
        rest.tokens.extend(&whole[..5]);
        let (_, mut receiver) = sim.submit(Job::Generate(rest));
        sim.run();
        assert_eq!(tokens(&events(&mut receiver)), whole[5..]);
        whole
    };
    assert_ne!(seeded(1), seeded(2));
}
