//! Products of FP8 weights with activations in FP8, on the emulated device: beside a reference that rounds as they do, and
//! beside the exact products.

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::{
    Backend, BackendError, Batch, CudaOptions, DType, DeviceOptions, Fp8Activations, Glu, Group, KSum,
    KvSpec, Linear, MatrixView, Moe, Out, Output, Quant, QuantView, Routing, Score, SeqId, Step, TensorView,
    WeightSource,
};
use backend_cuda::EmulatedBackend;
use half::bf16;

/// Inputs that share a scale.
const CHUNK: usize = 128;
/// A device that multiplies FP8, and one that does not.
const LARGE: usize = 1;
const SMALL: usize = 0;

/// Kernels run one at a time in a process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(device: usize, dtype: DType, activations: Fp8Activations) -> Result<EmulatedBackend, BackendError> {
    let cuda = CudaOptions { activations, ..CudaOptions::default() };
    EmulatedBackend::open(&DeviceOptions { dtype, device, cuda, ..DeviceOptions::default() }, Group::alone())
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 20
    }

    /// From -1 to 1.
    fn signed(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 43) as f32 - 1.0
    }
}

/// Random bf16 numbers, rows of unlike size.
fn numbers(seed: u64, rows: usize, cols: usize) -> Vec<bf16> {
    let mut random = Random(seed * 0x9e37_79b9 + 1);
    let mut row = |at: usize| (0..cols).map(|_| random.signed() * (1 + at % 7) as f32).collect::<Vec<_>>();
    (0..rows).flat_map(|at| row(at).into_iter().map(bf16::from_f32).collect::<Vec<_>>()).collect()
}

fn plain(bytes: &[u8], rows: usize) -> TensorView<'_> {
    let row_stride_bytes = bytes.len() / rows;
    TensorView { name: "test", dtype: DType::BF16, rows, cols: row_stride_bytes / 2, row_stride_bytes, bytes }
}

fn bytes(numbers: &[bf16]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// What a code means.
fn meaning(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = if exponent == 0 { fraction / 512.0 } else { (8.0 + fraction) * 2f64.powi(exponent - 10) };
    if code & 128 == 0 { size } else { -size }
}

/// The number of E4M3 that is nearest; of two the one with the even code.
fn nearest(x: f64) -> f64 {
    let distance = |code: u8| ((meaning(code) - x.abs()).abs(), code & 1);
    let best = (0..127).min_by(|a, b| distance(*a).partial_cmp(&distance(*b)).unwrap()).unwrap();
    meaning(best).copysign(x)
}

/// An FP8 matrix in blocks of 128 x 128.
struct Coded {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    values: Vec<f64>,
}

impl Coded {
    fn random(seed: u64, rows: usize, cols: usize) -> Self {
        let mut random = Random(seed * 0x517c_c1b7 + 1);
        let across = cols.div_ceil(CHUNK);
        let scales: Vec<f32> =
            (0..rows.div_ceil(CHUNK) * across).map(|_| 0.003 * (1.5 + random.signed())).collect();
        // All codes but not-a-number.
        let codes: Vec<u8> =
            (0..rows * cols).map(|_| (random.next() % 127 + (random.next() % 2) * 128) as u8).collect();
        let value = |at: usize| {
            meaning(codes[at]) * f64::from(scales[at / cols / CHUNK * across + at % cols / CHUNK])
        };
        let values = (0..rows * cols).map(value).collect();
        Coded { rows, cols, values, scales: scales.iter().flat_map(|x| x.to_le_bytes()).collect(), codes }
    }

    fn view(&self) -> QuantView<'_> {
        let across = self.cols.div_ceil(CHUNK);
        let scales = TensorView {
            name: "scales",
            dtype: DType::F32,
            rows: self.rows.div_ceil(CHUNK),
            cols: across,
            row_stride_bytes: across * 4,
            bytes: &self.scales,
        };
        QuantView {
            name: "test",
            format: Quant::Fp8 { rows: CHUNK, cols: CHUNK },
            rows: self.rows,
            cols: self.cols,
            row_stride_bytes: self.cols,
            bytes: &self.codes,
            scales: Some(scales),
            biases: None,
            origin: (0, 0),
        }
    }
}

/// The rows of `x` through `body`.
fn step(
    backend: &mut EmulatedBackend,
    x: &[bf16],
    rows: usize,
    body: impl FnOnce(
        &mut <EmulatedBackend as Backend>::Step<'_>,
        <EmulatedBackend as Backend>::Act,
    ) -> <EmulatedBackend as Backend>::Act,
) -> Result<Vec<f32>, BackendError> {
    let table = backend.load(&WeightSource::Embedding(plain(&bytes(x), rows).into()))?;
    let spec = KvSpec::gqa(1, 1, 0..1, 8, DType::BF16);
    let mut kv = backend.kv(&spec, 64 * spec.token_bytes() as u64)?;
    let mut batch = Batch::default();
    (0..rows).for_each(|row| batch.push(SeqId(row as u64), 0, &[row as u32]));
    let mut step = backend.step(&mut kv, &batch);
    let x = step.embed(&table);
    let y = body(&mut step, x);
    match step.submit(Out::Logits(y)).wait()? {
        Output::Logits(logits) => Ok(logits),
        _ => panic!("no logits"),
    }
}

fn product(
    activations: Fp8Activations,
    x: &[bf16],
    rows: usize,
    parts: Vec<MatrixView<'_>>,
    bias: Option<Vec<TensorView<'_>>>,
) -> Vec<f32> {
    let mut backend = open(LARGE, DType::BF16, activations).unwrap();
    let linear = Linear { parts, bias, sum: KSum::Ascending };
    let weight = backend.load(&WeightSource::Linear(linear)).unwrap();
    step(&mut backend, x, rows, |step, x| step.linear(&x, &weight)).unwrap()
}

/// Products of every row with every output, activations rounded where `rounds`.
fn expected(x: &[bf16], weights: &[f64], cols: usize, rounds: bool) -> Vec<f64> {
    let row = |x: &[bf16]| -> Vec<f64> {
        let chunk = |x: &[bf16]| -> Vec<f64> {
            let most = x.iter().fold(0f32, |most, x| most.max(x.to_f32().abs()));
            // Divided in f32: what lies between two codes is decided by its rounding.
            let scale = if most == 0.0 { 1.0 } else { most / 448.0 };
            let round = |x: f32| nearest(f64::from(x / scale)) * f64::from(scale);
            x.iter().map(|x| if rounds { round(x.to_f32()) } else { x.to_f64() }).collect()
        };
        x.chunks(CHUNK).flat_map(chunk).collect()
    };
    let rows: Vec<Vec<f64>> = x.chunks(cols).map(row).collect();
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    rows.iter().flat_map(|x| weights.chunks(cols).map(move |w| dot(x, w))).collect()
}

fn linear(part: MatrixView<'_>) -> Linear<'_> {
    Linear { parts: vec![part], bias: None, sum: KSum::Ascending }
}

/// The root of the mean square of the difference, as a part of that of `want`.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = square(&mut got.iter().zip(want).map(|(got, want)| f64::from(*got) - want));
    difference / square(&mut want.iter().copied())
}

/// Tiles, outputs and chunks that are not full, more than one of each.
#[test]
fn activations_are_rounded_chunk_by_chunk() {
    let _alone = alone();
    let (rows, cols, outputs) = (150, 272, 200);
    let mut x = numbers(1, rows, cols);
    // A chunk of nothing has no scale.
    x[..CHUNK].fill(bf16::ZERO);
    let w = Coded::random(2, outputs, cols);
    let got = product(Fp8Activations::Fp8, &x, rows, vec![w.view().into()], None);
    let want = expected(&x, &w.values, cols, true);
    // f32 sums, nothing else between them.
    assert!(distance(&got, &want) < 2e-6, "{}", distance(&got, &want));
    let exact = expected(&x, &w.values, cols, false);
    let loss = distance(&got, &exact);
    assert!((0.01..0.04).contains(&loss), "{loss} of what exact products give");
}

/// What is not FP8, or too few rows, or ends within a scale, is multiplied as ever: its bits say so.
#[test]
fn everything_else_is_multiplied_exactly() {
    let _alone = alone();
    let (rows, cols) = (70, 256);
    let x = numbers(3, rows, cols);
    let (w, plain_bytes) = (Coded::random(4, 140, cols), bytes(&numbers(5, 9, cols)));
    let bias = bytes(&numbers(6, 1, 149));
    let both = |activations| {
        let parts = vec![w.view().into(), plain(&plain_bytes, 9).into()];
        let biases = Some(vec![plain(&bias[..280], 1), plain(&bias[280..], 1)]);
        product(activations, &x, rows, parts, biases)
    };
    let (exact, rounded) = (both(Fp8Activations::Exact), both(Fp8Activations::Fp8));
    for (exact, rounded) in exact.chunks(149).zip(rounded.chunks(149)) {
        assert_ne!(exact[..140], rounded[..140], "FP8 weights");
        assert_eq!(exact[140..], rounded[140..], "weights of the same product that are not FP8");
    }
    let same = |rows: usize, cut: std::ops::Range<usize>| {
        let x: Vec<bf16> = x.chunks(cols).take(rows).flat_map(|row| row[cut.clone()].to_vec()).collect();
        let part = w.view().cut(5..140, cut.clone()).unwrap();
        let run = |activations| product(activations, &x, rows, vec![part.into()], None);
        run(Fp8Activations::Exact) == run(Fp8Activations::Fp8)
    };
    assert!(same(64, 0..256), "few rows");
    assert!(same(rows, 64..256), "chunks of two scales");
    assert!(same(rows, 0..120), "inputs that are no sixteens");
    assert!(!same(rows, 128..256), "a rank's part, its outputs from within a block on");
}

/// Experts: rows are gathered for gate and up, and lie in order for down.
#[test]
fn experts_take_rounded_rows() {
    let _alone = alone();
    let (rows, hidden, inner) = (170, 128, 144);
    let x = numbers(7, rows, hidden);
    let router = bytes(&numbers(8, 3, hidden));
    let coded = |seed: u64, outputs, inputs| -> Vec<Coded> {
        (0..3).map(|expert| Coded::random(seed + expert, outputs, inputs)).collect()
    };
    let (gate_up, down) = (coded(10, 2 * inner, hidden), coded(20, hidden, inner));
    let routing = Routing {
        experts: 3,
        top_k: 2,
        score: Score::Softmax,
        groups: None,
        normalise: true,
        normalise_eps: 0.0,
        scale: 1.0,
    };
    let run = |activations| {
        let mut backend = open(LARGE, DType::BF16, activations).unwrap();
        let router = backend.load(&WeightSource::Linear(linear(plain(&router, 3).into()))).unwrap();
        let mut load = |experts: &[Coded]| {
            let linears: Vec<Linear<'_>> =
                experts.iter().map(|expert| linear(expert.view().into())).collect();
            backend.load(&WeightSource::Experts(&&linears[..])).unwrap()
        };
        let (gate_up, down) = (load(&gate_up), load(&down));
        let moe = |step: &mut <EmulatedBackend as Backend>::Step<'_>, x| {
            let moe = Moe {
                router: &router,
                routing: &routing,
                choice_bias: None,
                gate_up: &gate_up,
                down: &down,
                shared: None,
                glu: Glu::Silu,
            };
            step.moe(&x, &moe)
        };
        step(&mut backend, &x, rows, moe).unwrap()
    };
    let exact: Vec<f64> = run(Fp8Activations::Exact).into_iter().map(f64::from).collect();
    let loss = distance(&run(Fp8Activations::Fp8), &exact);
    assert!((0.01..0.08).contains(&loss), "{loss} of what exact products give");
}

#[test]
fn a_device_or_a_dtype_without_fp8_refuses() {
    let said = |device, dtype| open(device, dtype, Fp8Activations::Fp8).err().map(|error| error.to_string());
    assert!(said(SMALL, DType::BF16).is_some_and(|said| said.contains("Ada generation or later")));
    assert!(said(LARGE, DType::F32).is_some_and(|said| said.contains("of bf16 steps, not of f32")));
    assert_eq!(said(LARGE, DType::BF16), None);
}
