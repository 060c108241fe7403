//! Quantised weights where the level multiplies pairs of bf16: codes are whole numbers (or E4M3), which are bf16 as they
//! are, so they are multiplied as such, and a group's sum is scaled once. Weights stream from memory as small as they are:
//! the first rows take codes apart in registers between their products, where that costs next to nothing, and leave
//! them in the first cache for the rows that follow, group by group; few rows are [`few`]'s. All rows add the same numbers in the same order:
//! within a group pair after pair, then group after group `scale * sum`, then `offset * (sum of the inputs)`.

mod few;

use std::arch::x86_64::*;

use few::few;

use super::Scaled;
use super::codes::{Code, Cursor, E4M3, by_code, scale_of};
use super::group_sums::sum_of;
use super::pair_codes::{Table, pair_of};
use super::pairs::halves;
use crate::lanes::LANES;
use crate::lanes::avx512::Avx512;

/// Rows of the first tile at most: by 2 panels they are enough sums in flight, and leave registers for taking codes apart.
const ROWS_FIRST: usize = 8;
/// Rows of another tile at most.
const ROWS_FOLLOWING: usize = 12;
/// Inputs are asked for so many pairs ahead: rows are more than the processor follows by itself.
const PAIRS_AHEAD: usize = 48;
/// Up to so many rows panels are read from end to end. Beyond, rows pass by so many octets of all panels before the next,
/// which stay in the second cache: whole blocks of every form, since groups divide them.
const ROWS_WHOLE: usize = 32;
const OCTETS_DEEP: usize = 512 / 8;
const _: () = assert!((OCTETS_DEEP * 8).is_multiple_of(Scaled::GROUP_MAX));
/// Panels of a tile: with more rows than [`few::ROWS`] they are sums enough in flight.
const PANELS: usize = 2;
/// Bytes that are asked for ahead of use, of all panels of a tile together.
const AHEAD_BYTES: usize = 8192;

/// Where scales lie in the buffer, behind the codes of a group.
const SCALES: usize = Scaled::GROUP_MAX / 2 * PANELS * LANES;
const _: () = assert!(SCALES + PANELS * 2 * LANES <= Scaled::BUFFER_FLOATS);

/// Runs a product.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn scaled(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match s.rows <= few::ROWS {
            true => by_code!(s.form.code, few(s)),
            false => by_code!(s.form.code, many(s)),
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
    fn of(rows: usize) -> Self {
        let tiles = rows.saturating_sub(ROWS_FIRST).div_ceil(ROWS_FOLLOWING);
        let first = rows.div_ceil(tiles + 1).min(ROWS_FIRST);
        Heights { first, others: rows - first, tiles }
    }

    /// Rows before the other tile `tile`.
    fn before(self, tile: usize) -> usize {
        self.first + self.others * tile / self.tiles
    }
}

/// More rows than are few.
#[inline(always)]
unsafe fn many<const CODE: usize>(s: &Scaled<'_>) {
    let heights = Heights::of(s.rows);
    let group = s.form.group / 8;
    let deep = if s.rows > ROWS_WHOLE { OCTETS_DEEP } else { usize::MAX };
    let (first, last) = s.octets;
    let (mut from, mut sums) = (first, 0);
    while from < last {
        let to = last.min((from / deep + 1).saturating_mul(deep));
        // SAFETY: octets and rows are the product's.
        unsafe {
            let part = Scaled {
                octets: (from, to),
                x: s.x.add((from - first) * 4),
                sums: s.sums.wrapping_add(sums),
                ..*s
            };
            let fresh = from == first;
            match heights.first {
                ..=5 => panels::<CODE, 5>(&part, heights, fresh),
                6 => panels::<CODE, 6>(&part, heights, fresh),
                7 => panels::<CODE, 7>(&part, heights, fresh),
                _ => panels::<CODE, ROWS_FIRST>(&part, heights, fresh),
            }
        }
        // Parts end where groups do.
        sums += to.div_ceil(group) - from / group;
        from = to;
    }
}

/// All panels, [`PANELS`] at a time while there are so many; the first tile has `R` rows. `fresh`: from zero on.
#[inline(always)]
unsafe fn panels<const CODE: usize, const R: usize>(s: &Scaled<'_>, heights: Heights, fresh: bool) {
    let mut panel = 0;
    // SAFETY: panels stay within the product.
    unsafe {
        while panel + PANELS <= s.panels {
            strip::<CODE, R, PANELS>(s, heights, fresh, panel);
            panel += PANELS;
        }
        while panel < s.panels {
            strip::<CODE, R, 1>(s, heights, fresh, panel);
            panel += 1;
        }
    }
}

/// Sums of `R` rows by `P` panels.
type Sums<const R: usize, const P: usize> = [[__m512; P]; R];

/// A group's scales and offsets.
type Scales<const P: usize> = [(__m512, __m512); P];

/// Some rows where they are in a group: their inputs, the sums of those, and what they add up to in memory.
#[derive(Clone, Copy)]
struct Rows {
    x: *const i32,
    of_inputs: *const f32,
    out: *mut f32,
}

impl Rows {
    /// The rows from `row` on.
    #[inline(always)]
    fn from(self, s: &Scaled<'_>, row: usize) -> Self {
        Rows {
            x: self.x.wrapping_add(row * s.x_stride),
            of_inputs: self.of_inputs.wrapping_add(row * s.x_stride),
            out: self.out.wrapping_add(row * s.acc_stride),
        }
    }
}

/// All rows by `P` panels, group after group.
#[inline(always)]
unsafe fn strip<const CODE: usize, const R: usize, const P: usize>(
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
        let table = Table::new::<CODE>();
        let first = s.panel.add(panel * s.panel_bytes);
        let mut rows = Rows { x: s.x, of_inputs: s.sums, out: s.acc.add(panel * LANES) };
        if fresh {
            for row in 0..s.rows {
                for p in 0..P {
                    _mm512_storeu_ps(rows.out.add(row * s.acc_stride + p * LANES), _mm512_setzero_ps());
                }
            }
        }
        while left > 0 {
            let count = cursor.count(left);
            let base = first.add(cursor.base);
            let behind = behind::<P>(s, cursor.base);
            for p in 0..P {
                let scales = s.form.scale.first() + cursor.at_group * s.form.scale.stride();
                _mm_prefetch::<_MM_HINT_T0>(base.wrapping_add(p * s.panel_bytes + behind + scales).cast());
            }
            let mut sums = [[_mm512_setzero_ps(); P]; R];
            let (mut octet, end) = (cursor.at, cursor.at + count);
            while octet < end {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                let pair = (octet - cursor.at) * 4;
                let keep = s.buffer.add(pair * P * LANES);
                let part = Part { chunk, behind, x: rows.x.add(pair), keep };
                // Whole chunks (or halves, of 16 inputs that share a scale), which groups nearly always are, have their
                // shifts as constants.
                octet += match (CODE, octet % 4, end - octet) {
                    (6, 0, 2..) => octets::<CODE, R, P, 0, 2>(s, part, table, &mut sums),
                    (6, 2, 2..) => octets::<CODE, R, P, 2, 2>(s, part, table, &mut sums),
                    (..6 | 7.., 0, 4..) => octets::<CODE, R, P, 0, 4>(s, part, table, &mut sums),
                    (_, from, _) => {
                        take_apart::<CODE>(part, (from, P), s.panel_bytes);
                        follow_octet(s, part, &mut sums);
                        1
                    }
                };
            }
            let mut scales = [(_mm512_setzero_ps(), _mm512_setzero_ps()); P];
            for (p, scales) in scales.iter_mut().enumerate() {
                let at = base.add(p * s.panel_bytes);
                let (scale, offset) = scale_of::<Avx512>(s.form, at, cursor.at_group);
                *scales = (scale.0, offset.0);
            }
            let offsets = const { CODE != E4M3 };
            debug_assert!(!offsets || rows.are_summed(s, R, count));
            finish::<R, P>(s, rows, &sums, &scales, offsets);
            if heights.tiles > 0 {
                for (p, (scale, offset)) in scales.into_iter().enumerate() {
                    let to = s.buffer.add(SCALES + p * 2 * LANES);
                    _mm512_store_ps(to, scale);
                    _mm512_store_ps(to.add(LANES), offset);
                }
                for tile in 0..heights.tiles {
                    let row = heights.before(tile);
                    let rows = rows.from(s, row);
                    match heights.before(tile + 1) - row {
                        12 => follow::<12, P>(s, rows, count),
                        11 => follow::<11, P>(s, rows, count),
                        10 => follow::<10, P>(s, rows, count),
                        9 => follow::<9, P>(s, rows, count),
                        8 => follow::<8, P>(s, rows, count),
                        7 => follow::<7, P>(s, rows, count),
                        6 => follow::<6, P>(s, rows, count),
                        5 => follow::<5, P>(s, rows, count),
                        _ => follow::<4, P>(s, rows, count),
                    }
                }
            }
            rows.x = rows.x.add(count * 4);
            rows.of_inputs = rows.of_inputs.wrapping_add(1);
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
#[allow(clippy::needless_range_loop)] // panels index weights and addresses alike
unsafe fn octets<const CODE: usize, const R: usize, const P: usize, const FROM: usize, const COUNT: usize>(
    s: &Scaled<'_>,
    part: Part,
    table: Table,
    sums: &mut Sums<R, P>,
) -> usize {
    // SAFETY: the caller's panels have this chunk, rows these inputs, and the buffer room for them.
    unsafe {
        let chunk_bytes = if CODE <= 6 { CODE * 64 } else { 512 };
        for p in 0..P {
            let ahead = part.chunk.wrapping_add(p * s.panel_bytes + part.behind);
            for line in FROM * chunk_bytes / 256..(FROM + COUNT) * chunk_bytes / 256 {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64).cast());
            }
        }
        // Two loops are unrolled where one of as many turns is not.
        for octet in 0..COUNT {
            for pair in 0..4 {
                let at = octet * 4 + pair;
                let mut weights = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    let chunk = part.chunk.add(p * s.panel_bytes);
                    weights[p] = pair_of::<CODE>(chunk, FROM + octet, pair, table);
                    _mm512_store_si512(part.keep.add((at * P + p) * LANES).cast(), weights[p]);
                }
                add(s, part.x.add(at), &weights, sums);
            }
        }
    }
    COUNT
}

/// Takes octet `octet` of a chunk of some panels apart, of a group that is no whole chunks.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn take_apart<const CODE: usize>(part: Part, (octet, panels): (usize, usize), panel_bytes: usize) {
    // SAFETY: the caller's panels have this chunk, and the buffer room for it.
    unsafe {
        let table = Table::new::<CODE>();
        for (pair, panel) in (0..4).flat_map(|pair| (0..panels).map(move |panel| (pair, panel))) {
            let weights = pair_of::<CODE>(part.chunk.add(panel * panel_bytes), octet, pair, table);
            _mm512_store_si512(part.keep.add((pair * panels + panel) * LANES).cast(), weights);
        }
    }
}

/// Adds an octet that is in the buffer.
#[inline(always)]
unsafe fn follow_octet<const R: usize, const P: usize>(s: &Scaled<'_>, part: Part, sums: &mut Sums<R, P>) {
    for pair in 0..4 {
        // SAFETY: the buffer has these codes, and rows the inputs.
        unsafe {
            let at = part.keep.add(pair * P * LANES);
            let weights = std::array::from_fn(|p| _mm512_load_si512(at.add(p * LANES).cast()));
            add(s, part.x.add(pair), &weights, sums);
        }
    }
}

/// Adds a pair of inputs, of the first row at `x`, by the weights of each panel.
#[inline(always)]
unsafe fn add<const R: usize, const P: usize>(
    s: &Scaled<'_>,
    x: *const i32,
    weights: &[__m512i; P],
    sums: &mut Sums<R, P>,
) {
    for (r, row) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's rows.
        unsafe {
            let factor = halves(_mm512_set1_epi32(*x.add(r * s.x_stride)));
            for (sum, weights) in row.iter_mut().zip(weights) {
                *sum = _mm512_dpbf16_ps(*sum, halves(*weights), factor);
            }
        }
    }
}

/// Scales a group's sums and adds them to the rows' totals.
#[inline(always)]
unsafe fn finish<const R: usize, const P: usize>(
    s: &Scaled<'_>,
    rows: Rows,
    sums: &Sums<R, P>,
    scales: &Scales<P>,
    offsets: bool,
) {
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: the caller's rows.
        unsafe {
            let ahead = rows.x.wrapping_add(r * s.x_stride + PAIRS_AHEAD);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            let of_inputs = match offsets {
                true => _mm512_set1_ps(*rows.of_inputs.add(r * s.x_stride)),
                false => _mm512_setzero_ps(),
            };
            for (p, (scale, offset)) in scales.iter().enumerate() {
                let out = rows.out.add(r * s.acc_stride + p * LANES);
                let mut total = _mm512_fmadd_ps(*scale, sums[p], _mm512_loadu_ps(out));
                if offsets {
                    total = _mm512_fmadd_ps(*offset, of_inputs, total);
                }
                _mm512_storeu_ps(out, total);
            }
        }
    }
}

/// A group of `R` more rows by `P` panels, by the codes and scales that are in the buffer.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn follow<const R: usize, const P: usize>(s: &Scaled<'_>, rows: Rows, octets: usize) {
    // SAFETY: the buffer has these octets and their scales, x and acc the rows.
    unsafe {
        let offsets = s.form.has_offsets();
        debug_assert!(!offsets || rows.are_summed(s, R, octets));
        let mut sums = [[_mm512_setzero_ps(); P]; R];
        for octet in 0..octets {
            let (x, keep) = (rows.x.add(octet * 4), s.buffer.add(octet * 4 * P * LANES));
            follow_octet(s, Part { chunk: std::ptr::null(), behind: 0, x, keep }, &mut sums);
        }
        let scales = std::array::from_fn(|p| {
            let at = s.buffer.add(SCALES + p * 2 * LANES);
            (_mm512_load_ps(at), _mm512_load_ps(at.add(LANES)))
        });
        finish::<R, P>(s, rows, &sums, &scales, offsets);
    }
}

impl Rows {
    /// Whether `count` rows bring the sums of the `octets` octets that they are at.
    unsafe fn are_summed(self, s: &Scaled<'_>, count: usize, octets: usize) -> bool {
        // SAFETY: the caller's rows.
        (0..count).all(|row| unsafe {
            let Rows { x, of_inputs, .. } = self.from(s, row);
            (*of_inputs).to_bits() == sum_of(x, octets).to_bits()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::codes::{Form, Scale, Zero};
    use super::super::{GroupSums, group_sums};
    use super::{Code, LANES, Scaled, scaled};
    use crate::level::Level;
    use crate::memory::Memory;

    const OCTETS: usize = 160;
    const PANELS: usize = 5;
    const ROWS: usize = 97;

    /// A row's bits are those that it has alone, however many rows tiles share codes with, and where parts of K begin and
    /// end within groups and chunks.
    #[test]
    fn rows_do_not_depend_on_each_other() {
        if !Level::Avx512Bf16.available() {
            return;
        }
        for form in forms() {
            for octets in [(0, OCTETS), (3, OCTETS - 5)] {
                let alone: Vec<u32> =
                    (0..ROWS).flat_map(|row| product(&form, octets, 1, row..row + 1)).collect();
                for rows in (2..=34).chain([45, 86, 96, ROWS]) {
                    let together = product(&form, octets, 1, 0..rows);
                    assert!(together == alone[..together.len()], "{form:?}, octets {octets:?}, {rows} rows");
                }
            }
        }
    }

    /// Ranges that are summed at once have the sums that each has by itself, wherever they begin and end.
    #[test]
    fn ranges_do_not_depend_on_each_other() {
        if !Level::Avx512Bf16.available() {
            return;
        }
        for form in forms() {
            for (first, each) in [(0, OCTETS / 8), (3, 19)] {
                for rows in 1..=Scaled::ROWS_RANGES {
                    let alone: Vec<u32> = (0..8)
                        .map(|range| (first + range * each, first + (range + 1) * each))
                        .flat_map(|octets| product(&form, octets, 1, 0..rows))
                        .collect();
                    let together = product(&form, (first, first + each), 8, 0..rows);
                    assert!(
                        together == alone,
                        "{form:?}, 8 ranges of {each} octets from {first} on, {rows} rows"
                    );
                }
            }
        }
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
    fn product(form: &Form, octets: (usize, usize), ranges: usize, rows: std::ops::Range<usize>) -> Vec<u32> {
        let panel_bytes = (OCTETS * 8).div_ceil(form.span) * form.block_bytes();
        let weights = Memory::zeroed(PANELS * panel_bytes).unwrap();
        for at in 0..PANELS * panel_bytes {
            // Whatever they are part of, such bytes are no infinity.
            // SAFETY: within the weights.
            unsafe { *weights.at(at) = (at.wrapping_mul(0x9e37_79b9) >> 13) as u8 & 0x3b };
        }
        let (pairs, sums_range) = (OCTETS * 4, OCTETS + 1);
        let stride = pairs + ranges * sums_range;
        let mut x = vec![0i32; rows.len() * stride];
        for (row, x) in rows.clone().zip(x.chunks_exact_mut(stride)) {
            for (at, pair) in x[..pairs].iter_mut().enumerate() {
                let bits = (row * pairs + at).wrapping_mul(0x85eb_ca6b) >> 7;
                // Two numbers between a half and two.
                *pair = 0x3f00_3f00 | (bits & 0x80ff_80ff) as i32;
            }
            let (pairs, sums) = x.split_at_mut(pairs);
            for (range, sums) in sums.chunks_exact_mut(sums_range).enumerate() {
                let behind = range * (octets.1 - octets.0);
                let octets = (octets.0 + behind, octets.1 + behind);
                let (x, out) = (pairs[octets.0 * 4..].as_ptr(), sums.as_mut_ptr().cast());
                // SAFETY: the row's pairs, and room for as many sums as octets.
                unsafe { group_sums::sums(&GroupSums { x, octets, group: form.group / 8, out }) };
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
            sums: x[pairs..].as_ptr().cast(),
            sums_range,
            rows: rows.len(),
            acc: acc.as_mut_ptr(),
            acc_range,
            acc_stride: PANELS * LANES,
            buffer: buffer.at(0).cast(),
        };
        // SAFETY: the level is available, and all are as long as the product says.
        unsafe { scaled(&product) };
        acc.into_iter().map(f32::to_bits).collect()
    }
}
