//! Weights as MLX arrays.
//!
//! Plain numbers of the step's dtype stay as they are; others are converted once, at load: exactly for an f32 step, rounded
//! for a 16-bit one (MLX would widen the whole weight at every use instead). Quantised ones stay quantised where one of MLX's
//! forms can say the same numbers (see `part`); the rest (Q2_K, Q6_K, FP8 but MXFP8, FP4 in groups of 16) are decoded at load and rounded to the
//! step's dtype. Heads of latent attention are always decoded.

use std::cell::OnceCell;

use backend::{BackendError, DType, Heads, KSum, Linear, MatrixView, TensorView, WeightSource};
use mlx_rs::{Array, Dtype, ops};

use crate::graph::{Failure, Recorded, int, mlx_type};
use crate::host::matrix;
use crate::part::{Part, merged};
use crate::stack;

/// Outputs of a product whose f32 weight stays f32 in a 16-bit step: that of a router, whose choice hangs on it.
const ROUTER_ROWS_MAX: usize = 1024;

/// A weight of the MLX backend.
#[derive(Debug)]
pub struct MlxWeight(pub(crate) Kind);

#[derive(Debug)]
pub(crate) enum Kind {
    /// A product's weight or an embedding table.
    Product(Product),
    /// Per expert a product, in parts `[experts, rows, cols]` stacked by rows.
    Experts {
        parts: Vec<Part>,
        /// `[experts, rows]`.
        bias: Option<Array>,
        experts: usize,
    },
    /// Per head a product: `[heads, in, out]`.
    Heads(Array),
    /// A norm's scale or a bias.
    Vector {
        /// `[dim]`.
        vector: Array,
        /// The scale of every head and of another norm's, or the vector in another type, once somebody asked.
        made: OnceCell<Array>,
    },
}

/// `[rows, cols]` in parts stacked by rows.
#[derive(Debug)]
pub(crate) struct Product {
    parts: Vec<Part>,
    /// `[rows]`.
    bias: Option<Array>,
    /// The only part in f32 as `[cols, rows]`, once somebody asked.
    wide: OnceCell<Array>,
}

impl Product {
    /// `x W^T + bias`, `[.., out]` in the type of `x`.
    pub(crate) fn of(&self, x: &Array) -> Recorded {
        let mut outs = self.parts.iter().map(|part| part.product(x)).collect::<Result<Vec<_>, _>>()?;
        let product = match outs.len() {
            1 => outs.swap_remove(0),
            _ => ops::concatenate(&outs, -1)?,
        };
        Ok(match &self.bias {
            Some(bias) => product.add(bias)?,
            None => product,
        })
    }

    /// The same with sums that stay f32.
    pub(crate) fn of_wide(&self, x: &Array) -> Recorded {
        let x = x.as_dtype(Dtype::Float32)?;
        let product = match (self.wide.get(), self.parts.as_slice()) {
            (Some(wide), _) => x.matmul(wide)?,
            (None, [part @ Part::Plain { .. }]) => {
                let wide = part.decoded()?.as_dtype(Dtype::Float32)?.swap_axes(-1, -2)?;
                wide.eval()?;
                x.matmul(self.wide.get_or_init(|| wide))?
            }
            _ => self.of(&x)?,
        };
        match &self.bias {
            Some(bias) if self.wide.get().is_some() => Ok(product.add(bias)?),
            _ => Ok(product),
        }
    }

    /// Rows `ids` of the table, in `dtype`. Errors for an id outside.
    pub(crate) fn take(&self, ids: &Array, dtype: Dtype) -> Recorded {
        match self.parts.as_slice() {
            [part] => part.take(ids, dtype),
            parts => Err(Failure(format!("a table in {} parts", parts.len()))),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.parts.iter().map(Part::rows).sum()
    }
}

impl MlxWeight {
    pub(crate) fn load(source: &WeightSource<'_>, dtype: DType) -> Result<Self, BackendError> {
        let kind = match source {
            WeightSource::Linear(linear) => Kind::Product(linear_weight(linear, dtype)?),
            WeightSource::Embedding(table) => {
                let parts = vec![part(table, dtype)?];
                Kind::Product(Product { parts, bias: None, wide: OnceCell::new() })
            }
            WeightSource::Norm(view) | WeightSource::Bias(view) => Kind::vector(vector(&[*view], dtype)?),
            WeightSource::Exact(view) => Kind::vector(vector(&[*view], DType::F32)?),
            WeightSource::Experts(experts) => stack::loaded(*experts, dtype)?,
            WeightSource::Heads(heads) => Kind::Heads(heads_weight(heads, dtype)?),
        };
        // Evaluated now: the bytes may go, and nothing lazy is left over for the first step.
        let arrays: Vec<&Array> = match &kind {
            Kind::Product(Product { parts, bias, .. }) => {
                parts.iter().flat_map(Part::arrays).chain(bias.as_ref()).collect()
            }
            Kind::Experts { parts, bias, .. } => parts.iter().flat_map(Part::arrays).chain(bias).collect(),
            Kind::Heads(array) | Kind::Vector { vector: array, .. } => vec![array],
        };
        mlx_rs::transforms::eval(arrays).map_err(Failure::from)?;
        Ok(MlxWeight(kind))
    }

    /// A scale or bias of `width`.
    pub(crate) fn vector(&self, width: usize) -> Result<&Array, Failure> {
        match &self.0 {
            Kind::Vector { vector, .. } if vector.size() == width => Ok(vector),
            Kind::Vector { vector, .. } => {
                Err(Failure(format!("a vector of {} for width {width}", vector.size())))
            }
            other => Err(Failure(format!("{} where a vector is needed", other.name()))),
        }
    }

    /// This scale for each of `heads` heads of `dim`, then `other`, which is always the same one, for each of `others`:
    /// `[heads + others, dim]`.
    pub(crate) fn with_heads(&self, heads: usize, other: &MlxWeight, others: usize, dim: usize) -> Recorded {
        let Kind::Vector { made, .. } = &self.0 else { return Ok(self.vector(dim)?.clone()) };
        if let Some(made) = made.get().filter(|made| made.shape() == [heads + others, dim].map(int)) {
            return Ok(made.clone());
        }
        let repeated = |scale: &MlxWeight, heads: usize| -> Recorded {
            Ok(ops::broadcast_to(scale.vector(dim)?, &[int(heads), int(dim)])?)
        };
        let all = ops::concatenate(&[repeated(self, heads)?, repeated(other, others)?], 0)?;
        all.eval()?;
        // Heads of another shape, which no model has, are made each time.
        let _ = made.set(all.clone());
        Ok(all)
    }

    /// A vector of `width` in `dtype`, which is always the same one.
    pub(crate) fn vector_in(&self, width: usize, dtype: Dtype) -> Result<&Array, Failure> {
        let vector = self.vector(width)?;
        let Kind::Vector { made, .. } = &self.0 else { return Ok(vector) };
        if vector.dtype() == dtype {
            return Ok(vector);
        }
        if made.get().is_none() {
            let narrow = vector.as_dtype(dtype)?;
            narrow.eval()?;
            let _ = made.set(narrow);
        }
        Ok(made.get().filter(|made| made.dtype() == dtype).unwrap_or(vector))
    }

    /// A product or table.
    pub(crate) fn product(&self) -> Result<&Product, Failure> {
        match &self.0 {
            Kind::Product(product) => Ok(product),
            other => Err(Failure(format!("{} where a matrix is needed", other.name()))),
        }
    }

    /// The products of `experts` experts, and their biases.
    pub(crate) fn experts(&self, wanted: usize) -> Result<(&[Part], Option<&Array>), Failure> {
        match &self.0 {
            Kind::Experts { parts, bias, experts } if *experts == wanted => Ok((parts, bias.as_ref())),
            Kind::Experts { experts, .. } => Err(Failure(format!("{experts} experts, {wanted} needed"))),
            other => Err(Failure(format!("{} where experts are needed", other.name()))),
        }
    }

    /// The products of heads, `[heads, input, output]`.
    pub(crate) fn heads(&self, heads: usize, input: usize, output: usize) -> Result<&Array, Failure> {
        let wanted = [heads, input, output].map(int);
        match &self.0 {
            Kind::Heads(array) if array.shape() == wanted => Ok(array),
            Kind::Heads(array) => Err(Failure(format!("heads {:?}, {wanted:?} needed", array.shape()))),
            other => Err(Failure(format!("{} where heads are needed", other.name()))),
        }
    }
}

impl Kind {
    fn vector(vector: Array) -> Self {
        Kind::Vector { vector, made: OnceCell::new() }
    }

    fn name(&self) -> &'static str {
        match self {
            Kind::Product(_) => "a matrix",
            Kind::Experts { .. } => "experts",
            Kind::Heads(_) => "heads",
            Kind::Vector { .. } => "a vector",
        }
    }
}

/// Checks what a linear layer's parts have in common, but for biases; returns its outputs.
pub(crate) fn check(linear: &Linear<'_>) -> Result<usize, BackendError> {
    let Some(first) = linear.parts.first() else {
        return Err(refused("", "a linear layer without parts".to_owned()));
    };
    match linear.sum {
        KSum::Ascending => {}
        KSum::Tree { ranges } if [1, 2, 4, 8].contains(&ranges) && first.cols() % ranges == 0 => {}
        KSum::Tree { ranges } => {
            return Err(refused(first.name(), format!("{} columns in {ranges} ranges", first.cols())));
        }
    }
    if let Some(part) = linear.parts.iter().find(|part| part.cols() != first.cols()) {
        let reason = format!("{} columns beside {} of {}", part.cols(), first.cols(), first.name());
        return Err(refused(part.name(), reason));
    }
    Ok(linear.parts.iter().map(MatrixView::rows).sum())
}

fn linear_weight(linear: &Linear<'_>, dtype: DType) -> Result<Product, BackendError> {
    let rows = check(linear)?;
    let name = linear.parts[0].name();
    if matches!(linear.sum, KSum::Tree { .. }) && linear.bias.is_some() {
        return Err(refused(name, "a bias belongs after the join of a tree".to_owned()));
    }
    let bias = biases(linear, rows, dtype)?;
    let wide = rows <= ROUTER_ROWS_MAX && linear.parts.iter().all(|part| part.dtype() == Some(DType::F32));
    let dtype = if wide { DType::F32 } else { dtype };
    let parts = linear.parts.iter().map(|view| part(view, dtype)).collect::<Result<Vec<_>, _>>()?;
    let parts = merged(parts).map_err(|failure| refused(name, failure.0))?;
    Ok(Product { parts, bias, wide: OnceCell::new() })
}

/// The biases of a linear layer of `rows` outputs.
pub(crate) fn biases(linear: &Linear<'_>, rows: usize, dtype: DType) -> Result<Option<Array>, BackendError> {
    let bias = linear.bias.as_deref().map(|parts| vector(parts, dtype)).transpose()?;
    match &bias {
        Some(bias) if bias.size() != rows => {
            Err(refused(linear.parts[0].name(), format!("{} biases for {rows} outputs", bias.size())))
        }
        _ => Ok(bias),
    }
}

/// One matrix as MLX multiplies by it.
fn part(view: &MatrixView<'_>, dtype: DType) -> Result<Part, BackendError> {
    match view {
        MatrixView::Plain(view) => Ok(Part::plain(array(view, dtype)?)),
        MatrixView::Quantised(quant) => {
            view.check()?;
            let made = match Part::coded(quant) {
                Some(part) => part.and_then(|part| part.narrowed(mlx_type(dtype))),
                None => decoded(view, dtype).map(Part::plain),
            };
            made.map_err(|failure| refused(view.name(), failure.0))
        }
    }
}

/// The numbers of any matrix, `[rows, cols]` of the step's dtype.
pub(crate) fn decoded(view: &MatrixView<'_>, dtype: DType) -> Recorded {
    let (rows, cols) = (view.rows(), view.cols());
    let mut numbers = vec![0.0; rows * cols];
    for (row, out) in numbers.chunks_exact_mut(cols).enumerate() {
        view.decode(row, 0..cols, out);
    }
    let wide = Array::from_slice(&numbers, &[int(rows), int(cols)]);
    Ok(wide.as_dtype(mlx_type(dtype))?)
}

fn heads_weight(heads: &Heads<'_>, dtype: DType) -> Result<Array, BackendError> {
    let Some(first) = heads.heads.first() else {
        return Err(refused("", "no heads".to_owned()));
    };
    let shape = |view: &MatrixView<'_>| (view.rows(), view.cols());
    if let Some(other) = heads.heads.iter().find(|head| shape(head) != shape(first)) {
        return Err(refused(other.name(), format!("{:?} beside {:?}", shape(other), shape(first))));
    }
    let one = |view: &MatrixView<'_>| {
        view.check()?;
        match view {
            MatrixView::Plain(view) => array(view, dtype),
            MatrixView::Quantised(quant) => named(quant.name, decoded(view, dtype)),
        }
    };
    let all = heads.heads.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    let stacked = || -> Recorded {
        let stacked = ops::stack(&all, 0)?;
        // [heads, in, out]
        Ok(if heads.transposed { stacked } else { stacked.swap_axes(1, 2)?.contiguous()? })
    };
    named(first.name(), stacked())
}

/// Parts of one row each, one after the other.
fn vector(parts: &[TensorView<'_>], dtype: DType) -> Result<Array, BackendError> {
    let mut arrays = Vec::with_capacity(parts.len());
    for part in parts {
        if part.rows != 1 {
            return Err(refused(part.name, format!("{} rows instead of a vector", part.rows)));
        }
        arrays.push(named(part.name, flat(&array(part, dtype)?))?);
    }
    named(parts.first().map_or("", |part| part.name), join(&arrays))
}

fn join(arrays: &[Array]) -> Recorded {
    Ok(ops::concatenate(arrays, 0)?)
}

fn flat(x: &Array) -> Recorded {
    Ok(x.reshape(&[-1])?)
}

/// One tensor in the step's dtype.
pub(crate) fn array(view: &TensorView<'_>, dtype: DType) -> Result<Array, BackendError> {
    let row_bytes = view.cols * view.dtype.bytes();
    let held = view.rows.checked_sub(1).map_or(0, |rows| rows * view.row_stride_bytes + row_bytes);
    if view.rows == 0 || view.cols == 0 || view.row_stride_bytes < row_bytes || view.bytes.len() < held {
        let (rows, cols, got) = (view.rows, view.cols, view.bytes.len());
        return Err(refused(view.name, format!("{got} bytes for {rows} x {cols} of {}", view.dtype)));
    }
    if [view.rows, row_bytes].iter().any(|size| int(*size) == i32::MAX) {
        return Err(refused(view.name, format!("{} x {} is more than an index holds", view.rows, view.cols)));
    }
    let raw = if view.row_stride_bytes == row_bytes {
        matrix(&view.bytes[..held], view.dtype, view.rows, view.cols)
    } else {
        let bytes: Vec<u8> = (0..view.rows).flat_map(|row| view.row(row)).copied().collect();
        matrix(&bytes, view.dtype, view.rows, view.cols)
    };
    named(view.name, raw.and_then(|raw| Ok(raw.as_dtype(mlx_type(dtype))?)))
}

fn named(name: &str, recorded: Recorded) -> Result<Array, BackendError> {
    recorded.map_err(|failure| refused(name, failure.0))
}

pub(crate) fn refused(name: &str, reason: String) -> BackendError {
    BackendError::Weight { name: name.to_owned(), reason }
}
