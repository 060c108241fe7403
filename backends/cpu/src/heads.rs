//! One small product per head: `[rows, heads, in] -> [rows, heads, out]`, for latent attention.

use backend::{BackendError, DType, Heads, MatrixView, TensorView};
use half::bf16;

use crate::kernel::{Kernels, Sweep};
use crate::lanes::LANES;
use crate::packed::weight_error;
use crate::plain::Plain;
use crate::pool::Pool;

/// Rows of one task at most.
const ROWS_MAX: usize = 96;

/// A weight with a matrix for every head.
#[derive(Debug)]
pub(crate) struct PackedHeads {
    pub(crate) heads: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Heads one below the other, each padded to whole panels.
    packed: Plain,
}

/// One call: where heads' inputs and outputs are.
pub(crate) struct HeadsProduct<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) weight: &'a PackedHeads,
    /// Inputs of row 0 and head 0; floats from one row to the next, and from one head to the next.
    pub(crate) x: *const f32,
    pub(crate) x_strides: (usize, usize),
    /// Outputs likewise.
    pub(crate) out: *mut f32,
    pub(crate) out_strides: (usize, usize),
    pub(crate) rows: usize,
}

// SAFETY: tasks read `x` and write the outputs of their own rows and heads.
unsafe impl Sync for HeadsProduct<'_> {}

impl PackedHeads {
    pub(crate) fn pack(
        source: &Heads<'_>,
        kernels: &Kernels,
        pool: &Pool,
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let Some(first) = source.heads.first() else {
            return Err(weight_error("", "a product of no heads".to_owned()));
        };
        for head in &source.heads {
            head.check()?;
            if (head.rows(), head.cols()) != (first.rows(), first.cols()) {
                let (rows, cols) = (head.rows(), head.cols());
                let reason = format!("{rows} x {cols} beside {} x {}", first.rows(), first.cols());
                return Err(weight_error(head.name(), reason));
            }
        }
        let (outputs, inputs) = match source.transposed {
            true => (first.cols(), first.rows()),
            false => (first.rows(), first.cols()),
        };
        // bf16 stays bf16; what was quantised is rounded as far as the step rounds.
        let exact = source.heads.iter().all(|head| head.dtype() == Some(DType::BF16));
        let stored = if exact || dtype == DType::BF16 { DType::BF16 } else { DType::F32 };
        let padded = outputs.next_multiple_of(LANES);
        let mut floats = vec![0f32; source.heads.len() * padded * inputs];
        for (head, to) in source.heads.iter().zip(floats.chunks_exact_mut(padded * inputs)) {
            unpack(head, source.transposed, inputs, to);
        }
        let bytes: Vec<u8> = match stored {
            DType::BF16 => floats.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => floats.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        let view = TensorView {
            name: first.name(),
            dtype: stored,
            rows: source.heads.len() * padded,
            cols: inputs,
            row_stride_bytes: inputs * stored.bytes(),
            bytes: &bytes,
        };
        let packed = Plain::pack(&view, kernels, pool)?;
        Ok(PackedHeads { heads: source.heads.len(), inputs, outputs, packed })
    }
}

/// One head as `[outputs, inputs]`.
fn unpack(head: &MatrixView<'_>, transposed: bool, inputs: usize, out: &mut [f32]) {
    let cols = head.cols();
    let mut line = vec![0f32; cols];
    for row in 0..head.rows() {
        head.decode(row, 0..cols, &mut line);
        if transposed {
            line.iter().enumerate().for_each(|(output, x)| out[output * inputs + row] = *x);
        } else {
            out[row * inputs..][..cols].copy_from_slice(&line);
        }
    }
}

impl HeadsProduct<'_> {
    /// Computes all outputs, unrounded.
    ///
    /// # Safety
    /// `x` and `out` are valid for the stated shapes, and nobody else touches the outputs.
    pub(crate) unsafe fn run(&self, pool: &Pool) {
        let w = self.weight;
        let blocks = self.rows.div_ceil(ROWS_MAX).max(1);
        let block = self.rows.div_ceil(blocks);
        let work = self.rows * w.heads * w.inputs * w.outputs;
        let panels = w.outputs.div_ceil(LANES);
        pool.run(w.heads * blocks, work, |task, scratch| {
            let (head, row) = (task / blocks, task % blocks * block);
            let rows = block.min(self.rows.saturating_sub(row));
            let width = panels * LANES;
            let sums = scratch.floats(rows * width);
            // SAFETY: the panels of this head, and the inputs and outputs of these rows and this head.
            unsafe {
                (self.kernels.sweep)(&Sweep {
                    x: self.x.add(row * self.x_strides.0 + head * self.x_strides.1),
                    x_stride: self.x_strides.0,
                    rows,
                    layout: w.packed.layout,
                    w: w.packed.at(head * panels, 0, 0),
                    panel_stride: w.packed.panel_elements(),
                    k_stride: LANES,
                    panels,
                    k: w.inputs,
                    acc: sums,
                    acc_stride: width,
                    fresh: true,
                    soon: None,
                });
                let out = self.out.add(row * self.out_strides.0 + head * self.out_strides.1);
                (self.kernels.place)(sums, width, out, self.out_strides.0, rows, w.outputs);
            }
        });
    }
}
