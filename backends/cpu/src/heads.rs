//! One small product per head: `[rows, heads, in] -> [rows, heads, out]`, for latent attention.

use backend::{BackendError, DType, ExpertSource, Heads, KSum, Linear, MatrixView, TakeExpert, TensorView};
use half::bf16;

use crate::coded::{Coded, DECODED_FLOATS};
use crate::kernel::{Kernels, Stretch};
use crate::lanes::LANES;
use crate::packed::{Packed, pack_all, weight_error};
use crate::pool::Pool;

/// Rows of one task at most.
const ROWS_MAX: usize = 96;

/// A weight with a matrix for every head.
#[derive(Debug)]
pub(crate) struct PackedHeads {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    heads: Vec<Packed>,
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
        // bf16 stays bf16; what was quantised otherwise than along inputs is rounded as far as the step rounds.
        let exact = source.heads.iter().all(|head| head.dtype() == Some(DType::BF16));
        let stored = if exact || dtype == DType::BF16 { DType::BF16 } else { DType::F32 };
        let each = Each { source, outputs, inputs, stored };
        Ok(PackedHeads { inputs, outputs, heads: pack_all(&each, kernels, pool)? })
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads.len()
    }
}

/// Heads as linear layers: as they are where they are quantised along their inputs, else as numbers.
struct Each<'a> {
    source: &'a Heads<'a>,
    outputs: usize,
    inputs: usize,
    stored: DType,
}

impl ExpertSource for Each<'_> {
    fn count(&self) -> usize {
        self.source.heads.len()
    }

    fn each(&self, take: &mut TakeExpert<'_>) -> Result<(), BackendError> {
        for head in &self.source.heads {
            if let MatrixView::Quantised(view) = head
                && !self.source.transposed
                && Coded::new(view).is_some()
            {
                take(&linear(*head))?;
                continue;
            }
            let floats = self.numbers(head);
            let bytes: Vec<u8> = match self.stored {
                DType::BF16 => floats.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
                _ => floats.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            take(&linear(MatrixView::Plain(TensorView {
                name: head.name(),
                dtype: self.stored,
                rows: self.outputs,
                cols: self.inputs,
                row_stride_bytes: self.inputs * self.stored.bytes(),
                bytes: &bytes,
            })))?;
        }
        Ok(())
    }
}

fn linear(part: MatrixView<'_>) -> Linear<'_> {
    Linear { parts: vec![part], bias: None, sum: KSum::Ascending }
}

impl Each<'_> {
    /// One head as `[outputs, inputs]`.
    fn numbers(&self, head: &MatrixView<'_>) -> Vec<f32> {
        let (inputs, cols) = (self.inputs, head.cols());
        let mut out = vec![0f32; self.outputs * inputs];
        let mut line = vec![0f32; cols];
        for row in 0..head.rows() {
            head.decode(row, 0..cols, &mut line);
            if self.source.transposed {
                line.iter().enumerate().for_each(|(output, x)| out[output * inputs + row] = *x);
            } else {
                out[row * inputs..][..cols].copy_from_slice(&line);
            }
        }
        out
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
        let work = self.rows * w.heads() * w.inputs * w.outputs;
        let width = w.outputs.next_multiple_of(LANES);
        let soon = |task: usize| {
            let next: Option<&Packed> = w.heads.get(task / blocks);
            next.and_then(|head| head.segments.first()).map_or(std::ptr::null(), |segment| segment.start(0))
        };
        pool.run(w.heads() * blocks, work, |task, scratch| {
            let (head, row) = (task / blocks, task % blocks * block);
            let rows = block.min(self.rows.saturating_sub(row));
            let sums = scratch.floats(rows * width + DECODED_FLOATS);
            let buffer = sums.wrapping_add(rows * width);
            // SAFETY: the inputs and outputs of these rows and this head.
            unsafe {
                let x = self.x.add(row * self.x_strides.0 + head * self.x_strides.1);
                let inputs = (x, self.x_strides.0);
                for segment in &w.heads[head].segments {
                    let soon = soon(pool.next(task));
                    let stretch = Stretch { panel: 0, panels: segment.panels(), soon };
                    segment.sum_floats(self.kernels, stretch, inputs, rows, sums, buffer);
                }
                let out = self.out.add(row * self.out_strides.0 + head * self.out_strides.1);
                (self.kernels.place)(sums, width, out, self.out_strides.0, rows, w.outputs);
            }
        });
    }
}
