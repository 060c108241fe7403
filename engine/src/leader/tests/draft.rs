//! Tokens that are guessed ahead.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use kvtransfer::Close;
use proptest::prelude::*;

use super::sim::{Sim, VOCABULARY, events, expected, next_token, options, request, tokens};
use crate::draft::{Ask, Drafted, Drafter};
use crate::error::EngineError;
use crate::options::EngineOptions;
use crate::request::{Counters, Event, Finish, Job, JobError, Request, Sampling};
use crate::sequence::Stage;

/// Repeats what it said five tokens ago, but for every eleventh.
fn repeating(tokens: &[u32]) -> u32 {
    match tokens.len() {
        len if len < 5 || len.is_multiple_of(11) => next_token(tokens),
        len => tokens[len - 5],
    }
}

fn sim(blocks: u32, draft_max: usize) -> Sim {
    let mut sim = Sim::new(1, blocks, EngineOptions { draft_max, ..options() });
    sim.model = repeating;
    sim
}

fn counters(sim: &mut Sim) -> Counters {
    sim.core.report(Default::default(), vec![]).counters
}

/// Steps until one has guesses, which is under way then.
fn guess(sim: &mut Sim, generating: usize) {
    for _ in 0..20 {
        if rows(sim) > generating && sim.core.sequences.values().all(|s| s.output_tokens() > 0) {
            return;
        }
        sim.finish();
    }
    panic!("nothing is guessed");
}

/// Rows of the next step.
fn rows(sim: &mut Sim) -> usize {
    let step = sim.core.plan(sim.now).expect("a step");
    let rows = step.plan.batch.rows();
    sim.begin(step);
    rows
}

#[test]
fn what_repeats_comes_several_tokens_a_step() {
    let asked = request(&[1, 2, 3, 4, 5, 6], 40);
    let run = |draft_max, ahead| {
        let mut sim = sim(32, draft_max).ahead(ahead);
        let (_, mut receiver) = sim.submit(Job::Generate(asked.clone()));
        let steps = (0..).take_while(|_| sim.step()).count();
        (tokens(&events(&mut receiver)), steps, sim)
    };
    for ahead in [false, true] {
        let (plain, many, _) = run(0, ahead);
        let (guessed, few, mut sim) = run(8, ahead);
        assert_eq!(guessed, plain);
        assert!(3 * few < 2 * many, "{few} steps, {many} without");
        let counters = counters(&mut sim);
        assert_eq!(counters.generated_tokens, 40);
        assert!(counters.accepted_tokens >= 20, "{counters:?}");
        assert!(counters.draft_tokens >= counters.accepted_tokens && counters.drafts > 1, "{counters:?}");
        // 45 of 46 positions are computed: 11 full blocks.
        assert_eq!((sim.blocks().cached, sim.blocks().free), (11, 21));
    }
}

/// Protects: no row is computed for a token that the answer cannot have.
#[test]
fn an_answer_is_no_longer_than_asked() {
    for most in 1..14 {
        let mut sim = sim(32, 8);
        let (_, mut receiver) = sim.submit(Job::Generate(request(&[7; 12], most)));
        while !sim.core.sequences.is_empty() {
            let rows = rows(&mut sim);
            let said = sim.core.sequences.values().next().unwrap().output_tokens();
            assert!(said == 0 || rows <= most - said, "{rows} rows of {most}");
            sim.finish();
        }
        assert_eq!(tokens(&events(&mut receiver)).len(), most);
    }
}

/// Protects: a prompt beside streams has all rows that they leave, and nobody waits for guesses then.
#[test]
fn beside_prompts_nothing_is_guessed() {
    let mut sim = sim(64, 8);
    sim.submit(Job::Generate(request(&[7; 8], 40)));
    guess(&mut sim, 1);
    sim.finish();
    sim.submit(Job::Generate(request(&[3; 20], 1)));
    assert_eq!(rows(&mut sim), 1 + 8);
}

/// Protects: where guesses do not pay it is learned all the same how often they hold, so that they are made when they do.
#[test]
fn guesses_without_rows_are_learned_of() {
    for ahead in [false, true] {
        let mut sim = sim(64, 8).ahead(ahead);
        for rows in (0..64).flat_map(|_| [1, 2]) {
            sim.core.totals.worth.step(rows, Duration::from_millis(10 * rows as u64));
        }
        let before = sim.core.totals.worth.odds(8);
        let (_, mut receiver) = sim.submit(Job::Generate(request(&[7; 8], 50)));
        sim.run();
        assert_eq!(tokens(&events(&mut receiver)).len(), 50);
        let counters = counters(&mut sim);
        assert_eq!(counters.drafts, 0, "{counters:?}");
        let after = sim.core.totals.worth.odds(8);
        assert!(after > before + 0.1, "{before} to {after}");
    }
}

/// Protects: a device that runs ahead waits only where it is worth it.
#[test]
fn guesses_begin_behind_what_is_known() {
    let mut sim = sim(64, 8).ahead(true);
    let (_, mut receiver) = sim.submit(Job::Generate(request(&[1, 2, 3, 4], 60)));
    // Nothing repeats yet.
    assert_eq!((rows(&mut sim), rows(&mut sim)), (4, 1));
    let mut waited = 0;
    while !sim.core.sequences.is_empty() {
        match sim.core.plan(sim.now) {
            Some(step) => {
                assert!(step.plan.batch.rows() == 1 || sim.running.is_empty());
                sim.begin(step);
            }
            None => {
                waited += usize::from(sim.running.len() == 1);
                sim.finish();
            }
        }
    }
    assert!(waited > 3, "{waited}");
    sim.run();
    assert_eq!(tokens(&events(&mut receiver)).len(), 60);
}

#[test]
fn a_client_that_leaves_takes_its_guesses_along() {
    let mut sim = sim(32, 8);
    let (job, _receiver) = sim.submit(Job::Generate(request(&[7; 8], 40)));
    let (_, mut stays) = sim.submit(Job::Generate(request(&[3; 8], 40)));
    guess(&mut sim, 2);
    sim.core.cancel(job);
    sim.run();
    assert_eq!(tokens(&events(&mut stays)).len(), 40);
    let blocks = sim.blocks();
    assert_eq!((blocks.used, blocks.free + blocks.cached), (0, 32));
}

/// What a draft model does in a test.
#[derive(Clone, Copy, Debug)]
enum Script {
    Right,
    Wrong,
    /// Wrong in every third token; has to read on every now and then.
    Partly,
    /// Ids that the model does not have.
    Foreign,
    /// Has no room.
    Silent,
    /// Fails after so many calls.
    Fails(usize),
}

/// What others see of a [`Scripted`].
#[derive(Clone, Default)]
struct Seen(Rc<RefCell<Notes>>);

#[derive(Default)]
struct Notes {
    calls: usize,
    /// Jobs that it has not been told to forget, and their tokens.
    held: BTreeMap<u64, Vec<u32>>,
    forgotten: BTreeSet<u64>,
}

impl Seen {
    fn held(&self) -> usize {
        self.0.borrow().held.len()
    }

    fn calls(&self) -> usize {
        self.0.borrow().calls
    }
}

/// A draft model that knows the model.
struct Scripted {
    script: Script,
    model: fn(&[u32]) -> u32,
    seen: Seen,
}

impl Drafter for Scripted {
    fn guess(&mut self, asks: &[Ask<'_>], _within: Duration) -> Result<Drafted, EngineError> {
        let mut notes = self.seen.0.borrow_mut();
        notes.calls += 1;
        let calls = notes.calls;
        if matches!(self.script, Script::Fails(after) if calls > after) {
            return Err(EngineError::Options("it was told to".into()));
        }
        let mut guess = |ask: &Ask<'_>| {
            assert!(!notes.forgotten.contains(&ask.job), "job {} has ended", ask.job);
            let held = notes.held.insert(ask.job, ask.tokens.to_vec()).unwrap_or_default();
            assert!(ask.tokens.starts_with(&held), "tokens of earlier calls and more");
            assert_eq!(ask.rule.position as usize, ask.tokens.len());
            let mut tokens = ask.tokens.to_vec();
            for at in 0..ask.most {
                let token = (self.model)(&tokens);
                let wrong = (token + 1) % VOCABULARY as u32;
                tokens.push(match self.script {
                    Script::Wrong => wrong,
                    Script::Partly if tokens.len().is_multiple_of(3) => wrong,
                    Script::Foreign if at == 1 => VOCABULARY as u32,
                    _ => token,
                });
            }
            let guess = tokens.split_off(ask.tokens.len());
            match self.script {
                Script::Silent => Some(vec![]),
                Script::Partly if calls.is_multiple_of(4) => None,
                _ => Some(guess),
            }
        };
        Ok(Drafted { guesses: asks.iter().map(&mut guess).collect(), steps: vec![] })
    }

    fn forget(&mut self, job: u64) {
        let mut notes = self.seen.0.borrow_mut();
        notes.held.remove(&job);
        notes.forgotten.insert(job);
    }
}

/// Gives `sim` a draft model.
fn draft(sim: &mut Sim, script: Script) -> Seen {
    let seen = Seen::default();
    sim.core.draft_with(Scripted { script, model: sim.model, seen: seen.clone() });
    seen
}

/// A node whose model says nothing twice, with a draft model.
fn drafting(blocks: u32, script: Script) -> (Sim, Seen) {
    let mut sim = Sim::new(1, blocks, EngineOptions { draft_max: 8, ..options() });
    let seen = draft(&mut sim, script);
    (sim, seen)
}

/// Protects: a draft model is asked where nothing repeats, and less and less where it is wrong.
#[test]
fn a_draft_model_guesses_what_no_passage_says() {
    let asked = request(&[1, 2, 3, 4], 50);
    let run = |script, ahead| {
        let (sim, seen) = drafting(32, script);
        let mut sim = sim.ahead(ahead);
        let (_, mut receiver) = sim.submit(Job::Generate(asked.clone()));
        let steps = (0..).take_while(|_| sim.step()).count();
        assert_eq!(tokens(&events(&mut receiver)), expected(&asked), "{script:?}");
        (steps, seen.calls(), counters(&mut sim))
    };
    for ahead in [false, true] {
        let (steps, _, counted) = run(Script::Right, ahead);
        assert!(steps < 30, "{steps} steps for 50 tokens");
        assert!(counted.model_accepted_tokens > 30, "{counted:?}");
        assert_eq!(counted.model_accepted_tokens, counted.model_draft_tokens, "{counted:?}");
        let (_, calls, counted) = run(Script::Wrong, ahead);
        assert!(calls < 30, "{calls} calls for 50 tokens");
        assert_eq!(counted.model_accepted_tokens, 0);
        let (_, _, counted) = run(Script::Foreign, ahead);
        assert!(counted.model_draft_tokens > 0, "{counted:?}");
        assert_eq!(counted.model_accepted_tokens, counted.model_draft_tokens, "{counted:?}");
        let (_, calls, counted) = run(Script::Silent, ahead);
        assert!(calls < 30, "{calls} calls for 50 tokens");
        assert_eq!(counted.model_draft_tokens, 0);
    }
}

/// Protects: what a draft model holds of a job comes back with whichever end the job has.
#[test]
fn a_draft_model_forgets_whoever_has_ended() {
    let (mut sim, seen) = drafting(32, Script::Right);
    let (left, _gone) = sim.submit(Job::Generate(request(&[1; 4], 40)));
    let (_, mut stays) = sim.submit(Job::Generate(request(&[2; 4], 40)));
    while seen.held() < 2 {
        assert!(sim.step());
    }
    sim.core.cancel(left);
    assert_eq!(seen.held(), 1);
    sim.run();
    assert!(matches!(events(&mut stays).last(), Some(Event::Finished { .. })));
    assert_eq!(seen.held(), 0);

    // 32 tokens for two that grow to 28 each.
    let (mut sim, seen) = drafting(8, Script::Right);
    let [mut first, mut second] = [1, 2].map(|token| sim.submit(Job::Generate(request(&[token; 4], 24))).1);
    sim.run();
    let ends = [events(&mut first), events(&mut second)];
    assert!(ends.iter().any(|events| matches!(events.last(), Some(Event::Preempted))), "{ends:?}");
    assert_eq!(seen.held(), 0);

    let (mut sim, seen) = drafting(32, Script::Right);
    sim.submit(Job::Generate(request(&[1; 4], 40)));
    while seen.held() < 1 {
        assert!(sim.step());
    }
    sim.core.finish(&JobError::Engine("a rank is gone".into()));
    assert_eq!(seen.held(), 0);
}

#[test]
fn a_draft_model_that_fails_is_asked_no_more() {
    let (mut sim, seen) = drafting(32, Script::Fails(3));
    let asked = request(&[1, 2, 3, 4], 50);
    let (_, mut receiver) = sim.submit(Job::Generate(asked.clone()));
    sim.run();
    assert_eq!(tokens(&events(&mut receiver)), expected(&asked));
    assert_eq!((seen.calls(), seen.held()), (4, 0));
}

/// Protects: the first tokens behind a prompt that lands have guesses, for it was read meanwhile.
#[test]
fn prompts_are_read_while_they_land() {
    let (mut sim, seen) = drafting(32, Script::Right);
    assert!(!sim.core.read_ahead(), "nobody is there");
    sim.submit(Job::Generate(request(&[1; 4], 8)));
    sim.run();
    let prompt = [5; 12];
    let (job, _receiver) = sim.submit(Job::Land(request(&prompt, 9)));
    sim.run();
    assert_eq!(sim.core.sequences[&job].stage, Stage::Landing);
    assert!(!sim.core.read_ahead(), "all is read at once");
    assert_eq!(seen.0.borrow().held[&job], prompt);
    sim.land(Close { token: 7, finish: 0 });
    sim.run();
    assert_eq!(seen.held(), 0);
}

fn script() -> impl Strategy<Value = Option<Script>> {
    let scripts =
        [Script::Right, Script::Wrong, Script::Partly, Script::Foreign, Script::Silent, Script::Fails(5)];
    prop::option::of(prop::sample::select(scripts.to_vec()))
}

fn sampling() -> impl Strategy<Value = Sampling> {
    (0u8..5, any::<u64>()).prop_map(|(kind, seed)| match kind {
        0 => Sampling { temperature: 0.3, seed, ..Sampling::default() },
        1 => Sampling { logprobs: true, top_logprobs: 2, ..Sampling::default() },
        2 => Sampling { frequency_penalty: 0.4, ..Sampling::default() },
        3 => Sampling { repetition_penalty: 1.5, temperature: 0.3, seed, ..Sampling::default() },
        _ => Sampling::default(),
    })
}

fn asked() -> impl Strategy<Value = Request> {
    let prompt = prop::collection::vec(0u32..4, 1..16);
    (prompt, 1usize..30, sampling(), 0usize..6, prop::option::of(0u32..8)).prop_map(
        |(prompt, most, sampling, min_tokens, stop)| Request {
            sampling,
            min_tokens,
            stop_ids: stop.into_iter().collect(),
            ..request(&prompt, most)
        },
    )
}

proptest! {
    // Whatever is guessed by whomever, answers are those without, every row of the cache is the answer's, and every block comes back; who is
    // given up for room goes on to the same answer.
    #[test]
    fn answers_are_those_without_guesses(
        all in prop::collection::vec(asked(), 1..4),
        blocks in 12u32..40,
        ahead in any::<bool>(),
        script in script(),
    ) {
        let run = |draft_max, script: Option<Script>| {
            let mut sim = sim(blocks, draft_max).ahead(ahead);
            let seen = script.map(|script| draft(&mut sim, script));
            let mut told: Vec<(Vec<u32>, Option<Finish>)> = vec![Default::default(); all.len()];
            let mut open: Vec<_> = all.iter().map(|asked| Some(sim.submit(Job::Generate(asked.clone())).1)).collect();
            for _ in 0..100 {
                sim.run();
                for (index, slot) in open.iter_mut().enumerate() {
                    let Some(mut receiver) = slot.take() else { continue };
                    let events = events(&mut receiver);
                    told[index].0.extend(tokens(&events));
                    match events.last() {
                        Some(Event::Finished { reason, .. }) => told[index].1 = Some(*reason),
                        Some(Event::Preempted | Event::Failed(_)) => {
                            let mut rest = all[index].clone();
                            rest.tokens.extend(&told[index].0);
                            *slot = Some(sim.submit(Job::Generate(rest)).1);
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
            let blocks = sim.blocks();
            assert_eq!((blocks.used, blocks.reserved, blocks.quarantined), (0, 0, 0));
            assert_eq!(seen.map_or(0, |seen| seen.held()), 0);
            told
        };
        let plain = run(0, None);
        prop_assert!(plain.iter().all(|told| told.1.is_some()), "{:?}", plain);
        prop_assert_eq!(run(5, script), plain);
    }
}
