//! Weighted V of one span where the level multiplies pairs of bf16: V of two positions side by side, weights rounded to
//! bf16. A row sums the pairs of its own positions in ascending order, whoever shares the step.

use std::ops::Range;

use super::{Attention, QUERIES_FEW, SPAN, Sums, Unit};
use crate::kernel::{PairKernels, Pairs, Weigh};
use crate::lanes::LANES;

/// bf16 of one panel of V: 16 elements of every position of a span, and a pair for edges.
const PANEL: usize = SPAN * LANES + 2 * LANES;
/// Where the pair for edges begins.
const EDGE: usize = SPAN * LANES;

impl Attention<'_> {
    /// Floats that V of a span takes in pairs.
    pub(super) fn paired_floats(&self) -> usize {
        self.padded_dim() / LANES * PANEL / 2
    }

    /// Whether V of two positions is put side by side in registers, for each few rows anew, instead of in memory for all.
    pub(super) fn takes_values_as_they_lie(&self, unit: &Unit) -> bool {
        unit.rows.len() * self.group() <= QUERIES_FEW
            && self.value_dim.is_multiple_of(LANES)
            && self.slab.block_tokens >= 2
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
        for pair in range.start / 2..range.end.div_ceil(2) {
            let to = out.cast::<u16>().wrapping_add(pair * 2 * LANES);
            // SAFETY: readable positions of value_dim elements; `out` has a place for this pair in every panel.
            unsafe { (kernels.interleave)(place(2 * pair), place(2 * pair + 1), self.value_dim, to, PANEL) };
        }
    }

    /// Adds weight times V for query rows `of`, each over its own positions.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn weigh(
        &self,
        kernels: &PairKernels,
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        v: *mut f32,
        scores: *const f32,
        sums: Sums,
    ) {
        let own = |query: usize| self.within(unit, span, query).unwrap_or(0..0);
        // Whole pairs that all rows have go together.
        let from = of.clone().map(|query| own(query).start).max().unwrap_or(0).next_multiple_of(2);
        let to = of.clone().map(|query| own(query).end).min().unwrap_or(0) / 2 * 2;
        let (from, to) = if from < to { (from, to) } else { (SPAN, SPAN) };
        // SAFETY: rows of scores and sums are those of the unit, and V has the positions that rows have.
        unsafe {
            self.heads_of_rows(unit, span, &of, |rows, own| {
                self.weigh_some(kernels, unit, span, rows, own.start..own.end.min(from), v, scores, sums);
            });
            self.weigh_some(kernels, unit, span, of.clone(), from..to, v, scores, sums);
            self.heads_of_rows(unit, span, &of, |rows, own| {
                self.weigh_some(kernels, unit, span, rows, own.start.max(to)..own.end, v, scores, sums);
            });
        }
    }

    /// Calls `f` for query rows that see the same positions: the heads of one row.
    fn heads_of_rows(
        &self,
        unit: &Unit,
        span: usize,
        of: &Range<usize>,
        f: impl Fn(Range<usize>, Range<usize>),
    ) {
        let mut query = of.start;
        while query < of.end {
            let end = (query / self.group() + 1) * self.group();
            let rows = query..end.min(of.end);
            query = rows.end;
            if let Some(own) = self.within(unit, span, rows.start) {
                f(rows, own);
            }
        }
    }

    /// Positions `range` for query rows that all have them; a half pair counts as one with zero.
    #[allow(clippy::too_many_arguments)]
    unsafe fn weigh_some(
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
        if range.is_empty() {
            return;
        }
        if self.takes_values_as_they_lie(unit) {
            // SAFETY: the caller's.
            return unsafe { self.weigh_in_place(kernels, unit, span, of, range, scores, sums) };
        }
        let (first, last) = (range.start.next_multiple_of(2), range.end / 2 * 2);
        // SAFETY: the caller's.
        unsafe {
            if range.start < first {
                self.edge(v, range.start);
                self.multiply(kernels, of.clone(), (range.start / 2, 1), EDGE, v, scores, sums);
            }
            if first < last {
                let pairs = (first / 2, (last - first) / 2);
                self.multiply(kernels, of.clone(), pairs, first * LANES, v, scores, sums);
            }
            if last < range.end && last >= first {
                self.edge(v, last);
                self.multiply(kernels, of, (last / 2, 1), EDGE, v, scores, sums);
            }
        }
    }

    /// The same from the cache, as far as positions follow each other.
    #[allow(clippy::too_many_arguments)]
    unsafe fn weigh_in_place(
        &self,
        kernels: &PairKernels,
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
                (kernels.weigh)(&Weigh {
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

    /// V of `position` without its neighbour, in the place for edges.
    unsafe fn edge(&self, v: *mut f32, position: usize) {
        let keep = if position.is_multiple_of(2) { 0x0000_ffff } else { 0xffff_0000u32 };
        for panel in 0..self.padded_dim() / LANES {
            // SAFETY: every panel has this position and a place for edges.
            unsafe {
                let panel = v.cast::<u16>().add(panel * PANEL);
                let (from, to) = (panel.add(position / 2 * 2 * LANES), panel.add(EDGE));
                for lane in 0..LANES {
                    *to.cast::<u32>().add(lane) = *from.cast::<u32>().add(lane) & keep;
                }
            }
        }
    }

    /// `count` pairs from `pair` on, whose V begins at element `at` of a panel.
    #[allow(clippy::too_many_arguments)]
    unsafe fn multiply(
        &self,
        kernels: &PairKernels,
        of: Range<usize>,
        (pair, count): (usize, usize),
        at: usize,
        v: *const f32,
        scores: *const f32,
        sums: Sums,
    ) {
        let width = self.padded_dim();
        // SAFETY: the caller's: weights are pairs at the beginning of each row's line of 256 floats.
        unsafe {
            (kernels.multiply)(&Pairs {
                x: scores.add(of.start * SPAN).cast::<i32>().add(pair),
                x_stride: SPAN,
                rows: of.len(),
                w: v.cast::<u16>().add(at),
                panel_stride: PANEL,
                panels: width / LANES,
                pairs: count,
                acc: sums.value.add(of.start * width),
                acc_stride: width,
                fresh: false,
            });
        }
    }
}
