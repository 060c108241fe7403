//! Tokens in flight on MLX: steps are recorded on ids that are still being drawn, by hand and by the engine, and give the
//! tokens of Hugging Face transformers.
#![cfg(feature = "mlx")]

#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use backend::{
    Backend, Batch, DType, DeviceOptions, Draw, Drawn, Group, Out, Output, Pending, Rule, SeqId, Step,
};
use backend_mlx::{MlxAct, MlxBackend};
use engine::{EngineOptions, Event, Events, Job, Place, Request, Runner, Terms};
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

/// An engine on MLX and what it tells besides events.
struct Served {
    engine: engine::Engine,
    thread: JoinHandle<Result<(), String>>,
    fixture: Fixture,
    /// Bytes copied from slot to slot.
    copied: Arc<AtomicU64>,
    token_bytes: u64,
}

impl Served {
    fn start() -> Self {
        let (engine, commands) = engine::engine();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let fixture = Fixture::open(CASE);
            let mut backend = MlxBackend::open(&options(), Group::alone()).unwrap();
            let checkpoint = &fixture.checkpoint;
            let model = Model::load(&mut backend, checkpoint, 0, 1, DType::F32, &mut |_| {}).unwrap();
            let token_bytes = model.kv_spec().token_bytes() as u64;
            tell.send((backend.copied_bytes(), token_bytes)).unwrap();
            let kv_bytes = 2048 * token_bytes;
            let options = EngineOptions { kv_bytes, context_tokens: 512, ..EngineOptions::default() };
            let mut runner = Runner::new(backend, model, options).unwrap();
            let terms = Terms {
                trust: engine::tp::Trust::in_clear(b"cluster".to_vec()),
                version: "1".into(),
                identity: CASE.into(),
                first_epoch: 1,
                native: None,
            };
            engine::serve(&mut runner, &Place::Alone, &terms, &commands).map_err(|error| error.to_string())
        });
        let (copied, token_bytes) = told.recv().unwrap();
        let begun = std::time::Instant::now();
        while !engine.ready() {
            assert!(begun.elapsed().as_secs() < 60, "the engine does not start");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Served { engine, thread, fixture: Fixture::open(CASE), copied, token_bytes }
    }

    fn submit(&self, tokens: &[u32], max_tokens: usize, stop_ids: Vec<u32>) -> Events {
        let tokens = tokens.to_vec();
        let output_start = tokens.len();
        let request = Request { output_start, tokens, max_tokens, stop_ids, ..Request::default() };
        self.engine.submit(Job::Generate(request)).unwrap()
    }

    fn copied_bytes(&self) -> u64 {
        self.copied.load(Ordering::Relaxed)
    }

    /// Stops, and checks that nothing is left over. Returns how many tokens of prompts the cache held.
    fn end(self) -> u64 {
        self.engine.stop();
        self.thread.join().unwrap().unwrap();
        let report = self.engine.report();
        assert_eq!((report.blocks.used, report.blocks.audit_errors), (0, 0), "{:?}", report.blocks);
        report.counters.cached_tokens
    }
}

/// Tokens that the cache held of the prompt, and the answer.
fn answer(mut events: Events) -> (usize, Vec<u32>) {
    let (mut cached, mut ids) = (0, Vec::new());
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::Admitted { cached_tokens, .. } => cached = cached_tokens,
            Event::FirstStep { .. } | Event::Finished { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    (cached, ids)
}

/// The engine on MLX: answers of different lengths, one ended by a stop id and one that nobody reads to its end.
#[test]
fn the_engine_runs_ahead_to_the_reference() {
    let served = Served::start();
    let [first, second] = [0, 1].map(|i| &served.fixture.prompts[i]);
    let all = first.greedy.len().min(second.greedy.len());
    let stop = second.greedy[all / 2];
    let answers = [
        served.submit(&first.prompt, all, vec![]),
        served.submit(&second.prompt, all, vec![]),
        served.submit(&second.prompt, all, vec![stop]),
        served.submit(&first.prompt, 3, vec![]),
    ];
    let mut left = served.submit(&first.prompt, all, vec![]);
    assert!(matches!(left.blocking_recv(), Some(Event::Admitted { .. })));
    drop(left);
    // A stop id may come before the place it was taken from.
    let stopped = second.greedy.iter().position(|id| *id == stop).unwrap() + 1;
    let wanted = [&first.greedy[..all], &second.greedy[..all], &second.greedy[..stopped], &first.greedy[..3]];
    for (events, wanted) in answers.into_iter().zip(wanted) {
        assert_eq!(answer(events).1, wanted);
    }
    served.end();
}

/// A prompt that goes on where an ended answer left off gets that answer's slot as it is; one that shares only its beginning
/// gets a copy of that, once. Both go on to the reference's tokens.
#[test]
fn a_shared_prefix_is_moved_or_copied_once() {
    let served = Served::start();
    let fixture = &served.fixture;
    let prompt = fixture.prompts.iter().max_by_key(|prompt| prompt.prompt.len()).unwrap();
    let (text, greedy) = (&prompt.prompt, &prompt.greedy);
    assert_eq!((text.len(), greedy.len()), (70, 24));
    assert_eq!(answer(served.submit(text, 10, vec![])), (0, greedy[..10].to_vec()));
    assert_eq!(served.copied_bytes(), 0);
    // 79 tokens were computed, 4 blocks of 16 are kept; the next turn takes all of them.
    let longer = [text, &greedy[..10]].concat();
    assert_eq!(answer(served.submit(&longer, 10, vec![])), (64, greedy[10..20].to_vec()));
    assert_eq!(served.copied_bytes(), 0, "the slot was to be moved");
    // 89 tokens are 5 blocks: the prompt by itself shares 4 of them.
    assert_eq!(answer(served.submit(text, 24, vec![])), (64, greedy.to_vec()));
    assert_eq!(served.copied_bytes(), 64 * served.token_bytes);
    assert_eq!(served.end(), 128);
}
