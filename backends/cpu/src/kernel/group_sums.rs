//! Sums of inputs by group, which offsets of quantised weights are multiplied by. Called once per row, by `pair_row`.

use std::arch::x86_64::*;

use super::GroupSums;

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
pub(super) unsafe fn sum_of(x: *const i32, octets: usize) -> f32 {
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
