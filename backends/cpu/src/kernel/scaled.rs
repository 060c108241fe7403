//! Quantised weights in bf16 steps, where the level multiplies pairs: codes are multiplied as they are, and a group's sum is
//! scaled once. Whole numbers are multiplied by whole numbers of 16 bits, which inputs become group by group with a factor that
//! is a power of two ([`inputs`]): what is as large as 1/128 of a group's largest is exact, and the rest is off by less than 1/65,000 of the largest. E4M3
//! is multiplied as bf16. Weights stream from memory as small as they are: the first rows take codes apart in registers between their
//! products, where that costs next to nothing, and leave them in the first cache for the rows that follow, group by group; few
//! rows are [`few`]'s. All rows add the same numbers in the same order: within a group pair after pair, then group after group
//! `scale * factor * sum`, then `offset * (sum of the inputs)`.

mod few;
mod halves;
mod inputs;
mod multiply;
mod words;
mod words_avx2;

use std::marker::PhantomData;

use few::few;
use halves::Halves;
use multiply::{Multiply, Task};
use words::Words;
use words_avx2::WordsAvx2;

use super::codes::{Code, Cursor, E4M3, by_code, scale_of};
use super::{Group, Scaled, WholeInputs};
use crate::lanes::{LANES, Lanes};

/// Inputs are asked for so many pairs ahead: rows are more than the processor follows by itself.
const PAIRS_AHEAD: usize = 48;
/// Up to so many rows panels are read from end to end. Beyond, rows pass by so many octets of all panels before the next,
/// which stay in the second cache: whole blocks of every form, since groups divide them.
const ROWS_WHOLE: usize = 32;
const OCTETS_DEEP: usize = 512 / 8;
const _: () = assert!((OCTETS_DEEP * 8).is_multiple_of(Scaled::GROUP_MAX));
/// Panels of a tile at most.
const PANELS: usize = 2;
/// Bytes that are asked for ahead of use, of all panels of a tile together.
const AHEAD_BYTES: usize = 8192;

/// Where scales lie in the buffer, behind the codes of a group.
const SCALES: usize = Scaled::GROUP_MAX / 2 * PANELS * LANES;
const _: () = assert!(SCALES + PANELS * 2 * LANES <= Scaled::BUFFER_FLOATS);

/// Does something for each of up to 12 rows. Of a loop the compiler may leave some turns, and then sums are in memory all the time.
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
    Words,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c"
);
whole!(words_avx2, inputs_avx2, WordsAvx2, "avx2,fma,f16c");

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
        match s.rows <= few::ROWS {
            // Not what this multiplies.
            _ if const { M::WHOLE == (CODE == E4M3) } => {}
            true => few::<M, CODE>(s),
            false => many::<M, CODE>(s),
        }
    }
}

/// How rows are cut into tiles: as few as there can be, of even heights.
#[derive(Clone, Copy)]
struct Heights {
    /// Rows of the first tile, which takes codes apart.
    first: usize,
    /// Rows of the others together, and how many those are.
    others: usize,
    tiles: usize,
}

impl Heights {
    fn of<M: Multiply>(rows: usize) -> Self {
        let tiles = rows.saturating_sub(M::ROWS_FIRST).div_ceil(M::ROWS_FOLLOWING);
        let first = rows.div_ceil(tiles + 1).min(M::ROWS_FIRST);
        Heights { first, others: rows - first, tiles }
    }

    /// Rows before the other tile `tile`.
    fn before(self, tile: usize) -> usize {
        self.first + self.others * tile / self.tiles
    }
}

/// More rows than are few.
#[inline(always)]
unsafe fn many<M: Multiply, const CODE: usize>(s: &Scaled<'_>) {
    let heights = Heights::of::<M>(s.rows);
    let group = s.form.group / 8;
    let deep = if s.rows > ROWS_WHOLE { OCTETS_DEEP } else { usize::MAX };
    let (first, last) = s.octets;
    let (mut from, mut passed) = (first, 0);
    while from < last {
        let to = last.min((from / deep + 1).saturating_mul(deep));
        // SAFETY: octets and rows are the product's.
        unsafe {
            let part = Scaled {
                octets: (from, to),
                x: s.x.add((from - first) * 4),
                groups: s.groups.wrapping_add(passed),
                ..*s
            };
            let fresh = from == first;
            // Even heights are more than half of the most.
            match heights.first {
                ..=5 if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, 5>(&part, heights, fresh),
                6 if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, 6>(&part, heights, fresh),
                7 if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, 7>(&part, heights, fresh),
                _ if const { M::ROWS_FIRST == 8 } => panels::<M, CODE, 8>(&part, heights, fresh),
                ..=3 => panels::<M, CODE, 3>(&part, heights, fresh),
                _ => panels::<M, CODE, 4>(&part, heights, fresh),
            }
        }
        // Parts end where groups do.
        passed += to.div_ceil(group) - from / group;
        from = to;
    }
}

/// All panels, as many at a time as tiles have while there are so many; the first tile has `R` rows. `fresh`: from zero on.
#[inline(always)]
unsafe fn panels<M: Multiply, const CODE: usize, const R: usize>(
    s: &Scaled<'_>,
    heights: Heights,
    fresh: bool,
) {
    let mut panel = 0;
    // SAFETY: panels stay within the product.
    unsafe {
        while const { M::PANELS == 2 } && panel + 2 <= s.panels {
            strip::<M, CODE, R, 2>(s, heights, fresh, panel);
            panel += 2;
        }
        while panel < s.panels {
            strip::<M, CODE, R, 1>(s, heights, fresh, panel);
            panel += 1;
        }
    }
}

/// Sums of `R` rows by `P` panels.
type Sums<M, const R: usize, const P: usize> = [[<M as Multiply>::Words; P]; R];

/// A group's scales and offsets.
type Scales<M, const P: usize> = [(<M as Multiply>::Floats, <M as Multiply>::Floats); P];

/// The scales of group `group` of the blocks of some panels.
#[inline(always)]
unsafe fn scales_of<M: Multiply, const P: usize>(
    s: &Scaled<'_>,
    block: *const u8,
    group: usize,
) -> Scales<M, P> {
    // A closure would be a function of its own, without these instructions.
    // SAFETY: the caller's blocks.
    unsafe {
        let mut scales = [(M::Floats::splat(0.0), M::Floats::splat(0.0)); P];
        for (p, scales) in scales.iter_mut().enumerate() {
            *scales = scale_of::<M::Floats>(s.form, block.add(p * s.panel_bytes), group);
        }
        scales
    }
}

/// Some rows where they are in a group: their inputs, what is known of those, and what they add up to in memory.
#[derive(Clone, Copy)]
struct Rows {
    x: *const i32,
    group: *const Group,
    out: *mut f32,
}

impl Rows {
    /// The rows from `row` on.
    #[inline(always)]
    fn from(self, s: &Scaled<'_>, row: usize) -> Self {
        Rows {
            x: self.x.wrapping_add(row * s.x_stride),
            group: s.group_of(self.group, row),
            out: self.out.wrapping_add(row * s.acc_stride),
        }
    }
}

impl Scaled<'_> {
    /// Row `row`'s of what `first` is of the first row.
    #[inline(always)]
    fn group_of(&self, first: *const Group, row: usize) -> *const Group {
        first.wrapping_byte_add(row * self.x_stride * size_of::<i32>())
    }
}

/// All rows by `P` panels, group after group.
#[inline(always)]
unsafe fn strip<M: Multiply, const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    heights: Heights,
    fresh: bool,
    panel: usize,
) {
    let (chunk_bytes, scale_bytes) = (s.form.chunk_bytes(), s.form.scale_bytes());
    let mut cursor = Cursor::new(s.form, s.octets.0);
    let mut left = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels, the buffer room for a group.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let mut rows = Rows { x: s.x, group: s.groups, out: s.acc.add(panel * LANES) };
        if fresh {
            for row in 0..s.rows {
                for p in 0..P {
                    M::Floats::splat(0.0).store(rows.out.add(row * s.acc_stride + p * LANES));
                }
            }
        }
        while left > 0 {
            let count = cursor.count(left);
            let base = first.add(cursor.base);
            let behind = behind::<P>(s, cursor.base);
            for p in 0..P {
                let scales = s.form.scale.first() + cursor.at_group * s.form.scale.stride();
                M::Floats::prefetch(base.wrapping_add(p * s.panel_bytes + behind + scales));
            }
            let mut sums = [[M::zero(); P]; R];
            let (mut octet, end) = (cursor.at, cursor.at + count);
            while octet < end {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                let pair = (octet - cursor.at) * 4;
                let keep = s.buffer.add(pair * P * LANES);
                let part = Part { chunk, behind, x: rows.x.add(pair), keep };
                // Whole chunks (or halves, of 16 inputs that share a scale), which groups nearly always are, have their
                // shifts as constants.
                octet += match (CODE, octet % 4, end - octet) {
                    (6, 0, 2..) => octets::<M, CODE, R, P, 0, 2>(s, part, &mut sums),
                    (6, 2, 2..) => octets::<M, CODE, R, P, 2, 2>(s, part, &mut sums),
                    (..6 | 7.., 0, 4..) => octets::<M, CODE, R, P, 0, 4>(s, part, &mut sums),
                    (_, from, _) => {
                        take_apart::<M, CODE>(part, (from, P), s.panel_bytes);
                        follow_octet::<M, R, P>(s, part, &mut sums);
                        1
                    }
                };
            }
            let scales = scales_of::<M, P>(s, base, cursor.at_group);
            finish::<M, R, P>(s, rows, &sums, &scales);
            if heights.tiles > 0 {
                for (p, (scale, offset)) in scales.into_iter().enumerate() {
                    let to = s.buffer.add(SCALES + p * 2 * LANES);
                    scale.store(to);
                    offset.store(to.add(LANES));
                }
                for tile in 0..heights.tiles {
                    let row = heights.before(tile);
                    let rows = rows.from(s, row);
                    follow_rows::<M, P>(s, rows, count, heights.before(tile + 1) - row);
                }
            }
            rows.x = rows.x.add(count * 4);
            rows.group = rows.group.wrapping_add(1);
            cursor.pass(s.form, count);
            left -= count;
        }
    }
}

/// Bytes from `at` in `P` panels to what is asked for there: what lies behind, and at the end of the panels those that come next.
#[inline(always)]
fn behind<const P: usize>(s: &Scaled<'_>, at: usize) -> usize {
    let own = const { AHEAD_BYTES / P };
    if at + own < s.panel_bytes { own } else { own + (P - 1) * s.panel_bytes }
}

/// What some octets of a chunk are multiplied by.
#[derive(Clone, Copy)]
struct Part {
    chunk: *const u8,
    /// Bytes from there to what is asked for ahead.
    behind: usize,
    /// The first row's inputs.
    x: *const i32,
    /// Where codes are kept, `[pair][panel]` lines.
    keep: *mut f32,
}

/// Adds octets `[FROM, FROM + COUNT)` of a chunk to the sums of a group, and asks for what lies so far behind them; says how
/// many octets that were.
#[inline(always)]
unsafe fn octets<
    M: Multiply,
    const CODE: usize,
    const R: usize,
    const P: usize,
    const FROM: usize,
    const COUNT: usize,
>(
    s: &Scaled<'_>,
    part: Part,
    sums: &mut Sums<M, R, P>,
) -> usize {
    // SAFETY: the caller's panels have this chunk, rows these inputs, and the buffer room for them.
    unsafe {
        let chunk_bytes = if CODE <= 6 { CODE * 64 } else { 512 };
        for p in 0..P {
            let ahead = part.chunk.wrapping_add(p * s.panel_bytes + part.behind);
            for line in FROM * chunk_bytes / 256..(FROM + COUNT) * chunk_bytes / 256 {
                M::Floats::prefetch(ahead.wrapping_add(line * 64));
            }
        }
        // Two loops are unrolled where one of as many turns is not.
        for octet in 0..COUNT {
            for pair in 0..4 {
                let at = octet * 4 + pair;
                let mut weights = [M::zero(); P];
                for (p, weights) in weights.iter_mut().enumerate() {
                    let chunk = part.chunk.add(p * s.panel_bytes);
                    *weights = M::pair::<CODE>(chunk, FROM + octet, pair);
                    M::store(*weights, part.keep.add((at * P + p) * LANES));
                }
                add::<M, R, P>(s, part.x.add(at), &weights, sums);
            }
        }
    }
    COUNT
}

/// Takes octet `octet` of a chunk of some panels apart, of a group that is no whole chunks.
#[inline(always)]
unsafe fn take_apart<M: Multiply, const CODE: usize>(
    part: Part,
    (octet, panels): (usize, usize),
    panel_bytes: usize,
) {
    // SAFETY: the caller's.
    unsafe { M::apart(TakeApart::<M, CODE> { part, octet, panels, panel_bytes, multiply: PhantomData }) }
}

struct TakeApart<M, const CODE: usize> {
    part: Part,
    octet: usize,
    panels: usize,
    panel_bytes: usize,
    multiply: PhantomData<M>,
}

impl<M: Multiply, const CODE: usize> Task for TakeApart<M, CODE> {
    #[inline(always)]
    unsafe fn run(self) {
        let TakeApart { part, octet, panels, panel_bytes, .. } = self;
        for (pair, panel) in (0..4).flat_map(|pair| (0..panels).map(move |panel| (pair, panel))) {
            // SAFETY: the caller's panels have this chunk, and the buffer room for it.
            unsafe {
                let weights = M::pair::<CODE>(part.chunk.add(panel * panel_bytes), octet, pair);
                M::store(weights, part.keep.add((pair * panels + panel) * LANES));
            }
        }
    }
}

/// Adds an octet that is in the buffer.
#[inline(always)]
unsafe fn follow_octet<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    part: Part,
    sums: &mut Sums<M, R, P>,
) {
    for pair in 0..4 {
        // SAFETY: the buffer has these codes, and rows the inputs.
        unsafe {
            let at = part.keep.add(pair * P * LANES);
            let mut weights = [M::zero(); P];
            for (p, weights) in weights.iter_mut().enumerate() {
                *weights = M::load(at.add(p * LANES));
            }
            add::<M, R, P>(s, part.x.add(pair), &weights, sums);
        }
    }
}

/// Adds a pair of inputs, of the first row at `x`, by the weights of each panel.
#[inline(always)]
unsafe fn add<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    x: *const i32,
    weights: &[M::Words; P],
    sums: &mut Sums<M, R, P>,
) {
    each_row!(R, r => {
        // SAFETY: the caller's rows.
        unsafe {
            let inputs = *x.add(r * s.x_stride);
            for (sum, weights) in sums[r].iter_mut().zip(weights) {
                *sum = M::add(*sum, *weights, inputs);
            }
        }
    });
}

/// Scales a group's sums and adds them to the rows' totals.
#[inline(always)]
unsafe fn finish<M: Multiply, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    rows: Rows,
    sums: &Sums<M, R, P>,
    scales: &Scales<M, P>,
) {
    each_row!(R, r => {
        // SAFETY: the caller's rows.
        unsafe {
            M::Floats::prefetch(rows.x.wrapping_add(r * s.x_stride + PAIRS_AHEAD).cast());
            let group = s.group_of(rows.group, r);
            for (p, (scale, offset)) in scales.iter().enumerate() {
                let out = rows.out.add(r * s.acc_stride + p * LANES);
                total::<M>(M::Floats::load(out), sums[r][p], (*scale, *offset), group).store(out);
            }
        }
    });
}

/// `total` and a group's sum, scaled.
#[inline(always)]
unsafe fn total<M: Multiply>(
    total: M::Floats,
    sum: M::Words,
    (scale, offset): (M::Floats, M::Floats),
    group: *const Group,
) -> M::Floats {
    // SAFETY: the caller's group, where there are such.
    unsafe {
        let sum = M::floats(sum);
        match const { M::WHOLE } {
            true => {
                let Group { factor, sum: inputs } = *group;
                let total = total.madd(scale, sum.mul(M::Floats::splat(factor)));
                total.madd(offset, M::Floats::splat(inputs))
            }
            false => total.madd(scale, sum),
        }
    }
}

/// A group of `height` more rows by `P` panels.
#[inline(always)]
unsafe fn follow_rows<M: Multiply, const P: usize>(s: &Scaled<'_>, rows: Rows, octets: usize, height: usize) {
    // SAFETY: the caller's.
    unsafe {
        match height {
            12.. if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 12, P>(s, rows, octets),
            11 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 11, P>(s, rows, octets),
            10 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 10, P>(s, rows, octets),
            9 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 9, P>(s, rows, octets),
            8 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 8, P>(s, rows, octets),
            7 if const { M::ROWS_FOLLOWING == 12 } => follow::<M, 7, P>(s, rows, octets),
            6.. => follow::<M, 6, P>(s, rows, octets),
            5 => follow::<M, 5, P>(s, rows, octets),
            4 => follow::<M, 4, P>(s, rows, octets),
            3 if const { M::ROWS_FOLLOWING == 6 } => follow::<M, 3, P>(s, rows, octets),
            _ => follow::<M, 2, P>(s, rows, octets),
        }
    }
}

/// A group of `R` more rows by `P` panels, by the codes and scales that are in the buffer.
#[inline(always)]
unsafe fn follow<M: Multiply, const R: usize, const P: usize>(s: &Scaled<'_>, rows: Rows, octets: usize) {
    // SAFETY: the caller's.
    unsafe { M::apart(Follow::<M, R, P> { s, rows, octets, multiply: PhantomData }) }
}

struct Follow<'a, M, const R: usize, const P: usize> {
    s: &'a Scaled<'a>,
    rows: Rows,
    octets: usize,
    multiply: PhantomData<M>,
}

impl<M: Multiply, const R: usize, const P: usize> Task for Follow<'_, M, R, P> {
    #[inline(always)]
    unsafe fn run(self) {
        let Follow { s, rows, octets, .. } = self;
        // SAFETY: the buffer has these octets and their scales, x and acc the rows.
        unsafe {
            let mut sums = [[M::zero(); P]; R];
            for octet in 0..octets {
                let (x, keep) = (rows.x.add(octet * 4), s.buffer.add(octet * 4 * P * LANES));
                let part = Part { chunk: std::ptr::null(), behind: 0, x, keep };
                follow_octet::<M, R, P>(s, part, &mut sums);
            }
            let mut scales = [(M::Floats::splat(0.0), M::Floats::splat(0.0)); P];
            for (p, scales) in scales.iter_mut().enumerate() {
                let at = s.buffer.add(SCALES + p * 2 * LANES);
                *scales = (M::Floats::load(at), M::Floats::load(at.add(LANES)));
            }
            finish::<M, R, P>(s, rows, &sums, &scales);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::codes::{Form, Scale, Zero};
    use super::super::{CodedPairs, Kernels};
    use super::{Code, LANES, Scaled, WholeInputs};
    use crate::level::Level;
    use crate::memory::Memory;

    const OCTETS: usize = 160;
    const PANELS: usize = 5;
    const ROWS: usize = 97;

    /// Levels that multiply codes of a form as they are.
    fn each(check: impl Fn(&'static Kernels, unsafe fn(&Scaled<'_>), Form, String)) {
        for level in Level::ALL.into_iter().filter(|level| level.available()) {
            let kernels = level.kernels();
            for form in forms() {
                let halves = match kernels.pairs.map(|pairs| pairs.coded) {
                    Some(CodedPairs::Scaled(product)) => Some(product),
                    _ => None,
                };
                let whole = kernels.whole.map(|whole| whole.product);
                if let Some(product) = if form.is_whole() { whole } else { halves } {
                    check(kernels, product, form, format!("{level}, {form:?}"));
                }
            }
        }
    }

    /// A row's bits are those that it has alone, however many rows tiles share codes with, and where parts of K begin and
    /// end within groups and chunks.
    #[test]
    fn rows_do_not_depend_on_each_other() {
        each(|kernels, kernel, form, name| {
            for octets in [(0, OCTETS), (3, OCTETS - 5)] {
                let alone: Vec<u32> = (0..ROWS)
                    .flat_map(|row| product(kernels, kernel, &form, octets, 1, row..row + 1))
                    .collect();
                for rows in (2..=34).chain([45, 86, 96, ROWS]) {
                    let together = product(kernels, kernel, &form, octets, 1, 0..rows);
                    assert!(together == alone[..together.len()], "{name}, octets {octets:?}, {rows} rows");
                }
            }
        });
    }

    /// Ranges that are summed at once have the sums that each has by itself, wherever they begin and end.
    #[test]
    fn ranges_do_not_depend_on_each_other() {
        each(|kernels, kernel, form, name| {
            for (first, each) in [(0, OCTETS / 8), (3, 19)] {
                for rows in 1..=Scaled::ROWS_RANGES {
                    let alone: Vec<u32> = (0..8)
                        .map(|range| (first + range * each, first + (range + 1) * each))
                        .flat_map(|octets| product(kernels, kernel, &form, octets, 1, 0..rows))
                        .collect();
                    let together = product(kernels, kernel, &form, (first, first + each), 8, 0..rows);
                    assert!(
                        together == alone,
                        "{name}, 8 ranges of {each} octets from {first} on, {rows} rows"
                    );
                }
            }
        });
    }

    fn forms() -> [Form; 8] {
        let form = |code, scale, group, span| Form { code, scale, group, span };
        [
            form(Code::Planes(4), Scale::Minima, 32, 256),
            form(Code::Planes(6), Scale::Signed, 16, 256),
            form(Code::Planes(6), Scale::F16(Zero::Bias), 64, 64),
            form(Code::Planes(5), Scale::F16(Zero::Code(16.0)), 32, 64),
            form(Code::Planes(3), Scale::F32(Zero::Bias), 8, 32),
            form(Code::Planes(2), Scale::Bf16(Zero::Bias), 128, 128),
            form(Code::Bytes, Scale::F16(Zero::Code(128.0)), 32, 64),
            form(Code::E4m3, Scale::F32(Zero::Code(0.0)), 128, 128),
        ]
    }

    /// Bits of the sums of some rows over `octets` and as many ranges behind them; weights and inputs are always the same.
    fn product(
        kernels: &Kernels,
        kernel: unsafe fn(&Scaled<'_>),
        form: &Form,
        octets: (usize, usize),
        ranges: usize,
        rows: std::ops::Range<usize>,
    ) -> Vec<u32> {
        let panel_bytes = (OCTETS * 8).div_ceil(form.span) * form.block_bytes();
        let weights = Memory::zeroed(PANELS * panel_bytes).unwrap();
        for at in 0..PANELS * panel_bytes {
            // Whatever they are part of, such bytes are no infinity.
            // SAFETY: within the weights.
            unsafe { *weights.at(at) = (at.wrapping_mul(0x9e37_79b9) >> 13) as u8 & 0x3b };
        }
        // Pairs, and then what the groups of each range have.
        let (pairs, groups_range) = (OCTETS * 4, OCTETS + 1);
        let stride = pairs + ranges * groups_range * 2;
        let mut x = vec![0i32; rows.len() * stride];
        for (row, out) in rows.clone().zip(x.chunks_exact_mut(stride)) {
            let floats: Vec<f32> = (row * pairs * 2..(row + 1) * pairs * 2)
                .map(|at| {
                    let bits = at.wrapping_mul(0x85eb_ca6b) >> 7;
                    // Between a half and two in size.
                    f32::from_bits((0x3f00_0000 | bits & 0x80ff_0000) as u32)
                })
                .collect();
            let (out, groups) = out.split_at_mut(pairs);
            for (range, groups) in groups.chunks_exact_mut(groups_range * 2).enumerate() {
                let behind = range * (octets.1 - octets.0);
                let octets = (octets.0 + behind, octets.1 + behind);
                let (x, out) = (floats[octets.0 * 8..].as_ptr(), out[octets.0 * 4..].as_mut_ptr());
                let groups = groups.as_mut_ptr().cast();
                // SAFETY: the row's inputs and pairs, and room for as many groups as octets.
                unsafe {
                    match kernels.whole.filter(|_| form.is_whole()) {
                        Some(whole) => {
                            (whole.inputs)(&WholeInputs { x, octets, group: form.group / 8, out, groups });
                        }
                        None => (kernels.narrow)(x, out.cast(), (octets.1 - octets.0) * 8),
                    }
                }
            }
        }
        let acc_range = rows.len() * PANELS * LANES;
        let mut acc = vec![f32::NAN; ranges * acc_range];
        let buffer = Memory::zeroed(Scaled::BUFFER_FLOATS * 4).unwrap();
        let product = Scaled {
            form,
            panel: weights.at(0),
            panel_bytes,
            panels: PANELS,
            octets,
            ranges,
            x: x[octets.0 * 4..].as_ptr(),
            x_stride: stride,
            groups: x[pairs..].as_ptr().cast(),
            groups_range,
            rows: rows.len(),
            acc: acc.as_mut_ptr(),
            acc_range,
            acc_stride: PANELS * LANES,
            buffer: buffer.at(0).cast(),
        };
        // SAFETY: the level is available, and all are as long as the product says.
        unsafe { kernel(&product) };
        acc.into_iter().map(f32::to_bits).collect()
    }
}
