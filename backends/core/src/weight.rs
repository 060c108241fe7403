//! Weights on their way from a file to a device: views of file bytes, already cut to this rank's share.

use std::fmt;
use std::ops::Range;

use half::{bf16, f16};

use crate::{BackendError, DType, MatrixView};

/// A two-dimensional view `[rows, cols]` of file bytes (a vector has one row).
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Tensor name as in the checkpoint, for messages.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Number of rows (outputs).
    pub rows: usize,
    /// Number of columns (inputs, K).
    pub cols: usize,
    /// Bytes from one row to the next; at least `cols * dtype.bytes()`. Larger when columns were cut away.
    pub row_stride_bytes: usize,
    /// Bytes beginning at `[0, 0]`, little endian.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// The bytes of row `row`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {} in {}", self.rows, self.name);
        let start = row * self.row_stride_bytes;
        &self.bytes[start..start + self.cols * self.dtype.bytes()]
    }

    /// Element `[row, col]` as f32.
    pub fn float(&self, row: usize, col: usize) -> f32 {
        let item = self.dtype.bytes();
        let mut out = [0.0];
        widen(self.dtype, &self.row(row)[col * item..(col + 1) * item], &mut out);
        out[0]
    }

    /// All elements as f32, row-major.
    pub fn floats(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            widen(self.dtype, self.row(row), out);
        }
        out
    }

    /// Errors when there are fewer bytes than the shape needs.
    pub fn check(&self) -> Result<(), BackendError> {
        let error = |reason: String| Err(BackendError::Weight { name: self.name.to_owned(), reason });
        let (rows, cols, stride) = (self.rows, self.cols, self.row_stride_bytes);
        let row = cols.checked_mul(self.dtype.bytes());
        let needed = row.and_then(|row| rows.checked_sub(1)?.checked_mul(stride)?.checked_add(row));
        match (row, needed) {
            (Some(1..), Some(needed)) if self.bytes.len() < needed => {
                error(format!("{} bytes, {needed} needed", self.bytes.len()))
            }
            (Some(row @ 1..), Some(_)) if stride < row && rows > 1 => {
                error(format!("rows of {row} bytes, {stride} apart"))
            }
            (Some(1..), Some(_)) => Ok(()),
            _ => error(format!("{rows} x {cols} elements")),
        }
    }

    /// Rows and columns of this one. Errors when they lie outside.
    pub fn cut(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Self, BackendError> {
        if rows.end > self.rows || cols.end > self.cols || rows.is_empty() || cols.is_empty() {
            let reason = format!("rows {rows:?}, columns {cols:?} of {} x {}", self.rows, self.cols);
            return Err(BackendError::Weight { name: self.name.to_owned(), reason });
        }
        let start = rows.start * self.row_stride_bytes + cols.start * self.dtype.bytes();
        let bytes = self.bytes.get(start..).unwrap_or_default();
        Ok(TensorView { rows: rows.len(), cols: cols.len(), bytes, ..*self })
    }
}

/// Little-endian elements of `dtype` as f32.
pub fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = f16::from_le_bytes(*b).to_f32();
            }
        }
        DType::BF16 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// How a linear's products over K are summed, so that tensor-parallel ranks join to the same bits as one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KSum {
    /// One sum in ascending K: column-parallel and replicated weights.
    Ascending,
    /// Row-parallel weights: K of the whole model is cut into 8 equal ranges; this rank holds `ranges` of them, each
    /// summed in ascending K, joined as a binary tree. [`crate::Step::all_reduce`] joins the ranks' sums as the same
    /// tree. (`ranges` 1 where K or the split does not divide: then ranks agree within tolerance only.)
    Tree {
        /// Partial sums of this rank: 8, 4, 2 or 1.
        ranges: usize,
    },
}

/// A linear layer: `y = x W^T + bias`, `W` given as parts stacked by rows (q, k and v; gate and up). Parts may differ in
/// format.
#[derive(Clone, Debug)]
pub struct Linear<'a> {
    /// Parts with equal `cols`, stacked by rows.
    pub parts: Vec<MatrixView<'a>>,
    /// One bias per part where the model has them: `[1, rows]`. None with [`KSum::Tree`], see [`crate::Step::bias`], but
    /// for experts, see [`crate::Moe::down`].
    pub bias: Option<Vec<TensorView<'a>>>,
    /// Order of the sums over K.
    pub sum: KSum,
}

/// One small matrix per head: `[rows, heads, in] -> [rows, heads, out]`; for [`crate::Mla`].
#[derive(Clone, Debug)]
pub struct Heads<'a> {
    /// This rank's heads: `[out, in]`, or `[in, out]` when `transposed`; equal shapes.
    pub heads: Vec<MatrixView<'a>>,
    /// Whether rows are inputs. A quantised matrix that must be turned is decoded.
    pub transposed: bool,
    /// Whether outputs are latents ([`crate::Mla::q_to_latent`]), else inputs are ([`crate::Mla::latent_to_value`]).
    pub to_latent: bool,
}

/// The products of a mixture's experts on their way to a device, one at a time: together they are a large part of a model,
/// and a machine that has room for the packed ones may have none for their sources beside.
pub trait ExpertSource {
    /// Number of experts.
    fn count(&self) -> usize;

    /// Gives every expert's product to `take`, in order; its bytes are gone when `take` returns. Errors with the first
    /// error of `take`, or with [`BackendError::Source`] when an expert cannot be read. May be called again.
    fn each(&self, take: &mut TakeExpert<'_>) -> Result<(), BackendError>;
}

impl fmt::Debug for dyn ExpertSource + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} experts", self.count())
    }
}

/// What [`ExpertSource::each`] gives an expert's product to.
pub type TakeExpert<'t> = dyn FnMut(&Linear<'_>) -> Result<(), BackendError> + 't;

/// Experts that are in memory anyway.
impl ExpertSource for &[Linear<'_>] {
    fn count(&self) -> usize {
        self.len()
    }

    fn each(&self, take: &mut TakeExpert<'_>) -> Result<(), BackendError> {
        self.iter().try_for_each(take)
    }
}

/// What [`crate::Backend::load`] turns into a weight.
#[derive(Clone, Debug)]
pub enum WeightSource<'a> {
    /// A product; also serves as embedding table (`parts[0]` rows are the vocabulary) when embeddings are tied.
    Linear(Linear<'a>),
    /// One product per expert, for [`crate::Moe`]: equal shapes and sums, biases of all or none.
    Experts(&'a dyn ExpertSource),
    /// One product per head.
    Heads(Heads<'a>),
    /// A table for [`crate::Step::embed`] only.
    Embedding(MatrixView<'a>),
    /// A norm's scale: `[1, dim]`.
    Norm(TensorView<'a>),
    /// A bias for [`crate::Step::bias`]: `[1, dim]`.
    Bias(TensorView<'a>),
    /// Numbers that stay f32 whatever the step's dtype: `[1, dim]`; for [`crate::Moe::choice_bias`] and
    /// [`crate::Attend::sinks`].
    Exact(TensorView<'a>),
}
