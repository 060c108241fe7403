//! Products of few rows, which take as long as reading the weights. One row reads panel after panel, each from end to end,
//! so that a thread reads one stream: with four panels side by side less was on its way from memory, and a core read 20 GB/s
//! where it could read 35. A group's sum is a chain of its own, and chains of groups that follow each other overlap by
//! themselves. More rows have more to compute per weight, and share the inputs of two panels.

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
            1 => M::apart(Panels::<M, CODE, SCALES, 1, 1> { s, multiply: PhantomData }),
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
                let behind = behind::<P>(s, cursor.base);
                if cursor.at == 0 {
                    for (line, p) in (0..scale_bytes / 64).flat_map(|line| (0..P).map(move |p| (line, p))) {
                        M::Floats::prefetch(base.wrapping_add(p * s.panel_bytes + behind + line * 64));
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
                        let part = Part { chunk, behind, x, next: x, keep: s.buffer };
                        let done = match (octet % 4, end - octet) {
                            (0, left) if left >= whole => octets::<M, CODE, R, P, 0>(s, part, &mut group),
                            (2, 2..) if const { CODE == 6 } => {
                                octets::<M, CODE, R, P, 2>(s, part, &mut group)
                            }
                            (from, _) => {
                                let change = Change::none();
                                take_apart::<M, CODE, false, P>(part, from, s.panel_bytes, &change);
                                follow_octet::<M, R, P>(s, (part.x, part.keep), &mut group);
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

/// Whole numbers add up in any order: so many sums of one row and one panel are on their way at once.
const CHAINS: usize = 2;

/// Bytes of the codes of 32 inputs.
const fn chunk_bytes(code: usize) -> usize {
    if code <= 6 { code * 64 } else { 512 }
}

/// Adds the octets of a chunk from `FROM` on, a half or a whole, to the sums of a group, and asks for what lies so far behind
/// them; says how many octets that were.
#[inline(always)]
unsafe fn octets<M: Multiply, const CODE: usize, const R: usize, const P: usize, const FROM: usize>(
    s: &Scaled<'_>,
    part: Part,
    sums: &mut Sums<M, R, P>,
) -> usize {
    let count = const { if CODE == 6 { 2 } else { 4 } };
    // SAFETY: the caller's panels have this chunk, and rows these inputs.
    unsafe {
        let mut chains: [Sums<M, R, P>; CHAINS] = [[[M::Words::splat(0); P]; R]; CHAINS];
        chains[0] = *sums;
        for octet in 0..count {
            let octet_bytes = const { chunk_bytes(CODE) / 4 };
            for p in 0..P {
                let ahead = part.chunk.wrapping_add(p * s.panel_bytes + part.behind);
                for line in (FROM + octet) * octet_bytes / 64..(FROM + octet + 1) * octet_bytes / 64 {
                    M::Floats::prefetch(ahead.wrapping_add(line * 64));
                }
            }
            for pair in 0..4 {
                let mut weights = [M::Words::splat(0); P];
                for (p, weights) in weights.iter_mut().enumerate() {
                    let chunk = part.chunk.add(p * s.panel_bytes);
                    *weights = M::pair::<CODE>(chunk, FROM + octet, pair);
                }
                let chain = if const { M::WHOLE && R * P == 1 } { pair % CHAINS } else { 0 };
                add::<M, R, P>(s, part.x.add(octet * 4 + pair), &weights, &mut chains[chain]);
            }
        }
        *sums = chains[0];
        if const { M::WHOLE && R * P == 1 } {
            for chain in &chains[1..] {
                sums[0][0] = sums[0][0].added(chain[0][0]);
            }
        }
    }
    count
}
