//! [`super::bytes`] with the instruction that AVX-512 VNNI has for it: four inputs of 16 outputs at once. Codes are unpacked
//! in registers, so that weights stream from memory as small as they are.

use std::arch::x86_64::*;

use super::bytes::{Bytes, ORDER, at};
use super::codes::{Code, by_code, scale_of};
use crate::lanes::avx512::{Avx512, line};
use crate::lanes::{E2M1, IQ4, LANES, Lanes, place_of, values};

/// Bytes that are asked for ahead of use.
const AHEAD_BYTES: usize = 1024;

/// As [`super::bytes::bytes`].
///
/// # Safety
/// As there; this machine has AVX-512 VNNI and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn bytes(s: &Bytes<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, panels(s)) }
}

/// All panels and rows of a product: four panels at once for few rows, so that enough sums are in
/// flight.
#[inline(always)]
unsafe fn panels<const CODE: usize>(s: &Bytes<'_>) {
    let mut panel = 0;
    while panel < s.panels {
        let mut row = 0;
        let wide = match s.panels - panel {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        while row < s.rows {
            // SAFETY: rows and panels stay within the product.
            unsafe {
                row += match (s.rows - row, wide) {
                    (6.., 4) => {
                        tile::<CODE, 6, 2>(s, row, panel);
                        tile::<CODE, 6, 2>(s, row, panel + 2)
                    }
                    (6.., 2) => tile::<CODE, 6, 2>(s, row, panel),
                    (2.., 4) => tile::<CODE, 2, 4>(s, row, panel),
                    (2.., 2) => tile::<CODE, 2, 2>(s, row, panel),
                    (_, 4) => tile::<CODE, 1, 4>(s, row, panel),
                    (_, 2) => tile::<CODE, 1, 2>(s, row, panel),
                    (_, _) => tile::<CODE, 1, 1>(s, row, panel),
                };
            }
        }
        panel += wide;
    }
}

/// For each byte of two words: the bit of both words where eight bits are taken, so that the `bits` of an input, of those in
/// the words' halves from bit `from` on, are moved up by `up`.
const fn fields(bits: usize, up: usize, from: usize, second: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut at = 0;
    while at < 64 {
        let (word, input) = (at / 4 % 2, ORDER[4 * second + at % 4]);
        out[at] = ((64 + word * 32 + from + place_of(bits, input) - up) % 64) as u8;
        at += 1;
    }
    out
}

/// Bits of `words` for the first (`second` 0) or last (1) four of eight inputs in bytes: `bits` of each input, from bit
/// `from` of each half on, moved up by `up`; other bits are arbitrary.
#[inline(always)]
unsafe fn spread<const BITS: usize, const UP: usize>(words: __m512i, from: usize, second: usize) -> __m512i {
    // Fields begin at multiples of 4 bits.
    let tables: &'static [[[u8; 64]; 2]; 4] = const {
        &[
            [fields(BITS, UP, 0, 0), fields(BITS, UP, 0, 1)],
            [fields(BITS, UP, 4, 0), fields(BITS, UP, 4, 1)],
            [fields(BITS, UP, 8, 0), fields(BITS, UP, 8, 1)],
            [fields(BITS, UP, 12, 0), fields(BITS, UP, 12, 1)],
        ]
    };
    // SAFETY: 64 bytes of a table, and register arithmetic.
    unsafe {
        let control = _mm512_loadu_si512(tables[from / 4][second].as_ptr().cast());
        _mm512_multishift_epi64_epi8(control, words)
    }
}

/// `low` where `mask` has bits, else `high`, without what is above the code.
#[inline(always)]
unsafe fn joined(low: __m512i, high: __m512i, mask: i8, code: i8) -> __m512i {
    const SELECT: i32 = 0xca;
    // SAFETY: register arithmetic.
    unsafe {
        let both = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi8(mask), low, high);
        _mm512_and_si512(both, _mm512_set1_epi8(code))
    }
}

/// The codes of eight inputs: four bytes per output, in the order of [`ORDER`].
#[inline(always)]
pub(super) unsafe fn octet_of<const CODE: usize>(chunk: *const u8, octet: usize) -> [__m512i; 2] {
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        match CODE {
            2 => {
                let (words, from) = (line(chunk, octet / 2), 8 * (octet % 2));
                let mask = _mm512_set1_epi8(3);
                let (first, last) = (spread::<2, 0>(words, from, 0), spread::<2, 0>(words, from, 1));
                [_mm512_and_si512(first, mask), _mm512_and_si512(last, mask)]
            }
            3 => {
                let (words, from) = (line(chunk, octet / 2), 8 * (octet % 2));
                let high = line(chunk, 2);
                let (first, last) = (spread::<1, 2>(high, 4 * octet, 0), spread::<1, 2>(high, 4 * octet, 1));
                [
                    joined(spread::<2, 0>(words, from, 0), first, 3, 7),
                    joined(spread::<2, 0>(words, from, 1), last, 3, 7),
                ]
            }
            4 | IQ4 | E2M1 => {
                let words = line(chunk, octet);
                let mask = _mm512_set1_epi8(15);
                let fours =
                    [_mm512_and_si512(words, mask), _mm512_and_si512(_mm512_srli_epi32::<4>(words), mask)];
                if const { CODE == 4 } {
                    return fours;
                }
                let table: &'static [u8; 16] = const { &values(CODE) };
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                [_mm512_shuffle_epi8(table, fours[0]), _mm512_shuffle_epi8(table, fours[1])]
            }
            5 => {
                let (words, high) = (line(chunk, octet), line(chunk, 4));
                let low = [words, _mm512_srli_epi32::<4>(words)];
                let (first, last) = (spread::<1, 4>(high, 4 * octet, 0), spread::<1, 4>(high, 4 * octet, 1));
                [joined(low[0], first, 15, 31), joined(low[1], last, 15, 31)]
            }
            6 => {
                let (words, high) = (line(chunk, octet), line(chunk, 4 + octet / 2));
                let low = [words, _mm512_srli_epi32::<4>(words)];
                let from = 8 * (octet % 2);
                let (first, last) = (spread::<2, 4>(high, from, 0), spread::<2, 4>(high, from, 1));
                [joined(low[0], first, 15, 63), joined(low[1], last, 15, 63)]
            }
            _ => {
                // Four lines of 16 outputs, turned.
                const TURNED: [u8; 64] = {
                    let mut order = [0; 64];
                    let mut at = 0;
                    while at < 64 {
                        order[at] = (at % 4 * 16 + at / 4) as u8;
                        at += 1;
                    }
                    order
                };
                let order = _mm512_loadu_si512(TURNED.as_ptr().cast());
                [
                    _mm512_permutexvar_epi8(order, line(chunk, octet * 2)),
                    _mm512_permutexvar_epi8(order, line(chunk, octet * 2 + 1)),
                ]
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, scales and addresses alike
unsafe fn tile<const CODE: usize, const R: usize, const P: usize>(
    s: &Bytes<'_>,
    row: usize,
    panel: usize,
) -> usize {
    // SAFETY: the panels have these blocks, x the rows and blocks, acc the rows and panels.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[Avx512::splat(0.0); P]; R];
        if !s.fresh {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = Avx512::load(out.add(r * s.acc_stride + p * LANES));
                }
            }
        }
        let halves = s.form.group == 16;
        let parts = if halves { 2 } else { 1 };
        let chunk_bytes = s.form.chunk_bytes();
        for block in s.blocks.0..s.blocks.1 {
            let x = s.x.add(row * s.x_stride + block - s.blocks.0);
            let (base, group, codes) = at(s.form, block);
            for p in 0..P {
                let mut ahead = first.wrapping_add(p * s.panel_bytes + codes + AHEAD_BYTES).cast::<i8>();
                for _ in 0..chunk_bytes / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead);
                    ahead = ahead.wrapping_add(64);
                }
            }
            for part in 0..parts {
                let mut dots = [[_mm512_setzero_si512(); P]; R];
                // Plain loops: a closure would not have this level's instructions.
                let (from, to) = if halves { (2 * part, 2 * part + 2) } else { (0, 4) };
                for octet in from..to {
                    let mut weights = [[_mm512_setzero_si512(); 2]; P];
                    for p in 0..P {
                        weights[p] = octet_of::<CODE>(first.add(p * s.panel_bytes + codes), octet);
                    }
                    for odd in 0..2 {
                        for r in 0..R {
                            let x = (*x.add(r * s.x_stride)).codes.as_ptr().cast::<i32>();
                            let factor = _mm512_set1_epi32(*x.add(octet * 2 + odd));
                            for p in 0..P {
                                dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], weights[p][odd], factor);
                            }
                        }
                    }
                }
                for p in 0..P {
                    let scales = first.add(p * s.panel_bytes + base);
                    let (scale, offset) = scale_of::<Avx512>(s.form, scales, group + part);
                    for r in 0..R {
                        let x = &*x.add(r * s.x_stride);
                        let sum = if halves { x.halves[part] } else { x.sum };
                        let dot = Avx512(_mm512_cvtepi32_ps(dots[r][p]));
                        let scaled = scale.mul(Avx512::splat(x.scale));
                        acc[r][p] = acc[r][p].madd(dot, scaled).madd(offset, Avx512::splat(sum));
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                acc[r][p].store(out.add(r * s.acc_stride + p * LANES));
            }
        }
    }
    R
}
