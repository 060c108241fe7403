//! Quantised weights in bf16 steps, where the level multiplies pairs: codes are multiplied as they are, and a unit's sum is
//! scaled once. A unit is a group; or, where scales are whole numbers themselves, several, and codes are multiplied by those
//! scales first ([`Units`]). Whole numbers are multiplied by whole numbers of 16 bits, which inputs become unit by unit with a
//! factor that is a power of two ([`inputs`]): what is as large as 1/128 of a unit's largest is exact (of several groups 1/32, so that sums
//! fit), and the rest is off by less than 1/8,000 of the largest at worst. E4M3
//! is multiplied as bf16. Weights stream from memory as small as they are: the first rows take codes apart in registers between their
//! products, where that costs next to nothing, and leave them in the first cache for the rows that follow, unit by unit; few
//! rows are [`few`]'s. All rows add the same numbers in the same order, whole ones in any: unit after unit
//! `scale * factor * sum`, then group after group `offset * (sum of the inputs)`.

mod few;
mod halves;
mod inputs;
mod multiply;
mod tile;
mod unit;
mod words;
mod words_amx;
mod words_avx2;

use std::iter;
use std::marker::PhantomData;

use few::few;
use halves::Halves;
use multiply::{Multiply, Task, Words};
use tile::{Rows, Sums, add, ask_for_rows, begun, finish, follow_octet, follow_rows};
use unit::{Change, Unit, ask_for_scales, has_scales, scale_unit, together};
use words::WordsVnni;
use words_amx::by_tiles;
use words_avx2::WordsAvx2;

use super::ahead::{behind, chunk_bytes};
use super::codes::{Code, Cursor, E4M3, by_code};
use super::tiles;
use super::{Scaled, WholeInputs};
use crate::lanes::{LANES, Lanes};

/// Up to so many rows panels are read from end to end. Beyond, rows pass by so many octets of all panels before the next,
/// which stay in the second cache: whole blocks of every form, since units divide them.
const ROWS_WHOLE: usize = 32;
const OCTETS_DEEP: usize = 512 / 8;
const _: () = assert!((OCTETS_DEEP * 8).is_multiple_of(Scaled::UNIT_MAX));
/// Panels of a tile at most.
const PANELS: usize = 2;
/// Bytes that are asked for ahead of use, of all panels of a tile together.
const AHEAD_BYTES: usize = 4096;

/// Does something for each of up to 12 rows, or pairs. Of a loop the compiler may leave some turns, and then sums are in memory all
/// the time, and shifts no constants.
macro_rules! each_row {
    ($count:expr, $row:ident => $body:block) => {
        each_row!($count, $row => $body; 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($count:expr, $row:ident => $body:block; $($at:literal)*) => {
        $(if $at < $count {
            let $row: usize = $at;
            $body
        })*
    };
}
use each_row;

/// The kernels of one way to multiply whole numbers, as functions of their own.
macro_rules! whole {
    ($product:ident, $inputs:ident, $multiply:ty, $features:literal) => {
        /// Runs a product of whole numbers.
        ///
        /// # Safety
        /// Pointers are valid for what the fields say, the form's codes are whole numbers, and the instructions exist.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $product(s: &Scaled<'_>) {
            // SAFETY: the caller's.
            unsafe { by_code!(s.form.code, scaled<$multiply>(s)) }
        }

        /// Makes inputs whole numbers.
        ///
        /// # Safety
        /// Pointers are valid for what the fields say, and the instructions exist.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $inputs(w: &WholeInputs) {
            // SAFETY: the caller's.
            unsafe { inputs::inputs::<$multiply>(w) }
        }
    };
}

whole!(
    words_vnni,
    inputs_vnni,
    WordsVnni,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c"
);
whole!(words_avx2, inputs_avx2, WordsAvx2<false>, "avx2,fma,f16c");
whole!(words_avx_vnni, inputs_avx_vnni, WordsAvx2<true>, "avx2,fma,f16c");

/// Runs a product of whole numbers, of many rows in tiles.
///
/// # Safety
/// Pointers are valid for what the fields say, the form's codes are whole numbers, and this machine has AMX, AVX-512 VNNI and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn words_amx(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, by_tiles<tiles::processor::Tiles>((&mut tiles::processor::Tiles, s))) }
}

/// See [`super::WholeKernels::apart`].
///
/// # Safety
/// There are so many inputs, whole octets, room for twice as many bytes, and this machine has AVX-512 BW and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
pub(super) unsafe fn bytes_vnni(words: *const i32, inputs: usize, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe { words_amx::bytes(words, inputs, out) }
}

/// Runs a product of E4M3.
///
/// # Safety
/// Pointers are valid for what the fields say, the form's codes are E4M3, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn halves(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe { scaled::<Halves, E4M3>(s) }
}

#[inline(always)]
unsafe fn scaled<M: Multiply, const CODE: usize>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match s.rows <= few::most::<M>(s.form) {
            // Not what this multiplies.
            _ if const { M::WHOLE == (CODE == E4M3) } => {}
            true => few_rows::<M, CODE>(s),
            false => {
                for range in 0..s.ranges {
                    one_range::<M, CODE>(&s.range(range));
                }
            }
        }
    }
}

/// More rows than are few, over one range.
#[inline(always)]
unsafe fn one_range<M: Multiply, const CODE: usize>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match const { has_scales(CODE) } && s.units.scales {
            true => many::<M, CODE, true>(s),
            false => many::<M, CODE, false>(s),
        }
    }
}

impl Scaled<'_> {
    /// One of its ranges by itself.
    fn range(&self, range: usize) -> Self {
        let each = self.octets.1 - self.octets.0;
        let first = self.octets.0 + range * each;
        Scaled {
            octets: (first, first + each),
            ranges: 1,
            x: self.x.wrapping_add(range * each * 4),
            known: self.known.wrapping_add(range * self.known_range),
            bytes: self.bytes.wrapping_add(range * self.bytes_range),
            acc: self.acc.wrapping_add(range * self.acc_range),
            ..*self
        }
    }

    /// Its only range, cut at multiples of `deep` octets, which units divide; and whether a part is the first.
    fn deep(self, deep: usize) -> impl Iterator<Item = (Self, bool)> {
        let (unit, (first, last)) = (self.units.unit / 8, self.octets);
        let (mut from, mut passed) = (first, 0);
        iter::from_fn(move || {
            let to = last.min((from / deep + 1).saturating_mul(deep));
            let part = Scaled {
                octets: (from, to),
                x: self.x.wrapping_add((from - first) * 4),
                known: self.known.wrapping_add(passed * self.units.words()),
                bytes: self.bytes.wrapping_add((from - first) * 8),
                ..self
            };
            let at = (from < last).then_some((part, from == first));
            (from, passed) = (to, passed + to.div_ceil(unit) - from / unit);
            at
        })
    }
}

/// Rows that are few.
#[inline(always)]
unsafe fn few_rows<M: Multiply, const CODE: usize>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        let chunks = s.octets.0.is_multiple_of(4) && s.octets.1.is_multiple_of(4);
        match const { has_scales(CODE) } && s.form.scale.is_whole() && chunks {
            true => few::<M, CODE, true>(s),
            false => few::<M, CODE, false>(s),
        }
    }
}

/// How rows are cut into tiles: as few as there can be, of even heights.
#[derive(Clone, Copy)]
struct Heights {
    /// Rows of the first tile, which takes codes apart.
    first: usize,
    /// The others, and rows of each; so many of them have one more.
    tiles: usize,
    least: usize,
    higher: usize,
}

impl Heights {
    fn of<M: Multiply>(rows: usize) -> Self {
        let tiles = rows.saturating_sub(M::ROWS_FIRST).div_ceil(M::ROWS_FOLLOWING);
        let first = rows.div_ceil(tiles + 1).min(M::ROWS_FIRST);
        let (others, each) = (rows - first, tiles.max(1));
        Heights { first, tiles, least: others / each, higher: others % each }
    }

    /// Rows of the other tile `tile`.
    fn height(self, tile: usize) -> usize {
        self.least + usize::from(tile < self.higher)
    }
}

/// More rows than are few.
#[inline(always)]
unsafe fn many<M: Multiply, const CODE: usize, const SCALES: bool>(s: &Scaled<'_>) {
    let alone = s.panels % const { M::PANELS };
    if alone > 0 {
        // SAFETY: the caller's.
        unsafe { last_panel::<M, CODE>(s) }
    }
    let heights = Heights::of::<M>(s.rows);
    let deep = if s.rows > ROWS_WHOLE { OCTETS_DEEP } else { usize::MAX };
    for (part, fresh) in (Scaled { panels: s.panels - alone, ..*s }).deep(deep) {
        // SAFETY: octets and rows are the product's.
        unsafe {
            // Even heights are more than half of the most.
            match heights.first {
                ..=5 if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, SCALES, 5>(&part, heights, fresh),
                6 if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, SCALES, 6>(&part, heights, fresh),
                7 if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, SCALES, 7>(&part, heights, fresh),
                _ if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, SCALES, 8>(&part, heights, fresh),
                ..=3 => panels::<M, CODE, SCALES, 3>(&part, heights, fresh),
                _ => panels::<M, CODE, SCALES, 4>(&part, heights, fresh),
            }
        }
    }
}

/// All panels, as many at a time as tiles have; the first tile has `R` rows. `fresh`: from zero on.
#[inline(always)]
unsafe fn panels<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize>(
    s: &Scaled<'_>,
    heights: Heights,
    fresh: bool,
) {
    // SAFETY: panels stay within the product.
    unsafe {
        for panel in (0..s.panels).step_by(const { M::PANELS }) {
            match const { M::PANELS } {
                2 => strip::<M, CODE, SCALES, R, 2>(s, heights, fresh, panel),
                _ => strip::<M, CODE, SCALES, R, 1>(s, heights, fresh, panel),
            }
        }
    }
}

/// Some rows by the last panel, which has no other beside it: as few at a time as need no tiles of their own.
#[inline(always)]
unsafe fn last_panel<M: Multiply, const CODE: usize>(s: &Scaled<'_>) {
    let panel = s.panels - 1;
    for row in (0..s.rows).step_by(few::ROWS) {
        // SAFETY: the product's panel and rows.
        unsafe {
            few_rows::<M, CODE>(&Scaled {
                panel: s.panel.add(panel * s.panel_bytes),
                panels: 1,
                x: s.row_of(s.x, row),
                known: s.row_of(s.known, row),
                rows: few::ROWS.min(s.rows - row),
                acc: s.sums_of(s.acc, row).add(panel * LANES),
                ..*s
            });
        }
    }
}

/// All rows by `P` panels, unit after unit.
#[inline(always)]
unsafe fn strip<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    heights: Heights,
    fresh: bool,
    panel: usize,
) {
    let mut cursor = Cursor::by(s.form, s.units.unit, s.octets.0);
    let mut left = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels, the buffer room for a unit.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let out = s.acc.add(panel * LANES);
        if fresh {
            clear::<M, P>(s, out);
        }
        let (mut x, mut known) = (s.x, s.known);
        while left > 0 {
            let count = cursor.count(left);
            let unit = Unit::new(s, cursor.at, count);
            let base = first.add(cursor.base);
            let behind = behind(s.panel_bytes, P * s.panel_bytes, cursor.base, AHEAD_BYTES / P);
            ask_for_scales::<M, P>(s, unit, base.wrapping_add(behind));
            let next = x.wrapping_add(count * 4);
            let follows = if heights.tiles > 0 { s.row_of(x, heights.first) } else { next };
            let rows = Rows { x, next: follows, known, out };
            M::apart(First::<M, CODE, SCALES, R, P> { s, base, behind, unit, rows, multiply: PhantomData });
            let mut row = heights.first;
            for tile in 0..heights.tiles {
                let end = row + heights.height(tile);
                let rows = Rows {
                    x: s.row_of(x, row),
                    next: if end < s.rows { s.row_of(x, end) } else { next },
                    known: s.row_of(known, row),
                    out: s.sums_of(out, row),
                };
                follow_rows::<M, P>(s, rows, unit, end - row);
                row = end;
            }
            x = next;
            known = known.wrapping_add(s.units.words());
            cursor.pass(s.form, count);
            left -= count;
        }
    }
}

/// Zeros the sums of `P` panels.
#[inline(always)]
unsafe fn clear<M: Multiply, const P: usize>(s: &Scaled<'_>, out: *mut f32) {
    for row in 0..s.rows {
        for p in 0..P {
            // SAFETY: acc has the rows and panels.
            unsafe { M::Floats::splat(0.0).store(s.sums_of(out, row).add(p * LANES)) }
        }
    }
}

/// A unit of the first `R` rows, whose codes are left for those that follow, with its scales and offsets.
struct First<'a, M, const CODE: usize, const SCALES: bool, const R: usize, const P: usize> {
    s: &'a Scaled<'a>,
    /// The unit's block, from which octets count, and bytes from there to what is asked for ahead.
    base: *const u8,
    behind: usize,
    unit: Unit,
    rows: Rows,
    multiply: PhantomData<M>,
}

impl<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize> Task
    for First<'_, M, CODE, SCALES, R, P>
{
    #[inline(always)]
    unsafe fn run(self) {
        let First { s, base, behind, unit, rows, .. } = self;
        let (chunk_bytes, scale_bytes) = (s.form.chunk_bytes(), s.form.scale_bytes());
        // SAFETY: the panels have these octets, x and acc the rows, the buffer room for a unit.
        unsafe {
            let mut sums = begun::<M, R, P>(s, rows.known);
            let (mut octet, end) = unit.octets;
            while octet < end {
                let change = match const { SCALES } {
                    true => Change::of::<CODE>(s, base, octet >> s.units.part_shift()),
                    false => Change::none(),
                };
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                let pair = (octet - unit.octets.0) * 4;
                let keep = s.buffer.add(pair * P * LANES);
                let part =
                    Part { chunk, behind, x: rows.x.add(pair), next: rows.next.wrapping_add(pair), keep };
                // Whole chunks (or halves, of 16 inputs that share a scale), which groups nearly always are, have their
                // shifts as constants.
                octet += match (const { together(CODE, SCALES) }, octet % 4, end - octet) {
                    (2, 0, 2..) => octets::<M, CODE, SCALES, R, P, 0, 2>(s, part, &change, &mut sums),
                    (2, 2, 2..) => octets::<M, CODE, SCALES, R, P, 2, 2>(s, part, &change, &mut sums),
                    (4, 0, 4..) => octets::<M, CODE, SCALES, R, P, 0, 4>(s, part, &change, &mut sums),
                    (_, from, _) => {
                        take_apart::<M, CODE, SCALES, P>(part, from, s.panel_bytes, &change);
                        follow_octet::<M, R, P>(s, (part.x, part.keep), &mut sums);
                        1
                    }
                };
            }
            scale_unit::<M, P>(s, base, unit);
            finish::<M, R, P>(s, rows, &sums, unit.parts);
        }
    }
}

/// What some octets of a chunk are multiplied by.
#[derive(Clone, Copy)]
struct Part {
    chunk: *const u8,
    /// Bytes from there to what is asked for ahead.
    behind: usize,
    /// The first row's inputs, and those that are multiplied next.
    x: *const i32,
    next: *const i32,
    /// Where codes are kept, `[pair][panel]` lines.
    keep: *mut f32,
}

/// Adds octets `[FROM, FROM + COUNT)` of a chunk to the sums of a unit, and asks for what lies so far behind them; says how
/// many octets that were.
#[inline(always)]
unsafe fn octets<
    M: Multiply,
    const CODE: usize,
    const SCALES: bool,
    const R: usize,
    const P: usize,
    const FROM: usize,
    const COUNT: usize,
>(
    s: &Scaled<'_>,
    part: Part,
    change: &Change<M::Words, P>,
    sums: &mut Sums<M, R, P>,
) -> usize {
    // SAFETY: the caller's panels have this chunk, rows these inputs, and the buffer room for them.
    unsafe {
        let chunk_bytes = const { chunk_bytes(CODE) };
        for p in 0..P {
            let ahead = part.chunk.wrapping_add(p * s.panel_bytes + part.behind);
            for line in FROM * chunk_bytes / 256..(FROM + COUNT) * chunk_bytes / 256 {
                M::Floats::prefetch(ahead.wrapping_add(line * 64));
            }
        }
        ask_for_rows::<M, R>(s, part.next);
        match const { shifts_by_octet(CODE) } {
            true => {
                each_row!(COUNT, octet => {
                    next_octet::<M, CODE, SCALES, R, P>(s, part, (FROM + octet, octet * 4), change, sums);
                }; 0 1 2 3);
            }
            false => {
                for octet in 0..COUNT {
                    next_octet::<M, CODE, SCALES, R, P>(s, part, (FROM + octet, octet * 4), change, sums);
                }
            }
        }
    }
    COUNT
}

/// Adds octet `octet` of a chunk, whose inputs are from pair `first` on, and keeps its codes.
#[inline(always)]
unsafe fn next_octet<M: Multiply, const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    part: Part,
    (octet, first): (usize, usize),
    change: &Change<M::Words, P>,
    sums: &mut Sums<M, R, P>,
) {
    each_row!(4, pair => {
        // SAFETY: the caller's.
        unsafe {
            let at = first + pair;
            let mut weights = [M::Words::splat(0); P];
            for (p, weights) in weights.iter_mut().enumerate() {
                let codes = M::pair::<CODE>(part.chunk.add(p * s.panel_bytes), octet, pair);
                *weights = change.made::<CODE, SCALES>(codes, p);
                weights.store(part.keep.add((at * P + p) * LANES));
            }
            add::<M, R, P>(s, part.x.add(at), &weights, sums);
        }
    }; 0 1 2 3);
}

/// Whether codes are shifted by what depends on the octet, which is to be a constant then.
const fn shifts_by_octet(code: usize) -> bool {
    matches!(code, 2 | 3 | 5 | 6)
}

/// Takes octet `octet` of a chunk of some panels apart, of a group that is no whole chunks.
#[inline(always)]
unsafe fn take_apart<M: Multiply, const CODE: usize, const SCALES: bool, const P: usize>(
    part: Part,
    octet: usize,
    panel_bytes: usize,
    change: &Change<M::Words, P>,
) {
    // SAFETY: the caller's.
    unsafe { M::apart(TakeApart::<M, CODE, SCALES, P> { part, octet, panel_bytes, change }) }
}

struct TakeApart<'a, M: Multiply, const CODE: usize, const SCALES: bool, const P: usize> {
    part: Part,
    octet: usize,
    panel_bytes: usize,
    change: &'a Change<M::Words, P>,
}

impl<M: Multiply, const CODE: usize, const SCALES: bool, const P: usize> Task
    for TakeApart<'_, M, CODE, SCALES, P>
{
    #[inline(always)]
    unsafe fn run(self) {
        let TakeApart { part, octet, panel_bytes, change } = self;
        for pair in 0..4 {
            for p in 0..P {
                // SAFETY: the caller's panels have this chunk, and the buffer room for it.
                unsafe {
                    let codes = M::pair::<CODE>(part.chunk.add(p * panel_bytes), octet, pair);
                    change.made::<CODE, SCALES>(codes, p).store(part.keep.add((pair * P + p) * LANES));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
