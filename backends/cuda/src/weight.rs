//! Weights on the device: numbers in the step's dtype, or codes and scales as the checkpoint has them. Numbers of another
//! type are converted once, at load.

use std::rc::Rc;

use backend::weight::widen;
use backend::{
    BackendError, DType, GgufBlock, Heads, KSum, Linear, MatrixView, Quant, QuantView, TensorView,
    WeightSource,
};
use half::bf16;

use crate::args::QuantArgs;
use crate::driver::Driver;

/// A weight of the CUDA backend. Shared, so that a product can wait until it is known where its result goes.
pub struct CudaWeight<D: Driver>(pub(crate) Rc<Kind<D>>);

pub(crate) enum Kind<D: Driver> {
    Product(Matrix<D>),
    Experts(Matrix<D>),
    /// Heads one below the other: `[heads * outputs, inputs]`, or `[heads * inputs, outputs]` where turned.
    Heads(Vec<HeadShape>, Matrix<D>),
    Vector(Memory<D>, usize),
    /// f32 in every step.
    Exact(Memory<D>, usize),
}

/// Shape of one head: outputs, inputs, and whether the matrix has inputs as rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadShape {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) turned: bool,
}

/// One matrix, or one per expert, in parts stacked by rows.
pub(crate) struct Matrix<D: Driver> {
    pub(crate) experts: usize,
    /// Rows of one expert, all parts.
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) parts: Vec<Part<D>>,
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
    pub(crate) fn of(driver: &D, bytes: &[u8]) -> Result<Self, BackendError> {
        let memory = driver.alloc(bytes.len().max(1))?;
        let address = driver.address(&memory);
        driver.upload(address, bytes)?;
        Ok(Memory { address, _memory: memory })
    }
}

impl<D: Driver> CudaWeight<D> {
    pub(crate) fn load(driver: &D, source: &WeightSource<'_>, dtype: DType) -> Result<Self, BackendError> {
        let kind = match source {
            WeightSource::Linear(linear) => {
                Kind::Product(Matrix::load(driver, std::slice::from_ref(linear), dtype)?)
            }
            WeightSource::Experts(experts) => Kind::Experts(Matrix::load(driver, experts, dtype)?),
            WeightSource::Heads(heads) => load_heads(driver, heads, dtype)?,
            WeightSource::Embedding(view) => {
                let linear = Linear { parts: vec![*view], bias: None, sum: KSum::Ascending };
                Kind::Product(Matrix::load(driver, std::slice::from_ref(&linear), dtype)?)
            }
            WeightSource::Norm(view) | WeightSource::Bias(view) => {
                Kind::Vector(vector(driver, std::slice::from_ref(view), dtype)?, view.cols)
            }
            WeightSource::Exact(view) => {
                Kind::Exact(vector(driver, std::slice::from_ref(view), DType::F32)?, view.cols)
            }
        };
        Ok(CudaWeight(Rc::new(kind)))
    }
}

/// Vectors one after the other, in `dtype`.
fn vector<D: Driver>(driver: &D, views: &[TensorView<'_>], dtype: DType) -> Result<Memory<D>, BackendError> {
    let mut bytes = Vec::new();
    for view in views {
        view.check()?;
        if view.rows != 1 {
            return Err(refused(view.name, format!("{} rows where a vector is needed", view.rows)));
        }
        append(&mut bytes, view.row(0), view.dtype, dtype);
    }
    Memory::of(driver, &bytes)
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
    let mut line = vec![0f32; cols];
    for head in &source.heads {
        head.check()?;
        if (head.rows(), head.cols()) != (rows, cols) {
            return Err(refused(
                head.name(),
                format!("{} x {} beside {rows} x {cols}", head.rows(), head.cols()),
            ));
        }
        for row in 0..rows {
            head.decode(row, 0..cols, &mut line);
            append_floats(&mut bytes, &line, dtype);
        }
    }
    let (outputs, inputs) = if source.transposed { (cols, rows) } else { (rows, cols) };
    let shape = HeadShape { outputs, inputs, turned: source.transposed };
    let part =
        Part { first: 0, outputs: source.heads.len() * rows, data: Data::Plain(Memory::of(driver, &bytes)?) };
    let matrix = Matrix {
        experts: 1,
        outputs: source.heads.len() * rows,
        inputs: cols,
        parts: vec![part],
        bias: None,
    };
    Ok(Kind::Heads(vec![shape; source.heads.len()], matrix))
}

impl<D: Driver> Matrix<D> {
    fn load(driver: &D, experts: &[Linear<'_>], dtype: DType) -> Result<Self, BackendError> {
        let Some(linear) = experts.first().filter(|linear| !linear.parts.is_empty()) else {
            return Err(refused("", "a linear layer without parts".to_owned()));
        };
        let first = &linear.parts[0];
        let (name, inputs) = (first.name(), first.cols());
        if let KSum::Tree { ranges } = linear.sum {
            if ![1, 2, 4, 8].contains(&ranges) || !inputs.is_multiple_of(ranges) {
                return Err(refused(name, format!("{inputs} columns in {ranges} ranges")));
            }
            if linear.bias.is_some() {
                return Err(refused(name, "a bias belongs after the join of a tree".to_owned()));
            }
        }
        for part in experts.iter().flat_map(|linear| &linear.parts) {
            part.check()?;
            if part.cols() != inputs {
                return Err(refused(
                    part.name(),
                    format!("{} columns beside {inputs} of {name}", part.cols()),
                ));
            }
        }
        if let Some(other) = experts.iter().find(|other| {
            other.parts.len() != linear.parts.len()
                || other.bias.is_some() && experts.len() > 1
                || other.parts.iter().zip(&linear.parts).any(|(a, b)| a.rows() != b.rows())
        }) {
            let name = other.parts.first().map_or("", |part| part.name());
            return Err(refused(name, "experts of different shapes".to_owned()));
        }
        let mut parts: Vec<Part<D>> = Vec::new();
        let mut outputs = 0;
        // Parts that are numbers lie together, so that they are one product.
        let mut plain: Vec<usize> = Vec::new();
        for (at, part) in linear.parts.iter().enumerate() {
            match part {
                MatrixView::Plain(_) => plain.push(at),
                MatrixView::Quantised(_) => {
                    flush(driver, experts, &mut plain, &mut parts, &mut outputs, dtype)?;
                    let data = quantised(driver, experts, at)?;
                    parts.push(Part { first: outputs, outputs: part.rows(), data });
                    outputs += part.rows();
                }
            }
        }
        flush(driver, experts, &mut plain, &mut parts, &mut outputs, dtype)?;
        let bias = match &linear.bias {
            None => None,
            Some(bias) => {
                let count: usize = bias.iter().map(|bias| bias.cols).sum();
                if count != outputs {
                    return Err(refused(name, format!("{count} biases for {outputs} outputs")));
                }
                Some(vector(driver, bias, dtype)?)
            }
        };
        Ok(Matrix { experts: experts.len(), outputs, inputs, parts, bias })
    }
}

/// The plain parts gathered so far as one.
fn flush<D: Driver>(
    driver: &D,
    experts: &[Linear<'_>],
    plain: &mut Vec<usize>,
    parts: &mut Vec<Part<D>>,
    outputs: &mut usize,
    dtype: DType,
) -> Result<(), BackendError> {
    if plain.is_empty() {
        return Ok(());
    }
    let mut bytes = Vec::new();
    for linear in experts {
        for at in plain.iter() {
            let MatrixView::Plain(view) = &linear.parts[*at] else {
                return Err(refused(linear.parts[*at].name(), "experts of different formats".to_owned()));
            };
            (0..view.rows).for_each(|row| append(&mut bytes, view.row(row), view.dtype, dtype));
        }
    }
    let rows = plain.drain(..).map(|at| experts[0].parts[at].rows()).sum();
    parts.push(Part { first: *outputs, outputs: rows, data: Data::Plain(Memory::of(driver, &bytes)?) });
    *outputs += rows;
    Ok(())
}

/// Part `at` of every expert.
fn quantised<D: Driver>(driver: &D, experts: &[Linear<'_>], at: usize) -> Result<Data<D>, BackendError> {
    let mut views: Vec<&QuantView<'_>> = Vec::with_capacity(experts.len());
    for linear in experts {
        match &linear.parts[at] {
            MatrixView::Quantised(view)
                if views.first().is_none_or(|first| {
                    let dtype = |view: &QuantView<'_>| view.scales.map(|scales| scales.dtype);
                    (view.format, view.origin, dtype(view)) == (first.format, first.origin, dtype(first))
                }) =>
            {
                views.push(view);
            }
            other => return Err(refused(other.name(), "experts of different formats".to_owned())),
        }
    }
    let first = views[0];
    let row_bytes = first.format.code_bytes(first.cols);
    let mut codes = Vec::with_capacity(views.len() * first.rows * row_bytes);
    views.iter().for_each(|view| (0..view.rows).for_each(|row| codes.extend_from_slice(view.codes(row))));
    let dense = |of: for<'v> fn(&QuantView<'v>) -> Option<TensorView<'v>>| -> Vec<u8> {
        let all = views.iter().filter_map(|view| of(view));
        all.flat_map(|view| (0..view.rows).flat_map(move |row| view.row(row).to_vec())).collect()
    };
    let (scales, biases) = (dense(|view| view.scales), dense(|view| view.biases));
    let memory =
        vec![Memory::of(driver, &codes)?, Memory::of(driver, &scales)?, Memory::of(driver, &biases)?];
    let (format, bits, group, group_rows) = match first.format {
        Quant::Affine { bits, group } => (0, bits, group, 1),
        Quant::Int4 { group } => (1, 4, group, 1),
        Quant::Fp8 { rows, cols } => (2, 8, cols, rows),
        Quant::Gguf(block) => (gguf_code(block), 0, block.cols(), 1),
    };
    if first.biases.zip(first.scales).is_some_and(|(biases, scales)| biases.dtype != scales.dtype) {
        return Err(refused(first.name, "scales and biases of different types".to_owned()));
    }
    let args = QuantArgs {
        codes: memory[0].address,
        scales: memory[1].address,
        biases: memory[2].address,
        format,
        bits: bits as u32,
        group: group as u32,
        group_rows: group_rows as u32,
        origin_row: first.origin.0 as u32,
        origin_col: first.origin.1 as u32,
        scale_type: first.scales.map_or(0, |scales| match scales.dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
        }),
        scale_cols: first.scales.map_or(0, |scales| scales.cols as u32),
        row_bytes: row_bytes as u32,
        cols: first.cols as u32,
    };
    let scales_expert = first.scales.map_or(0, |scales| (scales.rows * scales.cols) as u64);
    Ok(Data::Quantised { args, strides: ((first.rows * row_bytes) as u64, scales_expert), _memory: memory })
}

/// As `enum Format` in `kernels/quant.cuh`.
fn gguf_code(block: GgufBlock) -> u32 {
    match block {
        GgufBlock::Q4_0 => 3,
        GgufBlock::Q4_1 => 4,
        GgufBlock::Q5_0 => 5,
        GgufBlock::Q5_1 => 6,
        GgufBlock::Q8_0 => 7,
        GgufBlock::Q4K => 8,
        GgufBlock::Q5K => 9,
        GgufBlock::Q6K => 10,
    }
}
