//! Weighted values of few query rows: pairs of positions are put side by side in registers, straight from the cache, and
//! multiplied at once. To the bit what [`super::pairs`] makes of values that were put side by side in memory.

use std::arch::x86_64::*;

use super::Weigh;
use super::pairs::halves;
use crate::lanes::LANES;

/// Positions that are asked for ahead of use.
const AHEAD: usize = 24;

/// Runs a sum.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn weigh(s: &Weigh) {
    let mut row = 0;
    // SAFETY: rows and panels stay within the sum.
    unsafe {
        while row + 8 <= s.rows {
            rows::<8>(s, row);
            row += 8;
        }
        while row + 4 <= s.rows {
            rows::<4>(s, row);
            row += 4;
        }
        while row < s.rows {
            rows::<1>(s, row);
            row += 1;
        }
    }
}

/// All panels for rows `[row, row + R)`.
#[inline(always)]
unsafe fn rows<const R: usize>(s: &Weigh, row: usize) {
    let mut panel = 0;
    // SAFETY: as above.
    unsafe {
        if const { R <= 4 } {
            while panel + 4 <= s.panels {
                tile::<R, 4>(s, row, panel);
                panel += 4;
            }
        }
        while panel + 2 <= s.panels {
            tile::<R, 2>(s, row, panel);
            panel += 2;
        }
        if panel < s.panels {
            tile::<R, 1>(s, row, panel);
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, factors and addresses alike
unsafe fn tile<const R: usize, const P: usize>(s: &Weigh, row: usize, panel: usize) {
    // SAFETY: the caller's sum has these rows, panels and positions.
    unsafe {
        let x = s.x.add(row * s.x_stride);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        for r in 0..R {
            for p in 0..P {
                acc[r][p] = _mm512_loadu_ps(out.add(r * s.acc_stride + p * LANES));
            }
        }
        for pair in 0..s.pairs {
            let first = s.v.wrapping_add(2 * pair * s.v_stride + panel * LANES);
            let second = first.wrapping_add(s.v_stride);
            for line in (0..P).step_by(2) {
                let ahead = first.wrapping_add(AHEAD * s.v_stride + line * LANES);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(s.v_stride).cast());
            }
            let (no_first, no_second) = (s.without.0 && pair == 0, s.without.1 && pair + 1 == s.pairs);
            let mut values = [_mm512_setzero_si512(); P];
            if const { P > 1 } {
                for p in (0..P).step_by(2) {
                    let a = if no_first { _mm512_setzero_si512() } else { wide(first.add(p * LANES)) };
                    let b = if no_second { _mm512_setzero_si512() } else { wide(second.add(p * LANES)) };
                    values[p] = _mm512_permutex2var_epi16(a, wide(ORDERS[0].as_ptr()), b);
                    values[p + 1] = _mm512_permutex2var_epi16(a, wide(ORDERS[1].as_ptr()), b);
                }
            } else {
                let a = if no_first { _mm256_setzero_si256() } else { _mm256_loadu_si256(first.cast()) };
                let b = if no_second { _mm256_setzero_si256() } else { _mm256_loadu_si256(second.cast()) };
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(b));
                values[0] = _mm512_or_si512(_mm512_cvtepu16_epi32(a), high);
            }
            for r in 0..R {
                let weight = _mm512_set1_epi32(*x.add(r * s.x_stride + pair));
                for p in 0..P {
                    acc[r][p] = _mm512_dpbf16_ps(acc[r][p], halves(values[p]), halves(weight));
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(out.add(r * s.acc_stride + p * LANES), acc[r][p]);
            }
        }
    }
}

/// Of 32 elements of two positions: the first 16 side by side, then the others.
const ORDERS: [[u16; 32]; 2] = {
    let mut orders = [[0; 32]; 2];
    let mut at = 0;
    while at < 64 {
        orders[at / 32][at % 32] = (at / 2 + at % 2 * 32) as u16;
        at += 1;
    }
    orders
};

#[inline(always)]
unsafe fn wide(from: *const u16) -> __m512i {
    // SAFETY: the caller's 32 elements.
    unsafe { _mm512_loadu_si512(from.cast()) }
}
