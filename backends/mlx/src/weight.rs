//! Weights as MLX arrays. A weight of the step's dtype stays as it is; others are converted once, at load: exactly for an
//! f32 step, rounded for a 16-bit one (MLX would widen the whole weight at every use instead).

use backend::{BackendError, DType, KSum, Linear, MatrixView, TensorView, WeightSource};
use mlx_rs::{Array, ops};

use crate::graph::{Failure, Recorded, int, mlx_type};
use crate::host::matrix;

/// A weight of the MLX backend.
#[derive(Debug)]
pub struct MlxWeight(pub(crate) Kind);

#[derive(Debug)]
pub(crate) enum Kind {
    /// A product's weight or an embedding table.
    Matrix {
        /// `[rows, cols]`.
        rows: Array,
        /// The same memory as `[cols, rows]`.
        turned: Array,
        /// `[rows]`.
        bias: Option<Array>,
    },
    /// A norm's scale or a bias: `[dim]`.
    Vector(Array),
}

impl MlxWeight {
    pub(crate) fn load(source: &WeightSource<'_>, dtype: DType) -> Result<Self, BackendError> {
        let kind = match source {
            WeightSource::Linear(linear) => linear_weight(linear, dtype)?,
            WeightSource::Embedding(table) => matrix_weight(table.name(), stacked(&[*table], dtype)?, None)?,
            WeightSource::Norm(view) | WeightSource::Bias(view) => Kind::Vector(vector(&[*view], dtype)?),
            WeightSource::Exact(view) => Kind::Vector(vector(&[*view], DType::F32)?),
            WeightSource::Experts(_) | WeightSource::Heads(_) => {
                return Err(refused("", "experts and heads are not supported yet".to_owned()));
            }
        };
        // Evaluated now: the bytes may go, and nothing lazy is left over for the first step.
        let arrays = match &kind {
            Kind::Matrix { rows, turned, bias } => [Some(rows), Some(turned), bias.as_ref()],
            Kind::Vector(vector) => [Some(vector), None, None],
        };
        mlx_rs::transforms::eval(arrays.into_iter().flatten()).map_err(Failure::from)?;
        Ok(MlxWeight(kind))
    }
}

fn linear_weight(linear: &Linear<'_>, dtype: DType) -> Result<Kind, BackendError> {
    let Some(first) = linear.parts.first() else {
        return Err(refused("", "a linear layer without parts".to_owned()));
    };
    let tree = match linear.sum {
        KSum::Ascending => false,
        KSum::Tree { ranges } if [1, 2, 4, 8].contains(&ranges) && first.cols() % ranges == 0 => true,
        KSum::Tree { ranges } => {
            return Err(refused(first.name(), format!("{} columns in {ranges} ranges", first.cols())));
        }
    };
    if tree && linear.bias.is_some() {
        return Err(refused(first.name(), "a bias belongs after the join of a tree".to_owned()));
    }
    let rows: usize = linear.parts.iter().map(MatrixView::rows).sum();
    let bias = linear.bias.as_deref().map(|parts| vector(parts, dtype)).transpose()?;
    if let Some(bias) = bias.as_ref().filter(|bias| bias.size() != rows) {
        return Err(refused(first.name(), format!("{} biases for {rows} outputs", bias.size())));
    }
    matrix_weight(first.name(), stacked(&linear.parts, dtype)?, bias)
}

fn matrix_weight(name: &str, rows: Array, bias: Option<Array>) -> Result<Kind, BackendError> {
    let turned = named(name, rows.transpose().map_err(Failure::from))?;
    Ok(Kind::Matrix { rows, turned, bias })
}

fn plain<'a>(part: &MatrixView<'a>) -> Result<TensorView<'a>, BackendError> {
    match part {
        MatrixView::Plain(view) => Ok(*view),
        MatrixView::Quantised(view) => {
            Err(refused(view.name, format!("{} is not supported yet", view.format)))
        }
    }
}

/// Parts with equal columns, one below the other.
fn stacked(parts: &[MatrixView<'_>], dtype: DType) -> Result<Array, BackendError> {
    let parts: &[TensorView<'_>] = &parts.iter().map(plain).collect::<Result<Vec<_>, _>>()?;
    let mut arrays = Vec::with_capacity(parts.len());
    for part in parts {
        if part.cols != parts[0].cols {
            let reason = format!("{} columns beside {} of {}", part.cols, parts[0].cols, parts[0].name);
            return Err(refused(part.name, reason));
        }
        arrays.push(array(part, dtype)?);
    }
    match arrays.len() {
        1 => Ok(arrays.swap_remove(0)),
        _ => named(parts[0].name, ops::concatenate(&arrays, 0).map_err(Failure::from)),
    }
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
fn array(view: &TensorView<'_>, dtype: DType) -> Result<Array, BackendError> {
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

fn refused(name: &str, reason: String) -> BackendError {
    BackendError::Weight { name: name.to_owned(), reason }
}
