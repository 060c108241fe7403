//! Two 256-bit registers.

use std::arch::x86_64::*;

use super::{E2M1, IQ4, LANES, Lanes, place_of, table_of, values};

/// Sixteen floats: lanes `[0, 8)` and `[8, 16)`.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(crate) __m256, pub(crate) __m256);

// SAFETY (all blocks here): the kernels of this level run only where AVX2, FMA and F16C were detected, and the caller
// gives memory for the elements that each method names.
impl Lanes for Avx2 {
    const REGISTERS: usize = 7;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the impl.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(widen_bf16(p), widen_bf16(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_bf16_even(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(even_bf16(p), even_bf16(p.add(16))) }
    }

    #[inline(always)]
    unsafe fn load_bf16_odd(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(odd_bf16(p), odd_bf16(p.add(16))) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let (low, high) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(8).cast()));
            Avx2(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let (low, high) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            Avx2(
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let (low, high) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            Avx2(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_six(p: *const u8, n: usize) -> Self {
        // SAFETY: see the impl; three lines, each of two halves.
        unsafe { Avx2(_mm256_cvtepi32_ps(six(p, n)), _mm256_cvtepi32_ps(six(p.add(32), n))) }
    }

    #[inline(always)]
    unsafe fn load_four<const UPPER: bool>(p: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_cvtepi32_ps(four::<UPPER>(p)), _mm256_cvtepi32_ps(four::<UPPER>(p.add(8)))) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: see the impl. Shifted by 7, a code's exponent and fraction are a half's; the sign was extended.
        unsafe {
            let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            let halves = _mm256_and_si256(wide, _mm256_set1_epi16(0xbfff_u16 as i16));
            Avx2(
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            )
        }
    }

    #[inline(always)]
    unsafe fn codes<const CODE: usize>(chunk: *const u8, octet: usize) -> [Self; 8] {
        // SAFETY: see the impl; a chunk has the lines of its planes, and a line two halves of 32 bytes.
        unsafe {
            let (low, high) = (octet_codes::<CODE>(chunk, octet), octet_codes::<CODE>(chunk.add(32), octet));
            [
                Avx2(low[0], high[0]),
                Avx2(low[1], high[1]),
                Avx2(low[2], high[2]),
                Avx2(low[3], high[3]),
                Avx2(low[4], high[4]),
                Avx2(low[5], high[5]),
                Avx2(low[6], high[6]),
                Avx2(low[7], high[7]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // SAFETY: see the impl.
        unsafe {
            let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.0));
            let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.1));
            // packus works within 128-bit halves: put the middle quarters right.
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(p.cast(), packed);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn madd(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
    }

    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        // SAFETY: see the impl. The second operand comes out where either is not a number.
        unsafe { Avx2(_mm256_min_ps(limit.0, self.0), _mm256_min_ps(limit.1, self.1)) }
    }

    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        // SAFETY: see the impl. The second operand comes out where either is not a number.
        unsafe { Avx2(_mm256_max_ps(limit.0, self.0), _mm256_max_ps(limit.1, self.1)) }
    }

    #[inline(always)]
    unsafe fn zero_below(self, limit: Self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_NLT_UQ>(self.0, limit.0);
            let high = _mm256_cmp_ps::<_CMP_NLT_UQ>(self.1, limit.1);
            Avx2(_mm256_and_ps(low, other.0), _mm256_and_ps(high, other.1))
        }
    }

    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_round_ps::<MODE>(self.0), _mm256_round_ps::<MODE>(self.1)) }
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(power_of_two(self.0), power_of_two(self.1)) }
    }

    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx2(round_bf16(self.0), round_bf16(self.1)) }
    }

    #[inline(always)]
    unsafe fn only(self, from: usize, to: usize, other: f32) -> Self {
        let mut held = [0.0; LANES];
        // SAFETY: see the impl.
        unsafe {
            self.store(held.as_mut_ptr());
            held[..from.min(LANES)].fill(other);
            held[to.min(LANES)..].fill(other);
            Self::load(held.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let mut held = [0.0; LANES];
        // SAFETY: see the impl.
        unsafe { self.store(held.as_mut_ptr()) };
        for half in [8, 4, 2, 1] {
            for at in 0..half {
                held[at] += held[at + half];
            }
        }
        held[0]
    }

    #[inline(always)]
    unsafe fn peak(self) -> f32 {
        let mut held = [0.0; LANES];
        // SAFETY: see the impl.
        unsafe { self.store(held.as_mut_ptr()) };
        held.into_iter().fold(f32::NEG_INFINITY, |peak, x| if x > peak { x } else { peak })
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[*const u8; LANES], words: usize, out: *mut u32) {
        // SAFETY: see the impl; whole groups of 8 words here, the rest one by one.
        unsafe {
            let mut at = 0;
            while at + 8 <= words {
                transpose_8(&rows[..8], at, out.add(at * LANES));
                transpose_8(&rows[8..], at, out.add(at * LANES + 8));
                at += 8;
            }
            for (lane, row) in rows.iter().enumerate() {
                for word in at..words {
                    *out.add(word * LANES + lane) = row.cast::<u32>().add(word).read_unaligned();
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

#[inline(always)]
unsafe fn widen_bf16(p: *const u16) -> __m256 {
    // SAFETY: 8 bf16 at p are the caller's.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
}

#[inline(always)]
unsafe fn even_bf16(p: *const u16) -> __m256 {
    // SAFETY: 8 pairs at p are the caller's.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(p.cast()))) }
}

#[inline(always)]
unsafe fn odd_bf16(p: *const u16) -> __m256 {
    // SAFETY: 8 pairs at p are the caller's.
    unsafe {
        let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(p.cast()), upper))
    }
}

#[inline(always)]
unsafe fn power_of_two(n: __m256) -> __m256 {
    // SAFETY: register arithmetic of this level.
    unsafe {
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
    }
}

#[inline(always)]
unsafe fn round_bf16(x: __m256) -> __m256 {
    // SAFETY: register arithmetic of this level.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let lowest = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let nearest = _mm256_add_epi32(bits, _mm256_add_epi32(lowest, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let chosen = _mm256_blendv_epi8(nearest, quiet, nan);
        _mm256_castsi256_ps(_mm256_and_si256(chosen, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
    }
}

/// Half of line `n` of a chunk of codes.
#[inline(always)]
pub(crate) unsafe fn line(chunk: *const u8, n: usize) -> __m256i {
    // SAFETY: the caller's chunk has this line.
    unsafe { _mm256_loadu_si256(chunk.add(n * 64).cast()) }
}

/// See [`Lanes::load_six`], of half of the outputs.
#[inline(always)]
pub(crate) unsafe fn six(p: *const u8, n: usize) -> __m256i {
    // SAFETY: the caller's three lines.
    unsafe {
        let low = _mm256_and_si256(right(line(p, n / 8), n % 8 * 4), _mm256_set1_epi32(15));
        let high = _mm256_and_si256(right(line(p, 2), n * 2), _mm256_set1_epi32(3));
        _mm256_or_si256(low, _mm256_slli_epi32::<4>(high))
    }
}

/// See [`Lanes::load_four`], of half of the outputs.
#[inline(always)]
pub(crate) unsafe fn four<const UPPER: bool>(p: *const u8) -> __m256i {
    // SAFETY: the caller's bytes.
    unsafe {
        let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        match UPPER {
            true => _mm256_srli_epi32::<4>(bytes),
            false => _mm256_and_si256(bytes, _mm256_set1_epi32(15)),
        }
    }
}

/// What words of `bytes` (2 or 4) bytes stand for, which are below 16: see [`values`].
#[inline(always)]
pub(crate) unsafe fn looked_up<const CODE: usize>(words: __m256i, bytes: usize) -> __m256i {
    // SAFETY: register arithmetic of this level. A byte's highest bit asks for a zero.
    unsafe {
        let table: &'static [u8; 16] = const { &values(CODE) };
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        let above = _mm256_set1_epi32(if bytes == 2 { 0x8000_8000_u32 } else { 0x8080_8000 } as i32);
        _mm256_shuffle_epi8(table, _mm256_or_si256(words, above))
    }
}

#[inline(always)]
unsafe fn right(words: __m256i, by: usize) -> __m256i {
    // SAFETY: register arithmetic of this level.
    unsafe { _mm256_srlv_epi32(words, _mm256_set1_epi32(by as i32)) }
}

/// The codes of 8 consecutive inputs in half of the lanes.
#[inline(always)]
unsafe fn octet_codes<const CODE: usize>(chunk: *const u8, octet: usize) -> [__m256; 8] {
    // SAFETY: the caller's chunk has the lines of its planes.
    unsafe {
        let (low, high) = match CODE {
            2 => (right(line(chunk, octet / 2), 8 * (octet % 2)), _mm256_setzero_si256()),
            3 => (right(line(chunk, octet / 2), 8 * (octet % 2)), right(line(chunk, 2), 4 * octet)),
            4 | IQ4 | E2M1 => (line(chunk, octet), _mm256_setzero_si256()),
            5 => (line(chunk, octet), right(line(chunk, 4), 4 * octet)),
            _ => (line(chunk, octet), right(line(chunk, 4 + octet / 2), 8 * (octet % 2))),
        };
        [
            code::<CODE>(low, high, 0),
            code::<CODE>(low, high, 1),
            code::<CODE>(low, high, 2),
            code::<CODE>(low, high, 3),
            code::<CODE>(low, high, 4),
            code::<CODE>(low, high, 5),
            code::<CODE>(low, high, 6),
            code::<CODE>(low, high, 7),
        ]
    }
}

/// Code `k` of the 8 in each word of the planes `low` and `high`, as a number.
#[inline(always)]
unsafe fn code<const CODE: usize>(low: __m256i, high: __m256i, k: usize) -> __m256 {
    // (bits of the low plane, bits of the high plane)
    let (own, more) = match CODE {
        2 => (2, 0),
        3 => (2, 1),
        4 | IQ4 | E2M1 => (4, 0),
        5 => (4, 1),
        _ => (4, 2),
    };
    // SAFETY: register arithmetic of this level.
    unsafe {
        let low = _mm256_and_si256(right(low, place_of(own, k)), _mm256_set1_epi32((1 << own) - 1));
        if more == 0 {
            return _mm256_cvtepi32_ps(if table_of(CODE).is_some() {
                looked_up::<CODE>(low, 4)
            } else {
                low
            });
        }
        let high = _mm256_and_si256(right(high, place_of(more, k)), _mm256_set1_epi32((1 << more) - 1));
        let shifted = _mm256_sllv_epi32(high, _mm256_set1_epi32(own as i32));
        _mm256_cvtepi32_ps(_mm256_or_si256(low, shifted))
    }
}

/// 8 words beginning at word `at` of 8 rows, to lines of 16 words.
#[inline(always)]
unsafe fn transpose_8(rows: &[*const u8], at: usize, out: *mut u32) {
    // SAFETY: the caller's rows have 8 words from `at` on, and 8 lines at `out`.
    unsafe {
        let mut quads = [_mm256_setzero_si256(); 8];
        for group in 0..2 {
            let (a, b) = (words(rows[group * 4], at), words(rows[group * 4 + 1], at));
            let (c, d) = (words(rows[group * 4 + 2], at), words(rows[group * 4 + 3], at));
            let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            // quads[group * 4 + w], half h: word 4 h + w of the group's four rows
            quads[group * 4] = _mm256_unpacklo_epi64(ab_low, cd_low);
            quads[group * 4 + 1] = _mm256_unpackhi_epi64(ab_low, cd_low);
            quads[group * 4 + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
            quads[group * 4 + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
        }
        for w in 0..4 {
            let (low, high) = (quads[w], quads[4 + w]);
            let (first, second) = (out.add(w * LANES), out.add((4 + w) * LANES));
            _mm256_storeu_si256(first.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
            _mm256_storeu_si256(second.cast(), _mm256_permute2x128_si256::<0x31>(low, high));
        }
    }
}

/// 8 words of `row` from word `at` on.
#[inline(always)]
unsafe fn words(row: *const u8, at: usize) -> __m256i {
    // SAFETY: the caller's rows have 8 words from `at` on.
    unsafe { _mm256_loadu_si256(row.add(at * 4).cast()) }
}
