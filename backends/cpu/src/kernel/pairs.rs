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
/// Bytes that are asked for ahead of use, of all panels of a tile together.
const AHEAD_BYTES: usize = 8192;

/// The same bits.
#[inline(always)]
pub(super) unsafe fn halves(words: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of whatever.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// What a tile asks for ahead of use.
#[derive(Clone, Copy)]
enum Ahead {
    /// What lies behind its own weights, which stream from memory.
    Own,
    /// So many lines of the panels that come next: some of them with every tile of rows, so that memory is busy all the time.
    Next(*const u16, usize),
}

/// `R` rows by `P` panels in registers over all pairs.
///
/// # Safety
/// As for [`pairs`], restricted to rows `[row, row + R)` and panels `[panel, panel + P)`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, factors and addresses alike
unsafe fn tile<const R: usize, const P: usize>(s: &Pairs, row: usize, panel: usize, ahead: Ahead) {
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
            if let Ahead::Next(lines, count) = ahead
                && k < count
            {
                _mm_prefetch::<_MM_HINT_T0>(lines.wrapping_add(k * 2 * LANES).cast());
            }
            let mut weights = [_mm512_setzero_si512(); P];
            for p in 0..P {
                let at = w.wrapping_add(p * s.panel_stride + k * 2 * LANES);
                if let Ahead::Own = ahead {
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD_BYTES / P));
                }
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

/// Panels `[from, to)` for rows `[row, row + R)`: as many at once as registers allow, but two for one row, which is to read
/// few streams at a time.
#[inline(always)]
unsafe fn rows<const R: usize>(s: &Pairs, row: usize, from: usize, to: usize, ahead: Ahead) {
    let mut panel = from;
    // SAFETY: the caller's product covers these rows and panels.
    unsafe {
        if const { R > 1 && R * 8 + 9 <= REGISTERS } {
            while panel + 8 <= to {
                tile::<R, 8>(s, row, panel, ahead);
                panel += 8;
            }
        }
        if const { R > 1 && R * 4 + 5 <= REGISTERS } {
            while panel + 4 <= to {
                tile::<R, 4>(s, row, panel, ahead);
                panel += 4;
            }
        }
        while panel + 2 <= to {
            tile::<R, 2>(s, row, panel, ahead);
            panel += 2;
        }
        while panel < to {
            tile::<R, 1>(s, row, panel, ahead);
            panel += 1;
        }
    }
}

/// Rows of the next tile where `left` are left: of even sizes, as a small last one would leave the processor idle.
fn rows_of(left: usize) -> usize {
    match left {
        16 | 8..=11 => 8,
        12.. => 12,
        6.. => 6,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Runs a product of pairs.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn pairs(s: &Pairs) {
    let streams = s.rows <= ROWS_FEW;
    let group = if streams { s.panels } else { PANELS_WITH_MANY_ROWS };
    let tiles = {
        let (mut left, mut count) = (s.rows, 0);
        while left > 0 {
            left -= rows_of(left);
            count += 1;
        }
        count
    };
    let mut from = 0;
    while from < s.panels {
        let to = (from + group).min(s.panels);
        // The panels behind these, or what lies behind the first ones.
        let next = match to < s.panels {
            true => s.w.wrapping_add(to * s.panel_stride),
            false => s.w.wrapping_add(s.pairs * 2 * LANES),
        };
        let (mut row, mut at) = (0, 0);
        while row < s.rows {
            let ahead = if streams {
                Ahead::Own
            } else {
                // Even tiles bring the first panel, odd ones the second, each its part.
                let (panel, part, parts) = (at % 2, at / 2, (tiles + 1 - at % 2) / 2);
                let (first, last) = (part * s.pairs / parts, (part + 1) * s.pairs / parts);
                Ahead::Next(next.wrapping_add(panel * s.panel_stride + first * 2 * LANES), last - first)
            };
            let count = rows_of(s.rows - row);
            // SAFETY: rows and panels stay within the product.
            unsafe {
                match count {
                    12 => rows::<12>(s, row, from, to, ahead),
                    8 => rows::<8>(s, row, from, to, ahead),
                    6 => rows::<6>(s, row, from, to, ahead),
                    4 => rows::<4>(s, row, from, to, ahead),
                    2 => rows::<2>(s, row, from, to, ahead),
                    _ => rows::<1>(s, row, from, to, ahead),
                }
            }
            (row, at) = (row + count, at + 1);
        }
        from = to;
    }
}

/// Two rows of bf16 side by side; see [`super::PairKernels`].
///
/// # Safety
/// Rows are null or hold `n` bf16, `out` has a line per 16 of them, `stride` apart; this machine has AVX-512 BW.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn interleave(
    rows: [*const u16; 2],
    n: usize,
    out: *mut u16,
    stride: usize,
    ahead: [*const u16; 2],
) {
    // SAFETY: masked elements are not read.
    let wide = |row: *const u16, at: usize| unsafe {
        if row.is_null() {
            return _mm512_setzero_si512();
        }
        let mask = if n - at >= LANES { u16::MAX } else { (1 << (n - at)) - 1 };
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row.add(at).cast()))
    };
    for line in (0..n).step_by(2 * LANES) {
        for row in ahead {
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(line).cast());
        }
    }
    for (line, at) in (0..n).step_by(LANES).enumerate() {
        let both = _mm512_or_si512(wide(rows[0], at), _mm512_slli_epi32::<16>(wide(rows[1], at)));
        // SAFETY: the caller's line.
        unsafe { _mm512_storeu_si512(out.add(line * stride).cast(), both) };
    }
}
