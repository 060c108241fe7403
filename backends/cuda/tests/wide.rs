//! Attention and experts by the products of a GPU's generation, on emulated devices that have them, and by those of every generation:
//! beside references. The emulator does these products as late as somebody waits for them, from the descriptors that the kernels made,
//! and checks that everything they read is there and shown to them.

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
const HOPPER: usize = 5;
/// Large, with tensor memory.
const BLACKWELL: usize = 9;

/// Kernels run one at a time in a process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(device: usize, attention: PromptAttention, block_tokens: u32) -> DeviceOptions {
    let cuda = CudaOptions { attention, ..CudaOptions::default() };
    DeviceOptions { dtype: DType::BF16, device, block_tokens, cuda, ..DeviceOptions::default() }
}

/// `runs`, of each sequence: tokens that are there, and tokens of this step.
#[derive(Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    window: Option<u32>,
    sinks: bool,
    block_tokens: u32,
    runs: Vec<(u32, u32)>,
}

/// A number of all tokens' q, k and v.
fn number(at: usize) -> bf16 {
    bf16::from_f32(((at * 7919 % 4001) as f32 / 1000.0 - 2.0) * (1 + at % 3) as f32)
}

/// The angle by which pair `pair` is turned from one position to the next.
fn frequency(pair: usize) -> f32 {
    1.0 / (1 + pair * 3) as f32
}

/// The sink of a head, where there are any: among its scores, far above and far below.
fn sink(head: usize) -> f32 {
    [12.5, 200.0, 7.0, -200.0, 18.0, -3.0][head % 6]
}

/// What the second step is to answer, in f64 of what the cache has in bf16.
fn reference(case: &Case) -> Vec<f32> {
    let Case { heads, kv_heads, dim, window, .. } = *case;
    let width = (heads + 2 * kv_heads) * dim;
    let turned = |token: u32, position: u32, head: usize| -> Vec<f64> {
        let at = |i: usize| number(token as usize * width + head * dim + i).to_f32();
        let pair = |i: usize| {
            let (sin, cos) = (position as f32 * frequency(i % (dim / 2))).sin_cos();
            let (low, high) = (at(i % (dim / 2)), at(i % (dim / 2) + dim / 2));
            if i < dim / 2 { low * cos - high * sin } else { high * cos + low * sin }
        };
        (0..dim).map(|i| f64::from(bf16::from_f32(pair(i)))).collect()
    };
    let (mut answers, mut first) = (Vec::new(), 0);
    for (before, now) in &case.runs {
        let keys: Vec<Vec<Vec<f64>>> = (0..kv_heads)
            .map(|kv| (0..before + now).map(|p| turned(first + p, p, heads + kv)).collect())
            .collect();
        for position in *before..before + now {
            let seen = window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
            for head in 0..heads {
                let (q, kv) = (turned(first + position, position, head), head * kv_heads / heads);
                let score = |p: u32| {
                    let products = q.iter().zip(&keys[kv][p as usize]).map(|(q, k)| q * k);
                    products.sum::<f64>() * (dim as f64).powf(-0.5)
                };
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let sink = if case.sinks { f64::from(sink(head)) } else { f64::NEG_INFINITY };
                let peak = scores.iter().fold(sink, |most, x| most.max(*x));
                let weights: Vec<f64> = scores.iter().map(|x| (x - peak).exp()).collect();
                let total = weights.iter().sum::<f64>() + (sink - peak).exp();
                answers.extend((0..dim).map(|i| {
                    let value = |p: u32| {
                        f64::from(number((first + p) as usize * width + (heads + kv_heads + kv) * dim + i))
                    };
                    let sum: f64 =
                        weights.iter().zip(seen.clone()).map(|(weight, p)| weight * value(p)).sum();
                    (sum / total) as f32
                }));
            }
        }
        first += before + now;
    }
    answers
}

/// The largest difference, as a part of the largest value. Not a number where one is.
fn apart(want: &[f32], got: &[f32]) -> f32 {
    assert_eq!(want.len(), got.len());
    let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    let differences = want.iter().zip(got).map(|(x, y)| (x - y).abs() / largest);
    differences.fold(0f32, |most, x| if x > most || x.is_nan() { x } else { most })
}

/// Answers of the second step.
fn attended(device: usize, case: &Case, attention: PromptAttention) -> (String, Vec<f32>) {
    let Case { heads, kv_heads, dim, .. } = *case;
    let options = options(device, attention, case.block_tokens);
    let mut backend = EmulatedBackend::open(&options, Group::alone()).unwrap();
    let width = (heads + 2 * kv_heads) * dim;
    let rows: u32 = case.runs.iter().map(|(before, now)| before + now).sum();
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
    let bytes: Vec<u8> = (0..heads).flat_map(|head| sink(head).to_le_bytes()).collect();
    let (row_stride_bytes, bytes) = (bytes.len(), &bytes[..]);
    let sinks = TensorView { name: "test", dtype: DType::F32, rows: 1, cols: heads, row_stride_bytes, bytes };
    let sinks = backend.load(&WeightSource::Exact(sinks)).unwrap();
    let spec = KvSpec::gqa(1, kv_heads, 0..kv_heads, dim, DType::BF16);
    let room = (rows as usize + case.runs.len() * case.block_tokens as usize) * spec.token_bytes();
    let mut kv = backend.kv(&spec, room as u64).unwrap();
    let inv_freq: Vec<f32> = (0..dim / 2).map(frequency).collect();
    let rope = Rope { inv_freq: inv_freq.into(), factor: 1.0, style: RopeStyle::HalfSplit };
    let mut got = Vec::new();
    for now in [false, true] {
        let (mut batch, mut first) = (Batch::default(), 0);
        for (seq, (before, after)) in (0..).map(SeqId).zip(&case.runs) {
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
            sinks: case.sinks.then_some(&sinks),
        };
        let act = step.attend(0, qkv, &attend);
        let Output::Logits(logits) = step.submit(Out::Logits(act)).wait().unwrap() else {
            panic!("no result of attention")
        };
        got = logits;
    }
    (backend.caps().device, got)
}

/// Shapes that matter, many tiles of keys, so that places for them and the parities of barriers come round and round, and shapes drawn
/// by chance; with sinks and without.
fn cases() -> Vec<Case> {
    let case = |heads, kv_heads, dim, window, sinks, block_tokens, runs: &[(u32, u32)]| Case {
        heads,
        kv_heads,
        dim,
        window,
        sinks,
        block_tokens,
        runs: runs.to_vec(),
    };
    let mut cases = vec![
        // Several tiles of queries and keys, pages as a cluster has them.
        case(4, 2, 64, None, false, 32, &[(0, 300)]),
        // What was there before; sequences of unlike lengths; one token; small pages.
        case(6, 2, 128, None, true, 16, &[(140, 60), (0, 17), (5, 1), (200, 128)]),
        // Windows that begin within a tile and leave tiles out; heads whose columns are no tile.
        case(8, 1, 80, Some(100), true, 32, &[(150, 90), (0, 130)]),
        case(4, 4, 96, Some(7), false, 64, &[(129, 140)]),
        // A group of heads that does not divide a tile.
        case(5, 1, 128, None, false, 32, &[(0, 257)]),
        // As gpt-oss, with a token and guesses behind many.
        case(8, 1, 64, Some(128), true, 32, &[(300, 40), (550, 1), (600, 4)]),
        case(1, 1, 64, None, false, 32, &[(1500, 40)]),
    ];
    let mut state = 20u32;
    let mut below = |end: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % end
    };
    for at in 0..4 {
        let kv_heads = 1 + below(2) as usize;
        cases.push(Case {
            heads: kv_heads * (1 + below(7) as usize),
            kv_heads,
            dim: 8 * (1 + below(16) as usize),
            window: [None, Some(1 + below(300))][below(2) as usize],
            sinks: at % 2 == 0,
            block_tokens: 16 << below(3),
            runs: (0..1 + below(3)).map(|_| (below(400), 1 + below(140))).collect(),
        });
    }
    cases
}

/// Whether `device` attends prompts as the reference does, by `products` or without those of a generation.
fn attends(device: usize, attention: PromptAttention, products: Option<&str>) {
    let _alone = alone();
    for case in cases() {
        let (device, got) = attended(device, &case, attention);
        let used = ["wgmma", "tcgen05"].into_iter().find(|products| device.contains(products));
        assert_eq!(used, products, "{device}");
        let worst = apart(&reference(&case), &got);
        assert!(worst < 1e-2, "{worst} of the largest value: {case:?}");
    }
}

#[test]
fn tiles_attend_as_a_reference_does() {
    attends(HOPPER, PromptAttention::Mma, None);
}

#[test]
fn warp_groups_attend_as_a_reference_does() {
    attends(HOPPER, PromptAttention::Auto, Some("wgmma"));
}

#[test]
fn tensor_memory_attends_as_a_reference_does() {
    attends(BLACKWELL, PromptAttention::Auto, Some("tcgen05"));
}

/// Answers of a mixture of experts with biases and a clamped gate (gpt-oss), each of which gets many rows.
fn mixed(options: &DeviceOptions) -> Vec<f32> {
    const ROWS: usize = 210;
    const HIDDEN: usize = 136;
    const INNER: usize = 72;
    const EXPERTS: usize = 3;
    let mut backend = EmulatedBackend::open(options, Group::alone()).unwrap();
    let numbers = |seed: usize, count: usize| -> Vec<u8> {
        let number = |at: usize| bf16::from_f32((at * 7919 % 4001) as f32 / 4000.0 - 0.5);
        (0..count).flat_map(|at| number(at + seed * 31).to_le_bytes()).collect()
    };
    fn view(bytes: &[u8], rows: usize) -> TensorView<'_> {
        let cols = bytes.len() / 2 / rows;
        TensorView { name: "test", dtype: DType::BF16, rows, cols, row_stride_bytes: cols * 2, bytes }
    }
    /// Biases stand behind the weights.
    fn linear(bytes: &[u8], rows: usize) -> Linear<'_> {
        let (weights, bias) = bytes.split_at(bytes.len() - rows * 2);
        Linear {
            parts: vec![view(weights, rows).into()],
            bias: Some(vec![view(bias, 1)]),
            sum: KSum::Ascending,
        }
    }
    let table = numbers(1, ROWS * HIDDEN);
    let table = backend.load(&WeightSource::Embedding(view(&table, ROWS).into())).unwrap();
    let router = numbers(2, EXPERTS * (HIDDEN + 1));
    let router = backend.load(&WeightSource::Linear(linear(&router, EXPERTS))).unwrap();
    let mut experts = |seed: usize, outputs: usize, inputs: usize| {
        let bytes: Vec<_> = (0..EXPERTS).map(|at| numbers(seed + at, outputs * (inputs + 1))).collect();
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
    let spec = KvSpec::gqa(1, 1, 0..1, 8, options.dtype);
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
        glu: Glu::Clamped { limit: 1.5, slope: 1.702 },
    };
    let x = step.moe(&x, &moe);
    match step.submit(Out::Logits(x)).wait() {
        Ok(Output::Logits(logits)) => logits,
        Ok(_) => panic!("no result of experts"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn many_rows_are_multiplied_as_in_f32() {
    let _alone = alone();
    let plain = DeviceOptions { dtype: DType::F32, ..options(HOPPER, PromptAttention::Mma, 32) };
    let want = mixed(&plain);
    for attention in [PromptAttention::Auto, PromptAttention::Mma] {
        let worst = apart(&want, &mixed(&options(HOPPER, attention, 32)));
        assert!(worst < 1e-2, "{worst} of the largest value, {attention:?}");
    }
}

/// Latent attention's prompts too, whose keys are longer than its values, and products with every format of weights.
fn conforms(device: usize, parts: &[&str]) {
    let _alone = alone();
    let open = |options: &DeviceOptions, group: Group| {
        EmulatedBackend::open(&DeviceOptions { device, ..options.clone() }, group)
    };
    let tolerance = Tolerance { f32: 3e-6, bf16: 2e-2 };
    let dtypes = &[DType::BF16];
    let suite = Suite { open: &open, tolerance, dtypes, group: None, quants: QUANTS, plain_experts: dtypes };
    for (name, case) in suite.cases() {
        if parts.iter().any(|part| name.contains(part)) {
            println!("conformance: {name}");
            case(&suite, DType::BF16);
        }
    }
}

#[test]
fn a_device_with_warp_groups_conforms() {
    conforms(HOPPER, &["head sizes", "ragged", "latent attention, long", "quantised, products"]);
}

#[test]
fn a_device_with_tensor_memory_conforms() {
    conforms(BLACKWELL, &["head sizes", "ragged", "latent attention, long"]);
}
