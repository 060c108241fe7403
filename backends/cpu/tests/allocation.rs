//! A step that runs again allocates nothing: whatever an operation needs is kept from the steps before. What leaves the
//! step is the caller's: the pending result and the list of drawn tokens.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use backend::draw::Rule;
use backend::{
    Attend, Backend, Batch, DType, DeviceOptions, Draw, GgufBlock, Glu, Group, KSum, KvSpec, KvStore, Linear,
    MatrixView, Moe, Out, Quant, QuantView, Rope, RopeStyle, Routing, Score, SeqId, Step, TensorView,
    WeightSource,
};
use backend_cpu::{CpuAct, CpuBackend, CpuKv, CpuStep, CpuWeight, Level};

/// The system's allocator, counted.
struct Counted;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

const HIDDEN: usize = 256;
const EXPERTS: usize = 4;
const VOCABULARY: usize = 512;

/// A layer of attention and a mixture of experts with a shared one.
struct Model {
    table: CpuWeight,
    norm: CpuWeight,
    qkv: CpuWeight,
    o: CpuWeight,
    router: CpuWeight,
    gate_up: CpuWeight,
    down: CpuWeight,
    shared: (CpuWeight, CpuWeight),
    rope: Rope,
    routing: Routing,
}

fn plain<T>(rows: usize, cols: usize, f: impl FnOnce(TensorView<'_>) -> T) -> T {
    let bytes: Vec<u8> = (0..rows * cols)
        .flat_map(|at| half::bf16::from_f32(((at * 37 % 101) as f32 - 50.0) * 0.002).to_le_bytes())
        .collect();
    let row_stride_bytes = 2 * cols;
    f(TensorView { name: "plain", dtype: DType::BF16, rows, cols, row_stride_bytes, bytes: &bytes })
}

fn coded<T>(block: GgufBlock, rows: usize, cols: usize, f: impl FnOnce(QuantView<'_>) -> T) -> T {
    let format = Quant::Gguf(block);
    // Codes whose halves are small numbers.
    let bytes: Vec<u8> = (0..rows * format.code_bytes(cols)).map(|at| (at * 37 % 251) as u8 & 0x1f).collect();
    f(QuantView {
        name: "coded",
        format,
        rows,
        cols,
        row_stride_bytes: format.code_bytes(cols),
        bytes: &bytes,
        scales: None,
        biases: None,
        origin: (0, 0),
    })
}

fn linear(part: MatrixView<'_>) -> Linear<'_> {
    Linear { parts: vec![part], bias: None, sum: KSum::Ascending }
}

impl Model {
    fn load(backend: &mut CpuBackend) -> Self {
        let table = plain(VOCABULARY, HIDDEN, |view| backend.load(&WeightSource::Embedding(view.into())));
        let norm = plain(1, HIDDEN, |view| backend.load(&WeightSource::Norm(view)));
        let router = plain(EXPERTS, HIDDEN, |view| backend.load(&WeightSource::Linear(linear(view.into()))));
        let mut product = |block, rows, cols| {
            coded(block, rows, cols, |view| backend.load(&WeightSource::Linear(linear(view.into()))).unwrap())
        };
        let (qkv, o) = (product(GgufBlock::Q4K, 768, HIDDEN), product(GgufBlock::Q8_0, HIDDEN, HIDDEN));
        let shared = (product(GgufBlock::Q4K, 512, HIDDEN), product(GgufBlock::Q6K, HIDDEN, 256));
        let mut experts = |rows, cols| {
            coded(GgufBlock::Q4K, rows, cols, |view| {
                let all = vec![linear(view.into()); EXPERTS];
                backend.load(&WeightSource::Experts(&all.as_slice())).unwrap()
            })
        };
        let (gate_up, down) = (experts(512, HIDDEN), experts(HIDDEN, 256));
        let inv_freq = (0..32).map(|i| 10_000f32.powf(-(i as f32) / 32.0)).collect();
        Model {
            table: table.unwrap(),
            norm: norm.unwrap(),
            qkv,
            o,
            router: router.unwrap(),
            gate_up,
            down,
            shared,
            rope: Rope { inv_freq, factor: 1.0, style: RopeStyle::HalfSplit },
            routing: Routing {
                experts: EXPERTS,
                top_k: 2,
                score: Score::Softmax,
                groups: None,
                normalise: true,
                normalise_eps: 0.0,
                scale: 1.0,
            },
        }
    }

    fn forward(&self, step: &mut CpuStep<'_>, last: &[u32]) -> CpuAct {
        let attend = Attend {
            heads: 4,
            kv_heads: 4,
            head_dim: 64,
            scale: 0.125,
            rope: &self.rope,
            qk_norm: None,
            window: None,
            sinks: None,
        };
        let moe = Moe {
            router: &self.router,
            routing: &self.routing,
            choice_bias: None,
            gate_up: &self.gate_up,
            down: &self.down,
            shared: Some((&self.shared.0, &self.shared.1)),
            glu: Glu::Silu,
        };
        let x = step.embed(&self.table);
        let normed = step.norm(&x, &self.norm, 1e-6);
        let qkv = step.linear(&normed, &self.qkv);
        let attended = step.attend(0, qkv, &attend);
        let attended = step.linear(&attended, &self.o);
        let x = step.add(x, attended);
        let mixed = step.moe(&x, &moe);
        let x = step.add(x, mixed);
        step.rows(x, last)
    }
}

/// Allocations of the step's operations, and of what it hands out.
fn step(backend: &mut CpuBackend, kv: &mut CpuKv, model: &Model, batch: &Batch) -> (usize, usize) {
    let (last, draws) = (batch.last_rows(), vec![Draw::Token(Rule::GREEDY); batch.runs.len()]);
    let before = COUNT.load(Relaxed);
    let mut step = backend.step(kv, batch);
    let out = model.forward(&mut step, &last);
    let inside = COUNT.load(Relaxed);
    let drawn = step.submit(Out::Draw(out, draws)).wait();
    let handed_out = COUNT.load(Relaxed) - inside;
    drawn.unwrap();
    (inside - before, handed_out)
}

#[test]
fn a_step_allocates_nothing() {
    for level in Level::ALL.into_iter().filter(|level| level.available()) {
        let options = DeviceOptions { threads: 2, ..DeviceOptions::default() };
        let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
        let model = Model::load(&mut backend);
        let mut kv = backend.kv(&KvSpec::gqa(1, 4, 0..4, 64, DType::BF16), 4 << 20).unwrap();
        (1..=2).for_each(|seq| kv.open(SeqId(seq), 1200).unwrap());
        // A long context, so that spans go to several threads, beside the end of a prompt; then both decode.
        let ids: Vec<u32> = (0..1100).map(|at| at % VOCABULARY as u32).collect();
        let mut mixed = Batch::default();
        mixed.push(SeqId(1), 0, &ids);
        step(&mut backend, &mut kv, &model, &mixed);
        for round in 0..8u32 {
            let mut mixed = Batch::default();
            mixed.push(SeqId(1), 1100 + round, &[7]);
            mixed.push(SeqId(2), 40 * round, &ids[..40]);
            let counts = step(&mut backend, &mut kv, &model, &mixed);
            // A thread that comes late to a job meets its own scratch for the first time: not in every round.
            if round >= 4 {
                assert_eq!(counts.0, 0, "{level}, chunk {round}: allocations in a step");
            }
        }
        for round in 0..6u32 {
            let mut decode = Batch::default();
            decode.push_drawn(SeqId(1), 1108 + round, 0);
            decode.push_drawn(SeqId(2), 320 + round, 1);
            let (inside, handed_out) = step(&mut backend, &mut kv, &model, &decode);
            if round >= 2 {
                assert_eq!(inside, 0, "{level}, token {round}: allocations in a step");
                assert!(
                    handed_out <= 2,
                    "{level}, token {round}: {handed_out} allocations for what it hands out"
                );
            }
        }
    }
}
