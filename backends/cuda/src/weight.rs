//! Weights on the device: numbers in the step's dtype, or codes and scales as the checkpoint has them. Numbers of another
//! type are converted once, at load.

use std::ops::Range;
use std::rc::Rc;

use backend::weight::widen;
use backend::{
    BackendError, DType, ExpertSource, GgufBlock, Heads, KSum, Linear, MatrixView, Quant, QuantView,
    TensorView, WeightSource,
};
use half::bf16;

use crate::args::QuantArgs;
use crate::driver::Driver;

/// Formats in `enum Format` of `kernels/quant.cuh`: MLX's, INT4, DeepSeek's FP8, FP4.
pub(crate) const AFFINE: u32 = 0;
pub(crate) const INT4: u32 = 1;
pub(crate) const FP8: u32 = 2;
pub(crate) const FP4: u32 = 3;

/// A weight of the CUDA backend. Shared, so that a product can wait until it is known where its result goes.
pub struct CudaWeight<D: Driver>(pub(crate) Rc<Kind<D>>);

pub(crate) enum Kind<D: Driver> {
    Product(Matrix<D>),
    Experts(Matrix<D>),
    /// Heads one below the other, latents as columns.
    Heads(Vec<HeadShape>, Matrix<D>),
    Vector(Memory<D>, usize),
    /// f32 in every step.
    Exact(Memory<D>, usize),
}

/// Shape of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadShape {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    /// Whether outputs are latents, else inputs are.
    pub(crate) to_latent: bool,
}

/// One matrix, or one per expert, in parts stacked by rows.
pub(crate) struct Matrix<D: Driver> {
    pub(crate) experts: usize,
    /// Rows of one expert, all parts.
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) parts: Vec<Part<D>>,
    /// `[experts, outputs]` in the step's dtype.
    pub(crate) bias: Option<Memory<D>>,
}

pub(crate) struct Part<D: Driver> {
    /// First of the matrix's outputs, and their number.
    pub(crate) first: usize,
    pub(crate) outputs: usize,
    pub(crate) data: Data<D>,
}

pub(crate) enum Data<D: Driver> {
    /// `[experts, outputs, inputs]`.
    Plain(Memory<D>),
    Quantised {
        args: QuantArgs,
        /// Bytes of codes and elements of scales of one expert.
        strides: (u64, u64),
        /// Kept alive for the addresses in `args`.
        _memory: Vec<Memory<D>>,
    },
}

/// Device memory with its address.
pub(crate) struct Memory<D: Driver> {
    pub(crate) address: u64,
    _memory: D::Memory,
}

fn refused(name: &str, reason: String) -> BackendError {
    BackendError::Weight { name: name.to_owned(), reason }
}

impl<D: Driver> Memory<D> {
    /// `bytes` that the caller fills.
    fn room(driver: &D, bytes: usize) -> Result<Self, BackendError> {
        let memory = driver.alloc(bytes.max(1))?;
        Ok(Memory { address: driver.address(&memory), _memory: memory })
    }

    pub(crate) fn of(driver: &D, bytes: &[u8]) -> Result<Self, BackendError> {
        let memory = Self::room(driver, bytes.len())?;
        driver.upload(memory.address, bytes)?;
        Ok(memory)
    }
}

impl<D: Driver> CudaWeight<D> {
    pub(crate) fn load(driver: &D, source: &WeightSource<'_>, dtype: DType) -> Result<Self, BackendError> {
        let kind = match source {
            WeightSource::Linear(linear) => {
                if let (KSum::Tree { .. }, Some(_), Some(part)) =
                    (linear.sum, &linear.bias, linear.parts.first())
                {
                    return Err(refused(part.name(), "a bias belongs after the join of a tree".to_owned()));
                }
                Kind::Product(Matrix::load(driver, &std::slice::from_ref(linear), dtype)?)
            }
            WeightSource::Experts(experts) => Kind::Experts(Matrix::load(driver, *experts, dtype)?),
            WeightSource::Heads(heads) => load_heads(driver, heads, dtype)?,
            WeightSource::Embedding(view) => {
                let linear = Linear { parts: vec![*view], bias: None, sum: KSum::Ascending };
                Kind::Product(Matrix::load(driver, &std::slice::from_ref(&linear), dtype)?)
            }
            WeightSource::Norm(view) | WeightSource::Bias(view) => {
                Kind::Vector(vector(driver, view, dtype)?, view.cols)
            }
            WeightSource::Exact(view) => Kind::Exact(vector(driver, view, DType::F32)?, view.cols),
        };
        Ok(CudaWeight(Rc::new(kind)))
    }
}

fn vector<D: Driver>(driver: &D, view: &TensorView<'_>, dtype: DType) -> Result<Memory<D>, BackendError> {
    Memory::of(driver, &joined(std::slice::from_ref(view), dtype)?)
}

/// Vectors one after the other, in `dtype`.
fn joined(views: &[TensorView<'_>], dtype: DType) -> Result<Vec<u8>, BackendError> {
    let mut bytes = Vec::new();
    for view in views {
        view.check()?;
        if view.rows != 1 {
            return Err(refused(view.name, format!("{} rows where a vector is needed", view.rows)));
        }
        append(&mut bytes, view.row(0), view.dtype, dtype);
    }
    Ok(bytes)
}

/// Elements of one type as another.
fn append(to: &mut Vec<u8>, bytes: &[u8], from: DType, dtype: DType) {
    if from == dtype {
        to.extend_from_slice(bytes);
        return;
    }
    let mut floats = vec![0f32; bytes.len() / from.bytes()];
    widen(from, bytes, &mut floats);
    append_floats(to, &floats, dtype);
}

fn append_floats(to: &mut Vec<u8>, floats: &[f32], dtype: DType) {
    match dtype {
        DType::BF16 => floats.iter().for_each(|x| to.extend(bf16::from_f32(*x).to_le_bytes())),
        _ => floats.iter().for_each(|x| to.extend(x.to_le_bytes())),
    }
}

fn load_heads<D: Driver>(driver: &D, source: &Heads<'_>, dtype: DType) -> Result<Kind<D>, BackendError> {
    let Some(first) = source.heads.first() else {
        return Err(refused("", "a product of no heads".to_owned()));
    };
    let (rows, cols) = (first.rows(), first.cols());
    let mut bytes = Vec::new();
    let mut floats = vec![0f32; rows * cols];
    // Rows are latents: they are to be columns.
    let turn = source.to_latent != source.transposed;
    for head in &source.heads {
        head.check()?;
        if (head.rows(), head.cols()) != (rows, cols) {
            return Err(refused(
                head.name(),
                format!("{} x {} beside {rows} x {cols}", head.rows(), head.cols()),
            ));
        }
        floats.chunks_exact_mut(cols).enumerate().for_each(|(row, line)| head.decode(row, 0..cols, line));
        if turn {
            let turned: Vec<f32> = (0..rows * cols).map(|i| floats[i % rows * cols + i / rows]).collect();
            append_floats(&mut bytes, &turned, dtype);
        } else {
            append_floats(&mut bytes, &floats, dtype);
        }
    }
    let (outputs, inputs) = if source.transposed { (cols, rows) } else { (rows, cols) };
    let shape = HeadShape { outputs, inputs, to_latent: source.to_latent };
    let (rows, latents) = if turn { (cols, rows) } else { (rows, cols) };
    let part =
        Part { first: 0, outputs: source.heads.len() * rows, data: Data::Plain(Memory::of(driver, &bytes)?) };
    let matrix = Matrix {
        experts: 1,
        outputs: source.heads.len() * rows,
        inputs: latents,
        parts: vec![part],
        bias: None,
    };
    Ok(Kind::Heads(vec![shape; source.heads.len()], matrix))
}

impl<D: Driver> Matrix<D> {
    /// One product, or one per expert, each on the device before the next is asked for.
    fn load(driver: &D, source: &dyn ExpertSource, dtype: DType) -> Result<Self, BackendError> {
        let experts = source.count();
        let mut filling: Option<Filling<D>> = None;
        let mut taken = 0;
        source.each(&mut |linear| {
            check(linear)?;
            let filling = match &mut filling {
                Some(filling) => filling,
                none => none.insert(Filling::new(driver, linear, experts, dtype)?),
            };
            filling.put(driver, linear, taken, dtype)?;
            taken += 1;
            Ok(())
        })?;
        match filling {
            Some(filling) if taken == experts => Ok(filling.matrix),
            _ => Err(refused("", format!("{taken} products of {experts}"))),
        }
    }
}

/// Checks a linear layer, alone or as one of some experts.
fn check(linear: &Linear<'_>) -> Result<(), BackendError> {
    let Some(first) = linear.parts.first() else {
        return Err(refused("", "a linear layer without parts".to_owned()));
    };
    let (name, inputs) = (first.name(), first.cols());
    if let KSum::Tree { ranges } = linear.sum
        && (![1, 2, 4, 8].contains(&ranges) || !inputs.is_multiple_of(ranges))
    {
        return Err(refused(name, format!("{inputs} columns in {ranges} ranges")));
    }
    for part in &linear.parts {
        part.check()?;
        if part.cols() != inputs {
            return Err(refused(part.name(), format!("{} columns beside {inputs} of {name}", part.cols())));
        }
    }
    Ok(())
}

/// What makes parts of two experts one format: they share a kernel's arguments.
#[derive(PartialEq)]
enum Alike {
    Plain,
    Quantised { format: Quant, origin: (usize, usize), scales: Option<(DType, usize, usize)> },
}

impl Alike {
    fn of(part: &MatrixView<'_>) -> Self {
        match part {
            MatrixView::Plain(_) => Alike::Plain,
            MatrixView::Quantised(view) => Alike::Quantised {
                format: view.format,
                origin: view.origin,
                scales: view.scales.map(|scales| (scales.dtype, scales.rows, scales.cols)),
            },
        }
    }
}

/// A matrix whose experts arrive one by one.
struct Filling<D: Driver> {
    matrix: Matrix<D>,
    /// Inputs and, per part of the linear layer, its rows and format, which every expert must have.
    shape: (usize, Vec<(usize, Alike)>),
    /// Per part of the matrix, the parts of the linear layer that lie in it.
    spans: Vec<Range<usize>>,
}

impl<D: Driver> Filling<D> {
    /// Room for `experts` as `linear`.
    fn new(driver: &D, linear: &Linear<'_>, experts: usize, dtype: DType) -> Result<Self, BackendError> {
        let inputs = linear.parts[0].cols();
        // Neighbours that are numbers lie together, so that they are one product.
        let numbers = |part: &MatrixView<'_>| matches!(part, MatrixView::Plain(_));
        let mut spans: Vec<Range<usize>> = Vec::new();
        for run in linear.parts.chunk_by(|a, b| numbers(a) && numbers(b)) {
            let first = spans.last().map_or(0, |span| span.end);
            spans.push(first..first + run.len());
        }
        let (mut parts, mut outputs) = (Vec::new(), 0);
        for span in &spans {
            let own = &linear.parts[span.clone()];
            let rows = own.iter().map(MatrixView::rows).sum();
            let data = match &own[0] {
                MatrixView::Plain(_) => {
                    Data::Plain(Memory::room(driver, room(rows * inputs * dtype.bytes(), experts)?)?)
                }
                MatrixView::Quantised(view) => quantised(driver, view, experts)?,
            };
            parts.push(Part { first: outputs, outputs: rows, data });
            outputs += rows;
        }
        let bytes = room(outputs * dtype.bytes(), experts)?;
        let bias = linear.bias.as_ref().map(|_| Memory::room(driver, bytes)).transpose()?;
        let shape = (inputs, linear.parts.iter().map(|part| (part.rows(), Alike::of(part))).collect());
        Ok(Filling { matrix: Matrix { experts, outputs, inputs, parts, bias }, shape, spans })
    }

    /// Puts expert `at` in its place.
    fn put(&self, driver: &D, linear: &Linear<'_>, at: usize, dtype: DType) -> Result<(), BackendError> {
        let (inputs, shape) = &self.shape;
        let name = linear.parts[0].name();
        let rows = |part: &MatrixView<'_>, own: &(usize, Alike)| part.rows() == own.0;
        let pairs = || linear.parts.iter().zip(shape);
        if linear.parts.len() != shape.len()
            || linear.parts[0].cols() != *inputs
            || !pairs().all(|(part, own)| rows(part, own))
            || at >= self.matrix.experts
        {
            return Err(refused(name, "experts of different shapes".to_owned()));
        }
        if let Some((part, _)) = pairs().find(|(part, own)| Alike::of(part) != own.1) {
            return Err(refused(part.name(), "experts of different formats".to_owned()));
        }
        let at = at as u64;
        match (&linear.bias, &self.matrix.bias) {
            (None, None) => {}
            (Some(biases), Some(memory)) => {
                let bytes = joined(biases, dtype)?;
                let (count, outputs) = (bytes.len() / dtype.bytes(), self.matrix.outputs);
                if count != outputs {
                    return Err(refused(name, format!("{count} biases for {outputs} outputs")));
                }
                driver.upload(memory.address + at * bytes.len() as u64, &bytes)?;
            }
            _ => return Err(refused(name, "some experts with a bias and some without".to_owned())),
        }
        for (part, span) in self.matrix.parts.iter().zip(&self.spans) {
            match &part.data {
                Data::Plain(memory) => {
                    let mut bytes = Vec::with_capacity(part.outputs * inputs * dtype.bytes());
                    for view in &linear.parts[span.clone()] {
                        let MatrixView::Plain(view) = view else { continue };
                        (0..view.rows).for_each(|row| append(&mut bytes, view.row(row), view.dtype, dtype));
                    }
                    driver.upload(memory.address + at * bytes.len() as u64, &bytes)?;
                }
                Data::Quantised { args, .. } => {
                    let MatrixView::Quantised(view) = &linear.parts[span.start] else { continue };
                    let mut codes = Vec::with_capacity(view.rows * view.format.code_bytes(view.cols));
                    (0..view.rows).for_each(|row| codes.extend_from_slice(view.codes(row)));
                    driver.upload(args.codes + at * codes.len() as u64, &codes)?;
                    for (to, numbers) in [(args.scales, view.scales), (args.biases, view.biases)] {
                        let bytes = numbers.map_or_else(Vec::new, |numbers| dense(&numbers));
                        driver.upload(to + at * bytes.len() as u64, &bytes)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Bytes of `experts` matrices of `bytes` each.
fn room(bytes: usize, experts: usize) -> Result<usize, BackendError> {
    bytes.checked_mul(experts).ok_or(BackendError::OutOfMemory { wanted_bytes: u64::MAX, free_bytes: 0 })
}

/// Rows of numbers one after the other.
fn dense(view: &TensorView<'_>) -> Vec<u8> {
    (0..view.rows).flat_map(|row| view.row(row)).copied().collect()
}

/// Room for `experts` matrices as `view`.
fn quantised<D: Driver>(driver: &D, view: &QuantView<'_>, experts: usize) -> Result<Data<D>, BackendError> {
    if view.biases.zip(view.scales).is_some_and(|(biases, scales)| biases.dtype != scales.dtype) {
        return Err(refused(view.name, "scales and biases of different types".to_owned()));
    }
    let row_bytes = view.format.code_bytes(view.cols);
    let numbers =
        |view: Option<TensorView<'_>>| view.map_or(0, |view| view.rows * view.cols * view.dtype.bytes());
    let sizes = [view.rows * row_bytes, numbers(view.scales), numbers(view.biases)];
    let memory = sizes.map(|bytes| Memory::room(driver, room(bytes, experts)?));
    let memory = memory.into_iter().collect::<Result<Vec<_>, _>>()?;
    let (format, bits, group, group_rows) = match view.format {
        Quant::Affine { bits, group } => (AFFINE, bits, group, 1),
        Quant::Int4 { group } => (INT4, 4, group, 1),
        Quant::Fp8 { rows, cols } => (FP8, 8, cols, rows),
        Quant::Fp4 { group } => (FP4, 4, group, 1),
        Quant::Gguf(block) => (gguf_code(block), 0, block.cols(), 1),
    };
    let args = QuantArgs {
        codes: memory[0].address,
        scales: memory[1].address,
        biases: memory[2].address,
        format,
        bits: bits as u32,
        group: group as u32,
        group_rows: group_rows as u32,
        origin_row: view.origin.0 as u32,
        origin_col: view.origin.1 as u32,
        scale_type: view.scales.map_or(0, |scales| scale_type(scales.dtype)),
        scale_cols: view.scales.map_or(0, |scales| scales.cols as u32),
        row_bytes: row_bytes as u32,
        cols: view.cols as u32,
    };
    let scales_expert = view.scales.map_or(0, |scales| (scales.rows * scales.cols) as u64);
    Ok(Data::Quantised { args, strides: ((view.rows * row_bytes) as u64, scales_expert), _memory: memory })
}

/// As `enum ScaleType` in `kernels/quant.cuh`.
pub(crate) fn scale_type(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

/// As `enum Format` in `kernels/quant.cuh`.
pub(crate) fn gguf_code(block: GgufBlock) -> u32 {
    match block {
        GgufBlock::Q4_0 => 4,
        GgufBlock::Q4_1 => 5,
        GgufBlock::Q5_0 => 6,
        GgufBlock::Q5_1 => 7,
        GgufBlock::Q8_0 => 8,
        GgufBlock::Q2K => 9,
        GgufBlock::Q3K => 10,
        GgufBlock::Q4K => 11,
        GgufBlock::Q5K => 12,
        GgufBlock::Q6K => 13,
        GgufBlock::Iq4Nl => 14,
        GgufBlock::Iq4Xs => 15,
        GgufBlock::Mxfp4 => 16,
    }
}
