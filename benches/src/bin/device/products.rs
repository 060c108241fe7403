//! Products by themselves: a model's gate and up, and its down, by format of the weights.

use std::time::{Duration, Instant};

use anyhow::Result;
use backend::{
    Backend, Batch, CudaOptions, DType, DeviceOptions, Fp8Activations, GgufBlock, Group, KSum, KvSpec,
    Linear, MatrixView, Out, Quant, QuantView, SeqId, Step, TensorView, WeightSource,
};
use half::{bf16, f16};

use crate::attention::Random;

/// Inputs and outputs of the wider product; the other turns back.
const HIDDEN: usize = 4096;
const INNER: usize = 14336;
/// Pairs of products in a timed step.
const PAIRS: usize = 8;
/// Columns and rows of FP8's blocks, and columns of a 4-bit group.
const FP8_BLOCK: usize = 128;
const GROUP: usize = 64;

/// Bytes of a matrix whose numbers are of such a size that products keep theirs.
struct Matrix {
    format: Option<Quant>,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

impl Matrix {
    fn random(format: Option<Quant>, rows: usize, cols: usize) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let size = (cols as f32).powf(-0.5);
        let mut matrix =
            Matrix { format, rows, cols, bytes: Vec::new(), scales: Vec::new(), biases: Vec::new() };
        let count = rows * format.map_or(cols * 2, |format| format.code_bytes(cols));
        match format {
            None => {
                let numbers = (0..rows * cols).map(|_| bf16::from_f32(random.value() * size));
                matrix.bytes = numbers.flat_map(|x| x.to_le_bytes()).collect();
            }
            Some(Quant::Fp8 { .. }) => {
                // All codes but not-a-number.
                let code = |random: u64| (random % 127 + (random >> 20) % 2 * 128) as u8;
                matrix.bytes = (0..count).map(|_| code(random.next())).collect();
                let blocks = rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK);
                matrix.scales = (size / 150.0).to_le_bytes().repeat(blocks);
            }
            Some(Quant::Gguf(block)) => {
                matrix.bytes = (0..count).map(|_| random.next() as u8).collect();
                // Scales, and minima where there are any, stand first.
                let (scale, minimum) = match block {
                    GgufBlock::Q8_0 => (size / 70.0, None),
                    _ => (size / 300.0, Some(size / 40.0)),
                };
                for block in matrix.bytes.chunks_exact_mut(block.bytes()) {
                    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                    if let Some(minimum) = minimum {
                        block[2..4].copy_from_slice(&f16::from_f32(minimum).to_le_bytes());
                    }
                }
            }
            Some(_) => {
                matrix.bytes = (0..count).map(|_| random.next() as u8).collect();
                let groups = rows * cols / GROUP;
                matrix.scales = bf16::from_f32(size / 5.0).to_le_bytes().repeat(groups);
                matrix.biases = bf16::from_f32(size / -5.0 * 7.5).to_le_bytes().repeat(groups);
            }
        }
        matrix
    }

    fn view(&self) -> MatrixView<'_> {
        let numbers = |bytes, dtype: DType, rows: usize| {
            let row_stride_bytes = <[u8]>::len(bytes) / rows;
            let cols = row_stride_bytes / dtype.bytes();
            TensorView { name: "random", dtype, rows, cols, row_stride_bytes, bytes }
        };
        let Some(format) = self.format else { return numbers(&self.bytes, DType::BF16, self.rows).into() };
        let (scales, biases) = match format {
            Quant::Fp8 { rows, .. } => {
                (Some(numbers(&self.scales, DType::F32, self.rows.div_ceil(rows))), None)
            }
            Quant::Gguf(_) => (None, None),
            _ => (
                Some(numbers(&self.scales, DType::BF16, self.rows)),
                Some(numbers(&self.biases, DType::BF16, self.rows)),
            ),
        };
        QuantView {
            name: "random",
            format,
            rows: self.rows,
            cols: self.cols,
            row_stride_bytes: self.bytes.len() / self.rows,
            bytes: &self.bytes,
            scales,
            biases,
            origin: (0, 0),
        }
        .into()
    }
}

/// Prints a row for each format and number of rows. `small`: widths of an eighth, to try it out.
pub fn table<B: Backend>(runs: usize, small: bool, options: &DeviceOptions) -> Result<()> {
    let (hidden, inner) = if small { (HIDDEN / 8, INNER / 8) } else { (HIDDEN, INNER) };
    let fp8 = Some(Quant::Fp8 { rows: FP8_BLOCK, cols: FP8_BLOCK });
    let exact = CudaOptions::default();
    let rounded = CudaOptions { activations: Fp8Activations::Fp8, ..exact };
    for (name, format, cuda) in [
        ("bf16", None, exact),
        ("fp8", fp8, exact),
        ("fp8 on both sides", fp8, rounded),
        ("mlx 4-bit", Some(Quant::Affine { bits: 4, group: GROUP }), exact),
        ("Q8_0", Some(Quant::Gguf(GgufBlock::Q8_0)), exact),
        ("Q4_K", Some(Quant::Gguf(GgufBlock::Q4K)), exact),
    ] {
        let mut backend =
            match B::open(&DeviceOptions { dtype: DType::BF16, cuda, ..options.clone() }, Group::alone()) {
                Ok(backend) => backend,
                Err(reason) => {
                    println!("| products, {name} | not run | {reason} |");
                    continue;
                }
            };
        if cuda != exact && backend.caps().name != "cuda" {
            continue;
        }
        let mut load = |rows, cols| {
            let matrix = Matrix::random(format, rows, cols);
            let linear = Linear { parts: vec![matrix.view()], bias: None, sum: KSum::Ascending };
            backend.load(&WeightSource::Linear(linear))
        };
        let weights = (load(inner, hidden)?, load(hidden, inner)?);
        let table = Matrix::random(None, 512, hidden);
        let table = backend.load(&WeightSource::Embedding(table.view()))?;
        for rows in [1, 16, 128, 4096] {
            let time = products(&mut backend, &table, &weights, rows, runs)?;
            let tflops = 4.0 * (rows * hidden * inner) as f64 / time.as_secs_f64() / 1e12;
            println!(
                "| products, {name}, {rows} rows, {hidden} to {inner} and back | {time:.2?} | {tflops:.2} TFLOP/s |"
            );
        }
    }
    Ok(())
}

/// Median time of a pair of products with so many rows.
fn products<B: Backend>(
    backend: &mut B,
    table: &B::Weight,
    (up, down): &(B::Weight, B::Weight),
    rows: usize,
    runs: usize,
) -> Result<Duration> {
    // Steps without attention need a cache all the same.
    let spec = KvSpec::gqa(1, 1, 0..1, 64, DType::BF16);
    let mut kv = backend.kv(&spec, 64 * spec.token_bytes() as u64)?;
    let ids: Vec<u32> = (0..rows).map(|row| row as u32 % 512).collect();
    let mut batch = Batch::default();
    batch.push(SeqId(0), 0, &ids);
    let mut once = |pairs: usize| -> Result<Duration> {
        let begun = Instant::now();
        let mut step = backend.step(&mut kv, &batch);
        let mut x = step.embed(table);
        for _ in 0..pairs {
            let wide = step.linear(&x, up);
            x = step.linear(&wide, down);
        }
        step.submit(Out::Hidden(x)).wait()?;
        Ok(begun.elapsed())
    };
    let mut times = Vec::new();
    for _ in 0..=runs {
        let rest = once(1)?;
        times.push(once(1 + PAIRS)?.saturating_sub(rest) / PAIRS as u32);
    }
    // The first compiles and allocates.
    times.remove(0);
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
