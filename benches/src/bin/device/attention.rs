//! Attention by itself: against a float64 reference over random shapes, and its speed.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use backend::{
    Attend, Backend, Batch, DType, DeviceOptions, Group, KvSpec, KvStore, MatrixView, Out, Output,
    PromptAttention, Rope, RopeStyle, SeqId, Step, TensorView, WeightSource,
};
use half::bf16;

/// Head sizes that models have.
const DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];
/// Heads of queries, and of keys and values.
const HEADS: [(usize, usize); 6] = [(4, 4), (8, 2), (6, 1), (16, 2), (5, 5), (32, 8)];
/// Largest differences that pass, as parts of the largest value.
const LIMIT_F32: f64 = 1e-5;
const LIMIT_BF16: f64 = 2e-2;
/// Layers of one timed step.
const LAYERS: usize = 8;

/// Xorshift.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound
    }

    /// Between -1 and 1.
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// One shape.
#[derive(Debug)]
struct Shape {
    dim: usize,
    heads: usize,
    kv_heads: usize,
    window: Option<u32>,
    /// Tokens computed first, and after them in one step, of each sequence.
    runs: Vec<(usize, usize)>,
}

impl Shape {
    fn random(random: &mut Random) -> Self {
        let (heads, kv_heads) = HEADS[random.below(HEADS.len())];
        let runs = (0..1 + random.below(3)).map(|_| {
            let before = if random.below(2) == 0 { 0 } else { random.below(400) };
            // As often one token as many.
            let now = if random.below(2) == 0 { 1 + random.below(4) } else { 1 + random.below(200) };
            (before, now)
        });
        let runs = runs.collect();
        let window = (random.below(3) == 0).then(|| 1 + random.below(120) as u32);
        Shape { dim: DIMS[random.below(DIMS.len())], heads, kv_heads, window, runs }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }
}

/// `count` random shapes in both types; a row of the table for each. Whether all passed.
pub fn check<B: Backend>(count: usize, options: &DeviceOptions) -> Result<bool> {
    let mut all = true;
    for (dtype, limit) in [(DType::F32, LIMIT_F32), (DType::BF16, LIMIT_BF16)] {
        let options = DeviceOptions { dtype, ..options.clone() };
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let (mut worst, mut failed) = (0f64, 0);
        let mut backend = B::open(&options, Group::alone())?;
        for _ in 0..count {
            let shape = Shape::random(&mut random);
            let difference = difference(&mut backend, &shape, &options, &mut random)?;
            if difference.is_nan() || difference > limit {
                failed += 1;
                println!("attention {dtype}: {difference:.1e} for {shape:?}");
            }
            worst = if difference.is_nan() { difference } else { worst.max(difference) };
        }
        all &= failed == 0;
        let kernels = if options.cuda.attention == PromptAttention::Mma { ", mma.sync" } else { "" };
        let verdict = if failed == 0 { "ok".to_owned() } else { format!("FAILED: {failed}") };
        println!(
            "| attention against float64{kernels}, {count} shapes, {dtype} | {verdict} | largest difference {worst:.1e} of the largest value, limit {limit} |"
        );
    }
    Ok(all)
}

/// Angles of zero: rope changes nothing.
fn still(dim: usize) -> Rope {
    Rope { inv_freq: vec![0.0; dim / 2].into(), factor: 1.0, style: RopeStyle::HalfSplit }
}

/// Values of a table, as the type holds them, and its bytes.
fn table(random: &mut Random, count: usize, dtype: DType) -> (Vec<f64>, Vec<u8>) {
    let mut bytes = Vec::with_capacity(count * dtype.bytes());
    let values = (0..count).map(|_| {
        let x = random.value() * 2.0;
        if dtype == DType::BF16 {
            bytes.extend(bf16::from_f32(x).to_le_bytes());
            bf16::from_f32(x).to_f64()
        } else {
            bytes.extend(x.to_le_bytes());
            f64::from(x)
        }
    });
    let values = values.collect();
    (values, bytes)
}

fn view(bytes: &[u8], rows: usize, cols: usize, dtype: DType) -> MatrixView<'_> {
    let row_stride_bytes = cols * dtype.bytes();
    TensorView { name: "attention", dtype, rows, cols, row_stride_bytes, bytes }.into()
}

fn difference<B: Backend>(
    backend: &mut B,
    shape: &Shape,
    options: &DeviceOptions,
    random: &mut Random,
) -> Result<f64> {
    let width = shape.width();
    let rows: usize = shape.runs.iter().map(|(before, now)| before + now).sum();
    let (values, bytes) = table(random, rows * width, options.dtype);
    let weight = backend.load(&WeightSource::Embedding(view(&bytes, rows, width, options.dtype)))?;
    let spec = KvSpec::gqa(1, shape.kv_heads, 0..shape.kv_heads, shape.dim, options.dtype);
    let blocks = rows / options.block_tokens as usize + shape.runs.len() + 1;
    let mut kv = backend.kv(&spec, (blocks * options.block_tokens as usize * spec.token_bytes()) as u64)?;
    let rope = still(shape.dim);
    let scale = (shape.dim as f32).powf(-0.5);
    let mut got = Vec::new();
    // What was there before, then all sequences at once.
    for now in [false, true] {
        let mut batch = Batch::default();
        let mut first = 0;
        for (seq, (before, after)) in shape.runs.iter().enumerate() {
            if !now {
                kv.open(SeqId(seq as u64), (before + after) as u32)?;
            }
            let (from, count) = if now { (*before, *after) } else { (0, *before) };
            let ids: Vec<u32> = (0..count).map(|at| (first + from + at) as u32).collect();
            if count > 0 {
                batch.push(SeqId(seq as u64), from as u32, &ids);
            }
            first += before + after;
        }
        if batch.rows() == 0 {
            continue;
        }
        let mut step = backend.step(&mut kv, &batch);
        let qkv = step.embed(&weight);
        let attend = Attend {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.dim,
            scale,
            rope: &rope,
            qk_norm: None,
            window: shape.window,
            sinks: None,
        };
        let act = step.attend(0, qkv, &attend);
        match step.submit(Out::Logits(act)).wait()? {
            Output::Logits(logits) => got = logits,
            _ => bail!("no result of attention"),
        }
    }
    let want = reference(shape, &values, f64::from(scale));
    let most = want.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    Ok(want.iter().zip(&got).fold(0f64, |worst, (want, got)| {
        let error = (want - f64::from(*got)).abs() / most;
        if error > worst || error.is_nan() { error } else { worst }
    }))
}

/// Rows of the second step, `[rows, heads * dim]`.
fn reference(shape: &Shape, values: &[f64], scale: f64) -> Vec<f64> {
    let (dim, width, group) = (shape.dim, shape.width(), shape.heads / shape.kv_heads);
    let mut out = Vec::new();
    let mut first = 0;
    for (before, after) in &shape.runs {
        let part = |token: usize, head: usize| {
            let at = (first + token) * width + head * dim;
            &values[at..at + dim]
        };
        for position in *before..before + after {
            let from = shape.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            for head in 0..shape.heads {
                let (key, value) = (shape.heads + head / group, shape.heads + shape.kv_heads + head / group);
                let dot = |token| {
                    let products = part(position, head).iter().zip(part(token, key)).map(|(x, y)| x * y);
                    products.sum::<f64>() * scale
                };
                let scores: Vec<f64> = (from..=position).map(dot).collect();
                let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - peak).exp()).sum();
                let mut sum = vec![0.0; dim];
                for (token, score) in (from..=position).zip(&scores) {
                    let weight = (score - peak).exp() / total;
                    sum.iter_mut().zip(part(token, value)).for_each(|(sum, x)| *sum += weight * x);
                }
                out.extend(sum);
            }
        }
        first += before + after;
    }
    out
}

/// Time of attention over one prompt of `tokens`, 32 heads of 128 on 8, bf16; rope and the cache's writes included.
pub fn speed<B: Backend>(tokens: usize, runs: usize, options: &DeviceOptions) -> Result<Duration> {
    let (heads, kv_heads, dim) = (32, 8, 128);
    let options = DeviceOptions { dtype: DType::BF16, ..options.clone() };
    let width = (heads + 2 * kv_heads) * dim;
    let mut random = Random(9);
    let (_, bytes) = table(&mut random, 512 * width, DType::BF16);
    let mut backend = B::open(&options, Group::alone())?;
    let weight = backend.load(&WeightSource::Embedding(view(&bytes, 512, width, DType::BF16)))?;
    let spec = KvSpec::gqa(LAYERS, kv_heads, 0..kv_heads, dim, DType::BF16);
    let room = tokens.next_multiple_of(options.block_tokens as usize);
    let mut kv = backend.kv(&spec, (room * spec.token_bytes()) as u64)?;
    let rope = still(dim);
    let ids: Vec<u32> = (0..tokens).map(|at| at as u32 % 512).collect();
    let mut once = |attends: bool, seq: u64| -> Result<Duration> {
        let seq = SeqId(seq);
        kv.open(seq, tokens as u32)?;
        let mut batch = Batch::default();
        batch.push(seq, 0, &ids);
        let begun = Instant::now();
        let mut step = backend.step(&mut kv, &batch);
        for layer in 0..LAYERS {
            let qkv = step.embed(&weight);
            if attends {
                let attend = Attend {
                    heads,
                    kv_heads,
                    head_dim: dim,
                    scale: (dim as f32).powf(-0.5),
                    rope: &rope,
                    qk_norm: None,
                    window: None,
                    sinks: None,
                };
                drop(step.attend(layer, qkv, &attend));
            }
        }
        step.submit(Out::Nothing).wait()?;
        let took = begun.elapsed();
        kv.close(seq)?;
        Ok(took)
    };
    let mut times = Vec::new();
    for run in 0..=runs as u64 {
        let whole = once(true, 2 * run)?;
        let rest = once(false, 2 * run + 1)?;
        times.push(whole.saturating_sub(rest) / LAYERS as u32);
    }
    // The first compiles and allocates.
    times.remove(0);
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

/// Multiply-adds count twice; causal: half of the square.
pub fn flops(tokens: usize) -> f64 {
    4.0 * (tokens as f64).powi(2) * 128.0 * 32.0 / 2.0
}
