//! Codes of 2 to 6 bits by pairs of bf16: a code is set into the fraction of a bf16 from 128 to 256, which takes two
//! instructions for a pair of 16 outputs, and 32 inputs (16 where scales change) are scaled when they are summed. That is
//! nearer than weights rounded to bf16, and few rows stream codes at memory's speed. One order of sums for any number of
//! rows.

use std::arch::x86_64::*;

use super::bytes::at;
use super::codes::{Code, scale_of};
use super::pairs::halves;
use super::stream::Stream;
use crate::lanes::avx512::Avx512;
use crate::lanes::{LANES, Lanes};

/// Bytes that are asked for ahead of use.
const AHEAD_BYTES: usize = 1024;
/// What a code is above, as the fraction's last place is 1 there.
const BASE: f32 = 128.0;

/// As [`Stream`] over whole blocks of 32 inputs, `x` being pairs with strides that count pairs.
///
/// # Safety
/// Pointers are valid for what the fields say, `sums` for [`super::sums_floats`]; the form is whole and of 2 to 6 bits; this
/// machine has AVX-512 BF16 and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn whole(s: &Stream<'_>, sums: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        sum_inputs(s, sums);
        match s.form.code {
            Code::Planes(2) => panels::<2>(s, sums),
            Code::Planes(3) => panels::<3>(s, sums),
            Code::Planes(4) => panels::<4>(s, sums),
            Code::Planes(5) => panels::<5>(s, sums),
            _ => panels::<6>(s, sums),
        }
    }
}

/// Sums of 16 inputs and 16 inputs, `[rows][inputs / 16]`.
#[inline(always)]
unsafe fn sum_inputs(s: &Stream<'_>, sums: *mut f32) {
    let lines = (s.octets.1 - s.octets.0) / 4;
    for row in 0..s.rows {
        for line in 0..lines {
            // SAFETY: the row has so many lines of 16 pairs, and the sums two places for each.
            unsafe {
                let pairs = s.x.cast::<i32>().add(row * s.x_stride + line * LANES);
                let ones = halves(_mm512_set1_epi32(0x3f80_3f80));
                let x = halves(_mm512_loadu_si512(pairs.cast()));
                let both = _mm512_dpbf16_ps(_mm512_setzero_ps(), x, ones);
                // Halves of eight: a tree.
                let four = _mm512_add_ps(both, _mm512_shuffle_f32x4::<0b10_11_00_01>(both, both));
                let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
                let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
                let to = sums.add(row * lines * 2 + line * 2);
                *to = _mm512_cvtss_f32(one);
                *to.add(1) = _mm512_cvtss_f32(_mm512_shuffle_f32x4::<0b00_00_00_10>(one, one));
            }
        }
    }
}

/// All panels and rows: four panels at once for few rows, so that enough sums
/// are in flight.
#[inline(always)]
unsafe fn panels<const CODE: usize>(s: &Stream<'_>, sums: *const f32) {
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
                        tile::<CODE, 6, 2>(s, sums, row, panel);
                        tile::<CODE, 6, 2>(s, sums, row, panel + 2)
                    }
                    (6.., 2) => tile::<CODE, 6, 2>(s, sums, row, panel),
                    (2.., 4) => tile::<CODE, 2, 4>(s, sums, row, panel),
                    (2.., 2) => tile::<CODE, 2, 2>(s, sums, row, panel),
                    (_, 4) => tile::<CODE, 1, 4>(s, sums, row, panel),
                    (_, 2) => tile::<CODE, 1, 2>(s, sums, row, panel),
                    (_, _) => tile::<CODE, 1, 1>(s, sums, row, panel),
                };
            }
        }
        panel += wide;
    }
}

/// For the lower byte of each half of two words: the bit of both words where eight bits are taken, `from` for the first and
/// `step` further for the second.
const fn fields(from: i32, step: i32) -> [u8; 64] {
    let mut out = [0; 64];
    let mut at = 0;
    while at < 64 {
        let (word, half) = (at as i32 / 4 % 2, at as i32 % 4 / 2);
        out[at] = ((word * 32 + from + step * half) & 63) as u8;
        at += 1;
    }
    out
}

/// `BITS` of inputs `2 pair` and `2 pair + 1` of those from bit 8 `from` of a word on, moved up by `UP`, in the halves of
/// words; other bits are arbitrary.
#[inline(always)]
unsafe fn spread<const BITS: i32, const UP: i32>(words: __m512i, from: usize, pair: usize) -> __m512i {
    const fn four<const BITS: i32, const UP: i32>(from: i32) -> [[u8; 64]; 4] {
        [
            fields(from - UP, BITS),
            fields(from + 2 * BITS - UP, BITS),
            fields(from + 4 * BITS - UP, BITS),
            fields(from + 6 * BITS - UP, BITS),
        ]
    }
    let tables: &'static [[[u8; 64]; 4]; 4] =
        const { &[four::<BITS, UP>(0), four::<BITS, UP>(8), four::<BITS, UP>(16), four::<BITS, UP>(24)] };
    // SAFETY: 64 bytes of a table, and register arithmetic.
    unsafe {
        let control = _mm512_loadu_si512(tables[from][pair].as_ptr().cast());
        _mm512_multishift_epi64_epi8(control, words)
    }
}

/// Line `n` of a chunk of codes.
#[inline(always)]
unsafe fn line(chunk: *const u8, n: usize) -> __m512i {
    // SAFETY: the caller's chunk has this line.
    unsafe { _mm512_loadu_si512(chunk.add(n * 64).cast()) }
}

/// Codes in the halves of words as bf16, [`BASE`] added.
#[inline(always)]
unsafe fn number<const CODE: usize>(codes: __m512i) -> __m512i {
    // (a & b) | c
    const AND_OR: i32 = 0xea;
    let mask = (1 << CODE) - 1;
    // SAFETY: register arithmetic.
    unsafe {
        _mm512_ternarylogic_epi32::<AND_OR>(
            codes,
            _mm512_set1_epi32(mask << 16 | mask),
            _mm512_set1_epi32(0x4300_4300),
        )
    }
}

/// `low` where `mask` has bits, else `high`.
#[inline(always)]
unsafe fn select(mask: i32, low: __m512i, high: __m512i) -> __m512i {
    const SELECT: i32 = 0xca;
    // SAFETY: register arithmetic.
    unsafe { _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi32(mask << 16 | mask), low, high) }
}

/// The codes of pair `pair` of eight inputs.
#[inline(always)]
unsafe fn pair_of<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> __m512i {
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        let two = octet / 2;
        number::<CODE>(match CODE {
            2 => spread::<2, 0>(line(chunk, two), 2 * (octet % 2), pair),
            3 => {
                let high = spread::<1, 2>(line(chunk, 2), octet, pair);
                select(3, spread::<2, 0>(line(chunk, two), 2 * (octet % 2), pair), high)
            }
            4 => spread::<4, 0>(line(chunk, octet), 0, pair),
            5 => {
                let high = spread::<1, 4>(line(chunk, 4), octet, pair);
                select(15, spread::<4, 0>(line(chunk, octet), 0, pair), high)
            }
            _ => {
                let high = spread::<2, 4>(line(chunk, 4 + two), 2 * (octet % 2), pair);
                select(15, spread::<4, 0>(line(chunk, octet), 0, pair), high)
            }
        })
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, scales and addresses alike
unsafe fn tile<const CODE: usize, const R: usize, const P: usize>(
    s: &Stream<'_>,
    sums: *const f32,
    row: usize,
    panel: usize,
) -> usize {
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels.
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
        let halved = s.form.group == 16;
        let parts = if halved { 2 } else { 1 };
        let chunk_bytes = s.form.chunk_bytes();
        let (begin, end) = (s.octets.0 / 4, s.octets.1 / 4);
        let sums_stride = 2 * (end - begin);
        for block in begin..end {
            let x = s.x.cast::<i32>().add(row * s.x_stride + (block - begin) * LANES);
            let sums = sums.add(row * sums_stride + (block - begin) * 2);
            let (base, group, codes) = at(s.form, block);
            for p in 0..P {
                let mut ahead = first.wrapping_add(p * s.panel_bytes + codes + AHEAD_BYTES).cast::<i8>();
                for _ in 0..chunk_bytes / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead);
                    ahead = ahead.wrapping_add(64);
                }
            }
            for part in 0..parts {
                let mut dots = [[_mm512_setzero_ps(); P]; R];
                // Plain loops: a closure would not have this level's instructions.
                let (from, to) = if halved { (2 * part, 2 * part + 2) } else { (0, 4) };
                for octet in from..to {
                    for pair in 0..4 {
                        let mut weights = [_mm512_setzero_si512(); P];
                        for p in 0..P {
                            let chunk = first.add(p * s.panel_bytes + codes);
                            weights[p] = pair_of::<CODE>(chunk, octet, pair);
                        }
                        for r in 0..R {
                            let factor = _mm512_set1_epi32(*x.add(r * s.x_stride + octet * 4 + pair));
                            for p in 0..P {
                                dots[r][p] = _mm512_dpbf16_ps(dots[r][p], halves(weights[p]), halves(factor));
                            }
                        }
                    }
                }
                for p in 0..P {
                    let scales = first.add(p * s.panel_bytes + base);
                    let (scale, offset) = scale_of::<Avx512>(s.form, scales, group + part);
                    let offset = offset.sub(scale.mul(Avx512::splat(BASE)));
                    for r in 0..R {
                        let sums = sums.add(r * sums_stride);
                        let sum = if halved { *sums.add(part) } else { *sums + *sums.add(1) };
                        acc[r][p] =
                            acc[r][p].madd(Avx512(dots[r][p]), scale).madd(offset, Avx512::splat(sum));
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
