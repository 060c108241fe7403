//! Measures, on request, what the kernels reach on this machine:
//! `cargo test --release -p backend-cpu --test speed -- --ignored --nocapture`.

use std::time::Instant;

use backend::{
    Activations, Attend, Backend, Batch, CpuOptions, DType, DeviceOptions, GgufBlock, Glu, Group, KSum,
    KvSpec, KvStore, Linear, Moe, Out, Quant, QuantView, Rope, RopeStyle, Routing, Score, SeqId, Step,
    TensorView, WeightSource,
};
use backend_cpu::{CpuBackend, CpuWeight, Level};

const WIDTH: usize = 4096;

fn weight(backend: &mut CpuBackend, dtype: DType, rows: usize, table: bool) -> CpuWeight {
    // Small whole numbers in every type.
    let one: &[u8] = match dtype {
        DType::F32 => &[0, 0, 0x80, 0x3f],
        DType::F16 => &[0, 0x3c],
        DType::BF16 => &[0x80, 0x3f],
    };
    let bytes = one.repeat(rows * WIDTH);
    let view = TensorView {
        name: "w",
        dtype,
        rows,
        cols: WIDTH,
        row_stride_bytes: WIDTH * dtype.bytes(),
        bytes: &bytes,
    };
    let source = match table {
        true => WeightSource::Embedding(view.into()),
        false => WeightSource::Linear(Linear { parts: vec![view.into()], bias: None, sum: KSum::Ascending }),
    };
    backend.load(&source).unwrap()
}

/// Seconds of the fastest of many short repetitions: others use this machine too.
fn fastest(mut f: impl FnMut()) -> f64 {
    f();
    let (all, mut best) = (Instant::now(), f64::INFINITY);
    while all.elapsed().as_secs_f64() < 0.5 {
        let begun = Instant::now();
        f();
        best = best.min(begun.elapsed().as_secs_f64());
    }
    best
}

/// Few rows: four products in a step, 100 MB of bf16 weights, more than caches hold. Many: one short product.
fn product(level: Level, threads: usize, dtype: DType, rows: usize) {
    let options = DeviceOptions { threads, ..DeviceOptions::default() };
    let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
    let (outputs, count) = if rows <= 16 { (3072, 4) } else { (1024, 1) };
    let weights: Vec<CpuWeight> = (0..count).map(|_| weight(&mut backend, dtype, outputs, false)).collect();
    let table = weight(&mut backend, DType::BF16, rows, true);
    let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, DType::BF16), 1 << 20).unwrap();
    let mut batch = Batch::default();
    (0..rows).for_each(|row| batch.push(SeqId(row as u64), 0, &[row as u32]));
    let seconds = fastest(|| {
        let mut step = backend.step(&mut kv, &batch);
        let x = step.embed(&table);
        for weight in &weights {
            step.linear(&x, weight);
        }
        step.submit(Out::Nothing).wait().unwrap();
    });
    let products = (count * rows * WIDTH * outputs) as f64;
    let bytes = (count * WIDTH * outputs * dtype.bytes()) as f64;
    println!(
        "{level}, {threads} threads, {dtype} weights, {rows:4} rows: {:7.1} GFLOP/s, {:6.1} GB/s of weights",
        2.0 * products / seconds / 1e9,
        bytes / seconds / 1e9
    );
}

#[test]
#[ignore = "a measurement"]
fn products() {
    for level in Level::ALL.into_iter().rev().filter(|level| level.available()) {
        for threads in [1, 2] {
            for (dtype, rows) in [
                (DType::BF16, 1),
                (DType::BF16, 2),
                (DType::BF16, 4),
                (DType::BF16, 5),
                (DType::BF16, 8),
                (DType::BF16, 16),
                (DType::BF16, 32),
                (DType::BF16, 96),
                (DType::F16, 1),
                (DType::F16, 96),
                (DType::F32, 1),
                (DType::F32, 96),
            ] {
                product(level, threads, dtype, rows);
            }
        }
    }
}

/// Formats in which people have weights.
const FORMATS: [Quant; 16] = [
    Quant::Gguf(GgufBlock::Q8_0),
    Quant::Gguf(GgufBlock::Q4_0),
    Quant::Gguf(GgufBlock::Q2K),
    Quant::Gguf(GgufBlock::Q3K),
    Quant::Gguf(GgufBlock::Q4K),
    Quant::Gguf(GgufBlock::Q5K),
    Quant::Gguf(GgufBlock::Q6K),
    Quant::Gguf(GgufBlock::Iq4Nl),
    Quant::Gguf(GgufBlock::Iq4Xs),
    Quant::Gguf(GgufBlock::Mxfp4),
    Quant::Fp4 { group: 16 },
    Quant::Fp4 { group: 32 },
    Quant::Affine { bits: 4, group: 64 },
    Quant::Affine { bits: 8, group: 64 },
    Quant::Int4 { group: 32 },
    Quant::Fp8 { rows: 128, cols: 128 },
];

/// As many bytes as a product of `rows` by [`WIDTH`] has in `format`.
fn coded_bytes(format: Quant, rows: usize) -> usize {
    let scales = match format {
        Quant::Affine { group, .. } => rows * WIDTH / group * 4,
        Quant::Int4 { group } | Quant::Fp4 { group } => rows * WIDTH / group * 2,
        _ => 0,
    };
    rows * format.code_bytes(WIDTH) + scales
}

fn coded(backend: &mut CpuBackend, format: Quant, rows: usize) -> CpuWeight {
    with_coded(format, rows, WIDTH, |view| {
        let linear = Linear { parts: vec![view.into()], bias: None, sum: KSum::Ascending };
        backend.load(&WeightSource::Linear(linear)).unwrap()
    })
}

/// Calls `f` with a quantised matrix `[rows, cols]`.
fn with_coded<T>(format: Quant, rows: usize, cols: usize, f: impl FnOnce(QuantView<'_>) -> T) -> T {
    // Codes whose halves, where there are any, are small numbers.
    let bytes: Vec<u8> = (0..rows * format.code_bytes(cols)).map(|at| (at * 37 % 251) as u8 & 0x1f).collect();
    let (dtype, across) = match format {
        Quant::Affine { group, .. } | Quant::Int4 { group } | Quant::Fp4 { group } => {
            (DType::BF16, cols / group)
        }
        Quant::Fp8 { cols: wide, .. } => (DType::F32, cols / wide),
        Quant::Gguf(_) => (DType::BF16, 1),
    };
    let ones = [0x80, 0x3f].repeat(rows * across * 2);
    let row_stride_bytes = across * dtype.bytes();
    let scales = TensorView { name: "s", dtype, rows, cols: across, row_stride_bytes, bytes: &ones };
    let view = QuantView {
        name: "w",
        format,
        rows,
        cols,
        row_stride_bytes: format.code_bytes(cols),
        bytes: &bytes,
        scales: (!matches!(format, Quant::Gguf(_))).then_some(scales),
        biases: matches!(format, Quant::Affine { .. }).then_some(scales),
        origin: (0, 0),
    };
    f(view)
}

/// Seconds that this thread has computed: what others take of the machine does not count.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Bytes per second that one thread reads of memory, when it does nothing else.
fn read_bandwidth(memory: &[u64]) -> f64 {
    let begun = thread_seconds();
    let sum = memory.chunks_exact(32).fold([0u64; 32], |mut sums, words| {
        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        sums
    });
    std::hint::black_box(sum);
    size_of_val(memory) as f64 / (thread_seconds() - begun)
}

/// Quantised products of one thread beside those of bf16 and plain reading: the three alternate, so that a busy machine
/// slows all.
fn quantised(level: Level, rows: usize, activations: Activations) {
    let cpu = CpuOptions { activations, ..CpuOptions::default() };
    let options = DeviceOptions { threads: 1, cpu, ..DeviceOptions::default() };
    let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
    let table = weight(&mut backend, DType::BF16, rows, true);
    let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, DType::BF16), 1 << 20).unwrap();
    let mut batch = Batch::default();
    (0..rows).for_each(|row| batch.push(SeqId(row as u64), 0, &[row as u32]));
    let memory = vec![1u64; 12 << 20];
    // Few rows: more weights than caches hold. Many: one product.
    let outputs = if rows <= 32 { 3072 } else { 1024 };
    let count = |bytes: usize| if rows <= 32 { (96 << 20) / bytes + 1 } else { 1 };
    let plain_bytes = outputs * WIDTH * 2;
    let plain: Vec<CpuWeight> =
        (0..count(plain_bytes)).map(|_| weight(&mut backend, DType::BF16, outputs, false)).collect();
    for format in FORMATS {
        let bytes = coded_bytes(format, outputs);
        let weights: Vec<CpuWeight> =
            (0..count(bytes)).map(|_| coded(&mut backend, format, outputs)).collect();
        let mut run = |weights: &[CpuWeight]| {
            let begun = thread_seconds();
            let mut step = backend.step(&mut kv, &batch);
            let x = step.embed(&table);
            weights.iter().for_each(|weight| drop(step.linear(&x, weight)));
            step.submit(Out::Nothing).wait().unwrap();
            (thread_seconds() - begun) / weights.len() as f64
        };
        let (mut own, mut theirs, mut read) = (f64::INFINITY, f64::INFINITY, 0f64);
        for _ in 0..10 {
            own = own.min(run(&weights));
            theirs = theirs.min(run(&plain));
            read = read.max(read_bandwidth(&memory));
        }
        println!(
            "{level}, {rows:3} rows, {:24}: {:5.2} of bf16's speed; {:5.1} GB/s, {:4.2} of {:.1}; {:6.1} GFLOP/s",
            format.to_string(),
            theirs / own,
            bytes as f64 / own / 1e9,
            bytes as f64 / own / read,
            read / 1e9,
            2.0 * (rows * outputs * WIDTH) as f64 / own / 1e9,
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn quantised_products() {
    for level in Level::ALL.into_iter().rev().filter(|level| level.available()) {
        for rows in [96, 32, 16, 8, 4, 2, 1] {
            quantised(level, rows, Activations::Exact);
        }
    }
}

/// The same with activations in 8 bits.
#[test]
#[ignore = "a measurement"]
fn quantised_products_in_bytes() {
    for rows in [96, 16, 4, 1] {
        quantised(Level::best(), rows, Activations::Int8);
    }
}

/// A layer of Qwen3-30B-A3B with half of its experts: 8 of 64, hidden 2048, inner 768.
fn mixture(level: Level, format: Quant, rows: usize) {
    let (experts, top_k, hidden, inner) = (64, 8, 2048, 768);
    let options = DeviceOptions { threads: 1, ..DeviceOptions::default() };
    let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
    let numbers = |count: usize| -> Vec<u8> {
        let mut state = count as u64 | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            half::bf16::from_f32((state >> 40) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
        };
        (0..count).flat_map(|_| next()).collect()
    };
    let view = |bytes, rows, cols| TensorView {
        name: "w",
        dtype: DType::BF16,
        rows,
        cols,
        row_stride_bytes: 2 * cols,
        bytes,
    };
    let (tokens, choice) = (numbers(1024 * hidden), numbers(experts * hidden));
    let table = backend.load(&WeightSource::Embedding(view(&tokens, 1024, hidden).into())).unwrap();
    let parts = vec![view(&choice, experts, hidden).into()];
    let linear = Linear { parts, bias: None, sum: KSum::Ascending };
    let router = backend.load(&WeightSource::Linear(linear)).unwrap();
    let mut all = |rows: usize, cols: usize, sum: KSum| {
        with_coded(format, rows, cols, |view| {
            let linear = Linear { parts: vec![view.into()], bias: None, sum };
            backend.load(&WeightSource::Experts(&vec![linear; experts].as_slice())).unwrap()
        })
    };
    let gate_up = all(2 * inner, hidden, KSum::Ascending);
    let down = all(hidden, inner, KSum::Tree { ranges: 8 });
    let routing = Routing {
        experts,
        top_k,
        score: Score::Softmax,
        groups: None,
        normalise: true,
        normalise_eps: 0.0,
        scale: 1.0,
    };
    let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, DType::BF16), 1 << 20).unwrap();
    let memory = vec![1u64; 12 << 20];
    let (mut best, mut read) = (f64::INFINITY, 0f64);
    for run in 0..24 {
        let mut batch = Batch::default();
        (0..rows).for_each(|row| batch.push(SeqId(row as u64), 0, &[((run * rows + row) % 1024) as u32]));
        read = read.max(read_bandwidth(&memory));
        let begun = thread_seconds();
        let mut step = backend.step(&mut kv, &batch);
        let x = step.embed(&table);
        let (gate_up, down, glu) = (&gate_up, &down, Glu::Silu);
        let moe =
            Moe { router: &router, routing: &routing, choice_bias: None, gate_up, down, shared: None, glu };
        step.moe(&x, &moe);
        step.submit(Out::Nothing).wait().unwrap();
        best = best.min(thread_seconds() - begun);
    }
    let weights = 3 * hidden * inner;
    // Every row of few has its own experts; many rows pass all.
    let used = experts.min(rows * top_k);
    let bytes = (used * weights) as f64 * format.code_bytes(256) as f64 / 256.0;
    println!(
        "{level}, {rows:3} rows, experts of {:24}: {:6.3} ms, at most {:5.1} GB/s of {:.1}; {:6.1} GFLOP/s",
        format.to_string(),
        best * 1e3,
        bytes / best / 1e9,
        read / 1e9,
        2.0 * (rows * top_k * weights) as f64 / best / 1e9,
    );
}

#[test]
#[ignore = "a measurement"]
fn mixtures() {
    let level = Level::best();
    for format in
        [Quant::Gguf(GgufBlock::Q4K), Quant::Gguf(GgufBlock::Q8_0), Quant::Affine { bits: 4, group: 64 }]
    {
        for rows in [1, 4, 16, 256] {
            mixture(level, format, rows);
        }
    }
}

/// Llama 3 8B heads: 32 over 8 of 128.
fn attention(level: Level, threads: usize, context: u32, rows: u32) {
    let options = DeviceOptions { threads, ..DeviceOptions::default() };
    let mut backend = CpuBackend::with_level(&options, Group::alone(), level).unwrap();
    let spec = KvSpec::gqa(1, 8, 0..8, 128, DType::BF16);
    let mut kv = backend.kv(&spec, u64::from(context + 64) * spec.token_bytes() as u64).unwrap();
    let width = 48 * 128;
    let bytes = [0x80, 0x3e].repeat(512 * width);
    let view = TensorView {
        name: "w",
        dtype: DType::BF16,
        rows: 512,
        cols: width,
        row_stride_bytes: 2 * width,
        bytes: &bytes,
    };
    let table = backend.load(&WeightSource::Embedding(view.into())).unwrap();
    let rope = Rope {
        inv_freq: (0..64).map(|i| 500_000f32.powf(-(i as f32) / 64.0)).collect(),
        factor: 1.0,
        style: RopeStyle::HalfSplit,
    };
    kv.open(SeqId(1), context).unwrap();
    // A cache of zeros is as good as any.
    let landing = kv.land(SeqId(1), 0..context).unwrap();
    kv.commit(landing).unwrap();
    let attend = Attend {
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        scale: 0.088,
        rope: &rope,
        qk_norm: None,
        window: None,
        sinks: None,
    };
    let mut run = |start: u32, len: u32| {
        let mut batch = Batch::default();
        batch.push(SeqId(1), start, &(0..len).collect::<Vec<u32>>());
        let mut step = backend.step(&mut kv, &batch);
        let qkv = step.embed(&table);
        step.attend(0, qkv, &attend);
        step.submit(Out::Nothing).wait().unwrap();
    };
    let seconds = fastest(|| run(context - rows, rows));
    let seen: f64 = (context - rows..context).map(|p| f64::from(p + 1)).sum();
    println!(
        "{level}, {threads} threads, {rows:4} rows at the end of {context}: {:8.3} ms, {:6.1} GFLOP/s, {:6.1} GB/s of cache",
        seconds * 1e3,
        seen * 32.0 * 128.0 * 4.0 / seconds / 1e9,
        f64::from(context) * spec.token_bytes() as f64 / seconds / 1e9
    );
}

#[test]
#[ignore = "a measurement"]
fn attentions() {
    for level in Level::ALL.into_iter().rev().filter(|level| level.available()) {
        for threads in [1, 2] {
            for (context, rows) in [(512, 512), (4096, 96), (2048, 1), (32768, 1), (32768, 4)] {
                attention(level, threads, context, rows);
            }
        }
    }
}
