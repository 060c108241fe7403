//! `x W^T`: cuts a product into tasks of some panels by some rows, each summing K in order.

use std::ops::Range;

use crate::coded::DECODED_FLOATS;
use crate::kernel::{Kernels, Scaled, Stretch};
use crate::lanes::LANES;
use crate::operand::Operand;
use crate::packed::{Packed, Segment};
use crate::pool::{Pool, Scratch};

/// Panels of one task at most: 128 outputs.
const PANELS_MAX: usize = 8;
/// The same for so few rows that weights stream from memory: a stream is slow to begin.
const PANELS_STREAMING: usize = 32;
pub(crate) const ROWS_STREAMING: usize = 4;
/// As many of the last tasks take one's place then.
const TAPER: usize = 4;
/// Rows of one task at most: their sums (48 KiB) and inputs stay in the second cache.
const ROWS_MAX: usize = 96;
/// The same where a task takes codes apart for all its rows, and inputs are half as large.
const ROWS_MAX_WHOLE: usize = 256;
/// Tasks per thread that even out unequal speeds.
pub(crate) const TASKS_PER_THREAD: usize = 3;
/// Places of a tree of up to 8 ranges that are summed one after the other.
const TREE_LEVELS: usize = 4;

/// One product. `x` is `[rows, inputs]`, `out` `[rows, outputs]`, both dense.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) weight: &'a Packed,
    pub(crate) x: Operand<'a>,
    pub(crate) out: *mut f32,
    pub(crate) rows: usize,
}

/// Some panels of a segment by some rows: a task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub(crate) segment: usize,
    pub(crate) panel: usize,
    pub(crate) panels: usize,
    pub(crate) row: usize,
    pub(crate) rows: usize,
}

// SAFETY: tasks read `x` and write disjoint tiles of `out`; both outlive the run of the pool.
unsafe impl Sync for Product<'_> {}
// SAFETY: as above.
unsafe impl Send for Product<'_> {}

impl Product<'_> {
    /// Computes all of `out`, unrounded.
    ///
    /// # Safety
    /// `x` and `out` are valid for the stated shapes, and nobody else touches `out`.
    pub(crate) unsafe fn run(&self, pool: &Pool) {
        if self.rows == 0 {
            return;
        }
        let row_blocks = self.rows.div_ceil(self.rows_max());
        let enough = (pool.threads() * TASKS_PER_THREAD).div_ceil(row_blocks);
        let tiles = self.tiles(enough).tapered(pool.threads());
        let work = self.rows * self.weight.inputs * self.weight.outputs;
        let soon = |task| tiles.get(task).map_or(std::ptr::null(), |tile| self.start(tile));
        pool.run(tiles.count, work, |task, scratch| {
            if let Some(tile) = tiles.get(task) {
                // SAFETY: tasks cover disjoint rectangles of `out`.
                unsafe { self.tile(tile, soon(pool.next(task)), scratch) }
            }
        });
    }

    /// Rows of a tile at most.
    fn rows_max(&self) -> usize {
        if self.x.is_whole() { ROWS_MAX_WHOLE } else { ROWS_MAX }
    }

    /// Its tiles, with `enough` groups of panels if there are as many.
    pub(crate) fn tiles(&self, enough: usize) -> Tiles<'_> {
        Tiles::new(self.weight, self.rows, self.rows_max(), enough)
    }

    /// Where a tile's weights begin.
    pub(crate) fn start(&self, tile: Tile) -> *const u8 {
        self.weight.segments[tile.segment].start(tile.panel)
    }

    /// Computes one tile; `soon` as in [`Stretch`].
    ///
    /// # Safety
    /// As for [`Product::run`], restricted to this tile.
    pub(crate) unsafe fn tile(&self, tile: Tile, soon: *const u8, scratch: &Scratch<'_>) {
        let w = self.weight;
        let segment: &Segment = &w.segments[tile.segment];
        let width = tile.panels * LANES;
        let Tile { row, rows, .. } = tile;
        let (x, stretch) = (self.x.rows_from(row), Stretch { panel: tile.panel, panels: tile.panels, soon });
        // Few rows sum all ranges at once. Behind the sums, all [rows][width], comes what a segment decodes into.
        let size = rows * width;
        let tree =
            Tree { ranges: w.ranges, together: if rows <= Scaled::ROWS_RANGES { w.ranges } else { 1 } };
        let sums = scratch.floats(size * tree.places() + DECODED_FLOATS);
        let buffer = sums.wrapping_add(size * tree.places());
        // SAFETY: weights, x and sums are valid for the panels, rows and inputs named, and `out` has these rows and columns.
        unsafe {
            tree.sum(self.kernels, sums, size, |ranges, acc| {
                segment.sum(self.kernels, ranges, stretch, x, rows, acc, size, buffer);
            });
            let columns = width.min(segment.outputs - tile.panel * LANES);
            let first = segment.first + tile.panel * LANES;
            if let Some(bias) = &w.bias {
                for r in 0..rows {
                    (self.kernels.add)(sums.add(r * width), bias.as_ptr().add(first), columns, false);
                }
            }
            let out = self.out.add(row * w.outputs + first);
            (self.kernels.place)(sums, width, out, w.outputs, rows, columns);
        }
    }
}

/// How the sums of all ranges of K become one: as a binary tree, whose numbers of ranges are powers of two.
#[derive(Clone, Copy)]
pub(crate) struct Tree {
    pub(crate) ranges: usize,
    /// Ranges that are summed at once, side by side: all or one.
    pub(crate) together: usize,
}

impl Tree {
    /// Sums that there must be room for.
    pub(crate) fn places(self) -> usize {
        self.together.max(TREE_LEVELS)
    }

    /// Calls `part` for ranges that are summed at once and for where it puts their sums, of `size` floats each, one behind the
    /// other. The sum of all is left in the first place.
    ///
    /// # Safety
    /// `sums` has room for [`Tree::places`] of them, and `part` writes no others.
    pub(crate) unsafe fn sum(
        self,
        kernels: &Kernels,
        sums: *mut f32,
        size: usize,
        mut part: impl FnMut(Range<usize>, *mut f32),
    ) {
        // SAFETY: there is a place for each power of two of ranges, which are 8 at most, or for all that are summed at once.
        let join = |to: usize, from: usize| unsafe {
            (kernels.add)(sums.add(to * size), sums.add(from * size), size, false);
        };
        // As in binary counting: a carry joins two sums of equally many ranges.
        let mut waiting = 0usize;
        for range in (0..self.ranges).step_by(self.together) {
            let mut slot = waiting.count_ones() as usize;
            part(range..range + self.together, sums.wrapping_add(slot * size));
            let mut carry = 1;
            while waiting & carry != 0 {
                join(slot - 1, slot);
                waiting &= !carry;
                carry <<= 1;
                slot -= 1;
            }
            waiting |= carry;
        }
        let mut apart = 1;
        while apart < self.together {
            (0..self.together).step_by(apart * 2).for_each(|low| join(low, low + apart));
            apart *= 2;
        }
    }
}

/// The tiles of a product: of each segment groups of panels, by blocks of rows.
#[derive(Debug)]
pub(crate) struct Tiles<'a> {
    weight: &'a Packed,
    rows: usize,
    /// Panels of a tile.
    group: usize,
    tail: Option<Tail>,
    row_blocks: usize,
    /// Rows of a block: of even size, so that the last is not a scrap.
    block: usize,
    pub(crate) count: usize,
}

/// Smaller tiles at the end of the last segment: from which tile and panel on, and of how many panels.
#[derive(Debug)]
struct Tail {
    tile: usize,
    panel: usize,
    group: usize,
}

impl<'a> Tiles<'a> {
    /// Tiles for `rows` rows, up to `rows_max` each, `enough` groups of panels if there are as many.
    fn new(weight: &'a Packed, rows: usize, rows_max: usize, enough: usize) -> Self {
        let groups = |group: usize| -> usize {
            weight.segments.iter().map(|segment| segment.panels().div_ceil(group)).sum()
        };
        // Whole groups of a power of two keep the widest tiles busy.
        let mut group = if rows > ROWS_STREAMING { PANELS_MAX } else { PANELS_STREAMING };
        while group > 1 && groups(group) < enough {
            group /= 2;
        }
        let row_blocks = rows.div_ceil(rows_max).max(1);
        let block = rows.div_ceil(row_blocks);
        let count = groups(group) * row_blocks;
        Tiles { weight, rows, group, tail: None, row_blocks, block, count }
    }

    /// Cuts the last tiles for `threads` smaller, so that those end together: what one of them reads alone comes at its own speed.
    pub(crate) fn tapered(mut self, threads: usize) -> Self {
        let Some(last) = self.weight.segments.last().filter(|_| self.rows <= ROWS_STREAMING) else {
            return self;
        };
        let groups = last.panels().div_ceil(self.group);
        let (whole, group) = (groups.saturating_sub(threads), self.group / TAPER);
        if group > 1 && whole > 0 {
            let tail = Tail { tile: self.count - (groups - whole), panel: whole * self.group, group };
            self.count = tail.tile + (last.panels() - tail.panel).div_ceil(group);
            self.tail = Some(tail);
        }
        self
    }

    /// Tiles for one row.
    pub(crate) fn of_row(weight: &'a Packed, enough: usize) -> Self {
        Tiles::new(weight, 1, ROWS_MAX, enough)
    }

    /// Panels of a tile.
    pub(crate) fn group(&self) -> usize {
        self.group
    }

    /// Tile `at` of `[0, count)`. Row blocks of the same panels follow each other.
    pub(crate) fn get(&self, at: usize) -> Option<Tile> {
        let segments = &self.weight.segments;
        if at >= self.count {
            return None;
        }
        if let Some(tail) = self.tail.as_ref().filter(|tail| at >= tail.tile) {
            let panel = tail.panel + (at - tail.tile) * tail.group;
            let panels = tail.group.min(segments.last()?.panels() - panel);
            return Some(Tile { segment: segments.len() - 1, panel, panels, row: 0, rows: self.rows });
        }
        let mut group = at / self.row_blocks;
        let row = at % self.row_blocks * self.block;
        for (segment, held) in segments.iter().enumerate() {
            let groups = held.panels().div_ceil(self.group);
            if group < groups {
                let panel = group * self.group;
                let panels = self.group.min(held.panels() - panel);
                let rows = self.block.min(self.rows.saturating_sub(row));
                return Some(Tile { segment, panel, panels, row, rows });
            }
            group -= groups;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use backend::{DType, KSum, Linear, MatrixView, TensorView, WeightSource};

    use super::*;
    use crate::CpuWeight;
    use crate::level::Level;
    use crate::packed::Kind;

    /// Tiles, tapered or not, have every panel by every row once, in two segments too.
    #[test]
    fn tiles_cover_a_product_once() {
        let (pool, kernels) = (Pool::new(1, false), Level::Portable.kernels());
        let view = |dtype, outputs, bytes| {
            let row_stride_bytes = 2 * DType::bytes(dtype);
            MatrixView::Plain(TensorView {
                name: "w",
                dtype,
                rows: outputs,
                cols: 2,
                row_stride_bytes,
                bytes,
            })
        };
        let zeros = vec![0; 5000 * 8];
        for (first, second) in [(4096, 0), (1613, 901), (40, 4999), (16, 0)] {
            let mut parts = vec![view(DType::F32, first, &zeros[..first * 8])];
            if second > 0 {
                parts.push(view(DType::BF16, second, &zeros[..second * 4]));
            }
            let linear = WeightSource::Linear(Linear { parts, bias: None, sum: KSum::Ascending });
            let Kind::Product(weight) = CpuWeight::load(&linear, kernels, &pool, DType::F32).unwrap().0
            else {
                panic!("a product");
            };
            for (rows, threads) in [(1, 1), (1, 2), (4, 16), (100, 2), (300, 2)] {
                for tapers in [false, true] {
                    let tiles = Tiles::new(&weight, rows, ROWS_MAX, threads * TASKS_PER_THREAD);
                    let tiles = if tapers { tiles.tapered(threads) } else { tiles };
                    let mut seen: Vec<Vec<usize>> =
                        weight.segments.iter().map(|held| vec![0; held.panels() * rows]).collect();
                    for tile in (0..tiles.count).map(|at| tiles.get(at).unwrap()) {
                        for panel in tile.panel..tile.panel + tile.panels {
                            for row in tile.row..tile.row + tile.rows {
                                seen[tile.segment][panel * rows + row] += 1;
                            }
                        }
                    }
                    let once = seen.iter().flatten().all(|count| *count == 1);
                    assert!(once, "{first} + {second}, {rows} rows, {threads} threads, tapered: {tapers}");
                    assert!(tiles.get(tiles.count).is_none());
                }
            }
        }
    }
}
