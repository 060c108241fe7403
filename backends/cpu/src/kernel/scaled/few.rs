//! Products of few rows, which take as long as reading the weights: two panels side by side, each from end to end, asked for
//! twice, early into the second cache and then into the first. So two cores of an Emerald Rapids read 27 GB/s of 29 where one
//! panel, asked for into the first cache, came at 24. A group's sum is a chain of its own, and chains of groups that follow each
//! other overlap by themselves.

use std::marker::PhantomData;

use super::super::Scaled;
use super::super::codes::Cursor;
use super::multiply::{Multiply, Task, Words};
use super::tile::{Sums, add, factored, follow_octet};
use super::unit::{Change, Unit, has_zero, offsets, unit_scales, whole_scales};
use super::{Part, behind, each_row, take_apart};
use crate::lanes::{LANES, Lanes};

/// Rows at most: their sums stay in registers.
pub(super) const ROWS: usize = Scaled::ROWS_RANGES;
/// Bytes that are asked for ahead of use, of all panels together: for the first cache, and for the second, which waits for more
/// lines of memory at once.
const NEAR_BYTES: usize = 4096;
const FAR_BYTES: usize = 10240;

/// All rows by all panels.
///
/// # Safety
/// As for the product; there are at most [`ROWS`] rows.
#[inline(always)]
pub(super) unsafe fn few<M: Multiply, const CODE: usize, const SCALES: bool>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match s.rows {
            0 => {}
            1 => M::apart(Panels::<M, CODE, SCALES, 1, 2> { s, multiply: PhantomData }),
            2 if const { M::PANELS == 2 } => {
                M::apart(Panels::<M, CODE, SCALES, 2, 2> { s, multiply: PhantomData })
            }
            3 if const { M::PANELS == 2 } => {
                M::apart(Panels::<M, CODE, SCALES, 3, 2> { s, multiply: PhantomData })
            }
            _ if const { M::PANELS == 2 } => {
                M::apart(Panels::<M, CODE, SCALES, ROWS, 2> { s, multiply: PhantomData })
            }
            2 => M::apart(Panels::<M, CODE, SCALES, 2, 1> { s, multiply: PhantomData }),
            3 => M::apart(Panels::<M, CODE, SCALES, 3, 1> { s, multiply: PhantomData }),
            _ => M::apart(Panels::<M, CODE, SCALES, ROWS, 1> { s, multiply: PhantomData }),
        }
    }
}

/// All panels, `P` at a time while there are so many.
struct Panels<'a, M, const CODE: usize, const SCALES: bool, const R: usize, const P: usize> {
    s: &'a Scaled<'a>,
    multiply: PhantomData<M>,
}

impl<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize> Task
    for Panels<'_, M, CODE, SCALES, R, P>
{
    #[inline(always)]
    unsafe fn run(self) {
        let s = self.s;
        let mut panel = 0;
        // SAFETY: panels stay within the product.
        unsafe {
            while panel + P <= s.panels {
                strip::<M, CODE, SCALES, R, P>(s, panel);
                panel += P;
            }
            if const { P > 1 } && panel < s.panels {
                strip::<M, CODE, SCALES, R, 1>(s, panel);
            }
        }
    }
}

/// All rows by `P` panels, range after range, group after group: a panel is read from end to end whatever ranges it has, so that
/// what is asked for ahead is used next. Scales that are whole numbers multiply sums of groups here instead of codes, which makes
/// the same whole numbers.
#[inline(always)]
unsafe fn strip<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    panel: usize,
) {
    // Octets of whole chunks; of 6 bits, of halves, of 16 inputs that share a scale.
    let whole = const { if CODE == 6 { 2 } else { 4 } };
    let scale_bytes = s.form.scale_bytes();
    let (each, unit_octets) = (s.octets.1 - s.octets.0, s.units.unit / 8);
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels, the buffer room for an octet.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let mut x = s.x;
        for range in 0..s.ranges {
            let mut cursor = Cursor::new(s.form, s.octets.0 + range * each);
            let mut left = each;
            let mut known = s.known.wrapping_add(range * s.known_range);
            let mut totals = [[M::Floats::splat(0.0); P]; R];
            while left > 0 {
                let base = first.add(cursor.base);
                let ahead = Ahead::of::<P>(s, cursor.base);
                if cursor.at == 0 {
                    for (line, p) in (0..scale_bytes / 64).flat_map(|line| (0..P).map(move |p| (line, p))) {
                        ahead.ask::<M::Floats>(base.wrapping_add(p * s.panel_bytes + line * 64));
                    }
                }
                let codes = base.add(scale_bytes);
                let unit = Unit::new(s, cursor.at, left.min(unit_octets - (cursor.at & (unit_octets - 1))));
                left -= unit.octets.1 - unit.octets.0;
                let mut sums: Sums<M, R, P> = [[M::Words::splat(0); P]; R];
                for part in unit.parts.0..unit.parts.1 {
                    let count = cursor.count(unit.octets.1 - cursor.at);
                    let mut group: Sums<M, R, P> = [[M::Words::splat(0); P]; R];
                    if const { M::WHOLE && (!SCALES || has_zero(CODE)) } && s.units.zero != 0 {
                        each_row!(R, r => {
                            group[r] = [M::Words::splat(*s.row_of(known, r).add(1 + part)); P];
                        });
                    }
                    let (mut octet, end) = (cursor.at, cursor.at + count);
                    while octet < end {
                        let chunk = codes.add(octet / 4 * const { chunk_bytes(CODE) });
                        let done = match (octet % 4, end - octet) {
                            (0, left) if left >= whole => {
                                octets::<M, CODE, R, P, 0>(s, (chunk, x), ahead, &mut group)
                            }
                            (2, 2..) if const { CODE == 6 } => {
                                octets::<M, CODE, R, P, 2>(s, (chunk, x), ahead, &mut group)
                            }
                            (from, _) => {
                                let part = Part { chunk, behind: 0, x, next: x, keep: s.buffer };
                                let change = Change::none();
                                take_apart::<M, CODE, false, P>(part, from, s.panel_bytes, &change);
                                follow_octet::<M, R, P>(s, (x, s.buffer), &mut group);
                                1
                            }
                        };
                        octet += done;
                        x = x.add(done * 4);
                    }
                    match const { SCALES } {
                        true => {
                            let scales: [M::Words; P] = whole_scales(s, base, cursor.at_group);
                            each_row!(R, r => {
                                for p in 0..P {
                                    sums[r][p] = sums[r][p].plus(group[r][p], scales[p]);
                                }
                            });
                        }
                        false => sums = group,
                    }
                    // The block's end is the unit's.
                    cursor.pass(s.form, count);
                }
                let scales = unit_scales::<M, P>(s, base, unit);
                each_row!(R, r => {
                    let known = s.row_of(known, r);
                    for p in 0..P {
                        totals[r][p] = totals[r][p].madd(scales[p], factored::<M>(sums[r][p], known));
                    }
                });
                if s.units.offsets {
                    for part in unit.parts.0..unit.parts.1 {
                        let offsets = offsets::<M, P>(s, base, unit.group(s, part));
                        each_row!(R, r => {
                            let inputs = M::Floats::splat(*s.row_of(known, r).add(1 + part).cast());
                            for p in 0..P {
                                totals[r][p] = totals[r][p].madd(offsets[p], inputs);
                            }
                        });
                    }
                }
                known = known.wrapping_add(s.units.words());
            }
            let acc = s.acc.add(range * s.acc_range + panel * LANES);
            for (r, row) in totals.into_iter().enumerate() {
                for (p, total) in row.into_iter().enumerate() {
                    total.store(s.sums_of(acc, r).add(p * LANES));
                }
            }
        }
    }
}

/// Bytes of the codes of 32 inputs.
const fn chunk_bytes(code: usize) -> usize {
    if code <= 6 { code * 64 } else { 512 }
}

/// Bytes from some place in panels to what is asked for there.
#[derive(Clone, Copy)]
struct Ahead {
    near: usize,
    far: usize,
}

impl Ahead {
    /// From `at` in each of `P` panels.
    #[inline(always)]
    fn of<const P: usize>(s: &Scaled<'_>, at: usize) -> Self {
        Ahead { near: behind::<P>(s, at, NEAR_BYTES), far: behind::<P>(s, at, FAR_BYTES) }
    }

    /// Asks for what is so far behind `at`.
    #[inline(always)]
    fn ask<V: Lanes>(self, at: *const u8) {
        // SAFETY: any address will do.
        unsafe {
            V::prefetch_far(at.wrapping_add(self.far));
            V::prefetch(at.wrapping_add(self.near));
        }
    }
}

/// Adds the octets of a chunk from `FROM` on, a half or a whole, by the inputs at `x` to the sums of a group, and asks for what
/// lies behind them; says how many octets that were.
#[inline(always)]
unsafe fn octets<M: Multiply, const CODE: usize, const R: usize, const P: usize, const FROM: usize>(
    s: &Scaled<'_>,
    (chunk, x): (*const u8, *const i32),
    ahead: Ahead,
    sums: &mut Sums<M, R, P>,
) -> usize {
    let count = const { if CODE == 6 { 2 } else { 4 } };
    // SAFETY: the caller's panels have this chunk, and rows these inputs.
    unsafe {
        for octet in 0..count {
            let octet_bytes = const { chunk_bytes(CODE) / 4 };
            for p in 0..P {
                let chunk = chunk.wrapping_add(p * s.panel_bytes);
                for line in (FROM + octet) * octet_bytes / 64..(FROM + octet + 1) * octet_bytes / 64 {
                    ahead.ask::<M::Floats>(chunk.wrapping_add(line * 64));
                }
            }
            for pair in 0..4 {
                let mut weights = [M::Words::splat(0); P];
                for (p, weights) in weights.iter_mut().enumerate() {
                    *weights = M::pair::<CODE>(chunk.add(p * s.panel_bytes), FROM + octet, pair);
                }
                add::<M, R, P>(s, x.add(octet * 4 + pair), &weights, sums);
            }
        }
    }
    count
}
