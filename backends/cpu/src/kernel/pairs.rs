//! Products of bf16 by bf16 with the instruction that AVX-512 has for it: two inputs of 16 outputs at once. Its own order
//! of sums (pair after pair, within a pair as the instruction does) for any number of rows.

use std::arch::x86_64::*;

use super::Pairs;
use crate::lanes::LANES;

/// Registers that sums and operands share.
const REGISTERS: usize = 31;
/// Panels that all row tiles visit before the next: two of 256 inputs stay in the first cache.
const PANELS_WITH_MANY_ROWS: usize = 2;
/// Up to here rows are one or two tiles: visit all panels with each.
const ROWS_FEW: usize = 12;
/// Bytes that are asked for ahead of use.
const AHEAD_BYTES: usize = 1024;

/// The same bits.
#[inline(always)]
pub(super) unsafe fn halves(words: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of whatever.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// `R` rows by `P` panels in registers over all pairs.
///
/// # Safety
/// As for [`pairs`], restricted to rows `[row, row + R)` and panels `[panel, panel + P)`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, factors and addresses alike
unsafe fn tile<const R: usize, const P: usize>(s: &Pairs, row: usize, panel: usize) {
    // SAFETY: the caller's product is valid for these rows and panels.
    unsafe {
        let x = s.x.add(row * s.x_stride);
        let w = s.w.add(panel * s.panel_stride);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        if !s.fresh {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = _mm512_loadu_ps(out.add(r * s.acc_stride + p * LANES));
                }
            }
        }
        for k in 0..s.pairs {
            let mut weights = [_mm512_setzero_si512(); P];
            for p in 0..P {
                let at = w.wrapping_add(p * s.panel_stride + k * 2 * LANES);
                _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD_BYTES));
                weights[p] = _mm512_loadu_si512(at.cast());
            }
            for r in 0..R {
                let factor = _mm512_set1_epi32(*x.add(r * s.x_stride + k));
                for p in 0..P {
                    acc[r][p] = _mm512_dpbf16_ps(acc[r][p], halves(weights[p]), halves(factor));
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

/// Panels `[from, to)` for rows `[row, row + R)`: as many at once as registers allow.
#[inline(always)]
unsafe fn rows<const R: usize>(s: &Pairs, row: usize, from: usize, to: usize) {
    let mut panel = from;
    // SAFETY: the caller's product covers these rows and panels.
    unsafe {
        if const { R * 8 + 9 <= REGISTERS } {
            while panel + 8 <= to {
                tile::<R, 8>(s, row, panel);
                panel += 8;
            }
        }
        if const { R * 4 + 5 <= REGISTERS } {
            while panel + 4 <= to {
                tile::<R, 4>(s, row, panel);
                panel += 4;
            }
        }
        while panel + 2 <= to {
            tile::<R, 2>(s, row, panel);
            panel += 2;
        }
        while panel < to {
            tile::<R, 1>(s, row, panel);
            panel += 1;
        }
    }
}

/// Runs a product of pairs.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn pairs(s: &Pairs) {
    let group = if s.rows <= ROWS_FEW { s.panels } else { PANELS_WITH_MANY_ROWS };
    let mut from = 0;
    while from < s.panels {
        let to = (from + group).min(s.panels);
        let mut row = 0;
        // SAFETY: rows and panels stay within the product.
        unsafe {
            while row + 12 <= s.rows {
                rows::<12>(s, row, from, to);
                row += 12;
            }
            while row + 6 <= s.rows {
                rows::<6>(s, row, from, to);
                row += 6;
            }
            while row + 4 <= s.rows {
                rows::<4>(s, row, from, to);
                row += 4;
            }
            while row + 2 <= s.rows {
                rows::<2>(s, row, from, to);
                row += 2;
            }
            while row < s.rows {
                rows::<1>(s, row, from, to);
                row += 1;
            }
        }
        from = to;
    }
}

/// Two rows of bf16 side by side; see [`super::PairKernels`].
///
/// # Safety
/// `a` and `b` are null or hold `n` bf16, `out` has a line per 16 of them, `stride` apart; this machine has AVX-512 BW.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn interleave(a: *const u16, b: *const u16, n: usize, out: *mut u16, stride: usize) {
    // SAFETY: masked elements are not read.
    let wide = |row: *const u16, at: usize| unsafe {
        if row.is_null() {
            return _mm512_setzero_si512();
        }
        let mask = if n - at >= LANES { u16::MAX } else { (1 << (n - at)) - 1 };
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row.add(at).cast()))
    };
    for (line, at) in (0..n).step_by(LANES).enumerate() {
        let both = _mm512_or_si512(wide(a, at), _mm512_slli_epi32::<16>(wide(b, at)));
        // SAFETY: the caller's line.
        unsafe { _mm512_storeu_si512(out.add(line * stride).cast(), both) };
    }
}
