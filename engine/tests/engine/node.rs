//! Nodes and requests of the tests: one helper that all of them speak through.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use backend::{DType, DeviceOptions, Group, SeqId};
use backend_cpu::CpuBackend;
use engine::sampler;
use engine::{
    Commands, DraftModel, Engine, EngineError, EngineOptions, Event, Events, Finish, Handoff, Job, JobError,
    Place, Request, Runner, Sampling, Score, Terms, Token,
};
use models::{Checkpoint, Model};

use crate::late::{Calls, Late};

pub const VOCABULARY: u32 = 96;
const CONTEXT: u32 = 1024;

const CONFIG: &str = r#"{
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 1024, "tie_word_embeddings": false, "torch_dtype": "float32"
}"#;

/// Its weights are drawn from this.
pub const SEED: u64 = 5;

/// The model of all tests.
pub fn checkpoint() -> &'static Checkpoint {
    static CHECKPOINT: OnceLock<Checkpoint> = OnceLock::new();
    CHECKPOINT.get_or_init(|| dummy(SEED))
}

/// The same with weights drawn from `seed`.
fn dummy(seed: u64) -> Checkpoint {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("engine-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory for the model");
    std::fs::write(dir.join("config.json"), CONFIG).expect("the model's configuration");
    Checkpoint::dummy(&dir, seed).expect("a dummy checkpoint")
}

/// A node as a test wants it.
#[derive(Clone)]
pub struct Spec {
    pub world: usize,
    pub dtype: DType,
    pub block_tokens: u32,
    pub blocks: u64,
    pub options: EngineOptions,
    /// Results of steps come when they are waited for, so that the engine runs ahead.
    pub late: bool,
    /// Rank 0 has a draft model with weights drawn from this; [`SEED`]: the model itself.
    pub draft: Option<u64>,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            world: 1,
            dtype: DType::F32,
            block_tokens: 16,
            blocks: 256,
            options: EngineOptions {
                context_tokens: CONTEXT,
                batch_max: 32,
                step_tokens: 96,
                chunk_tokens: 40,
                ..EngineOptions::default()
            },
            late: crate::LATE,
            draft: None,
        }
    }
}

impl Spec {
    pub fn world(world: usize) -> Self {
        Spec { world, ..Spec::default() }
    }

    pub fn blocks_of(self, block_tokens: u32, blocks: u64) -> Self {
        Spec { block_tokens, blocks, ..self }
    }

    pub fn with(mut self, change: impl FnOnce(&mut EngineOptions)) -> Self {
        change(&mut self.options);
        self
    }

    fn device(&self) -> DeviceOptions {
        DeviceOptions {
            dtype: self.dtype,
            threads: 1,
            block_tokens: self.block_tokens,
            ..DeviceOptions::default()
        }
    }

    /// With room for as many tokens as the model has.
    fn open_draft(&self, checkpoint: &Checkpoint) -> DraftModel<Late> {
        let mut backend =
            Late::open(&self.device(), Group::alone(), self.late, Calls::default()).expect("the CPU");
        let model =
            Model::load(&mut backend, checkpoint, 0, 1, self.dtype, &mut |_| {}).expect("a draft model");
        let bytes = self.blocks * u64::from(self.block_tokens) * model.kv_spec().token_bytes() as u64;
        DraftModel::new(backend, model, bytes).expect("a draft model")
    }

    fn open(&self, rank: usize, calls: Calls) -> Runner<Late> {
        let group = engine::tp::unmet(rank, self.world).expect("loopback sockets");
        let mut backend = Late::open(&self.device(), group, self.late, calls).expect("the CPU");
        let model = Model::load(&mut backend, checkpoint(), rank, self.world, self.dtype, &mut |_| {})
            .expect("a model");
        let token_bytes = model.kv_spec().token_bytes() as u64;
        let kv_bytes = self.blocks * u64::from(self.block_tokens) * token_bytes;
        let options = EngineOptions { kv_bytes, ..self.options.clone() };
        let mut runner = Runner::new(backend, model, options).expect("a runner");
        if let Some(seed) = self.draft.filter(|_| rank == 0) {
            runner.draft_with(self.open_draft(&dummy(seed)));
        }
        runner
    }
}

fn terms() -> Terms {
    static EPOCH: AtomicU64 = AtomicU64::new(1);
    Terms {
        trust: engine::tp::Trust::in_clear(b"cluster".to_vec()),
        version: "1".into(),
        identity: "tiny".into(),
        first_epoch: EPOCH.fetch_add(1000, Ordering::Relaxed),
        native: None,
    }
}

/// What a rank leaves behind, and how it ended.
type Ended = (Runner<Late>, Result<(), EngineError>);

/// One rank on its thread.
pub struct RankThread {
    pub engine: Engine,
    thread: Option<JoinHandle<Ended>>,
}

impl RankThread {
    fn start(mut runner: Runner<Late>, place: Place) -> Self {
        let (engine, commands): (Engine, Commands) = engine::engine();
        let thread = std::thread::spawn(move || {
            let ended = engine::serve(&mut runner, &place, &terms(), &commands);
            if let Err(error) = &ended {
                eprintln!("{place:?} ended: {error}");
            }
            (runner, ended)
        });
        RankThread { engine, thread: Some(thread) }
    }

    /// Ends the rank as a killed process would: its sockets close.
    pub fn stop(&mut self) -> Option<Runner<Late>> {
        self.engine.stop();
        let (runner, ended) = self.thread.take()?.join().expect("no panic");
        ended.expect("a rank that could go on");
        Some(runner)
    }
}

/// A node: its leader's handle and all of its ranks.
pub struct Node {
    pub engine: Engine,
    pub ranks: Vec<RankThread>,
    /// What each rank's device was asked.
    pub calls: Vec<Calls>,
    leader: String,
}

impl Node {
    /// Starts all ranks and waits until they serve.
    pub fn start(spec: &Spec) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let leader = listener.local_addr().expect("bound").to_string();
        let place = match spec.world {
            1 => Place::Alone,
            world => Place::Lead { listener, world },
        };
        let calls: Vec<Calls> = (0..spec.world).map(|_| Calls::default()).collect();
        let mut ranks = vec![RankThread::start(spec.open(0, calls[0].clone()), place)];
        for (rank, calls) in calls.iter().enumerate().skip(1) {
            let place = Place::Follow { leader: leader.clone(), rank };
            ranks.push(RankThread::start(spec.open(rank, calls.clone()), place));
        }
        let node = Node { engine: ranks[0].engine.clone(), ranks, calls, leader };
        until("the node serves", || node.engine.ready());
        node
    }

    /// Starts a stopped rank anew with what it had loaded.
    pub fn restart(&mut self, rank: usize, runner: Runner<Late>) {
        let place = Place::Follow { leader: self.leader.clone(), rank };
        self.ranks[rank] = RankThread::start(runner, place);
    }

    pub fn submit(&self, job: Job) -> Events {
        self.engine.submit(job).expect("a node that takes jobs")
    }

    /// All events of a job that generates here.
    pub fn generate(&self, request: &Request) -> Outcome {
        Outcome::of(self.submit(Job::Generate(request.clone())))
    }

    /// Waits until nothing runs and every block is back or cached.
    pub fn quiet(&self) {
        // What was asked before the probe is in the report after it.
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        until("the node answers", || runtime.block_on(self.engine.probe()).is_ok());
        until_or("the node is idle and holds nothing", || {
            let report = self.engine.report();
            let b = report.blocks;
            let busy = report.running + report.waiting;
            match busy == 0 && b.used + b.reserved + b.quarantined == 0 && b.free + b.cached == b.total {
                true => Ok(()),
                false => Err(format!("{report:?}")),
            }
        });
        assert_eq!(self.engine.report().blocks.audit_errors, 0);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for rank in &self.ranks {
            rank.engine.stop();
        }
        for rank in &mut self.ranks {
            if let Some(thread) = rank.thread.take() {
                // A panic of the rank has failed the test already.
                let _ = thread.join();
            }
        }
    }
}

/// Looks until `what` is so; a minute is far more than any test takes.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    until_or(what, || if is_so() { Ok(()) } else { Err(String::new()) });
}

/// The same, with what is seen instead.
fn until_or(what: &str, mut is_so: impl FnMut() -> Result<(), String>) {
    let begun = Instant::now();
    while let Err(seen) = is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited too long until {what}: {seen}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How a job went.
#[derive(Debug, Default)]
pub struct Outcome {
    pub cached: usize,
    pub handoff: Option<Handoff>,
    /// Of the prompt's tokens from position 1 on.
    pub scores: Vec<Score>,
    pub tokens: Vec<Token>,
    pub bytes: u64,
    pub end: Option<Event>,
}

impl Outcome {
    pub fn of(mut events: Events) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some(event) = events.blocking_recv() {
            outcome.take(event);
        }
        outcome
    }

    pub fn take(&mut self, event: Event) {
        match event {
            Event::Admitted { cached_tokens, handoff } => {
                (self.cached, self.handoff) = (cached_tokens, handoff);
            }
            Event::Started { cached_tokens, .. } => self.cached = cached_tokens,
            Event::Landed { bytes, .. } => self.bytes = bytes,
            Event::Scored { start, scores } => {
                assert_eq!(start, 1 + self.scores.len());
                self.scores.extend(scores);
            }
            Event::FirstStep { .. } => assert!(self.end.is_none()),
            Event::Token(token) => self.tokens.push(token),
            event => {
                assert!(self.end.is_none(), "{event:?} after {:?}", self.end);
                self.end = Some(event);
            }
        }
    }

    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    pub fn error(&self) -> &JobError {
        match &self.end {
            Some(Event::Failed(error)) => error,
            other => panic!("ended with {other:?}"),
        }
    }

    pub fn finish(&self) -> Finish {
        match &self.end {
            Some(Event::Finished { reason, .. }) => *reason,
            other => panic!("ended with {other:?}"),
        }
    }
}

/// A prompt of `len` tokens of text number `text`, greedy.
pub fn request(text: u32, len: usize, max_tokens: usize) -> Request {
    let token = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(text * 40_503) >> 7) % VOCABULARY;
    Request {
        id: format!("text {text}"),
        tokens: (0..len as u32).map(token).collect(),
        output_start: len,
        max_tokens,
        ..Request::default()
    }
}

/// The same, drawn with a seed and penalties.
pub fn seeded(text: u32, len: usize, max_tokens: usize, seed: u64) -> Request {
    let sampling = Sampling {
        temperature: 1.1,
        top_p: 0.95,
        top_k: 40,
        presence_penalty: 0.3,
        repetition_penalty: 1.1,
        seed,
        ..Sampling::default()
    };
    Request { sampling, ..request(text, len, max_tokens) }
}

/// How likely the model itself holds the tokens of a prompt to be, from position 1 on: fed token by token.
pub fn direct_scores(tokens: &[u32], top: usize) -> Vec<Score> {
    let options = DeviceOptions { dtype: DType::F32, threads: 1, ..DeviceOptions::default() };
    let mut rank =
        models::replay::Rank::<CpuBackend>::open(&options, Group::alone(), checkpoint(), tokens.len())
            .expect("the model alone");
    rank.begin(SeqId(1), tokens.len()).expect("room");
    let scored = |(at, pair): (usize, &[u32])| {
        let logits = rank.feed(SeqId(1), at as u32, &pair[..1], usize::MAX).expect("a step").expect("logits");
        engine::score::score(&logits, pair[1], top)
    };
    tokens.windows(2).enumerate().map(scored).collect()
}

/// What the model itself gives for `request`: one rank, one chunk, no engine.
pub fn direct(request: &Request, dtype: DType) -> Vec<u32> {
    let options = DeviceOptions { dtype, threads: 1, ..DeviceOptions::default() };
    let room = request.tokens.len() + request.max_tokens;
    let mut rank = models::replay::Rank::<CpuBackend>::open(&options, Group::alone(), checkpoint(), room)
        .expect("the model alone");
    let mut request = request.clone();
    let prompt = request.tokens.len();
    rank.begin(SeqId(1), room).expect("room");
    let mut computed = 0;
    while request.tokens.len() - request.output_start < request.max_tokens {
        let ids = request.tokens[computed..].to_vec();
        let logits = rank.feed(SeqId(1), computed as u32, &ids, usize::MAX).expect("a step").expect("logits");
        computed = request.tokens.len();
        let next = sampler::sample(&logits, &mut request).expect("a token");
        request.tokens.push(next.id);
        let last = request.tokens.last().expect("just pushed");
        if request.stop_ids.contains(last) && !request.ignore_eos {
            break;
        }
    }
    request.tokens.split_off(prompt)
}

/// A request through a prefill node and a decode group, as the router does it.
pub struct Trip {
    /// From the prefill node.
    pub prefill: Outcome,
    /// From the decode group.
    pub decode: Outcome,
}

impl Trip {
    pub fn make(p: &Node, d: &Node, request: &Request) -> Trip {
        let mut landing = d.submit(Job::Land(request.clone()));
        let mut decode = Outcome::default();
        decode.take(landing.blocking_recv().expect("an answer"));
        let Some(handoff) = decode.handoff.clone() else { panic!("not admitted: {decode:?}") };
        let prefill = p.submit(Job::Prefill(request.clone(), Some(handoff)));
        let prefill = Outcome::of(prefill);
        while let Some(event) = landing.blocking_recv() {
            decode.take(event);
        }
        Trip { prefill, decode }
    }

    /// The answer: the prefill node's token, then the decode group's.
    pub fn ids(&self) -> Vec<u32> {
        assert!(matches!(self.prefill.end, Some(Event::Pushed { .. })), "{:?}", self.prefill.end);
        let mut ids = self.prefill.ids();
        ids.extend(self.decode.ids());
        ids
    }
}
