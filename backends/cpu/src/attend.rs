//! Attention over the paged cache: prompt chunks and generated tokens of many sequences in one call.
//!
//! The sums of a row are the same whoever shares its step: positions are cut at multiples of 256 into spans; each span
//! gives a maximum, a sum of weights (lanes are positions modulo 16) and a weighted sum of V in ascending position; spans
//! are folded in order. Spans are computed apart when there are few rows, so one long sequence keeps every thread busy.

mod latent;
mod prepare;
mod projection;
mod span;
mod weigh;

use std::f32::consts::LN_2;
use std::ops::Range;

use backend::DType;

use crate::kernel::{Kernels, PairKernels, Sums};
use crate::kv::Slab;
use crate::lanes::LANES;
use crate::memory::Arena;
use crate::pool::{Pool, Scratch};
pub(crate) use latent::PrepareLatent;
pub(crate) use prepare::Prepare;
pub(crate) use projection::Projection;

/// Positions of a span: the unit in which softmax sums are folded.
const SPAN: usize = 256;
/// Query rows (rows times heads that share a KV head) of one task: K of a span is turned once for all of them.
const QUERIES_MAX: usize = 96;
/// Query rows that a mask cuts at almost the same position, in a span that needs cutting.
const QUERIES_CUT: usize = 12;
/// Up to so many query rows a sequence's spans may go to different threads.
const QUERIES_SPLIT_MAX: usize = 32;
/// Up to so many query rows read values from the cache as they lie.
const QUERIES_FEW: usize = 8;
const TASKS_PER_THREAD: usize = 4;

/// One call of attention on one layer.
pub(crate) struct Attention<'a> {
    pub(crate) kernels: &'a Kernels,
    /// Where the level multiplies pairs of bf16, and q and the cache are such: q and the weights of the softmax are then
    /// rounded to bf16.
    pub(crate) pairs: Option<PairKernels>,
    pub(crate) slab: &'a Slab,
    pub(crate) layer: usize,
    pub(crate) runs: &'a [Rows<'a>],
    pub(crate) planes: Planes,
    pub(crate) heads: usize,
    /// Groups of consecutive heads that see the same K and V.
    pub(crate) groups: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<u32>,
    /// A score per head that has no value.
    pub(crate) sinks: Option<&'a [f32]>,
    /// Whether `out` is rounded to bf16.
    pub(crate) bf16: bool,
    /// `[rows, heads, key_dim]`, rows `q_stride` apart.
    pub(crate) q: *const f32,
    pub(crate) q_stride: usize,
    /// `[rows, heads, value_dim]`.
    pub(crate) out: *mut f32,
}

/// Where keys and values lie in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planes {
    /// K is plane 0, V plane 1, with a head per group.
    Heads,
    /// A key is plane 0 followed by plane 1, a value plane 0, for all groups.
    Latent,
}

impl Planes {
    /// The planes that make a key.
    fn keys(self) -> &'static [usize] {
        match self {
            Planes::Heads => &[0],
            Planes::Latent => &[0, 1],
        }
    }

    /// The plane of values.
    fn values(self) -> usize {
        match self {
            Planes::Heads => 1,
            Planes::Latent => 0,
        }
    }
}

/// The rows of one sequence in this step.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    /// Blocks of the sequence.
    pub(crate) table: &'a [u32],
    /// First row in the batch.
    pub(crate) row: usize,
    /// Position of that row.
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Rows<'_> {
    /// Where the row of `position` begins in a plane.
    fn place(&self, slab: &Slab, layer: usize, plane: usize, position: usize) -> *mut u8 {
        // A power of two.
        let bits = slab.block_tokens.trailing_zeros();
        let offset = position as u32 & (slab.block_tokens - 1);
        slab.token(layer, plane, self.table[position >> bits], offset)
    }
}

/// Rows of one sequence and one group of heads, over some spans.
#[derive(Debug)]
struct Unit {
    run: usize,
    group: usize,
    /// Rows of the run.
    rows: Range<usize>,
    spans: Range<usize>,
    /// Where the spans' partial sums go (floats), or `None`: this task folds them itself.
    partial: Option<usize>,
}

/// The tasks of one call; kept between calls for its memory.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    units: Vec<Unit>,
    /// Those whose partial sums must be folded afterwards, and the floats these take.
    folds: Vec<Unit>,
    floats: usize,
    /// Units before any is cut.
    whole: Vec<Unit>,
}

// SAFETY: tasks read shared inputs and write disjoint parts of q, the cache and `out`, as argued at each.
unsafe impl Sync for Attention<'_> {}

/// Raw memory that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: see Attention.
unsafe impl Sync for Shared {}
// SAFETY: see Attention.
unsafe impl Send for Shared {}

impl Attention<'_> {
    fn group(&self) -> usize {
        self.heads / self.groups
    }

    /// Floats of a value, padded to whole lanes.
    fn padded_dim(&self) -> usize {
        self.value_dim.next_multiple_of(LANES)
    }

    fn sums_floats(&self, queries: usize) -> usize {
        queries.next_multiple_of(LANES) * 2 + queries * self.padded_dim()
    }

    fn sums(&self, at: *mut f32, queries: usize) -> Sums {
        let line = queries.next_multiple_of(LANES);
        Sums { peak: at, total: at.wrapping_add(line), value: at.wrapping_add(2 * line) }
    }

    /// Sums over no positions.
    unsafe fn clear(&self, sums: &Sums, queries: usize) {
        let line = queries.next_multiple_of(LANES);
        // SAFETY: the floats of `sums`.
        unsafe {
            std::slice::from_raw_parts_mut(sums.peak, line).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(sums.total, line).fill(0.0);
            std::slice::from_raw_parts_mut(sums.value, queries * self.padded_dim()).fill(0.0);
        }
    }

    /// Element type of a plane (0: K, 1: V).
    fn dtype(&self, plane: usize) -> DType {
        self.slab.spec.planes[plane].dtype
    }

    /// Where what `group` sees of `position` lies in a plane.
    fn place(&self, run: &Rows<'_>, plane: usize, position: usize, group: usize) -> *mut u8 {
        // A token's row holds all heads of this rank.
        let head = if self.planes == Planes::Heads { group } else { 0 };
        let row = run.place(self.slab, self.layer, plane, position);
        row.wrapping_add(head * self.slab.spec.planes[plane].head_bytes())
    }

    /// Attention of every row over the cache, into `out`.
    ///
    /// # Safety
    /// The cache holds the rows' own positions already ([`Prepare`]); nobody writes the positions that the rows read; `out` is ours alone.
    pub(crate) unsafe fn run(&self, pool: &Pool, arena: &Arena, plan: &mut Plan) {
        self.plan(pool.threads(), plan);
        let Plan { units, folds, floats, .. } = plan;
        let mut partials = arena.floats(*floats);
        let shared = Shared(partials.as_mut_ptr());
        let seen: usize = self.runs.iter().map(|run| run.len * (run.start + run.len)).sum();
        let work = seen * self.heads * (self.key_dim + self.value_dim);
        pool.run(units.len(), work, |task, scratch| {
            // SAFETY: units cover disjoint rows and heads of `out`, or disjoint places of the partial sums.
            unsafe { self.unit(&units[task], shared, scratch) }
        });
        pool.run(folds.len(), *floats, |task, scratch| {
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

    fn plan(&self, threads: usize, plan: &mut Plan) {
        let Plan { units, folds, floats, whole } = plan;
        units.clear();
        folds.clear();
        *floats = 0;
        let block = (QUERIES_MAX / self.group()).max(1);
        for (run, rows) in self.runs.iter().enumerate() {
            // Later rows attend to more: they go first, so that the last tasks are short.
            for from in (0..rows.len).step_by(block).rev() {
                let of = from..rows.len.min(from + block);
                let spans = self.spans(rows, &of);
                whole.extend((0..self.groups).map(|group| Unit {
                    run,
                    group,
                    rows: of.clone(),
                    spans: spans.clone(),
                    partial: None,
                }));
            }
        }
        let tasks = threads * TASKS_PER_THREAD;
        if threads == 1 || whole.len() >= tasks {
            return units.append(whole);
        }
        let spans: usize = whole.iter().map(|unit| unit.spans.len()).sum();
        let together = spans.div_ceil(tasks);
        for mut unit in whole.drain(..) {
            let queries = unit.rows.len() * self.group();
            if unit.spans.len() <= together || queries > QUERIES_SPLIT_MAX {
                units.push(unit);
                continue;
            }
            let size = self.sums_floats(queries).next_multiple_of(LANES);
            for from in unit.spans.clone().step_by(together) {
                let partial = Some(*floats + (from - unit.spans.start) * size);
                let spans = from..unit.spans.end.min(from + together);
                units.push(Unit { rows: unit.rows.clone(), spans, partial, ..unit });
            }
            unit.partial = Some(*floats);
            *floats += unit.spans.len() * size;
            folds.push(unit);
        }
    }

    unsafe fn unit(&self, unit: &Unit, partials: Shared, scratch: &Scratch<'_>) {
        let queries = unit.rows.len() * self.group();
        let size = self.sums_floats(queries).next_multiple_of(LANES);
        let q_floats = queries * self.key_dim.next_multiple_of(LANES);
        let turned = SPAN * self.key_dim.next_multiple_of(LANES);
        let padded = (SPAN * self.padded_dim()).max(self.paired_floats()).next_multiple_of(LANES);
        let all = scratch.floats(q_floats + turned + padded + queries * SPAN + 2 * size);
        // SAFETY: the parts of the scratch follow each other; partial places are this unit's.
        unsafe {
            let k_turned = all.add(q_floats);
            let v_padded = k_turned.add(turned);
            let scores = v_padded.add(padded);
            let part = scores.add(queries * SPAN);
            let acc = self.sums(part.add(size), queries);
            self.clear(&acc, queries);
            let run = &self.runs[unit.run];
            for query in 0..queries {
                let (row, head) = (run.row + unit.rows.start + query / self.group(), query % self.group());
                let head = unit.group * self.group() + head;
                let from = self.q.add(row * self.q_stride + head * self.key_dim);
                let to = all.add(query * self.key_dim);
                match self.pairs {
                    Some(_) => (self.kernels.narrow)(from, to.cast(), self.key_dim),
                    None => std::ptr::copy_nonoverlapping(from, to, self.key_dim),
                }
            }
            for span in unit.spans.clone() {
                let place = match unit.partial {
                    Some(at) => partials.0.add(at + (span - unit.spans.start) * size),
                    None => part,
                };
                let sums = self.sums(place, queries);
                self.span(unit, span, all, k_turned, v_padded, scores, sums);
                if unit.partial.is_none() {
                    (self.kernels.fold)(&acc, &sums, queries, self.padded_dim());
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
        // SAFETY: the partial sums of each span of this unit follow each other; its rows and heads in `out` are its own.
        unsafe {
            self.clear(&acc, queries);
            for span in 0..unit.spans.len() {
                let part = self.sums(partials.0.add(at + span * size), queries);
                (self.kernels.fold)(&acc, &part, queries, self.padded_dim());
            }
            self.finish(unit, acc);
        }
    }

    /// What query row `query` attends to within `span`, as offsets.
    fn within(&self, unit: &Unit, span: usize, query: usize) -> Range<usize> {
        let position = self.runs[unit.run].start + unit.rows.start + query / self.group();
        let from = self.first(position).max(span * SPAN);
        let to = (position + 1).min((span + 1) * SPAN);
        if from < to { from - span * SPAN..to - span * SPAN } else { 0..0 }
    }

    unsafe fn finish(&self, unit: &Unit, acc: Sums) {
        let run = &self.runs[unit.run];
        for query in 0..unit.rows.len() * self.group() {
            let (row, head) = (run.row + unit.rows.start + query / self.group(), query % self.group());
            let head = unit.group * self.group() + head;
            // SAFETY: `out` has this row and head; they are this unit's.
            unsafe {
                let out = self.out.add((row * self.heads + head) * self.value_dim);
                let value = acc.value.add(query * self.padded_dim());
                let mut total = *acc.total.add(query);
                if let Some(sinks) = self.sinks {
                    // Relative to the largest score, as all weights are. Far above that it is a large number: the rest is nothing then.
                    total += (self.kernels.exp)(sinks[head] - *acc.peak.add(query) * LN_2);
                }
                (self.kernels.divide)(value, total, out, self.value_dim, self.bf16);
            }
        }
    }
}
