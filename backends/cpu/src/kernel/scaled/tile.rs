//! Tiles of rows and panels: what their sums begin with, how those grow and are scaled, and the tiles that follow the first by
//! the codes that it left in the buffer.

use std::marker::PhantomData;
use std::sync::atomic::{Ordering, compiler_fence};

use super::super::ahead::Ahead;
use super::multiply::{Multiply, Task, Words};
use super::unit::{OFFSETS, SCALES, Unit, together};
use super::{Scaled, each_row};
use crate::lanes::{LANES, Lanes};

/// Sums of `R` rows by `P` panels.
pub(super) type Sums<M, const R: usize, const P: usize> = [[<M as Multiply>::Words; P]; R];

/// Some rows where they are in a unit: their inputs, what is known of those, and what they add up to in memory.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub x: *const i32,
    /// The inputs that are multiplied next.
    pub next: *const i32,
    pub known: *const i32,
    pub out: *mut f32,
}

/// Where a row has what others have, by what the first row has; unchecked, for there are thousands of these in a tile.
impl Scaled<'_> {
    /// Row `row`'s inputs, or what is known of them.
    #[inline(always)]
    pub(super) fn row_of(&self, first: *const i32, row: usize) -> *const i32 {
        first.wrapping_add(row.wrapping_mul(self.x_stride))
    }

    /// Row `row`'s sums.
    #[inline(always)]
    pub(super) fn sums_of(&self, first: *mut f32, row: usize) -> *mut f32 {
        first.wrapping_add(row.wrapping_mul(self.acc_stride))
    }
}

/// What the sums of a unit begin with: nothing, or what makes codes count from their zero.
#[inline(always)]
pub(super) unsafe fn begun<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    known: *const i32,
) -> Sums<M, R, P> {
    // SAFETY: the caller's rows.
    unsafe {
        let mut sums = [[M::Words::splat(0); P]; R];
        if const { M::WHOLE } && s.units.zero != 0 && !s.units.scales {
            each_row!(R, r => {
                sums[r] = [M::Words::splat(*s.row_of(known, r).add(1)); P];
            });
        }
        sums
    }
}

/// Adds a pair of inputs, of the first row at `x`, by the weights of each panel.
#[inline(always)]
pub(super) unsafe fn add<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    x: *const i32,
    weights: &[M::Words; P],
    sums: &mut Sums<M, R, P>,
) {
    each_row!(R, r => {
        // SAFETY: the caller's rows.
        unsafe {
            let inputs = *s.row_of(x, r);
            for (sum, weights) in sums[r].iter_mut().zip(weights) {
                *sum = match const { R > 4 && P == 1 } {
                    true => M::add::<true>(*sum, *weights, inputs),
                    false => M::add::<false>(*sum, *weights, inputs),
                };
            }
        }
    });
}

/// Adds octets of a chunk pair by pair: see [`Multiply::octets`].
#[inline(always)]
pub(super) unsafe fn by_pairs<
    M: Multiply,
    const CODE: usize,
    const SCALES: bool,
    const R: usize,
    const P: usize,
>(
    s: &Scaled<'_>,
    (chunk, from): (*const u8, usize),
    x: *const i32,
    ahead: Ahead,
    sums: &mut Sums<M, R, P>,
) {
    each_row!(const { together(CODE, SCALES) }, octet => {
        ahead.ask_octet::<M::Floats, CODE, P>(s.panel_bytes, chunk, from + octet);
        for pair in 0..4 {
            // SAFETY: the caller's panels have this chunk, and rows these inputs.
            unsafe {
                let mut weights = [M::Words::splat(0); P];
                for (p, weights) in weights.iter_mut().enumerate() {
                    *weights = M::pair::<CODE>(chunk.add(p * s.panel_bytes), from + octet, pair);
                }
                add::<M, R, P>(s, x.add(octet * 4 + pair), &weights, sums);
            }
        }
    }; 0 1 2 3);
}

/// Scales a unit's sums by what the buffer has, and adds them to the rows' totals.
#[inline(always)]
pub(super) unsafe fn finish<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    rows: Rows,
    sums: &Sums<M, R, P>,
    parts: (usize, usize),
) {
    // SAFETY: the caller's rows, and the buffer's scales and offsets.
    unsafe {
        let mut totals = [[M::Floats::splat(0.0); P]; R];
        let scales = s.buffer.add(SCALES);
        each_row!(R, r => {
            let known = s.row_of(rows.known, r);
            for p in 0..P {
                let total = M::Floats::load(s.sums_of(rows.out, r).add(p * LANES));
                totals[r][p] = total.madd(M::Floats::load(scales.add(p * LANES)), factored::<M>(sums[r][p], known));
            }
        });
        if s.units.offsets {
            for part in parts.0..parts.1 {
                let offsets = s.buffer.add(OFFSETS + part * P * LANES);
                each_row!(R, r => {
                    let inputs = M::Floats::splat(*s.row_of(rows.known, r).add(1 + part).cast());
                    for (p, total) in totals[r].iter_mut().enumerate() {
                        *total = total.madd(M::Floats::load(offsets.add(p * LANES)), inputs);
                    }
                });
            }
        }
        each_row!(R, r => {
            for (p, total) in totals[r].iter().enumerate() {
                total.store(s.sums_of(rows.out, r).add(p * LANES));
            }
        });
    }
}

/// A unit's sum times the factor of its inputs, which are known where they are whole numbers.
#[inline(always)]
pub(super) unsafe fn factored<M: Multiply>(sum: M::Words, known: *const i32) -> M::Floats {
    // SAFETY: the caller's.
    unsafe {
        match const { M::WHOLE } {
            true => M::floats(sum).mul(M::Floats::splat(*known.cast())),
            false => M::floats(sum),
        }
    }
}

/// Asks for the inputs at `next` of `R` rows: rows are more than the processor follows by itself.
#[inline(always)]
pub(super) unsafe fn ask_for_rows<M: Multiply, const R: usize>(s: &Scaled<'_>, next: *const i32) {
    each_row!(R, r => {
        // SAFETY: any address will do.
        unsafe { M::Floats::prefetch(s.row_of(next, r).cast()) }
    });
}

/// Adds an octet that is in the buffer, at `keep`, by the first row's inputs at `x`.
#[inline(always)]
pub(super) unsafe fn follow_octet<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    (x, keep): (*const i32, *const f32),
    sums: &mut Sums<M, R, P>,
) {
    for pair in 0..4 {
        // SAFETY: the buffer has these codes, and rows the inputs.
        unsafe {
            let at = keep.add(pair * P * LANES);
            let mut weights = [M::Words::splat(0); P];
            for (p, weights) in weights.iter_mut().enumerate() {
                *weights = M::Words::load(at.add(p * LANES));
            }
            add::<M, R, P>(s, x.add(pair), &weights, sums);
        }
        // Else the compiler loads inputs of later pairs before, into registers that sums of bf16 need.
        if const { !M::WHOLE } {
            compiler_fence(Ordering::SeqCst);
        }
    }
}

/// A unit of `height` more rows by `P` panels.
#[inline(always)]
pub(super) unsafe fn follow_rows<M: Multiply, const P: usize>(
    s: &Scaled<'_>,
    rows: Rows,
    unit: Unit,
    height: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        match height {
            12.. if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 12, P>(s, rows, unit),
            11 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 11, P>(s, rows, unit),
            10 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 10, P>(s, rows, unit),
            9 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 9, P>(s, rows, unit),
            8 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 8, P>(s, rows, unit),
            7 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 7, P>(s, rows, unit),
            6.. => follow::<M, 6, P>(s, rows, unit),
            5 => follow::<M, 5, P>(s, rows, unit),
            4 => follow::<M, 4, P>(s, rows, unit),
            3 if const { M::ROWS_FOLLOWING == 6 } => follow::<M, 3, P>(s, rows, unit),
            _ => follow::<M, 2, P>(s, rows, unit),
        }
    }
}

/// A unit of `R` more rows by `P` panels, by the codes, scales and offsets that are in the buffer.
#[inline(always)]
unsafe fn follow<M: Multiply, const R: usize, const P: usize>(s: &Scaled<'_>, rows: Rows, unit: Unit) {
    // SAFETY: the caller's.
    unsafe { M::apart(Follow::<M, R, P> { s, rows, unit, multiply: PhantomData }) }
}

struct Follow<'a, M, const R: usize, const P: usize> {
    s: &'a Scaled<'a>,
    rows: Rows,
    unit: Unit,
    multiply: PhantomData<M>,
}

impl<M: Multiply, const R: usize, const P: usize> Task for Follow<'_, M, R, P> {
    #[inline(always)]
    unsafe fn run(self) {
        let Follow { s, rows, unit, .. } = self;
        // SAFETY: the buffer has these octets and their scales, x and acc the rows.
        unsafe {
            let mut sums = begun::<M, R, P>(s, rows.known);
            for octet in 0..unit.octets.1 - unit.octets.0 {
                let (x, keep) = (rows.x.add(octet * 4), s.buffer.add(octet * 4 * P * LANES));
                // A cache line has the pairs of four octets.
                if octet % 4 == 0 {
                    ask_for_rows::<M, R>(s, rows.next.wrapping_add(octet * 4));
                }
                follow_octet::<M, R, P>(s, (x, keep), &mut sums);
            }
            finish::<M, R, P>(s, rows, &sums, unit.parts);
        }
    }
}
