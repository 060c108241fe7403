//! Products of few rows, which take as long as reading the weights, or hardly longer: panels are read from end to end, two side by
//! side where registers have room for the sums, and asked for twice ([`Ahead`]). So two cores of an Emerald Rapids read 27 GB/s of 29 where one panel, asked for into the first cache, came
//! at 24. What is computed between counts as well: Q4_K at 20 GB/s in the cache came slower of memory than at 30. Up to 8 rows, of which
//! more is computed than read, this is still faster than tiles, which keep codes for rows that follow.

use std::marker::PhantomData;

use super::super::Scaled;
use super::super::ahead::{Ahead, chunk_bytes, next};
use super::super::codes::{Cursor, Form, minimum_of, scale_of, scaled_form, unit_groups};
use super::multiply::{Multiply, Task, Words};
use super::tile::{Sums, factored, follow_octet};
use super::unit::{Change, Unit, halved, has_zero, offsets, together, unit_scales, whole_scales};
use super::{Part, each_row, take_apart};
use crate::lanes::{LANES, Lanes};

/// Rows at most.
pub(super) const ROWS: usize = Scaled::ROWS_RANGES;

/// Rows of a form that are few. Small groups of whole numbers are scaled as often as they are few, for each row and panel, which two
/// panels side by side do faster from 7 rows on; but not groups of 16, of which tiles take octet by octet.
pub(super) fn most<M: Multiply>(form: &Form) -> usize {
    if M::WHOLE && !form.scale.is_whole() && form.group != 16 { 6 } else { ROWS }
}

/// All rows by all panels; `SCALES`: of forms whose groups have whole numbers as scales, and ranges that are whole chunks.
///
/// # Safety
/// As for the product; there are at most [`ROWS`] rows.
#[inline(always)]
pub(super) unsafe fn few<M: Multiply, const CODE: usize, const SCALES: bool>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        // As many sums as stay in registers.
        match (s.rows, const { M::PANELS }) {
            (0, _) => {}
            (1, _) => panels::<M, CODE, SCALES, 1, 2>(s),
            (2, 2) => panels::<M, CODE, SCALES, 2, 2>(s),
            (3, 2) => panels::<M, CODE, SCALES, 3, 2>(s),
            (4, 2) => panels::<M, CODE, SCALES, 4, 2>(s),
            (5, 2) => panels::<M, CODE, SCALES, 5, 1>(s),
            (6, 2) => panels::<M, CODE, SCALES, 6, 1>(s),
            (7, 2) => panels::<M, CODE, SCALES, 7, 1>(s),
            (_, 2) => panels::<M, CODE, SCALES, ROWS, 1>(s),
            (5.., _) => twice::<M, CODE, SCALES>(s),
            _ => four::<M, CODE, SCALES>(s),
        }
    }
}

/// Of two to four rows one panel after the other.
#[inline(always)]
unsafe fn four<M: Multiply, const CODE: usize, const SCALES: bool>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match s.rows {
            2 => panels::<M, CODE, SCALES, 2, 1>(s),
            3 => panels::<M, CODE, SCALES, 3, 1>(s),
            _ => panels::<M, CODE, SCALES, 4, 1>(s),
        }
    }
}

/// Of every panel one half of the rows after the other: the second finds it in the first cache.
#[inline(always)]
unsafe fn twice<M: Multiply, const CODE: usize, const SCALES: bool>(s: &Scaled<'_>) {
    let half = s.rows / 2;
    for panel in 0..s.panels {
        let start = s.panel.wrapping_add(panel * s.panel_bytes);
        let soon = if panel + 1 < s.panels { start.wrapping_add(s.panel_bytes) } else { s.soon };
        for (row, rows) in [(0, half), (half, s.rows - half)] {
            // SAFETY: the product's panel and rows.
            unsafe {
                four::<M, CODE, SCALES>(&Scaled {
                    panel: start,
                    panels: 1,
                    soon,
                    x: s.row_of(s.x, row),
                    known: s.row_of(s.known, row),
                    rows,
                    acc: s.sums_of(s.acc, row).add(panel * LANES),
                    ..*s
                });
            }
        }
    }
}

/// `R` rows by all panels, `P` at a time while there are so many.
#[inline(always)]
unsafe fn panels<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
    s: &Scaled<'_>,
) {
    // SAFETY: the caller's.
    unsafe { M::apart(Panels::<M, CODE, SCALES, R, P> { s, multiply: PhantomData }) }
}

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

/// All rows by `P` panels, range after range: a panel is read from end to end whatever ranges it has, so that what is asked for
/// ahead is used next.
#[inline(always)]
unsafe fn strip<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    panel: usize,
) {
    let each = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels, the buffer room for an octet.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let next = next::<P>(s.panel_bytes, first, s.panels - panel, s.soon);
        for range in 0..s.ranges {
            let octets = (s.octets.0 + range * each, each);
            let inputs = (s.x.wrapping_add(range * each * 4), s.known.wrapping_add(range * s.known_range));
            let totals = match const { SCALES } {
                true if s.units.scales => blocks::<M, CODE, R, P>(s, (first, next), octets, inputs),
                true => chunks::<M, CODE, R, P>(s, (first, next), octets, inputs),
                false => groups::<M, CODE, R, P>(s, (first, next), octets, inputs),
            };
            let acc = s.acc.add(range * s.acc_range + panel * LANES);
            for (r, row) in totals.into_iter().enumerate() {
                for (p, total) in row.into_iter().enumerate() {
                    total.store(s.sums_of(acc, r).add(p * LANES));
                }
            }
        }
    }
}

/// Sums of `R` rows by `P` panels, scaled.
type Totals<M, const R: usize, const P: usize> = [[<M as Multiply>::Floats; P]; R];

/// Where a group is: its block, its number there, the half or whole chunk that has its codes, its inputs and what is known of them.
#[derive(Clone, Copy)]
struct Group {
    block: *const u8,
    at: usize,
    chunk: *const u8,
    half: usize,
    x: *const i32,
    known: *const i32,
}

/// Groups of a chunk of such codes.
const fn chunk_groups(code: usize) -> usize {
    32 / scaled_form(code).group
}

/// One range of panels whose groups have whole numbers as scales: `count` octets from octet `from` on, whole blocks. Scales multiply
/// sums of groups here instead of codes, which makes the same whole numbers.
#[inline(always)]
unsafe fn blocks<M: Multiply, const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    (first, next): (*const u8, usize),
    (from, count): (usize, usize),
    (mut x, mut known): (*const i32, *const i32),
) -> Totals<M, R, P> {
    let form = const { scaled_form(CODE) };
    let (span, parts) = (form.span / 8, const { unit_groups(CODE) });
    debug_assert!(*s.form == form && s.units.parts() == parts && from % span == 0 && count % span == 0);
    // SAFETY: the panels have these blocks, x and known the rows and units.
    unsafe {
        let mut totals = [[M::Floats::splat(0.0); P]; R];
        for at in from / span..(from + count) / span {
            let start = at * form.block_bytes();
            let (block, ahead) = (first.add(start), Ahead::of::<P>(s.panel_bytes, next, start));
            ahead.ask_scales::<M::Floats, P>(s.panel_bytes, block, form.scale_bytes());
            let mut chunk = block.add(form.scale_bytes());
            for unit in 0..const { scaled_form(CODE).span / (scaled_form(CODE).group * unit_groups(CODE)) } {
                let mut sums: Sums<M, R, P> = [[M::Words::splat(0); P]; R];
                for at in 0..const { unit_groups(CODE) / chunk_groups(CODE) } {
                    each_row!(const { chunk_groups(CODE) }, half => {
                        let part = at * const { chunk_groups(CODE) } + half;
                        let group = Group { block, at: unit * parts + part, chunk, half, x, known };
                        add_group::<M, CODE, R, P>(s, group, part, ahead, &mut sums);
                        x = x.add(form.group / 2);
                    }; 0 1);
                    chunk = chunk.add(form.chunk_bytes());
                }
                for (p, block) in (0..P).map(|p| (p, block.wrapping_add(p * s.panel_bytes))) {
                    let scale = M::Floats::load_f16(block.cast());
                    each_row!(R, r => {
                        totals[r][p] = totals[r][p].madd(scale, factored::<M>(sums[r][p], s.row_of(known, r)));
                    });
                    if const { has_zero(CODE) } {
                        continue;
                    }
                    let least = M::Floats::splat(0.0).sub(M::Floats::load_f16(block.add(32).cast()));
                    for part in 0..parts {
                        let minimum = minimum_of::<M::Floats, CODE>(block, unit * parts + part);
                        let offset = least.mul(minimum);
                        each_row!(R, r => {
                            let inputs = M::Floats::splat(*s.row_of(known, r).add(1 + part).cast());
                            totals[r][p] = totals[r][p].madd(offset, inputs);
                        });
                    }
                }
                known = known.wrapping_add(1 + parts);
            }
        }
        totals
    }
}

/// Adds a group, part `part` of its unit, times its scales.
#[inline(always)]
unsafe fn add_group<M: Multiply, const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    group: Group,
    part: usize,
    ahead: Ahead,
    sums: &mut Sums<M, R, P>,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut own: Sums<M, R, P> = [[M::Words::splat(0); P]; R];
        if const { has_zero(CODE) } {
            each_row!(R, r => {
                own[r] = [M::Words::splat(*s.row_of(group.known, r).add(1 + part)); P];
            });
        }
        M::octets::<CODE, true, R, P>(s, (group.chunk, group.half * 2), group.x, ahead, &mut own);
        let scales: [M::Words; P] = whole_scales::<_, CODE, P>(s, group.block, group.at);
        each_row!(R, r => {
            for p in 0..P {
                sums[r][p] = sums[r][p].plus(own[r][p], scales[p]);
            }
        });
    }
}

/// One range of such panels that is no whole blocks, but whole chunks: groups are scaled each for itself.
#[inline(always)]
unsafe fn chunks<M: Multiply, const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    (first, next): (*const u8, usize),
    (from, count): (usize, usize),
    (mut x, mut known): (*const i32, *const i32),
) -> Totals<M, R, P> {
    let form = const { scaled_form(CODE) };
    let span = form.span / 32;
    // SAFETY: the panels have these chunks, x and known the rows and groups.
    unsafe {
        let mut totals = [[M::Floats::splat(0.0); P]; R];
        let (mut at, end) = (from / 4, (from + count) / 4);
        while at < end {
            let start = at / span * form.block_bytes();
            let (block, ahead) = (first.add(start), Ahead::of::<P>(s.panel_bytes, next, start));
            if at % span == 0 {
                ahead.ask_scales::<M::Floats, P>(s.panel_bytes, block, form.scale_bytes());
            }
            let last = end.min((at / span + 1) * span);
            for at in at..last {
                let chunk = block.add(form.scale_bytes() + at % span * form.chunk_bytes());
                each_row!(const { chunk_groups(CODE) }, half => {
                    let group = at % span * const { chunk_groups(CODE) } + half;
                    let group = Group { block, at: group, chunk, half, x, known };
                    add_alone::<M, CODE, R, P>(s, group, ahead, &mut totals);
                    (x, known) = (x.add(form.group / 2), known.wrapping_add(2));
                }; 0 1);
            }
            at = last;
        }
        totals
    }
}

/// Adds a group, scaled.
#[inline(always)]
unsafe fn add_alone<M: Multiply, const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    group: Group,
    ahead: Ahead,
    totals: &mut Totals<M, R, P>,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums: Sums<M, R, P> = [[M::Words::splat(0); P]; R];
        M::octets::<CODE, true, R, P>(s, (group.chunk, group.half * 2), group.x, ahead, &mut sums);
        for p in 0..P {
            let block = group.block.add(p * s.panel_bytes);
            let (scale, offset) = scale_of::<M::Floats>(const { &scaled_form(CODE) }, block, group.at);
            each_row!(R, r => {
                let known = s.row_of(group.known, r);
                let inputs = M::Floats::splat(*known.add(1).cast());
                totals[r][p] = totals[r][p].madd(scale, factored::<M>(sums[r][p], known)).madd(offset, inputs);
            });
        }
    }
}

/// One range of panels whose groups are scaled each for itself: `count` octets from octet `from` on.
#[inline(always)]
unsafe fn groups<M: Multiply, const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    (first, next): (*const u8, usize),
    (from, count): (usize, usize),
    (mut x, mut known): (*const i32, *const i32),
) -> Totals<M, R, P> {
    let whole = const { together(CODE, false) };
    let scale_bytes = s.form.scale_bytes();
    // SAFETY: the panels have these octets, x and known the rows and groups, the buffer room for an octet.
    unsafe {
        let mut totals = [[M::Floats::splat(0.0); P]; R];
        let mut cursor = Cursor::new(s.form, from);
        let mut left = count;
        while left > 0 {
            let base = first.add(cursor.base);
            let ahead = Ahead::of::<P>(s.panel_bytes, next, cursor.base);
            if cursor.at == 0 {
                ahead.ask_scales::<M::Floats, P>(s.panel_bytes, base, scale_bytes);
            }
            let codes = base.add(scale_bytes);
            let count = cursor.count(left);
            let unit = Unit::new(s, cursor.at, count);
            let mut sums: Sums<M, R, P> = [[M::Words::splat(0); P]; R];
            if const { M::WHOLE } && s.units.zero != 0 {
                each_row!(R, r => {
                    sums[r] = [M::Words::splat(*s.row_of(known, r).add(1)); P];
                });
            }
            let (mut octet, end) = unit.octets;
            while octet < end {
                let chunk = codes.add(octet / 4 * const { chunk_bytes(CODE) });
                let done = match (octet % 4, end - octet) {
                    (0, left) if left >= whole => {
                        M::octets::<CODE, false, R, P>(s, (chunk, 0), x, ahead, &mut sums);
                        whole
                    }
                    (2, 2..) if const { together(CODE, false) == 2 } => {
                        M::octets::<CODE, false, R, P>(s, (chunk, 2), x, ahead, &mut sums);
                        whole
                    }
                    (from @ (0 | 2), 2..) if const { halved(CODE) } => {
                        M::octets::<CODE, true, R, P>(s, (chunk, from), x, ahead, &mut sums);
                        2
                    }
                    (from, _) => {
                        let part = Part { chunk, behind: 0, x, next: x, keep: s.buffer };
                        let change = Change::none();
                        take_apart::<M, CODE, false, P>(part, from, s.panel_bytes, &change);
                        follow_octet::<M, R, P>(s, (x, s.buffer), &mut sums);
                        1
                    }
                };
                octet += done;
                x = x.add(done * 4);
            }
            let scales = unit_scales::<M, P>(s, base, unit);
            each_row!(R, r => {
                let known = s.row_of(known, r);
                for p in 0..P {
                    totals[r][p] = totals[r][p].madd(scales[p], factored::<M>(sums[r][p], known));
                }
            });
            if s.units.offsets {
                let offsets = offsets::<M, P>(s, base, cursor.at_group);
                each_row!(R, r => {
                    let inputs = M::Floats::splat(*s.row_of(known, r).add(1).cast());
                    for p in 0..P {
                        totals[r][p] = totals[r][p].madd(offsets[p], inputs);
                    }
                });
            }
            known = known.wrapping_add(s.units.words());
            cursor.pass(s.form, count);
            left -= count;
        }
        totals
    }
}
