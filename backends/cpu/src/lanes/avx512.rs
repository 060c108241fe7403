//! One 512-bit register.

use std::arch::x86_64::*;

use super::{E2M1, IQ4, LANES, Lanes, place_of as at, values};

/// Sixteen floats in a zmm register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

// SAFETY (all blocks here): the kernels of this level run only where AVX-512 F, BW, VL and DQ were detected, and the caller
// gives memory for the elements that each method names.
impl Lanes for Avx512 {
    const REGISTERS: usize = 29;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_loadu_ps(p) })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_even(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(p.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_bf16_odd(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            Avx512(_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p.cast()), upper)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_six(p: *const u8, n: usize) -> Self {
        // SAFETY: see the impl; three lines.
        unsafe { Avx512(_mm512_cvtepi32_ps(six(p, n))) }
    }

    #[inline(always)]
    unsafe fn load_four<const UPPER: bool>(p: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { Avx512(_mm512_cvtepi32_ps(four::<UPPER>(p))) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: see the impl. Shifted by 7, a code's exponent and fraction are a half's; the sign was extended.
        unsafe {
            let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            Avx512(_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(0xbfff_u16 as i16))))
        }
    }

    #[inline(always)]
    unsafe fn codes<const CODE: usize>(chunk: *const u8, octet: usize) -> [Self; 8] {
        // SAFETY: see the impl; a chunk has the lines of its planes.
        unsafe {
            let (low, high) = match CODE {
                2 => (right(line(chunk, octet / 2), 8 * (octet % 2)), _mm512_setzero_si512()),
                3 => (right(line(chunk, octet / 2), 8 * (octet % 2)), right(line(chunk, 2), 4 * octet)),
                4 | IQ4 | E2M1 => (line(chunk, octet), _mm512_setzero_si512()),
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

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // SAFETY: see the impl.
        unsafe {
            let upper = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.0));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(upper));
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn madd(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        // SAFETY: see the impl. The second operand comes out where either is not a number.
        Avx512(unsafe { _mm512_min_ps(limit.0, self.0) })
    }

    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        // SAFETY: see the impl. The second operand comes out where either is not a number.
        Avx512(unsafe { _mm512_max_ps(limit.0, self.0) })
    }

    #[inline(always)]
    unsafe fn zero_below(self, limit: Self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, limit.0);
            Avx512(_mm512_maskz_mov_ps(keep, other.0))
        }
    }

    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        }
    }

    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let lowest = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let chosen = _mm512_mask_mov_epi32(nearest, nan, quiet);
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            Avx512(_mm512_castsi512_ps(_mm512_and_si512(chosen, upper)))
        }
    }

    #[inline(always)]
    unsafe fn only(self, from: usize, to: usize, other: f32) -> Self {
        let below = |n: usize| ((1u32 << n.min(LANES)) - 1) as u16;
        // SAFETY: see the impl.
        unsafe { Avx512(_mm512_mask_blend_ps(below(to) & !below(from), _mm512_set1_ps(other), self.0)) }
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
        // SAFETY: see the impl.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: see the impl. Not-a-number is not below.
        unsafe {
            let n = self.nearest();
            let e = self.sub(n).exp2_of_half();
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, _mm512_set1_ps(-126.0));
            Avx512(_mm512_maskz_scalef_ps(keep, e.0, n.0))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[*const u8; LANES], words: usize, out: *mut u32) {
        // SAFETY: see the impl; whole groups of 16 words here, the rest one by one.
        unsafe {
            let mut at = 0;
            while at + LANES <= words {
                transpose_16(rows, at, out.add(at * LANES));
                at += LANES;
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

    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        // SAFETY: see the impl; masked lanes are not read.
        unsafe { Avx512(_mm512_maskz_loadu_ps(((1u32 << n.min(LANES)) - 1) as u16, p)) }
    }

    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: see the impl; masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n.min(LANES)) - 1) as u16, self.0) }
    }
}

/// Line `n` of a chunk of codes.
#[inline(always)]
pub(crate) unsafe fn line(chunk: *const u8, n: usize) -> __m512i {
    // SAFETY: the caller's chunk has this line.
    unsafe { _mm512_loadu_si512(chunk.add(n * 64).cast()) }
}

/// See [`Lanes::load_six`].
#[inline(always)]
pub(crate) unsafe fn six(p: *const u8, n: usize) -> __m512i {
    /// Bits of the mask from the first, the others from the second.
    const SELECT: i32 = 0xca;
    // SAFETY: the caller's three lines. The upper two bits are turned to where they belong.
    unsafe {
        let low = right(line(p, n / 8), n % 8 * 4);
        let high = _mm512_rorv_epi32(line(p, 2), _mm512_set1_epi32(2 * n as i32 - 4));
        let both = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi32(15), low, high);
        _mm512_and_si512(both, _mm512_set1_epi32(63))
    }
}

/// See [`Lanes::load_four`].
#[inline(always)]
pub(crate) unsafe fn four<const UPPER: bool>(p: *const u8) -> __m512i {
    // SAFETY: the caller's bytes.
    unsafe {
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        match UPPER {
            true => _mm512_srli_epi32::<4>(bytes),
            false => _mm512_and_si512(bytes, _mm512_set1_epi32(15)),
        }
    }
}

#[inline(always)]
unsafe fn right(words: __m512i, by: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe { _mm512_srlv_epi32(words, _mm512_set1_epi32(by as i32)) }
}

/// The bits from `from` on, moved to `to`.
#[inline(always)]
unsafe fn moved(words: __m512i, from: usize, to: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        match from >= to {
            true => right(words, from - to),
            false => _mm512_sllv_epi32(words, _mm512_set1_epi32((to - from) as i32)),
        }
    }
}

/// `[first, first + period)` again and again.
const fn numbers(period: usize, first: usize) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    let mut i = 0;
    while i < LANES {
        out[i] = (first + i % period) as f32;
        i += 1;
    }
    out
}

/// [`values`] as floats.
const fn looked_up(code: usize) -> [f32; LANES] {
    let (values, mut out) = (values(code), [0.0; LANES]);
    let mut i = 0;
    while i < LANES {
        out[i] = values[i] as f32;
        i += 1;
    }
    out
}

#[inline(always)]
unsafe fn table(numbers: &'static [f32; LANES]) -> __m512 {
    // SAFETY: sixteen floats.
    unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
}

/// Code `k` of the 8 in each word of the planes `low` and `high`, as a number. A permutation looks at the lowest bits of
/// its index only, so most codes are looked up without cutting off the others.
#[inline(always)]
unsafe fn code<const CODE: usize>(low: __m512i, high: __m512i, k: usize) -> Avx512 {
    // SAFETY: register arithmetic of this level.
    unsafe {
        // Bits of the mask from the first, the others from the second.
        const SELECT: i32 = 0xca;
        Avx512(match CODE {
            2 => _mm512_permutexvar_ps(right(low, at(2, k)), table(const { &numbers(4, 0) })),
            3 => {
                let (a, b) = (right(low, at(2, k)), moved(high, at(1, k), 2));
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi32(3), a, b);
                _mm512_permutexvar_ps(index, table(const { &numbers(8, 0) }))
            }
            4 | IQ4 | E2M1 => _mm512_permutexvar_ps(right(low, at(4, k)), table(const { &looked_up(CODE) })),
            5 => {
                let (a, b) = (right(low, at(4, k)), moved(high, at(1, k), 4));
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi32(15), a, b);
                _mm512_permutex2var_ps(
                    table(const { &numbers(16, 0) }),
                    index,
                    table(const { &numbers(16, 16) }),
                )
            }
            _ => {
                let (a, b) = (right(low, at(4, k)), moved(high, at(2, k), 4));
                let both = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi32(15), a, b);
                _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(63)))
            }
        })
    }
}

/// 16 words beginning at word `at` of 16 rows: pairs of words, then of pairs, within and across the 128-bit quarters.
#[inline(always)]
unsafe fn transpose_16(rows: &[*const u8; LANES], at: usize, out: *mut u32) {
    // SAFETY: the caller's rows have 16 words from `at` on, and 256 words at `out`.
    unsafe {
        let mut quads = [_mm512_setzero_si512(); LANES];
        for group in 0..4 {
            let (a, b) = (words(rows[group * 4], at), words(rows[group * 4 + 1], at));
            let (c, d) = (words(rows[group * 4 + 2], at), words(rows[group * 4 + 3], at));
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            // quads[group * 4 + w], quarter q: word 4 q + w of the group's four rows
            quads[group * 4] = _mm512_unpacklo_epi64(ab_low, cd_low);
            quads[group * 4 + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
            quads[group * 4 + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
            quads[group * 4 + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
        }
        for w in 0..4 {
            let (a, b, c, d) = (quads[w], quads[4 + w], quads[8 + w], quads[12 + w]);
            let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            let line = |word: usize| out.add(word * LANES).cast();
            _mm512_storeu_si512(line(w), _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even));
            _mm512_storeu_si512(line(4 + w), _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd));
            _mm512_storeu_si512(line(8 + w), _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even));
            _mm512_storeu_si512(line(12 + w), _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd));
        }
    }
}

/// 16 words of `row` from word `at` on.
#[inline(always)]
unsafe fn words(row: *const u8, at: usize) -> __m512i {
    // SAFETY: the caller's rows have 16 words from `at` on.
    unsafe { _mm512_loadu_si512(row.add(at * 4).cast()) }
}
