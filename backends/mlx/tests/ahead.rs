//! Tokens in flight on MLX: steps are recorded on ids that are still being drawn, by hand and by the engine, and give the
//! tokens of Hugging Face transformers.
#![cfg(feature = "mlx")]

#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::collections::VecDeque;

use backend::{
    Backend, Batch, DType, DeviceOptions, Draw, Drawn, Group, Out, Output, Pending, Rule, SeqId, Step,
};
use backend_mlx::{MlxAct, MlxBackend};
use engine::{EngineOptions, Event, Job, Place, Request, Runner, Terms};
use models::Model;
use models::replay::Rank;

use crate::fixture::Fixture;

const CASE: &str = "llama-base-s1";

fn options() -> DeviceOptions {
    DeviceOptions { dtype: DType::F32, threads: 1, block_tokens: 16, ..DeviceOptions::default() }
}

fn ids(pending: Box<dyn Pending<MlxAct>>) -> Vec<u32> {
    let Output::Drawn(rows) = pending.wait().unwrap() else { panic!("nothing drawn") };
    let id = |row: &Drawn| if let Drawn::Token(id) = row { *id } else { panic!("{row:?}") };
    rows.iter().map(id).collect()
}

/// Two answers side by side, each step submitted before the one before is waited for.
#[test]
fn greedy_in_flight_is_the_reference() {
    let fixture = Fixture::open(CASE);
    let prompts = &fixture.prompts[..2];
    let room = |i: usize| prompts[i].prompt.len() + prompts[i].greedy.len();
    let mut rank = Rank::<MlxBackend>::open(&options(), Group::alone(), &fixture.checkpoint, 1024).unwrap();
    let seqs = [SeqId(1), SeqId(2)];
    (0..2).for_each(|i| rank.begin(seqs[i], room(i)).unwrap());
    let steps = prompts.iter().map(|prompt| prompt.greedy.len()).min().unwrap();
    let (mut got, mut running) = ([vec![], vec![]], VecDeque::new());
    let mut take = |pending| got.iter_mut().zip(ids(pending)).for_each(|(ids, id)| ids.push(id));
    for step in 0..steps {
        let mut batch = Batch::default();
        for (i, seq) in seqs.into_iter().enumerate() {
            match step {
                0 => batch.push(seq, 0, &prompts[i].prompt),
                _ => batch.push_drawn(seq, (prompts[i].prompt.len() + step - 1) as u32, i as u32),
            }
        }
        let mut step = rank.backend.step(&mut rank.kv, &batch);
        let logits = rank.model.forward(&mut step, &batch.last_rows(), &mut |_, _| {});
        running.push_back(step.submit(Out::Draw(logits, vec![Draw::Token(Rule::GREEDY); 2])));
        if running.len() == 2 {
            running.pop_front().into_iter().for_each(&mut take);
        }
    }
    running.into_iter().for_each(take);
    for (got, prompt) in got.iter().zip(prompts) {
        assert_eq!(got[..], prompt.greedy[..steps]);
    }
}

/// The engine on MLX: answers of different lengths, one ended by a stop id and one that nobody reads to its end.
#[test]
fn the_engine_runs_ahead_to_the_reference() {
    let (engine, commands) = engine::engine();
    let serving = std::thread::spawn(move || {
        let fixture = Fixture::open(CASE);
        let mut backend = MlxBackend::open(&options(), Group::alone()).unwrap();
        let checkpoint = &fixture.checkpoint;
        let model = Model::load(&mut backend, checkpoint, 0, 1, DType::F32, &mut |_| {}).unwrap();
        let kv_bytes = 2048 * model.kv_spec().token_bytes() as u64;
        let options = EngineOptions { kv_bytes, context_tokens: 512, ..EngineOptions::default() };
        let mut runner = Runner::new(backend, model, options).unwrap();
        let terms = Terms {
            secret: b"cluster".to_vec(),
            version: "1".into(),
            identity: CASE.into(),
            first_epoch: 1,
            native: None,
        };
        engine::serve(&mut runner, &Place::Alone, &terms, &commands).map_err(|error| error.to_string())
    });
    let begun = std::time::Instant::now();
    while !engine.ready() {
        assert!(begun.elapsed().as_secs() < 60, "the engine does not start");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let fixture = Fixture::open(CASE);
    let submit = |i: usize, max_tokens: usize, stop: Option<usize>| {
        let prompt = &fixture.prompts[i];
        let request = Request {
            output_start: prompt.prompt.len(),
            tokens: prompt.prompt.clone(),
            max_tokens,
            stop_ids: stop.map(|at| prompt.greedy[at]).into_iter().collect(),
            ..Request::default()
        };
        engine.submit(Job::Generate(request)).unwrap()
    };
    let all = fixture.prompts[0].greedy.len().min(fixture.prompts[1].greedy.len());
    let mut answers =
        [submit(0, all, None), submit(1, all, None), submit(1, all, Some(all / 2)), submit(0, 3, None)];
    let mut left = submit(0, all, None);
    assert!(matches!(left.blocking_recv(), Some(Event::Admitted { .. })));
    drop(left);
    for (answer, (prompt, wanted)) in answers.iter_mut().zip([(0, all), (1, all), (1, all / 2 + 1), (0, 3)]) {
        let mut got = Vec::new();
        while let Some(event) = answer.blocking_recv() {
            match event {
                Event::Token(token) => got.push(token.id),
                Event::Admitted { .. } | Event::Finished { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let greedy = &fixture.prompts[prompt].greedy;
        // A stop id may come before the place it was taken from.
        let stop =
            if wanted == all / 2 + 1 { greedy.iter().position(|id| *id == greedy[all / 2]) } else { None };
        assert_eq!(got[..], greedy[..stop.map_or(wanted, |at| at + 1)]);
    }
    engine.stop();
    serving.join().unwrap().unwrap();
    let blocks = engine.report().blocks;
    assert_eq!((blocks.used, blocks.audit_errors), (0, 0), "{blocks:?}");
}
