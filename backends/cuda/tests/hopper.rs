//! Attention and experts by the products of warp groups, on an emulated device that has them: beside the kernels of every generation, which the
//! conformance suite compares with a reference. The emulator does these products as late as somebody waits for them, from
//! the descriptors that the kernels made, and checks that everything they read is there and shown to them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{
    Attend, Backend, Batch, CudaOptions, DType, DeviceOptions, Glu, Group, KSum, KvSpec, KvStore, Linear,
    Moe, Out, Output, PromptAttention, Rope, RopeStyle, Routing, Score, SeqId, Step, TensorView,
    WeightSource,
};
use backend_cuda::EmulatedBackend;
use half::bf16;

/// Large, with warp groups.
const DEVICE: usize = 5;

/// Kernels run one at a time in a process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(attention: PromptAttention, block_tokens: u32) -> DeviceOptions {
    let cuda = CudaOptions { attention, ..CudaOptions::default() };
    DeviceOptions { dtype: DType::BF16, device: DEVICE, block_tokens, cuda, ..DeviceOptions::default() }
}

/// Of each sequence: tokens that are there, and tokens of this step.
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    window: Option<u32>,
    block_tokens: u32,
    runs: &'static [(u32, u32)],
}

/// Answers of the second step.
fn attended(case: &Case, attention: PromptAttention) -> (String, Vec<f32>) {
    let Case { heads, kv_heads, dim, .. } = *case;
    let mut backend = EmulatedBackend::open(&options(attention, case.block_tokens), Group::alone()).unwrap();
    let width = (heads + 2 * kv_heads) * dim;
    let rows: u32 = case.runs.iter().map(|(before, now)| before + now).sum();
    let number = |at: usize| bf16::from_f32(((at * 7919 % 4001) as f32 / 1000.0 - 2.0) * (1 + at % 3) as f32);
    let bytes: Vec<u8> = (0..rows as usize * width).flat_map(|at| number(at).to_le_bytes()).collect();
    let table = TensorView {
        name: "test",
        dtype: DType::BF16,
        rows: rows as usize,
        cols: width,
        row_stride_bytes: width * 2,
        bytes: &bytes,
    };
    let table = backend.load(&WeightSource::Embedding(table.into())).unwrap();
    let spec = KvSpec::gqa(1, kv_heads, 0..kv_heads, dim, DType::BF16);
    let room = (rows as usize + case.runs.len() * case.block_tokens as usize) * spec.token_bytes();
    let mut kv = backend.kv(&spec, room as u64).unwrap();
    let inv_freq: Vec<f32> = (0..dim / 2).map(|at| 1.0 / (1 + at * 3) as f32).collect();
    let rope = Rope { inv_freq: inv_freq.into(), factor: 1.0, style: RopeStyle::HalfSplit };
    let mut got = Vec::new();
    for now in [false, true] {
        let (mut batch, mut first) = (Batch::default(), 0);
        for (seq, (before, after)) in (0..).map(SeqId).zip(case.runs) {
            if !now {
                kv.open(seq, before + after).unwrap();
            }
            let (from, count) = if now { (*before, *after) } else { (0, *before) };
            let ids: Vec<u32> = (first + from..first + from + count).collect();
            if count > 0 {
                batch.push(seq, from, &ids);
            }
            first += before + after;
        }
        if batch.rows() == 0 {
            continue;
        }
        let mut step = backend.step(&mut kv, &batch);
        let qkv = step.embed(&table);
        let attend = Attend {
            heads,
            kv_heads,
            head_dim: dim,
            scale: (dim as f32).powf(-0.5),
            rope: &rope,
            qk_norm: None,
            window: case.window,
        };
        let act = step.attend(0, qkv, &attend);
        let Output::Logits(logits) = step.submit(Out::Logits(act)).wait().unwrap() else {
            panic!("no result of attention")
        };
        got = logits;
    }
    (backend.caps().device, got)
}

#[test]
fn warp_groups_attend_as_the_other_kernels_do() {
    let _alone = alone();
    let case = |heads, kv_heads, dim, window, block_tokens, runs| Case {
        heads,
        kv_heads,
        dim,
        window,
        block_tokens,
        runs,
    };
    for case in [
        // Several tiles of queries and keys, pages as a cluster has them.
        case(4, 2, 64, None, 32, &[(0, 300)]),
        // What was there before; sequences of unlike lengths; one token; small pages.
        case(6, 2, 128, None, 16, &[(140, 60), (0, 17), (5, 1), (200, 128)]),
        // Windows that begin within a tile and leave tiles out; heads whose columns are no tile.
        case(8, 1, 80, Some(100), 32, &[(150, 90), (0, 130)]),
        case(4, 4, 96, Some(7), 64, &[(129, 140)]),
        // A group of heads that does not divide a tile.
        case(5, 1, 128, None, 32, &[(0, 257)]),
    ] {
        let (device, got) = attended(&case, PromptAttention::Auto);
        assert!(device.contains("wgmma"), "{device}");
        let (device, want) = attended(&case, PromptAttention::Mma);
        assert!(!device.contains("wgmma"), "{device}");
        let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        let worst = want.iter().zip(&got).map(|(x, y)| (x - y).abs() / largest);
        let worst = worst.fold(0f32, |most, x| if x > most || x.is_nan() { x } else { most });
        let Case { heads, kv_heads, dim, window, runs, .. } = case;
        assert!(
            worst < 1e-2,
            "{worst} of the largest value: {heads} on {kv_heads} of {dim}, {window:?}, {runs:?}"
        );
        assert_eq!(want.len(), got.len());
    }
}

/// Answers of a mixture of experts, each of which gets many rows.
fn mixed(attention: PromptAttention) -> Vec<f32> {
    const ROWS: usize = 210;
    const HIDDEN: usize = 136;
    const INNER: usize = 72;
    const EXPERTS: usize = 3;
    let mut backend = EmulatedBackend::open(&options(attention, 32), Group::alone()).unwrap();
    let numbers = |seed: usize, count: usize| -> Vec<u8> {
        let number = |at: usize| bf16::from_f32((at * 7919 % 4001) as f32 / 4000.0 - 0.5);
        (0..count).flat_map(|at| number(at + seed * 31).to_le_bytes()).collect()
    };
    fn view(bytes: &[u8], rows: usize) -> TensorView<'_> {
        let cols = bytes.len() / 2 / rows;
        TensorView { name: "test", dtype: DType::BF16, rows, cols, row_stride_bytes: cols * 2, bytes }
    }
    fn linear(bytes: &[u8], rows: usize) -> Linear<'_> {
        Linear { parts: vec![view(bytes, rows).into()], bias: None, sum: KSum::Ascending }
    }
    let table = numbers(1, ROWS * HIDDEN);
    let table = backend.load(&WeightSource::Embedding(view(&table, ROWS).into())).unwrap();
    let router = numbers(2, EXPERTS * HIDDEN);
    let router = backend.load(&WeightSource::Linear(linear(&router, EXPERTS))).unwrap();
    let mut experts = |seed: usize, outputs: usize, inputs: usize| {
        let bytes: Vec<_> = (0..EXPERTS).map(|at| numbers(seed + at, outputs * inputs)).collect();
        let experts: Vec<Linear<'_>> = bytes.iter().map(|bytes| linear(bytes, outputs)).collect();
        backend.load(&WeightSource::Experts(&&experts[..])).unwrap()
    };
    let (gate_up, down) = (experts(10, 2 * INNER, HIDDEN), experts(20, HIDDEN, INNER));
    let routing = Routing {
        experts: EXPERTS,
        top_k: 2,
        score: Score::Softmax,
        groups: None,
        normalise: true,
        normalise_eps: 0.0,
        scale: 1.0,
    };
    let spec = KvSpec::gqa(1, 1, 0..1, 8, DType::BF16);
    let mut kv = backend.kv(&spec, 32 * spec.token_bytes() as u64).unwrap();
    let mut batch = Batch::default();
    batch.push(SeqId(1), 0, &(0..ROWS as u32).collect::<Vec<_>>());
    let mut step = backend.step(&mut kv, &batch);
    let x = step.embed(&table);
    let moe = Moe {
        router: &router,
        routing: &routing,
        choice_bias: None,
        gate_up: &gate_up,
        down: &down,
        shared: None,
        glu: Glu::Silu,
    };
    let x = step.moe(&x, &moe);
    match step.submit(Out::Logits(x)).wait() {
        Ok(Output::Logits(logits)) => logits,
        Ok(_) => panic!("no result of experts"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn warp_groups_multiply_as_the_other_kernels_do() {
    let _alone = alone();
    let (got, want) = (mixed(PromptAttention::Auto), mixed(PromptAttention::Mma));
    let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    let worst = want.iter().zip(&got).map(|(x, y)| (x - y).abs() / largest);
    let worst = worst.fold(0f32, |most, x| if x > most || x.is_nan() { x } else { most });
    assert!(want.len() == got.len() && worst < 1e-2, "{worst} of the largest value");
}

/// Latent attention's prompts too, whose keys are longer than its values, and products with every format of weights.
#[test]
fn a_device_with_warp_groups_conforms() {
    let _alone = alone();
    let open = |options: &DeviceOptions, group: Group| {
        EmulatedBackend::open(&DeviceOptions { device: DEVICE, ..options.clone() }, group)
    };
    let tolerance = Tolerance { f32: 3e-6, bf16: 2e-2 };
    let dtypes = &[DType::BF16];
    let suite = Suite { open: &open, tolerance, dtypes, group: None, quants: QUANTS, plain_experts: dtypes };
    for (name, case) in suite.cases() {
        if ["head sizes", "ragged", "latent attention, long", "quantised, products"]
            .iter()
            .any(|part| name.contains(part))
        {
            println!("conformance: {name}");
            case(&suite, DType::BF16);
        }
    }
}
