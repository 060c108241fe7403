//! Whole numbers of 16 bits by AVX2: 16 words are two registers. AVX-VNNI multiplies and adds them at once.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::codes::plane_bits;
use super::inputs::Narrow;
use super::multiply::{Multiply, Task, Words};
use crate::lanes::avx2::{Avx2, four, line, looked_up, six};
use crate::lanes::{LANES, table_of};

/// Pairs of whole numbers; sums are whole too. `VNNI`: there is AVX-VNNI.
pub(super) struct WordsAvx2<const VNNI: bool>;

/// Words `[0, 8)` and `[8, 16)`.
#[derive(Clone, Copy)]
pub(super) struct Two(__m256i, __m256i);

// SAFETY (all blocks here): the product runs only where AVX2, FMA and F16C were detected, and the caller gives memory as each
// method says.
impl<const VNNI: bool> Multiply for WordsAvx2<VNNI> {
    type Floats = Avx2;
    type Words = Two;

    const WHOLE: bool = true;
    const ROWS_FIRST: usize = 4;
    const ROWS_FOLLOWING: usize = 6;
    const PANELS: usize = 1;

    #[inline(always)]
    unsafe fn pair<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> Two {
        // SAFETY: see the impl; a line is two halves of 32 bytes.
        unsafe {
            if const { plane_bits(CODE) == 0 } {
                // Where inputs are: see [`super::super::ORDER`].
                let first = chunk.add((octet * 8 + pair % 2 * 4 + pair / 2) * LANES);
                let (even, odd) =
                    (_mm_loadu_si128(first.cast()), _mm_loadu_si128(first.add(2 * LANES).cast()));
                return Two(
                    _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)),
                    _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd)),
                );
            }
            Two(planes::<CODE>(chunk, octet, pair), planes::<CODE>(chunk.add(32), octet, pair))
        }
    }

    #[inline(always)]
    unsafe fn add<const IN_TURN: bool>(sums: Two, codes: Two, inputs: i32) -> Two {
        // SAFETY: see the impl.
        unsafe {
            let inputs = _mm256_set1_epi32(inputs);
            match const { VNNI } {
                true => Two(plus_products(sums.0, codes.0, inputs), plus_products(sums.1, codes.1, inputs)),
                false => Two(
                    plus(sums.0, _mm256_madd_epi16(codes.0, inputs)),
                    plus(sums.1, _mm256_madd_epi16(codes.1, inputs)),
                ),
            }
        }
    }

    #[inline(always)]
    unsafe fn floats(sums: Two) -> Avx2 {
        // SAFETY: see the impl.
        unsafe { Avx2(_mm256_cvtepi32_ps(sums.0), _mm256_cvtepi32_ps(sums.1)) }
    }

    #[inline(always)]
    unsafe fn apart<T: Task>(task: T) {
        // SAFETY: see the impl.
        unsafe { apart(task) }
    }
}

// SAFETY (all blocks here): as above.
impl Words for Two {
    #[inline(always)]
    unsafe fn splat(word: i32) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_set1_epi32(word), _mm256_set1_epi32(word)) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(8).cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: see the impl.
        unsafe {
            _mm256_store_si256(at.cast(), self.0);
            _mm256_store_si256(at.add(8).cast(), self.1);
        }
    }

    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let (low, high) = (_mm_loadl_epi64(at.cast()), _mm_loadl_epi64(at.add(8).cast()));
            Two(_mm256_cvtepi8_epi32(low), _mm256_cvtepi8_epi32(high))
        }
    }

    #[inline(always)]
    unsafe fn four(at: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(four::<false>(at), four::<false>(at.add(8))) }
    }

    #[inline(always)]
    unsafe fn six(at: *const u8, n: usize) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(six(at, n), six(at.add(32), n)) }
    }

    #[inline(always)]
    unsafe fn twice(self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            Two(
                _mm256_blend_epi16::<0xaa>(self.0, _mm256_slli_epi32::<16>(self.0)),
                _mm256_blend_epi16::<0xaa>(self.1, _mm256_slli_epi32::<16>(self.1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn added(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_add_epi32(self.0, other.0), _mm256_add_epi32(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn plus(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            Two(
                _mm256_add_epi32(self.0, _mm256_mullo_epi32(a.0, b.0)),
                _mm256_add_epi32(self.1, _mm256_mullo_epi32(a.1, b.1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn halves_less(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_sub_epi16(self.0, other.0), _mm256_sub_epi16(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn halves_times(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_mullo_epi16(self.0, other.0), _mm256_mullo_epi16(self.1, other.1)) }
    }
}

impl<const VNNI: bool> Narrow for WordsAvx2<VNNI> {
    #[inline(always)]
    unsafe fn narrowed(x: Avx2, out: *mut i16) -> Two {
        // SAFETY: see the other impl. Packing works within 128-bit halves: put the middle quarters right.
        unsafe {
            let words = Two(_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1));
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(words.0, words.1));
            _mm256_storeu_si256(out.cast(), packed);
            words
        }
    }

    #[inline(always)]
    unsafe fn sum(words: Two) -> i32 {
        // SAFETY: see the other impl. Each step adds the other half of what is left.
        unsafe {
            let eight = _mm256_add_epi32(words.0, words.1);
            let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
        }
    }
}

/// # Safety
/// This machine has AVX2, FMA and F16C; the rest is the task's.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn apart<T: Task>(task: T) {
    // SAFETY: the caller's.
    unsafe { task.run() }
}

/// The sums of words, one after the other as they are written: the compiler would add what comes to the same sum later first, or
/// finish one sum before the next, and either way keep in memory what there are no registers for.
#[inline]
#[target_feature(enable = "avx2")]
fn plus(mut sums: __m256i, products: __m256i) -> __m256i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        asm!(
            "vpaddd {sums}, {sums}, {products}",
            sums = inout(ymm_reg) sums,
            products = in(ymm_reg) products,
            options(nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The sums of words and the products of pairs, likewise.
///
/// # Safety
/// This machine has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn plus_products(mut sums: __m256i, codes: __m256i, inputs: __m256i) -> __m256i {
    // SAFETY: register arithmetic of what the caller has.
    unsafe {
        asm!(
            "{{vex}} vpdpwssd {sums}, {codes}, {inputs}",
            sums = inout(ymm_reg) sums,
            codes = in(ymm_reg) codes,
            inputs = in(ymm_reg) inputs,
            options(nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// A pair of codes in planes, of half of the outputs.
#[inline(always)]
unsafe fn planes<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> __m256i {
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        // Where a pair's bits begin in planes of 2, 1 and 4 bits.
        let (two, one, four) = (8 * (octet % 2) + 2 * pair, 4 * octet + pair, 4 * pair);
        let low = match CODE {
            2 | 3 => and(moved(line(chunk, octet / 2), two, 0), 3),
            // The last four bits have nothing above.
            4 if pair == 3 => moved(line(chunk, octet), 12, 0),
            _ => and(moved(line(chunk, octet), four, 0), 15),
        };
        let high = match CODE {
            3 => and(moved(line(chunk, 2), one, 2), 4),
            5 => and(moved(line(chunk, 4), one, 4), 16),
            6 => and(moved(line(chunk, 4 + octet / 2), two, 4), 48),
            _ if const { table_of(CODE).is_some() } => return looked_up::<CODE>(low, 2),
            _ => return low,
        };
        _mm256_or_si256(low, high)
    }
}

/// In every half the bits from `from` on, moved to `to`.
#[inline(always)]
unsafe fn moved(words: __m256i, from: usize, to: usize) -> __m256i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        match from >= to {
            true => _mm256_srl_epi16(words, _mm_cvtsi32_si128((from - to) as i32)),
            false => _mm256_sll_epi16(words, _mm_cvtsi32_si128((to - from) as i32)),
        }
    }
}

/// The bits of `mask` in every half.
#[inline(always)]
unsafe fn and(words: __m256i, mask: i16) -> __m256i {
    // SAFETY: register arithmetic of this level.
    unsafe { _mm256_and_si256(words, _mm256_set1_epi16(mask)) }
}
