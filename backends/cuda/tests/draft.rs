//! A draft model beside a model, each with a handle of its own on the (emulated) device: whole answers are those without it, on one
//! rank and on two that sum by NCCL, and one that fails takes nothing with it.

#[path = "nccl/library.rs"]
mod library;

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use backend::{Backend, DType, DeviceOptions, Group};
use backend_cuda::EmulatedBackend;
use engine::{
    Counters, DraftModel, Engine, EngineOptions, Event, Job, Place, Request, Runner, Sampling, Terms,
};
use models::{Checkpoint, Model};

use crate::library::library;

/// The model's weights are drawn from this.
const SEED: u64 = 5;
const THETA: f64 = 10_000.0;
const BLOCK: u32 = 16;
const BLOCKS: u64 = 64;

/// Kernels run one at a time in a process: tests do, too, so that no rank of a group is silent because of another test.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model whose positions turn by `theta`.
fn checkpoint(seed: u64, theta: f64) -> Checkpoint {
    let config = serde_json::json!({
        "model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
        "rms_norm_eps": 1e-6, "rope_theta": theta, "max_position_embeddings": 512,
        "tie_word_embeddings": false, "torch_dtype": "float32"
    });
    // Ranks open theirs at once.
    static OPENED: AtomicU32 = AtomicU32::new(0);
    let name = format!("draft-{}-{}", std::process::id(), OPENED.fetch_add(1, Ordering::Relaxed));
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let checkpoint = Checkpoint::dummy(&dir, seed).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    checkpoint
}

fn device() -> DeviceOptions {
    DeviceOptions { dtype: DType::F32, block_tokens: BLOCK, ..DeviceOptions::default() }
}

/// A model and the bytes of its cache.
fn model(
    backend: &mut EmulatedBackend,
    checkpoint: &Checkpoint,
    [rank, world]: [usize; 2],
) -> (Model<EmulatedBackend>, u64) {
    let model = Model::load(backend, checkpoint, rank, world, DType::F32, &mut |_| {}).unwrap();
    let kv_bytes = BLOCKS * u64::from(BLOCK) * model.kv_spec().token_bytes() as u64;
    (model, kv_bytes)
}

/// All ranks of a group.
struct Node {
    ranks: Vec<(Engine, JoinHandle<()>)>,
}

impl Node {
    /// With a draft model of this seed and theta, if any.
    fn start(world: usize, draft: Option<(u64, f64)>) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let leader = listener.local_addr().unwrap().to_string();
        let mut listener = Some(listener);
        let draft_max = if draft.is_some() { 4 } else { 0 };
        let ranks = (0..world).map(|rank| {
            let place = match (world, rank) {
                (1, _) => Place::Alone,
                (_, 0) => Place::Lead { listener: listener.take().unwrap(), world },
                _ => Place::Follow { leader: leader.clone(), rank },
            };
            let (engine, commands) = engine::engine();
            let work = move || {
                let group = engine::tp::unmet(rank, world).unwrap();
                let mut backend = EmulatedBackend::open(&device(), group).unwrap();
                let (own, kv_bytes) = model(&mut backend, &checkpoint(SEED, THETA), [rank, world]);
                let draft = draft.filter(|_| rank == 0).map(|(seed, theta)| {
                    let mut beside = backend.beside(&device(), Group::alone()).unwrap();
                    let (model, kv_bytes) = model(&mut beside, &checkpoint(seed, theta), [0, 1]);
                    DraftModel::new(beside, model, kv_bytes).unwrap()
                });
                let options = EngineOptions {
                    kv_bytes,
                    context_tokens: 512,
                    batch_max: 4,
                    step_tokens: 64,
                    chunk_tokens: 40,
                    draft_max,
                    ..EngineOptions::default()
                };
                let mut runner = Runner::new(backend, own, options).unwrap();
                if let Some(draft) = draft {
                    runner.draft_with(draft);
                }
                let terms = Terms {
                    trust: engine::tp::Trust::in_clear(b"cluster".to_vec()),
                    version: "1".into(),
                    identity: "tiny".into(),
                    first_epoch: 1,
                    native: None,
                };
                engine::serve(&mut runner, &place, &terms, &commands).unwrap();
            };
            (engine, std::thread::spawn(work))
        });
        let node = Node { ranks: ranks.collect() };
        let until = Instant::now() + Duration::from_secs(60);
        while !node.ranks[0].0.ready() {
            assert!(Instant::now() < until, "the node does not serve");
            std::thread::yield_now();
        }
        node
    }

    /// The answers to all requests at once.
    fn answers(&self, asked: &[Request]) -> Vec<Vec<u32>> {
        let jobs =
            asked.iter().map(|request| self.ranks[0].0.submit(Job::Generate(request.clone())).unwrap());
        let jobs: Vec<_> = jobs.collect();
        let answer = |mut events: engine::Events| {
            let mut ids = Vec::new();
            while let Some(event) = events.blocking_recv() {
                match event {
                    Event::Token(token) => ids.push(token.id),
                    Event::Failed(error) => panic!("{error}"),
                    _ => {}
                }
            }
            ids
        };
        jobs.into_iter().map(answer).collect()
    }

    fn counters(&self) -> Counters {
        self.ranks[0].0.report().counters
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.ranks.iter().for_each(|(engine, _)| engine.stop());
        for (_, thread) in self.ranks.drain(..) {
            // A panic of the rank has failed the test already.
            let _ = thread.join();
        }
    }
}

/// A greedy answer and two that are drawn, behind prompts of one piece and of several.
fn requests() -> Vec<Request> {
    let request = |text: u32, len: u32, temperature| Request {
        id: format!("text {text}"),
        tokens: (0..len)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(text * 40_503) >> 7) % 96)
            .collect(),
        output_start: len as usize,
        max_tokens: 24,
        ignore_eos: true,
        sampling: Sampling { temperature, seed: text.into(), ..Sampling::default() },
        ..Request::default()
    };
    vec![request(1, 20, 0.0), request(2, 90, 0.8), request(3, 6, 0.8)]
}

/// The draft model is the model itself, and always right; or another.
#[test]
fn a_draft_model_changes_no_answer() {
    let _alone = alone();
    let want = Node::start(1, None).answers(&requests());
    for seed in [SEED, SEED + 1] {
        let node = Node::start(1, Some((seed, THETA)));
        assert!(node.answers(&requests()) == want, "seed {seed}");
        let Counters { model_draft_tokens: drafted, model_accepted_tokens: held, .. } = node.counters();
        assert!(drafted > 0 && (drafted == held) == (seed == SEED), "{held} of {drafted}");
    }
}

/// In a group of two, of whose other rank the draft model knows nothing; steps with guesses are replayed together there.
#[test]
fn a_draft_model_of_a_group_changes_no_answer() {
    let _alone = alone();
    let sums = library();
    let want = Node::start(2, None).answers(&requests());
    let node = Node::start(2, Some((SEED, THETA)));
    let before = sums();
    assert!(node.answers(&requests()) == want);
    let Counters { model_draft_tokens: drafted, model_accepted_tokens: held, .. } = node.counters();
    assert!(sums() > before && held > 0, "{held} of {drafted}");
}

/// One whose numbers are none (its angles have no end) has failed where the other was right: nothing is guessed, and the model
/// goes on.
#[test]
fn a_draft_model_that_fails_takes_nothing_with_it() {
    let _alone = alone();
    let want = Node::start(1, None).answers(&requests());
    let node = Node::start(1, Some((SEED, 1e-300)));
    assert!(node.answers(&requests()) == want);
    assert!(node.answers(&requests()) == want);
    assert_eq!(node.counters().model_draft_tokens, 0);
}
