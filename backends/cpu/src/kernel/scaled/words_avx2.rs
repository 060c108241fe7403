//! Whole numbers of 16 bits by AVX2: 16 words are two registers.

use std::arch::x86_64::*;

use super::super::codes::BYTES;
use super::inputs::Whole;
use super::multiply::{Multiply, Task};
use crate::lanes::LANES;
use crate::lanes::avx2::{Avx2, line};

/// Pairs of whole numbers; sums are whole too.
pub(super) struct WordsAvx2;

/// Words `[0, 8)` and `[8, 16)`.
#[derive(Clone, Copy)]
pub(super) struct Two(__m256i, __m256i);

// SAFETY (all blocks here): the product runs only where AVX2, FMA and F16C were detected, and the caller gives memory as each
// method says.
impl Multiply for WordsAvx2 {
    type Floats = Avx2;
    type Words = Two;

    const WHOLE: bool = true;
    const ROWS_FIRST: usize = 4;
    const ROWS_FOLLOWING: usize = 6;
    const PANELS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Two {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Two {
        // SAFETY: see the impl.
        unsafe { Two(_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(8).cast())) }
    }

    #[inline(always)]
    unsafe fn store(words: Two, at: *mut f32) {
        // SAFETY: see the impl.
        unsafe {
            _mm256_store_si256(at.cast(), words.0);
            _mm256_store_si256(at.add(8).cast(), words.1);
        }
    }

    #[inline(always)]
    unsafe fn pair<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> Two {
        // SAFETY: see the impl; a line is two halves of 32 bytes.
        unsafe {
            if const { CODE >= BYTES } {
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
    unsafe fn add(sums: Two, codes: Two, inputs: i32) -> Two {
        // SAFETY: see the impl.
        unsafe {
            let inputs = _mm256_set1_epi32(inputs);
            Two(
                _mm256_add_epi32(sums.0, _mm256_madd_epi16(codes.0, inputs)),
                _mm256_add_epi32(sums.1, _mm256_madd_epi16(codes.1, inputs)),
            )
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

impl Whole for WordsAvx2 {
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
}

/// # Safety
/// This machine has AVX2, FMA and F16C; the rest is the task's.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn apart<T: Task>(task: T) {
    // SAFETY: the caller's.
    unsafe { task.run() }
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
