//! Weights on their way from a file to a device: views of file bytes, already cut to this rank's share.

use crate::DType;

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

/// A linear layer: `y = x W^T + bias`, `W` given as parts stacked by rows (q, k and v; gate and up).
#[derive(Clone, Debug)]
pub struct Linear<'a> {
    /// Parts with equal `cols`, stacked by rows.
    pub parts: Vec<TensorView<'a>>,
    /// One bias per part where the model has them: `[1, rows]`. None with [`KSum::Tree`], see [`crate::Step::bias`].
    pub bias: Option<Vec<TensorView<'a>>>,
    /// Order of the sums over K.
    pub sum: KSum,
}

/// What [`crate::Backend::load`] turns into a weight.
#[derive(Clone, Debug)]
pub enum WeightSource<'a> {
    /// A product; also serves as embedding table (`parts[0]` rows are the vocabulary) when embeddings are tied.
    Linear(Linear<'a>),
    /// A table for [`crate::Step::embed`] only.
    Embedding(TensorView<'a>),
    /// A norm's scale: `[1, dim]`.
    Norm(TensorView<'a>),
    /// A bias for [`crate::Step::bias`]: `[1, dim]`.
    Bias(TensorView<'a>),
}
