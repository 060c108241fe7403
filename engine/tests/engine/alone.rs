//! One node that computes and generates by itself.

use backend::DType;
use engine::{Event, Finish, Job, JobError, Refusal, Request, Sampling};

use crate::node::{Node, Outcome, SEED, Spec, direct, direct_scores, request, seeded, until};

#[test]
fn generation_is_the_models_own_in_both_types() {
    for dtype in [DType::F32, DType::BF16] {
        let node = Node::start(&Spec { dtype, ..Spec::default() });
        for asked in [request(1, 1, 8), request(2, 70, 12), seeded(3, 130, 12, 7)] {
            let outcome = node.generate(&asked);
            assert_eq!(outcome.ids(), direct(&asked, dtype), "{dtype} {asked:?}");
            assert_eq!(outcome.finish(), Finish::Length);
            let indices: Vec<usize> = outcome.tokens.iter().map(|t| t.index).collect();
            assert_eq!(indices, (0..asked.max_tokens).collect::<Vec<_>>());
        }
        node.quiet();
    }
}

/// Protects: what is guessed ahead changes no answer, and blocks come back, on one rank and on two.
#[test]
fn answers_with_guesses_are_the_models_own() {
    for (world, dtype) in [(1, DType::F32), (1, DType::BF16), (2, DType::F32)] {
        let node = Node::start(&Spec { dtype, ..Spec::world(world) });
        // The model's own text, which greedy answers of so small a model repeat before long.
        let asked: Vec<Request> = (0..4).map(|i| request(i, 40 + 30 * i as usize, 150)).collect();
        let events: Vec<_> =
            asked.iter().map(|request| node.submit(Job::Generate(request.clone()))).collect();
        for (request, events) in asked.iter().zip(events) {
            assert_eq!(Outcome::of(events).ids(), direct(request, dtype), "{world} {dtype} {}", request.id);
        }
        node.quiet();
        let counters = node.engine.report().counters;
        assert!(counters.accepted_tokens > 0, "{counters:?}");
        assert!(counters.draft_tokens > counters.accepted_tokens, "none was wrong: {counters:?}");
    }
}

/// Protects: a draft model changes no answer; one that is the model itself is always right, whatever the sampling, as it draws by
/// the same rules, and one that is not is asked less.
#[test]
fn answers_with_a_draft_model_are_the_models_own() {
    for (world, seed) in [(1, SEED), (2, SEED), (1, SEED + 1)] {
        let draft = Some(seed);
        let node = Node::start(&Spec { draft, ..Spec::world(world) });
        let sampled = |text, len| {
            let sampling = Sampling { temperature: 1.0, top_p: 0.95, seed: 9, ..Sampling::default() };
            Request { sampling, ..request(text, len, 80) }
        };
        let mut asked = vec![sampled(1, 30), sampled(2, 250), request(4, 20, 60)];
        if seed != SEED {
            asked.push(seeded(3, 70, 40, 7));
        }
        let events: Vec<_> =
            asked.iter().map(|request| node.submit(Job::Generate(request.clone()))).collect();
        for (request, events) in asked.iter().zip(events) {
            assert_eq!(
                Outcome::of(events).ids(),
                direct(request, DType::F32),
                "{world} {seed} {}",
                request.id
            );
        }
        node.quiet();
        let counters = node.engine.report().counters;
        let (drafted, held) = (counters.model_draft_tokens, counters.model_accepted_tokens);
        assert!(drafted > 0 && (drafted == held) == (seed == SEED), "{held} of {drafted}");
        assert!(counters.model_draft_time > std::time::Duration::ZERO);
    }
}

#[test]
fn sixteen_at_once_are_sixteen_alone() {
    let node = Node::start(&Spec::default());
    let asked: Vec<Request> = (0..16).map(|i| seeded(i, 5 + 13 * i as usize, 10, i.into())).collect();
    let events: Vec<_> = asked.iter().map(|request| node.submit(Job::Generate(request.clone()))).collect();
    for (request, events) in asked.iter().zip(events) {
        assert_eq!(Outcome::of(events).ids(), direct(request, DType::F32), "{}", request.id);
    }
    node.quiet();
}

#[test]
fn a_continued_answer_is_the_answer_and_finds_its_prefix() {
    let node = Node::start(&Spec::default());
    let asked = seeded(4, 60, 20, 9);
    let whole = node.generate(&asked).ids();
    let mut rest = asked.clone();
    rest.tokens.extend(&whole[..11]);
    let outcome = node.generate(&rest);
    assert_eq!(outcome.cached, 64, "70 of 71 tokens are there; four blocks of 16");
    assert_eq!(outcome.ids(), whole[11..]);
    assert_eq!(outcome.tokens[0].index, 11);
}

#[test]
fn a_preempted_answer_goes_on_to_the_same_tokens() {
    // 12 blocks of 16: 8 are reserved for a prompt of 100 tokens and a block more, 4 for one of 40. That one wants a
    // fifth for its 65th token, when nobody younger is there to make room.
    let node = Node::start(&Spec::default().blocks_of(16, 12));
    let reserved = node.submit(Job::Land(request(1, 100, 1)));
    let asked = seeded(2, 40, 40, 3);
    let first = node.generate(&asked);
    assert!(matches!(first.end, Some(Event::Preempted)), "{:?}", first.end);
    assert_eq!(first.tokens.len(), 25, "the 65th token is drawn, its row has no room");
    let mut rest = asked.clone();
    rest.tokens.extend(first.ids());
    let refused = node.generate(&rest);
    assert_eq!(refused.error(), &JobError::Refused(Refusal::NoRoom { tokens: 81 }));
    drop(reserved);
    node.quiet();
    let last = node.generate(&rest);
    assert_eq!(last.cached, 64, "what was computed is kept while nobody wants the room");
    assert_eq!([first.ids(), last.ids()].concat(), direct(&asked, DType::F32));
    node.quiet();
    assert_eq!(node.engine.report().counters.preemptions, 1);
}

#[test]
fn a_dropped_job_gives_everything_back_whatever_it_was_doing() {
    let node = Node::start(&Spec::default().with(|o| o.prefix_cache = false));
    // Waiting, in its prompt, generating.
    for taken in 0..4 {
        let mut events = node.submit(Job::Generate(request(1, 400, 200)));
        for _ in 0..taken {
            events.blocking_recv();
        }
        drop(events);
        node.quiet();
        let blocks = node.engine.report().blocks;
        assert_eq!(blocks.free, blocks.total);
    }
}

#[test]
fn a_prefill_without_handoff_gives_one_token() {
    let node = Node::start(&Spec::default());
    let asked = request(6, 90, 1);
    let outcome = Outcome::of(node.submit(Job::Prefill(asked.clone(), None)));
    assert_eq!(outcome.ids(), direct(&asked, DType::F32));
    assert_eq!(outcome.finish(), Finish::Length);
    assert_eq!(outcome.tokens[0].finish, Some(Finish::Length));
}

#[test]
fn the_scores_of_a_prompt_are_the_models_own() {
    for ranks in [1, 2] {
        let node = Node::start(&Spec::world(ranks));
        let plain = request(6, 150, 4);
        let answer = node.generate(&plain).ids();
        let asked = Request { prompt_logprobs: Some(3), ..plain.clone() };
        let scores = direct_scores(&asked.tokens, 3);
        let outcome = node.generate(&asked);
        assert_eq!((outcome.scores, outcome.cached), (scores.clone(), 0), "{ranks} ranks");
        assert_eq!(outcome.tokens.iter().map(|token| token.id).collect::<Vec<_>>(), answer);
        let outcome = Outcome::of(node.submit(Job::Prefill(asked, None)));
        assert_eq!((outcome.scores.clone(), outcome.ids()), (scores, answer[..1].to_vec()), "{ranks} ranks");
        node.quiet();
    }
}

#[test]
fn probe_drain_and_stop_are_answered() {
    let node = Node::start(&Spec::default());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    assert!(runtime.block_on(node.engine.probe()).is_ok());
    let running = node.submit(Job::Generate(request(1, 10, 50)));
    node.engine.drain();
    assert_eq!(
        node.engine.submit(Job::Generate(request(1, 10, 5))).err(),
        Some(Refusal::Unavailable("draining".into()))
    );
    assert_eq!(Outcome::of(running).tokens.len(), 50, "what runs goes on");
    let running = node.submit_anyway();
    node.engine.stop();
    assert!(running.is_none());
    until("the engine refuses", || !node.engine.ready());
    assert!(runtime.block_on(node.engine.probe()).is_err());
}

impl Node {
    fn submit_anyway(&self) -> Option<engine::Events> {
        self.engine.submit(Job::Generate(request(1, 10, 5))).ok()
    }
}

#[test]
fn rates_and_counters_are_measured() {
    let node = Node::start(&Spec::default());
    node.quiet();
    node.generate(&request(1, 200, 10));
    node.quiet();
    let report = node.engine.report();
    assert_eq!((report.counters.requests, report.counters.prompt_tokens), (1, 200));
    assert_eq!(report.counters.generated_tokens, 10);
    assert!(report.prefill_tokens_per_s > 0.0 && report.decode_step_ms > 0.0, "{report:?}");
}
