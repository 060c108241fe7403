//! Quantised weights where the level multiplies pairs of bf16: codes are whole numbers (or E4M3), which are bf16 as they
//! are, so they are multiplied as such, and a group's sum is scaled once. Few rows take codes apart in registers and use
//! them at once, so that weights stream from memory as small as they are; for many rows pieces of panels are taken apart into
//! the first cache. Both add the same numbers in the same order: within a group pair after pair, then group after group
//! `scale * sum`, then `offset * (sum of the inputs)`.

use std::arch::x86_64::*;

use super::codes::{BYTES, Code, Cursor, E4M3, Form, by_code, scale_of};
use super::pairs::halves;
use super::{GroupSums, Scaled};
use crate::lanes::avx512::{Avx512, line};
use crate::lanes::{LANES, Lanes};

/// Inputs of a piece that is taken apart at once: whole groups.
const PIECE: usize = Scaled::PIECE;
/// Panels of a piece, which all tiles of rows visit before the next: they stay in the first cache.
const PANELS: usize = 2;
/// Rows that pass by a piece before the next.
const ROWS: usize = Scaled::ROWS;
/// Rows that share a code in registers.
const ROWS_FEW: usize = 4;
/// Bytes that are asked for ahead of use, of all panels of a tile together.
const AHEAD_BYTES: usize = 8192;

/// Elements of a piece of one panel, and floats of its scales and offsets.
const CODES: usize = PIECE * LANES;
const GROUPS: usize = PIECE / 8;
const SCALES: usize = GROUPS * 2 * LANES;
const _: () = assert!(PANELS * (CODES / 2 + SCALES) <= Scaled::BUFFER_FLOATS);

/// Runs a product.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn scaled(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, panels(s)) }
}

#[inline(always)]
unsafe fn panels<const CODE: usize>(s: &Scaled<'_>) {
    // SAFETY: rows and panels stay within the product.
    unsafe {
        if s.rows > ROWS_FEW {
            return many::<CODE>(s);
        }
        let mut row = 0;
        while row < s.rows {
            row += match s.rows - row {
                4.. => stream::<CODE, 4>(s, row),
                2.. => stream::<CODE, 2>(s, row),
                _ => stream::<CODE, 1>(s, row),
            };
        }
    }
}

/// [`Form::has_offsets`].
const fn has_offsets<const CODE: usize>() -> bool {
    CODE != E4M3
}

/// What codes of up to 6 bits are as bf16.
#[derive(Clone, Copy)]
struct Table(__m512i, __m512i);

impl Table {
    #[inline(always)]
    unsafe fn new<const CODE: usize>() -> Self {
        let mut words = [0u16; 64];
        for (at, word) in words.iter_mut().enumerate() {
            // An index has more bits than a code, which are ignored by repeating the table.
            let code = if CODE <= 6 { at % (1 << CODE) } else { 0 };
            // Whole numbers of 7 bits are bf16.
            *word = ((code as f32).to_bits() >> 16) as u16;
        }
        // SAFETY: two times 32 words.
        unsafe {
            Table(
                _mm512_loadu_si512(words.as_ptr().cast()),
                _mm512_loadu_si512(words.as_ptr().add(32).cast()),
            )
        }
    }
}

/// Every half moved down.
#[inline(always)]
unsafe fn down(words: __m512i, by: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe { _mm512_srlv_epi16(words, _mm512_set1_epi16(by as i16)) }
}

/// In every half the bit `from`, moved to `to`.
#[inline(always)]
unsafe fn moved(words: __m512i, from: usize, to: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        match from >= to {
            true => down(words, from - to),
            false => _mm512_sllv_epi16(words, _mm512_set1_epi16((to - from) as i16)),
        }
    }
}

/// Pair `pair` of the four of an octet: two inputs' codes of 16 outputs as bf16.
#[inline(always)]
unsafe fn pair_of<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize, table: Table) -> __m512i {
    /// Bits of the mask from the first, the others from the second.
    const SELECT: i32 = 0xca;
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        match CODE {
            2 => {
                let low = down(line(chunk, octet / 2), 8 * (octet % 2) + 2 * pair);
                _mm512_permutexvar_epi16(low, table.0)
            }
            3 => {
                let low = down(line(chunk, octet / 2), 8 * (octet % 2) + 2 * pair);
                let high = moved(line(chunk, 2), 4 * octet + pair, 2);
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(3), low, high);
                _mm512_permutexvar_epi16(index, table.0)
            }
            4 => _mm512_permutexvar_epi16(down(line(chunk, octet), 4 * pair), table.0),
            5 => {
                let (low, high) =
                    (down(line(chunk, octet), 4 * pair), moved(line(chunk, 4), 4 * octet + pair, 4));
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(15), low, high);
                _mm512_permutexvar_epi16(index, table.0)
            }
            6 => {
                let high = moved(line(chunk, 4 + octet / 2), 8 * (octet % 2) + 2 * pair, 4);
                let low = down(line(chunk, octet), 4 * pair);
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(15), low, high);
                _mm512_permutex2var_epi16(table.0, index, table.1)
            }
            _ => {
                // The upper halves of floats: such small numbers have nothing below.
                let (even, odd) = match CODE {
                    // Where inputs are: see [`super::ORDER`].
                    BYTES => (octet * 8 + pair % 2 * 4 + pair / 2, octet * 8 + pair % 2 * 4 + pair / 2 + 2),
                    _ => (octet * 8 + 2 * pair, octet * 8 + 2 * pair + 1),
                };
                let (even, odd) = (number::<CODE>(chunk, even), number::<CODE>(chunk, odd));
                let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                _mm512_ternarylogic_epi32::<SELECT>(upper, odd, _mm512_srli_epi32::<16>(even))
            }
        }
    }
}

/// Line `n` of codes of 8 bits as floats.
#[inline(always)]
unsafe fn number<const CODE: usize>(chunk: *const u8, n: usize) -> __m512i {
    // SAFETY: the caller's chunk has this line.
    unsafe {
        let at = chunk.add(n * LANES);
        _mm512_castps_si512(if CODE == BYTES { Avx512::load_u8(at).0 } else { Avx512::load_e4m3(at).0 })
    }
}

/// Sums of a row's inputs by group.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn sums(s: &GroupSums) {
    let (mut x, mut out, mut octet) = (s.x, s.out, s.octets.0);
    while octet < s.octets.1 {
        let count = s.octets.1.min((octet / s.group + 1) * s.group) - octet;
        // SAFETY: the row's inputs and places.
        unsafe {
            *out = sum_of(x, count);
            (x, out) = (x.add(4 * count), out.add(1));
        }
        octet += count;
    }
}

/// The sum of `octets` times eight inputs.
#[inline(always)]
unsafe fn sum_of(x: *const i32, octets: usize) -> f32 {
    // SAFETY: the caller's inputs.
    unsafe {
        let ones = std::mem::transmute::<__m128i, __m128bh>(_mm_set1_epi16(0x3f80));
        let mut sums = _mm_setzero_ps();
        for octet in 0..octets {
            let four = _mm_loadu_si128(x.add(4 * octet).cast());
            sums = _mm_dpbf16_ps(sums, std::mem::transmute::<__m128i, __m128bh>(four), ones);
        }
        let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
        _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)))
    }
}

/// All panels of rows `[row, row + R)`; says how many rows that were.
#[inline(always)]
unsafe fn stream<const CODE: usize, const R: usize>(s: &Scaled<'_>, row: usize) -> usize {
    let mut panel = 0;
    // SAFETY: panels stay within the product.
    unsafe {
        if const { R <= 2 } {
            while panel + 4 <= s.panels {
                few::<CODE, R, 4>(s, row, panel);
                panel += 4;
            }
        }
        while panel + 2 <= s.panels {
            few::<CODE, R, 2>(s, row, panel);
            panel += 2;
        }
        while panel < s.panels {
            few::<CODE, R, 1>(s, row, panel);
            panel += 1;
        }
    }
    R
}

/// A group's sums so far, of `R` rows by `P` panels.
type Sums<const R: usize, const P: usize> = [[__m512; P]; R];

/// `R` rows by `P` panels, codes taken apart in registers.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, scales and addresses alike
unsafe fn few<const CODE: usize, const R: usize, const P: usize>(s: &Scaled<'_>, row: usize, panel: usize) {
    let (chunk_bytes, scale_bytes) = (s.form.chunk_bytes(), s.form.scale_bytes());
    let mut cursor = Cursor::new(s.form, s.octets.0);
    let mut left = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels.
    unsafe {
        let table = Table::new::<CODE>();
        let first = s.panel.add(panel * s.panel_bytes);
        let mut x = s.x.add(row * s.x_stride);
        let mut of_inputs = s.sums.wrapping_add(row * s.x_stride);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        while left > 0 {
            let count = cursor.count(left);
            let base = first.add(cursor.base);
            let mut sums = [[_mm512_setzero_ps(); P]; R];
            // What lies behind; at the end of a panel the panels that come next.
            let behind = match cursor.base + AHEAD_BYTES / P < s.panel_bytes {
                true => AHEAD_BYTES / P,
                false => AHEAD_BYTES / P + (P - 1) * s.panel_bytes,
            };
            for p in 0..P {
                let scales = s.form.scale.first() + cursor.at_group * s.form.scale.stride();
                _mm_prefetch::<_MM_HINT_T0>(base.wrapping_add(p * s.panel_bytes + behind + scales).cast());
            }
            let (mut octet, end) = (cursor.at, cursor.at + count);
            while octet < end {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                let at = x.add((octet - cursor.at) * 4);
                // Whole chunks, which groups nearly always are, have their shifts as constants.
                octet += match (octet % 4, end - octet) {
                    (0, 4..) => octets::<CODE, R, P, 4>(s, chunk, 0, behind, at, table, &mut sums),
                    (0, 2..) if CODE == 6 => {
                        octets::<CODE, R, P, 2>(s, chunk, 0, behind, at, table, &mut sums)
                    }
                    (2, 2..) if CODE == 6 => {
                        octets::<CODE, R, P, 2>(s, chunk, 2, behind, at, table, &mut sums)
                    }
                    (from, _) => octets::<CODE, R, P, 1>(s, chunk, from, behind, at, table, &mut sums),
                };
            }
            let mut totals = [_mm512_setzero_ps(); R];
            if has_offsets::<CODE>() {
                for r in 0..R {
                    let total = *of_inputs.add(r * s.x_stride);
                    debug_assert_eq!(total.to_bits(), sum_of(x.add(r * s.x_stride), count).to_bits());
                    totals[r] = _mm512_set1_ps(total);
                }
                of_inputs = of_inputs.add(1);
            }
            for p in 0..P {
                let (scale, offset) =
                    scale_of::<Avx512>(s.form, base.add(p * s.panel_bytes), cursor.at_group);
                for r in 0..R {
                    acc[r][p] = _mm512_fmadd_ps(scale.0, sums[r][p], acc[r][p]);
                    if has_offsets::<CODE>() {
                        acc[r][p] = _mm512_fmadd_ps(offset.0, totals[r], acc[r][p]);
                    }
                }
            }
            x = x.add(count * 4);
            cursor.pass(s.form, count);
            left -= count;
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(out.add(r * s.acc_stride + p * LANES), acc[r][p]);
            }
        }
    }
}

/// Adds `COUNT` octets of a chunk to the sums of a group, and asks for what lies so far behind them; says how many octets
/// that were.
#[inline(always)]
#[allow(clippy::needless_range_loop, clippy::too_many_arguments)] // rows and panels index sums and addresses alike
unsafe fn octets<const CODE: usize, const R: usize, const P: usize, const COUNT: usize>(
    s: &Scaled<'_>,
    chunk: *const u8,
    from: usize,
    behind: usize,
    x: *const i32,
    table: Table,
    sums: &mut Sums<R, P>,
) -> usize {
    // SAFETY: the caller's panels have this chunk, and rows these inputs.
    unsafe {
        let chunk_bytes = if CODE <= 6 { CODE * 64 } else { 512 };
        for p in 0..P {
            let ahead = chunk.wrapping_add(p * s.panel_bytes + behind);
            for line in from * chunk_bytes / 256..(from + COUNT) * chunk_bytes / 256 {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64).cast());
            }
        }
        for octet in 0..COUNT {
            for pair in 0..4 {
                let mut weights = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    weights[p] = pair_of::<CODE>(chunk.add(p * s.panel_bytes), from + octet, pair, table);
                }
                for r in 0..R {
                    let factor = _mm512_set1_epi32(*x.add(r * s.x_stride + octet * 4 + pair));
                    for p in 0..P {
                        sums[r][p] = _mm512_dpbf16_ps(sums[r][p], halves(weights[p]), halves(factor));
                    }
                }
            }
        }
    }
    COUNT
}

/// A piece of some panels, taken apart: pairs of bf16, then scales and offsets of groups.
struct Piece {
    codes: *mut u16,
    scales: *mut f32,
    /// Octets of each group of the piece but the first and the last, which may be cut.
    group: usize,
    /// Octets of the first group.
    first: usize,
    octets: usize,
    has_offsets: bool,
}

impl Piece {
    /// Octets of the group that begins at octet `at` of the piece.
    #[inline(always)]
    fn count(&self, at: usize) -> usize {
        let whole = if at == 0 { self.first } else { self.group };
        whole.min(self.octets - at)
    }

    /// Groups, in whole or in part.
    fn groups(&self) -> usize {
        1 + self.octets.saturating_sub(self.first).div_ceil(self.group)
    }
}

/// Many rows: piece after piece of K, two panels at a time.
#[inline(always)]
unsafe fn many<const CODE: usize>(s: &Scaled<'_>) {
    let group = s.form.group / 8;
    let codes = s.buffer.cast::<u16>();
    let scales = s.buffer.wrapping_add(PANELS * CODES / 2);
    let mut sums = s.sums;
    let mut octet = s.octets.0;
    // SAFETY: the buffer has room for a piece of two panels; panels, rows and octets stay within the product.
    unsafe {
        let table = Table::new::<CODE>();
        while octet < s.octets.1 {
            let end = s.octets.1.min((octet / (PIECE / 8) + 1) * (PIECE / 8));
            let x = s.x.add((octet - s.octets.0) * 4);
            let piece = Piece {
                codes,
                scales,
                group,
                first: group - octet % group,
                octets: end - octet,
                has_offsets: has_offsets::<CODE>(),
            };
            for from in (0..s.rows).step_by(ROWS) {
                let rows = ROWS.min(s.rows - from);
                let x = x.add(from * s.x_stride);
                let sums = sums.wrapping_add(from * s.x_stride);
                for panel in (0..s.panels).step_by(PANELS) {
                    let wide = PANELS.min(s.panels - panel);
                    for p in 0..wide {
                        let panel = s.panel.add((panel + p) * s.panel_bytes);
                        take_apart::<CODE>(s.form, panel, (octet, end), table, &piece, p);
                    }
                    let acc = s.acc.add(from * s.acc_stride + panel * LANES);
                    let fresh = octet == s.octets.0;
                    if wide == 2 {
                        tiles::<2>(s, &piece, (x, sums), rows, acc, fresh);
                    } else {
                        tiles::<1>(s, &piece, (x, sums), rows, acc, fresh);
                    }
                }
            }
            sums = sums.wrapping_add(piece.groups());
            octet = end;
        }
    }
}

/// A panel's part of a piece.
#[inline(always)]
unsafe fn take_apart<const CODE: usize>(
    form: &Form,
    panel: *const u8,
    (from, to): (usize, usize),
    table: Table,
    piece: &Piece,
    p: usize,
) {
    let (chunk_bytes, scale_bytes) = (form.chunk_bytes(), form.scale_bytes());
    let mut cursor = Cursor::new(form, from);
    let mut left = to - from;
    // SAFETY: the panel has these octets, and the piece room for them.
    unsafe {
        let mut codes = piece.codes.add(p * CODES);
        let mut scales = piece.scales.add(p * SCALES);
        while left > 0 {
            let count = cursor.count(left);
            let base = panel.add(cursor.base);
            let (scale, offset) = scale_of::<Avx512>(form, base, cursor.at_group);
            scale.store(scales);
            offset.store(scales.add(LANES));
            scales = scales.add(2 * LANES);
            for octet in cursor.at..cursor.at + count {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                for line in 0..(chunk_bytes / 256).max(1) {
                    let ahead = chunk.wrapping_add(AHEAD_BYTES / 2 + octet % 4 * chunk_bytes / 4 + line * 64);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
                for pair in 0..4 {
                    let words = pair_of::<CODE>(chunk, octet % 4, pair, table);
                    _mm512_storeu_si512(codes.cast(), words);
                    codes = codes.add(2 * LANES);
                }
            }
            cursor.pass(form, count);
            left -= count;
        }
    }
}

/// All rows by the `P` panels of a piece.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn tiles<const P: usize>(
    s: &Scaled<'_>,
    piece: &Piece,
    (x, sums): (*const i32, *const f32),
    rows: usize,
    acc: *mut f32,
    fresh: bool,
) {
    let mut row = 0;
    while row < rows {
        // SAFETY: rows stay within the product.
        unsafe {
            let (x, sums) = (x.add(row * s.x_stride), sums.wrapping_add(row * s.x_stride));
            let acc = acc.add(row * s.acc_stride);
            row += match rows - row {
                16 | 8..=11 => tile::<8, P>(s, piece, x, sums, acc, fresh),
                12.. => tile::<12, P>(s, piece, x, sums, acc, fresh),
                6.. => tile::<6, P>(s, piece, x, sums, acc, fresh),
                4.. => tile::<4, P>(s, piece, x, sums, acc, fresh),
                2.. => tile::<2, P>(s, piece, x, sums, acc, fresh),
                _ => tile::<1, P>(s, piece, x, sums, acc, fresh),
            };
        }
    }
}

/// `R` rows by `P` panels: a group's sums in registers, the rows' in memory.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, factors and addresses alike
unsafe fn tile<const R: usize, const P: usize>(
    s: &Scaled<'_>,
    piece: &Piece,
    x: *const i32,
    of_inputs: *const f32,
    acc: *mut f32,
    fresh: bool,
) -> usize {
    // SAFETY: the piece has these panels, x and acc the rows.
    unsafe {
        let (mut at, mut group) = (0, 0);
        while at < piece.octets {
            let count = piece.count(at);
            let mut sums = [[_mm512_setzero_ps(); P]; R];
            let w = piece.codes.add(at * 8 * LANES);
            let x = x.add(at * 4);
            for k in 0..count * 4 {
                let mut weights = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    weights[p] = _mm512_loadu_si512(w.add(p * CODES + k * 2 * LANES).cast());
                }
                for r in 0..R {
                    let factor = _mm512_set1_epi32(*x.add(r * s.x_stride + k));
                    for p in 0..P {
                        sums[r][p] = _mm512_dpbf16_ps(sums[r][p], halves(weights[p]), halves(factor));
                    }
                }
            }
            for p in 0..P {
                let scales = piece.scales.add(p * SCALES + group * 2 * LANES);
                let (scale, offset) = (_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(LANES)));
                for r in 0..R {
                    let out = acc.add(r * s.acc_stride + p * LANES);
                    let before = if fresh && at == 0 { _mm512_setzero_ps() } else { _mm512_loadu_ps(out) };
                    let mut sum = _mm512_fmadd_ps(scale, sums[r][p], before);
                    if piece.has_offsets {
                        sum = _mm512_fmadd_ps(
                            offset,
                            _mm512_set1_ps(*of_inputs.add(r * s.x_stride + group)),
                            sum,
                        );
                    }
                    _mm512_storeu_ps(out, sum);
                }
            }
            (at, group) = (at + count, group + 1);
        }
    }
    R
}
