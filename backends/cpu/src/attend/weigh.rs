//! Weighted V of one span where the level multiplies pairs of bf16: V of two positions side by side, weights rounded to
//! bf16, pairs in ascending order.

use std::ops::Range;

use super::{Attention, QUERIES_FEW, SPAN, Unit};
use crate::kernel::{PairKernels, Pairs, Sums, Weigh};
use crate::lanes::LANES;

/// Positions that are asked for ahead of use.
const AHEAD: usize = 24;
/// bf16 of one panel of V: 16 elements of every position of a span.
const PANEL: usize = SPAN * LANES;

impl Attention<'_> {
    /// Floats that V of a span takes in pairs.
    pub(super) fn paired_floats(&self) -> usize {
        self.padded_dim() / LANES * PANEL / 2
    }

    /// Whether V of two positions is put side by side in registers, for each few rows anew, instead of in memory for all; and by what.
    pub(super) fn in_place(&self, unit: &Unit) -> Option<unsafe fn(&Weigh)> {
        let few = unit.rows.len() * self.group() <= QUERIES_FEW
            && self.value_dim.is_multiple_of(LANES)
            && self.slab.block_tokens >= 2;
        self.pairs.and_then(|kernels| kernels.weigh).filter(|_| few)
    }

    /// The last offset up to `offset` at which sums over positions may begin.
    pub(super) fn turn(&self, offset: usize) -> usize {
        self.pairs.map_or(offset, |kernels| offset / kernels.turn * kernels.turn)
    }

    /// V of positions `range` (offsets in the span) as `out[panel][position / 2][16][2]`. Positions outside are zeros.
    pub(super) unsafe fn pair_values(
        &self,
        kernels: &PairKernels,
        unit: &Unit,
        base: usize,
        range: Range<usize>,
        out: *mut f32,
    ) {
        let (run, plane) = (&self.runs[unit.run], self.planes.values());
        let place = |offset: usize| match range.contains(&offset) {
            true => self.place(run, plane, base + offset, unit.group).cast_const().cast(),
            false => std::ptr::null(),
        };
        for pair in self.turn(range.start) / 2..range.end.div_ceil(2) {
            let to = out.cast::<u16>().wrapping_add(pair * 2 * LANES);
            let rows = [place(2 * pair), place(2 * pair + 1)];
            // At the end what is there already: nothing lies where no address points, and looking for it takes time.
            let ahead = [0, 1].map(|row| place((2 * pair + row + AHEAD).min(range.end - 1)));
            // SAFETY: readable positions of value_dim elements; `out` has a place for this pair in every panel.
            unsafe { (kernels.interleave)(rows, self.value_dim, to, PANEL, ahead) };
        }
    }

    /// Adds weight times V of positions `range` for query rows `of`.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn weigh(
        &self,
        kernels: &PairKernels,
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        range: Range<usize>,
        v: *mut f32,
        scores: *const f32,
        sums: Sums,
    ) {
        if let Some(weigh) = self.in_place(unit) {
            // SAFETY: the caller's.
            return unsafe { self.weigh_in_place(weigh, unit, span, of, range, scores, sums) };
        }
        let (width, first) = (self.padded_dim(), self.turn(range.start) / 2);
        // SAFETY: rows of scores and sums are those of the unit, and V has the pairs of these positions.
        unsafe {
            (kernels.multiply)(&Pairs {
                x: scores.add(of.start * SPAN).cast::<i32>().add(first),
                x_stride: SPAN,
                rows: of.len(),
                w: v.cast::<u16>().add(first * 2 * LANES),
                panel_stride: PANEL,
                panels: width / LANES,
                pairs: range.end.div_ceil(2) - first,
                acc: sums.value.add(of.start * width),
                acc_stride: width,
                fresh: false,
            });
        }
    }

    /// The same from the cache, as far as positions follow each other.
    #[allow(clippy::too_many_arguments)]
    unsafe fn weigh_in_place(
        &self,
        weigh: unsafe fn(&Weigh),
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        range: Range<usize>,
        scores: *const f32,
        sums: Sums,
    ) {
        let (run, plane, width) = (&self.runs[unit.run], self.planes.values(), self.padded_dim());
        let plane_row = self.slab.spec.planes[plane].token_bytes() / self.dtype(plane).bytes();
        let mut from = range.start / 2 * 2;
        while from < range.end {
            // Blocks hold whole pairs, so a piece ends at an even position or with the range.
            let to = range.end.min(from + self.adjacent(run, span * SPAN + from));
            // SAFETY: positions `[from, to)` follow each other, those that are outside of the range are not read; weights are
            // pairs at the beginning of each row's line of 256 floats.
            unsafe {
                weigh(&Weigh {
                    x: scores.add(of.start * SPAN).cast::<i32>().add(from / 2),
                    x_stride: SPAN,
                    rows: of.len(),
                    v: self.place(run, plane, span * SPAN + from, unit.group).cast_const().cast(),
                    v_stride: plane_row,
                    panels: width / LANES,
                    pairs: (to - from).div_ceil(2),
                    without: (from < range.start, to % 2 == 1),
                    acc: sums.value.add(of.start * width),
                    acc_stride: width,
                });
            }
            from = to;
        }
    }
}
