//! Products of few rows, which take as long as reading the weights. One row reads panel after panel, each from end to end,
//! so that a thread reads one stream: with four panels side by side less was on its way from memory, and a core read 20 GB/s
//! where it could read 35. A group's sum is a chain of its own, and chains of groups that follow each other overlap by
//! themselves. More rows have more to compute per weight, and share the inputs of two panels.

use std::arch::x86_64::*;

use super::super::Scaled;
use super::super::codes::{Cursor, E4M3, scale_of};
use super::super::pair_codes::{Table, pair_of};
use super::{Part, Sums, add, behind, follow_octet, take_apart};
use crate::lanes::LANES;
use crate::lanes::avx512::Avx512;

/// Rows at most: their sums stay in registers.
pub(super) const ROWS: usize = Scaled::ROWS_RANGES;

/// All rows by all panels.
///
/// # Safety
/// As for [`super::scaled`]; there are at most [`ROWS`] rows.
#[inline(always)]
pub(super) unsafe fn few<const CODE: usize>(s: &Scaled<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match s.rows {
            0 => {}
            1 => panels::<CODE, 1, 1>(s),
            2 => panels::<CODE, 2, 2>(s),
            3 => panels::<CODE, 3, 2>(s),
            _ => panels::<CODE, ROWS, 2>(s),
        }
    }
}

/// All panels, `P` at a time while there are so many. A function of its own: within a larger one addresses are spilled.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn panels<const CODE: usize, const R: usize, const P: usize>(s: &Scaled<'_>) {
    let mut panel = 0;
    // SAFETY: panels stay within the product.
    unsafe {
        let table = Table::new::<CODE>();
        while panel + P <= s.panels {
            strip::<CODE, R, P>(s, table, panel);
            panel += P;
        }
        if const { P > 1 } && panel < s.panels {
            strip::<CODE, R, 1>(s, table, panel);
        }
    }
}

/// All rows by `P` panels, range after range, group after group: a panel is read from end to end whatever ranges it has, so that
/// what is asked for ahead is used next.
#[inline(always)]
unsafe fn strip<const CODE: usize, const R: usize, const P: usize>(
    s: &Scaled<'_>,
    table: Table,
    panel: usize,
) {
    // Octets of whole chunks; of 6 bits, of halves, of 16 inputs that share a scale.
    let whole = const { if CODE == 6 { 2 } else { 4 } };
    let scale_bytes = s.form.scale_bytes();
    let each = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels, the buffer room for an octet.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let mut x = s.x;
        for range in 0..s.ranges {
            let mut cursor = Cursor::new(s.form, s.octets.0 + range * each);
            let mut left = each;
            let mut of_inputs = s.sums.wrapping_add(range * s.sums_range);
            let mut totals: Sums<R, P> = [[_mm512_setzero_ps(); P]; R];
            while left > 0 {
                let count = cursor.count(left);
                let base = first.add(cursor.base);
                let behind = behind::<P>(s, cursor.base);
                if cursor.at == 0 {
                    for (line, p) in (0..scale_bytes / 64).flat_map(|line| (0..P).map(move |p| (line, p))) {
                        let ahead = base.wrapping_add(p * s.panel_bytes + behind + line * 64);
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                }
                let codes = base.add(scale_bytes);
                let mut sums: Sums<R, P> = [[_mm512_setzero_ps(); P]; R];
                let (mut octet, end) = (cursor.at, cursor.at + count);
                while octet < end {
                    let chunk = codes.add(octet / 4 * const { chunk_bytes(CODE) });
                    let part = Part { chunk, behind, x, keep: s.buffer };
                    let done = match (octet % 4, end - octet) {
                        (0, left) if left >= whole => octets::<CODE, R, P, 0>(s, part, table, &mut sums),
                        (2, 2..) if const { CODE == 6 } => octets::<CODE, R, P, 2>(s, part, table, &mut sums),
                        (from, _) => {
                            take_apart::<CODE>(part, (from, P), s.panel_bytes);
                            follow_octet(s, part, &mut sums);
                            1
                        }
                    };
                    octet += done;
                    x = x.add(done * 4);
                }
                for p in 0..P {
                    let (scale, offset) =
                        scale_of::<Avx512>(s.form, base.add(p * s.panel_bytes), cursor.at_group);
                    for r in 0..R {
                        let total = _mm512_fmadd_ps(scale.0, sums[r][p], totals[r][p]);
                        totals[r][p] = match const { CODE == E4M3 } {
                            true => total,
                            false => {
                                let of_inputs = _mm512_set1_ps(*of_inputs.add(r * s.x_stride));
                                _mm512_fmadd_ps(offset.0, of_inputs, total)
                            }
                        };
                    }
                }
                of_inputs = of_inputs.wrapping_add(1);
                cursor.pass(s.form, count);
                left -= count;
            }
            let acc = s.acc.add(range * s.acc_range + panel * LANES);
            for (r, row) in totals.into_iter().enumerate() {
                for (p, total) in row.into_iter().enumerate() {
                    _mm512_storeu_ps(acc.add(r * s.acc_stride + p * LANES), total);
                }
            }
        }
    }
}

/// Bytes of the codes of 32 inputs.
const fn chunk_bytes(code: usize) -> usize {
    if code <= 6 { code * 64 } else { 512 }
}

/// Adds the octets of a chunk from `FROM` on, a half or a whole, to the sums of a group, and asks for what lies so far behind
/// them; says how many octets that were.
#[inline(always)]
unsafe fn octets<const CODE: usize, const R: usize, const P: usize, const FROM: usize>(
    s: &Scaled<'_>,
    part: Part,
    table: Table,
    sums: &mut Sums<R, P>,
) -> usize {
    let count = const { if CODE == 6 { 2 } else { 4 } };
    for octet in 0..count {
        // SAFETY: the caller's panels have this chunk, and rows these inputs.
        unsafe {
            let octet_bytes = const { chunk_bytes(CODE) / 4 };
            for p in 0..P {
                let ahead = part.chunk.wrapping_add(p * s.panel_bytes + part.behind);
                for line in (FROM + octet) * octet_bytes / 64..(FROM + octet + 1) * octet_bytes / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64).cast());
                }
            }
            for pair in 0..4 {
                let mut weights = [_mm512_setzero_si512(); P];
                for (p, weights) in weights.iter_mut().enumerate() {
                    let chunk = part.chunk.add(p * s.panel_bytes);
                    *weights = pair_of::<CODE>(chunk, FROM + octet, pair, table);
                }
                add(s, part.x.add(octet * 4 + pair), &weights, sums);
            }
        }
    }
    count
}
