//! `x W^T`: cuts a product into tasks of some panels by some rows, each summing K in order.

use crate::kernel::{Kernels, Sweep};
use crate::lanes::LANES;
use crate::packed::Packed;
use crate::pool::{Pool, Scratch};

/// Panels of one task at most: 128 outputs.
const PANELS_MAX: usize = 8;
/// Rows of one task at most: their sums (48 KiB) and inputs stay in the second cache.
const ROWS_MAX: usize = 96;
/// Inputs summed before the next rows come: two panels of them stay in the first cache.
const INPUTS_BLOCK: usize = 256;
/// Up to so many rows are a tile or two, and weights are read about once: long streams are best.
const ROWS_STREAMING: usize = 12;
/// Tasks per thread that even out unequal speeds.
const TASKS_PER_THREAD: usize = 3;
/// Sums waiting for their partner in a tree of ranges, by level.
const TREE_LEVELS: usize = 4;

/// One product. `x` is `[rows, inputs]`, `out` `[rows, outputs]`, both dense.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) weight: &'a Packed,
    pub(crate) x: *const f32,
    pub(crate) out: *mut f32,
    pub(crate) rows: usize,
}

// SAFETY: tasks read `x` and write disjoint tiles of `out`; both outlive the run of the pool.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes all of `out`, unrounded.
    ///
    /// # Safety
    /// `x` and `out` are valid for the stated shapes, and nobody else touches `out`.
    pub(crate) unsafe fn run(&self, pool: &Pool) {
        if self.rows == 0 {
            return;
        }
        let panels = self.weight.panels();
        let row_blocks = self.rows.div_ceil(ROWS_MAX);
        let enough = (pool.threads() * TASKS_PER_THREAD).div_ceil(row_blocks);
        // Whole groups of a power of two keep the widest tiles busy.
        let mut group = PANELS_MAX;
        while group > 1 && panels.div_ceil(group) < enough {
            group /= 2;
        }
        // Row blocks of even size, so that the last is not a scrap.
        let block = self.rows.div_ceil(row_blocks);
        let work = self.rows * self.weight.inputs * self.weight.outputs;
        pool.run(panels.div_ceil(group) * row_blocks, work, |task, scratch| {
            let (panel, row) = (task / row_blocks * group, task % row_blocks * block);
            // SAFETY: tasks cover disjoint rectangles of `out`.
            unsafe { self.tile(panel, group.min(panels - panel), row, block.min(self.rows - row), scratch) }
        });
    }

    unsafe fn tile(&self, panel: usize, panels: usize, row: usize, rows: usize, scratch: &Scratch<'_>) {
        let w = self.weight;
        let (width, inputs) = (panels * LANES, w.range_inputs());
        // Level i holds sums of 2^i ranges, [rows][width] each.
        let size = rows * width;
        let sums = scratch.floats(size * TREE_LEVELS);
        let block = if rows > ROWS_STREAMING { INPUTS_BLOCK } else { inputs };
        let mut waiting = 0usize;
        for range in 0..w.ranges {
            // SAFETY: bits of `waiting` count ranges, at most 8: the free slot is at most level 3. Weights, x and sums
            // are valid for the panels, rows and inputs named.
            unsafe {
                let slot = waiting.count_ones() as usize;
                let acc = sums.add(slot * size);
                let mut k = 0;
                while k < inputs {
                    let count = block.min(inputs - k);
                    (self.kernels.sweep)(&Sweep {
                        x: self.x.add(row * w.inputs + range * inputs + k),
                        x_stride: w.inputs,
                        rows,
                        layout: w.layout,
                        w: w.at(panel, range, k),
                        panel_stride: w.panel_elements(),
                        k_stride: LANES,
                        panels,
                        k: count,
                        acc,
                        acc_stride: width,
                        fresh: k == 0,
                    });
                    k += count;
                }
                // As in binary counting: a carry joins two sums of equally many ranges.
                let (mut carry, mut top) = (1, slot);
                while waiting & carry != 0 {
                    (self.kernels.add)(sums.add((top - 1) * size), sums.add(top * size), size, false);
                    waiting &= !carry;
                    carry <<= 1;
                    top -= 1;
                }
                waiting |= carry;
            }
        }
        // SAFETY: `out` has these rows and columns; level 0 holds the sum of all ranges (a power of two).
        unsafe {
            let columns = width.min(w.outputs - panel * LANES);
            for r in 0..rows {
                let sum = sums.add(r * width);
                if let Some(bias) = &w.bias {
                    (self.kernels.add)(sum, bias.as_ptr().add(panel * LANES), columns, false);
                }
                let out = self.out.add((row + r) * w.outputs + panel * LANES);
                std::ptr::copy_nonoverlapping(sum, out, columns);
            }
        }
    }
}
