//! E4M3 and inputs as bf16, which both are as they are, by the instruction that AVX-512 has for such pairs.

use std::arch::x86_64::*;

use super::super::pairs::halves;
use super::multiply::{Multiply, Task};
use crate::lanes::avx512::Avx512;
use crate::lanes::{LANES, Lanes};

/// Pairs of bf16; sums are floats.
pub(super) struct Halves;

// SAFETY (all blocks here): the product runs only where AVX-512 BF16 was detected, and the caller gives memory as each method
// says.
impl Multiply for Halves {
    type Floats = Avx512;
    type Words = __m512i;

    const WHOLE: bool = false;
    const ROWS_FIRST: usize = 8;
    const ROWS_FOLLOWING: usize = 12;
    const PANELS: usize = 2;

    #[inline(always)]
    unsafe fn pair<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> __m512i {
        /// Bits of the mask from the first, the others from the second.
        const SELECT: i32 = 0xca;
        // SAFETY: see the impl. Upper halves of floats: such small numbers have nothing below.
        unsafe {
            let line = chunk.add((octet * 8 + 2 * pair) * LANES);
            let (even, odd) = (Avx512::load_e4m3(line), Avx512::load_e4m3(line.add(LANES)));
            let (even, odd) = (_mm512_castps_si512(even.0), _mm512_castps_si512(odd.0));
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_ternarylogic_epi32::<SELECT>(upper, odd, _mm512_srli_epi32::<16>(even))
        }
    }

    #[inline(always)]
    unsafe fn add<const IN_TURN: bool>(sums: __m512i, codes: __m512i, inputs: i32) -> __m512i {
        // SAFETY: see the impl.
        unsafe {
            let sums = _mm512_castsi512_ps(sums);
            _mm512_castps_si512(_mm512_dpbf16_ps(sums, halves(codes), halves(_mm512_set1_epi32(inputs))))
        }
    }

    #[inline(always)]
    unsafe fn floats(sums: __m512i) -> Avx512 {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_castsi512_ps(sums) })
    }

    #[inline(always)]
    unsafe fn apart<T: Task>(task: T) {
        // SAFETY: see the impl.
        unsafe { apart(task) }
    }
}

/// # Safety
/// This machine has AVX-512 BF16; the rest is the task's.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn apart<T: Task>(task: T) {
    // SAFETY: the caller's.
    unsafe { task.run() }
}
