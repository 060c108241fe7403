//! Attention over the paged cache: prompt chunks and generated tokens of many sequences in one call.
//!
//! The sums of a row are the same whoever shares its step: positions are cut at multiples of 256 into spans; each span
//! gives a maximum, a sum of weights (lanes are positions modulo 16) and a weighted sum of V in ascending position; spans
//! are folded in order. Spans are computed apart when there are few rows, so one long sequence keeps every thread busy.

use std::ops::Range;

use backend::DType;

use crate::kernel::{Kernels, Layout, Sweep};
use crate::kv::Slab;
use crate::lanes::LANES;
use crate::memory::Arena;
use crate::pool::{Pool, Scratch};
use crate::rope::Angles;

/// Positions of a span: the unit in which softmax sums are folded.
const SPAN: usize = 256;
/// Query rows (rows times heads that share a KV head) of one task: K of a span is turned once for all of them.
const QUERIES_MAX: usize = 96;
/// Query rows that a mask cuts at almost the same position, in a span that needs cutting.
const QUERIES_CUT: usize = 12;
/// Up to so many query rows a sequence's spans may go to different threads.
const QUERIES_SPLIT_MAX: usize = 32;
const TASKS_PER_THREAD: usize = 4;

/// One call of attention on one layer.
pub(crate) struct Attention<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) slab: &'a Slab,
    pub(crate) layer: usize,
    pub(crate) runs: Vec<Rows<'a>>,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<u32>,
    pub(crate) bf16: bool,
    /// `[rows, heads + 2 kv_heads, dim]`.
    pub(crate) qkv: *mut f32,
    /// `[rows, heads, dim]`.
    pub(crate) out: *mut f32,
}

/// What is done to q and k before they meet.
pub(crate) struct Prepare<'a> {
    pub(crate) angles: &'a Angles,
    pub(crate) frequencies: usize,
    pub(crate) interleaved: bool,
    pub(crate) q_norm: Option<&'a [f32]>,
    pub(crate) k_norm: Option<&'a [f32]>,
    pub(crate) eps: f32,
}

/// The rows of one sequence in this step.
pub(crate) struct Rows<'a> {
    /// Blocks of the sequence.
    pub(crate) table: &'a [u32],
    /// First row in the batch.
    pub(crate) row: usize,
    /// Position of that row.
    pub(crate) start: usize,
    pub(crate) len: usize,
}

/// Rows of one sequence and one KV head, over some spans.
struct Unit {
    run: usize,
    kv_head: usize,
    /// Rows of the run.
    rows: Range<usize>,
    spans: Range<usize>,
    /// Where the spans' partial sums go (floats), or `None`: this task folds them itself.
    partial: Option<usize>,
}

// SAFETY: tasks read shared inputs and write disjoint parts of `qkv`, the cache and `out`, as argued at each.
unsafe impl Sync for Attention<'_> {}

/// Raw memory that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: see Attention.
unsafe impl Sync for Shared {}
// SAFETY: see Attention.
unsafe impl Send for Shared {}

/// A span's sums of some query rows: maxima, totals, and weighted V padded to whole lanes.
#[derive(Clone, Copy)]
struct Sums {
    peak: *mut f32,
    total: *mut f32,
    value: *mut f32,
}

impl Attention<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn stride(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    fn padded_dim(&self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    fn sums_floats(&self, queries: usize) -> usize {
        queries.next_multiple_of(LANES) * 2 + queries * self.padded_dim()
    }

    fn sums(&self, at: *mut f32, queries: usize) -> Sums {
        let line = queries.next_multiple_of(LANES);
        Sums { peak: at, total: at.wrapping_add(line), value: at.wrapping_add(2 * line) }
    }

    /// Element type of a plane (0: K, 1: V).
    fn dtype(&self, plane: usize) -> DType {
        self.slab.spec.planes[plane].dtype
    }

    /// Where K or V of `position` and `kv_head` lies.
    fn place(&self, run: &Rows<'_>, plane: usize, position: usize, kv_head: usize) -> *mut u8 {
        let block_tokens = self.slab.block_tokens as usize;
        let token = self.slab.token(
            self.layer,
            plane,
            run.table[position / block_tokens],
            (position % block_tokens) as u32,
        );
        // A token's row holds all heads of this rank.
        token.wrapping_add(kv_head * self.slab.spec.planes[plane].head_bytes())
    }

    /// Norm and rope of q (in place) and k, and K and V into the cache.
    ///
    /// # Safety
    /// `qkv` is valid, and the cache of every run's rows is for this step alone to write.
    pub(crate) unsafe fn prepare(&self, prepare: &Prepare<'_>, pool: &Pool) {
        let rows: usize = self.runs.iter().map(|run| run.len).sum();
        let block = rows.div_ceil(pool.threads() * TASKS_PER_THREAD).max(4);
        pool.run(rows.div_ceil(block), |task, scratch| {
            for row in task * block..rows.min((task + 1) * block) {
                let at = self.runs.partition_point(|run| run.row + run.len <= row);
                // SAFETY: each row is prepared by one task; its qkv row and cache positions are its own.
                unsafe { self.prepare_row(prepare, &self.runs[at], row, scratch) };
            }
        });
    }

    unsafe fn prepare_row(&self, prepare: &Prepare<'_>, run: &Rows<'_>, row: usize, scratch: &Scratch<'_>) {
        let position = run.start + row - run.row;
        let (k, dim) = (self.kernels, self.dim);
        let rotary = row * prepare.frequencies..(row + 1) * prepare.frequencies;
        let (cos, sin) = (&prepare.angles.cos[rotary.clone()], &prepare.angles.sin[rotary]);
        // SAFETY: the row has heads + 2 kv_heads heads of dim floats.
        unsafe {
            let base = self.qkv.add(row * self.stride());
            for head in 0..self.heads + self.kv_heads {
                let x = base.add(head * dim);
                let norm = if head < self.heads { prepare.q_norm } else { prepare.k_norm };
                match norm {
                    Some(weight) => (k.norm)(x, weight.as_ptr(), x, dim, prepare.eps, self.bf16),
                    None => (k.round)(x, x, dim, self.bf16),
                }
                if prepare.interleaved {
                    deinterleave(x, prepare.frequencies, scratch.floats(dim));
                }
                (k.rotate)(x, cos.as_ptr(), sin.as_ptr(), prepare.frequencies, self.bf16);
            }
            for kv_head in 0..self.kv_heads {
                for plane in 0..2 {
                    let x = base.add((self.heads + plane * self.kv_heads + kv_head) * dim);
                    let place = self.place(run, plane, position, kv_head);
                    match self.dtype(plane) {
                        DType::F32 => (k.round)(x, place.cast(), dim, self.bf16),
                        _ => (k.narrow)(x, place.cast(), dim),
                    }
                }
            }
        }
    }

    /// Attention of every row over the cache, into `out`.
    ///
    /// # Safety
    /// [`Attention::prepare`] has run; nobody writes the positions that the rows read; `out` is ours alone.
    pub(crate) unsafe fn run(&self, pool: &Pool, arena: &Arena) {
        let (units, folds, floats) = self.plan(pool.threads());
        let mut partials = arena.floats(floats);
        let shared = Shared(partials.as_mut_ptr());
        pool.run(units.len(), |task, scratch| {
            // SAFETY: units cover disjoint rows and heads of `out`, or disjoint places of the partial sums.
            unsafe { self.unit(&units[task], shared, scratch) }
        });
        pool.run(folds.len(), |task, scratch| {
            // SAFETY: folds cover disjoint rows and heads of `out`; the partial sums are complete.
            unsafe { self.fold_partials(&folds[task], shared, scratch) }
        });
    }

    /// The first position that a row at `position` attends to.
    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
    }

    /// Spans that rows `[rows.start, rows.end)` of a run attend to.
    fn spans(&self, run: &Rows<'_>, rows: &Range<usize>) -> Range<usize> {
        self.first(run.start + rows.start) / SPAN..(run.start + rows.end).div_ceil(SPAN)
    }

    /// Tasks, those whose partial sums must be folded afterwards, and the floats these take.
    fn plan(&self, threads: usize) -> (Vec<Unit>, Vec<Unit>, usize) {
        let block = (QUERIES_MAX / self.group()).max(1);
        let mut whole = Vec::new();
        for (run, rows) in self.runs.iter().enumerate() {
            // Later rows attend to more: they go first, so that the last tasks are short.
            for from in (0..rows.len).step_by(block).rev() {
                let of = from..rows.len.min(from + block);
                let spans = self.spans(rows, &of);
                whole.extend((0..self.kv_heads).map(|kv_head| Unit {
                    run,
                    kv_head,
                    rows: of.clone(),
                    spans: spans.clone(),
                    partial: None,
                }));
            }
        }
        let tasks = threads * TASKS_PER_THREAD;
        if threads == 1 || whole.len() >= tasks {
            return (whole, Vec::new(), 0);
        }
        let spans: usize = whole.iter().map(|unit| unit.spans.len()).sum();
        let together = spans.div_ceil(tasks);
        let (mut units, mut folds, mut floats) = (Vec::new(), Vec::new(), 0);
        for mut unit in whole {
            let queries = unit.rows.len() * self.group();
            if unit.spans.len() <= together || queries > QUERIES_SPLIT_MAX {
                units.push(unit);
                continue;
            }
            let size = self.sums_floats(queries).next_multiple_of(LANES);
            for from in unit.spans.clone().step_by(together) {
                let partial = Some(floats + (from - unit.spans.start) * size);
                let spans = from..unit.spans.end.min(from + together);
                units.push(Unit { rows: unit.rows.clone(), spans, partial, ..unit });
            }
            unit.partial = Some(floats);
            floats += unit.spans.len() * size;
            folds.push(unit);
        }
        (units, folds, floats)
    }

    unsafe fn unit(&self, unit: &Unit, partials: Shared, scratch: &Scratch<'_>) {
        let queries = unit.rows.len() * self.group();
        let size = self.sums_floats(queries).next_multiple_of(LANES);
        let (q_floats, turned) = (queries * self.dim.next_multiple_of(LANES), SPAN * self.padded_dim());
        let all = scratch.floats(q_floats + 2 * turned + queries * SPAN + 2 * size);
        // SAFETY: the parts of the scratch follow each other; partial places are this unit's.
        unsafe {
            let k_turned = all.add(q_floats);
            let v_padded = k_turned.add(turned);
            let scores = v_padded.add(turned);
            let part = scores.add(queries * SPAN);
            let acc = self.sums(part.add(size), queries);
            let run = &self.runs[unit.run];
            for query in 0..queries {
                let (row, head) = (run.row + unit.rows.start + query / self.group(), query % self.group());
                let from =
                    self.qkv.add(row * self.stride() + (unit.kv_head * self.group() + head) * self.dim);
                std::ptr::copy_nonoverlapping(from, all.add(query * self.dim), self.dim);
            }
            for span in unit.spans.clone() {
                let place = match unit.partial {
                    Some(at) => partials.0.add(at + (span - unit.spans.start) * size),
                    None => part,
                };
                let sums = self.sums(place, queries);
                self.span(unit, span, all, k_turned, v_padded, scores, sums);
                if unit.partial.is_none() {
                    self.fold(unit, span, acc, sums);
                }
            }
            if unit.partial.is_none() {
                self.finish(unit, acc);
            }
        }
    }

    unsafe fn fold_partials(&self, unit: &Unit, partials: Shared, scratch: &Scratch<'_>) {
        let queries = unit.rows.len() * self.group();
        let size = self.sums_floats(queries).next_multiple_of(LANES);
        let acc = self.sums(scratch.floats(size), queries);
        let at = unit.partial.unwrap_or(0);
        for span in unit.spans.clone() {
            // SAFETY: the partial sums of each span of this unit follow each other.
            unsafe {
                let place = partials.0.add(at + (span - unit.spans.start) * size);
                self.fold(unit, span, acc, self.sums(place, queries));
            }
        }
        // SAFETY: the rows and heads of this unit in `out` are its own.
        unsafe { self.finish(unit, acc) }
    }

    /// What query row `query` attends to within `span`, as offsets; `None`: nothing.
    fn within(&self, unit: &Unit, span: usize, query: usize) -> Option<Range<usize>> {
        let position = self.runs[unit.run].start + unit.rows.start + query / self.group();
        let from = self.first(position).max(span * SPAN);
        let to = (position + 1).min((span + 1) * SPAN);
        (from < to).then(|| from - span * SPAN..to - span * SPAN)
    }

    /// The sums of one span: scores, weights, weighted V.
    #[allow(clippy::too_many_arguments)]
    unsafe fn span(
        &self,
        unit: &Unit,
        span: usize,
        q: *const f32,
        k_turned: *mut f32,
        v_padded: *mut f32,
        scores: *mut f32,
        sums: Sums,
    ) {
        let run = &self.runs[unit.run];
        let queries = unit.rows.len() * self.group();
        let base = span * SPAN;
        // [low, high): what any of the rows attends to, as offsets in the span
        let low = self.first(run.start + unit.rows.start).saturating_sub(base);
        let high = (run.start + unit.rows.end - base).min(SPAN);
        let (first_panel, panels) = (low / LANES, high.div_ceil(LANES));
        // SAFETY: positions [base + low, base + high) are readable; scratch parts have their full sizes.
        unsafe {
            // K of 16 positions a panel, K-major; positions behind the last are stood in for by the last.
            let words = self.dim * self.dtype(0).bytes() / 4;
            for panel in first_panel..panels {
                let rows = std::array::from_fn(|lane| {
                    let position = (panel * LANES + lane).clamp(low, high - 1);
                    self.place(run, 0, base + position, unit.kv_head).cast_const()
                });
                (self.kernels.transpose)(&rows, words, k_turned.cast::<u32>().add(panel * words * LANES));
            }
            let pad = !self.dim.is_multiple_of(LANES);
            if pad {
                self.pad_values(unit, base, low..high, v_padded);
            }
            std::ptr::write_bytes(sums.value, 0, queries * self.padded_dim());
            let mut query = 0;
            while query < queries {
                let (first, last) = (self.within(unit, span, query), self.within(unit, span, queries - 1));
                // All rows see the same positions: one piece. Else a mask passes through: a few rows at a time.
                let count = if first.is_some() && first == last { queries - query } else { QUERIES_CUT };
                let of = query..queries.min(query + count);
                self.piece(unit, span, of.clone(), q, k_turned, v_padded, scores, sums);
                query = of.end;
            }
        }
    }

    /// The sums of some query rows over one span.
    #[allow(clippy::too_many_arguments)]
    unsafe fn piece(
        &self,
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        q: *const f32,
        k_turned: *const f32,
        v_padded: *const f32,
        scores: *mut f32,
        sums: Sums,
    ) {
        let ranges: Vec<Range<usize>> =
            of.clone().map(|query| self.within(unit, span, query).unwrap_or(0..0)).collect();
        let present = || ranges.iter().filter(|range| !range.is_empty());
        let Some(low) = present().map(|range| range.start).min() else { return };
        let high = present().map(|range| range.end).max().unwrap_or(low);
        let (first, panels) = (low / LANES, high.div_ceil(LANES));
        let panel_stride = self.dim * LANES;
        let layout = if self.dtype(0) == DType::F32 { Layout::F32 } else { Layout::Bf16Pairs };
        // SAFETY: panels [first, panels) are turned; scores has a line of 256 floats per query row.
        unsafe {
            (self.kernels.sweep)(&Sweep {
                x: q.add(of.start * self.dim),
                x_stride: self.dim,
                rows: of.len(),
                layout,
                w: k_turned.cast::<u8>().add(first * panel_stride * self.dtype(0).bytes()),
                panel_stride,
                k_stride: LANES,
                panels: panels - first,
                k: self.dim,
                acc: scores.add(of.start * SPAN + first * LANES),
                acc_stride: SPAN,
                fresh: true,
            });
            for (query, range) in of.clone().zip(&ranges).filter(|(_, range)| !range.is_empty()) {
                let line = scores.add(query * SPAN);
                let (peak, total) = (self.kernels.softmax)(line, range.start, range.end, self.scale);
                *sums.peak.add(query) = peak;
                *sums.total.add(query) = total;
            }
            // Every row sums exactly its own positions: first those before all rows begin, one row at a time, then the
            // common ones together, then the rest.
            let common_from = ranges.iter().map(|range| range.start).max().unwrap_or(0);
            let common_to = ranges.iter().map(|range| range.end).min().unwrap_or(0);
            if common_from < common_to {
                for (query, range) in of.clone().zip(&ranges) {
                    self.values(
                        unit,
                        span,
                        query..query + 1,
                        range.start..common_from,
                        v_padded,
                        scores,
                        sums,
                    );
                }
                self.values(unit, span, of.clone(), common_from..common_to, v_padded, scores, sums);
                for (query, range) in of.clone().zip(&ranges) {
                    self.values(unit, span, query..query + 1, common_to..range.end, v_padded, scores, sums);
                }
            } else {
                for (query, range) in of.clone().zip(&ranges) {
                    self.values(unit, span, query..query + 1, range.clone(), v_padded, scores, sums);
                }
            }
        }
    }

    /// Adds weight times V of positions `range` (offsets in the span) for some query rows, in ascending position.
    #[allow(clippy::too_many_arguments)]
    unsafe fn values(
        &self,
        unit: &Unit,
        span: usize,
        of: Range<usize>,
        range: Range<usize>,
        v_padded: *const f32,
        scores: *const f32,
        sums: Sums,
    ) {
        let run = &self.runs[unit.run];
        let pad = !self.dim.is_multiple_of(LANES);
        let mut from = range.start;
        while from < range.end {
            let (layout, w, k_stride, count) = if pad {
                let w = v_padded.wrapping_add(from * self.padded_dim()).cast();
                (Layout::F32, w, self.padded_dim(), range.end - from)
            } else {
                let layout = if self.dtype(1) == DType::F32 { Layout::F32 } else { Layout::Bf16 };
                let w = self.place(run, 1, span * SPAN + from, unit.kv_head).cast_const();
                let count = self.adjacent(run, span * SPAN + from).min(range.end - from);
                (layout, w, self.kv_heads * self.dim, count)
            };
            // SAFETY: `count` positions follow each other at `w`; rows of scores and sums are those of the unit.
            unsafe {
                (self.kernels.sweep)(&Sweep {
                    x: scores.add(of.start * SPAN + from),
                    x_stride: SPAN,
                    rows: of.len(),
                    layout,
                    w,
                    panel_stride: LANES,
                    k_stride,
                    panels: self.padded_dim() / LANES,
                    k: count,
                    acc: sums.value.add(of.start * self.padded_dim()),
                    acc_stride: self.padded_dim(),
                    fresh: false,
                });
            }
            from += count;
        }
    }

    /// Positions from `position` on that lie in memory one after the other.
    fn adjacent(&self, run: &Rows<'_>, position: usize) -> usize {
        let block_tokens = self.slab.block_tokens as usize;
        let mut block = position / block_tokens;
        while block + 1 < run.table.len() && run.table[block + 1] == run.table[block] + 1 {
            block += 1;
            if (block + 1) * block_tokens - position >= SPAN {
                break;
            }
        }
        (block + 1) * block_tokens - position
    }

    /// V of a head whose size is not a multiple of 16, as f32 in padded rows.
    unsafe fn pad_values(&self, unit: &Unit, base: usize, range: Range<usize>, out: *mut f32) {
        let run = &self.runs[unit.run];
        for offset in range {
            let place = self.place(run, 1, base + offset, unit.kv_head);
            // SAFETY: a head of V has dim elements; out has a padded row per position of the span.
            unsafe {
                let row = out.add(offset * self.padded_dim());
                std::ptr::write_bytes(row, 0, self.padded_dim());
                for at in 0..self.dim {
                    *row.add(at) = match self.dtype(1) {
                        DType::F32 => *place.cast::<f32>().add(at),
                        _ => f32::from_bits(u32::from(*place.cast::<u16>().add(at)) << 16),
                    };
                }
            }
        }
    }

    /// Folds the sums of `span` into those of the spans before it.
    unsafe fn fold(&self, unit: &Unit, span: usize, acc: Sums, part: Sums) {
        let n = self.padded_dim();
        for query in 0..unit.rows.len() * self.group() {
            if self.within(unit, span, query).is_none() {
                continue;
            }
            let begun = span > 0 && self.within(unit, span - 1, query).is_some();
            // SAFETY: both sums have a line per query row.
            unsafe {
                let (peak, total) = (acc.peak.add(query), acc.total.add(query));
                let (value, part_value) = (acc.value.add(query * n), part.value.add(query * n));
                let (part_peak, part_total) = (*part.peak.add(query), *part.total.add(query));
                if !begun {
                    *peak = part_peak;
                    *total = part_total;
                    std::ptr::copy_nonoverlapping(part_value, value, n);
                    continue;
                }
                let higher = if part_peak > *peak { part_peak } else { *peak };
                let (a, b) = ((self.kernels.exp)(*peak - higher), (self.kernels.exp)(part_peak - higher));
                *peak = higher;
                *total = *total * a + part_total * b;
                (self.kernels.blend)(value, part_value, n, a, b);
            }
        }
    }

    unsafe fn finish(&self, unit: &Unit, acc: Sums) {
        let run = &self.runs[unit.run];
        for query in 0..unit.rows.len() * self.group() {
            let (row, head) = (run.row + unit.rows.start + query / self.group(), query % self.group());
            let head = unit.kv_head * self.group() + head;
            // SAFETY: `out` has this row and head; they are this unit's.
            unsafe {
                let out = self.out.add((row * self.heads + head) * self.dim);
                let value = acc.value.add(query * self.padded_dim());
                (self.kernels.divide)(value, *acc.total.add(query), out, self.dim, self.bf16);
            }
        }
    }
}

/// `(2 i, 2 i + 1)` pairs to `(i, i + n)`.
///
/// # Safety
/// 2 n floats at `x` and at `held`.
unsafe fn deinterleave(x: *mut f32, n: usize, held: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..n {
            *held.add(i) = *x.add(2 * i);
            *held.add(n + i) = *x.add(2 * i + 1);
        }
        std::ptr::copy_nonoverlapping(held, x, 2 * n);
    }
}
