//! Quantised weights as pairs of bf16, for levels that multiply those: decoded numbers are rounded to bf16, and sums are
//! those of [`super::pairs`], whether a weight is decoded into memory (many rows) or in registers (few).

use std::arch::x86_64::*;

use super::codes::{BYTES, Code, Cursor, Decode, E4M3, ahead, octet_of, scale_of};
use super::pairs::halves;
use super::stream::Stream;
use crate::lanes::avx512::Avx512;
use crate::lanes::{LANES, Lanes};

/// Calls `$f::<CODE>` for the code of a form.
macro_rules! by_code {
    ($code:expr, $f:ident($arg:expr)) => {
        match $code {
            Code::Planes(2) => $f::<2>($arg),
            Code::Planes(3) => $f::<3>($arg),
            Code::Planes(4) => $f::<4>($arg),
            Code::Planes(5) => $f::<5>($arg),
            Code::Planes(_) => $f::<6>($arg),
            Code::Bytes => $f::<BYTES>($arg),
            Code::E4m3 => $f::<E4M3>($arg),
        }
    };
}

/// As [`Decode`], to `out[pair][16][2]` of bf16: a pair takes the place of a line of floats.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn decode(d: &Decode<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(d.form.code, decode_as(d)) }
}

/// As [`Stream`], `x` being pairs of bf16 with strides that count pairs.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn stream(s: &Stream<'_>) {
    // SAFETY: the caller's.
    unsafe { by_code!(s.form.code, stream_as(s)) }
}

/// The numbers of 8 inputs as four pairs.
#[inline(always)]
unsafe fn pairs_of<const CODE: usize>(
    chunk: *const u8,
    octet: usize,
    (scale, offset): (Avx512, Avx512),
) -> [__m512i; 4] {
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        let v = octet_of::<Avx512, CODE>(chunk, octet);
        [
            pair(offset.madd(v[0], scale), offset.madd(v[1], scale)),
            pair(offset.madd(v[2], scale), offset.madd(v[3], scale)),
            pair(offset.madd(v[4], scale), offset.madd(v[5], scale)),
            pair(offset.madd(v[6], scale), offset.madd(v[7], scale)),
        ]
    }
}

/// Two inputs of 16 outputs, rounded to bf16, side by side per output.
#[inline(always)]
unsafe fn pair(first: Avx512, second: Avx512) -> __m512i {
    const SIDE_BY_SIDE: [u16; 32] = {
        let mut order = [0; 32];
        let mut at = 0;
        while at < 32 {
            order[at] = (at / 2 + at % 2 * 16) as u16;
            at += 1;
        }
        order
    };
    // SAFETY: register arithmetic of this level, and 32 halves.
    unsafe {
        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second.0, first.0));
        _mm512_permutexvar_epi16(_mm512_loadu_si512(SIDE_BY_SIDE.as_ptr().cast()), both)
    }
}

#[inline(always)]
unsafe fn decode_as<const CODE: usize>(d: &Decode<'_>) {
    let (chunk_bytes, scale_bytes) = (d.form.chunk_bytes(), d.form.scale_bytes());
    let mut cursor = Cursor::new(d.form, d.octets.0);
    let mut left = d.octets.1 - d.octets.0;
    let mut out = d.out;
    while left > 0 {
        let count = cursor.count(left);
        // SAFETY: the panel has this block, and the block this group; `out` has room for all octets.
        unsafe {
            let base = d.panel.add(cursor.base);
            let scales = scale_of::<Avx512>(d.form, base, cursor.at_group);
            for octet in cursor.at..cursor.at + count {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                ahead::<Avx512>(chunk, chunk_bytes / 4, octet % 4);
                for (at, pair) in pairs_of::<CODE>(chunk, octet % 4, scales).into_iter().enumerate() {
                    _mm512_storeu_si512(out.add(at * LANES).cast(), pair);
                }
                out = out.add(4 * LANES);
            }
        }
        cursor.pass(d.form, count);
        left -= count;
    }
}

#[inline(always)]
unsafe fn stream_as<const CODE: usize>(s: &Stream<'_>) {
    let mut row = 0;
    // SAFETY: rows and panels stay within the stream.
    unsafe {
        while row + 4 <= s.rows {
            rows::<CODE, 4>(s, row);
            row += 4;
        }
        while row + 2 <= s.rows {
            rows::<CODE, 2>(s, row);
            row += 2;
        }
        while row < s.rows {
            rows::<CODE, 1>(s, row);
            row += 1;
        }
    }
}

/// All panels for rows `[row, row + R)`.
#[inline(always)]
unsafe fn rows<const CODE: usize, const R: usize>(s: &Stream<'_>, row: usize) {
    let mut panel = 0;
    // SAFETY: as above.
    unsafe {
        if const { R <= 2 } {
            while panel + 4 <= s.panels {
                tile::<CODE, R, 4>(s, row, panel);
                panel += 4;
            }
        }
        while panel + 2 <= s.panels {
            tile::<CODE, R, 2>(s, row, panel);
            panel += 2;
        }
        while panel < s.panels {
            tile::<CODE, R, 1>(s, row, panel);
            panel += 1;
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and panels index sums, scales and addresses alike
unsafe fn tile<const CODE: usize, const R: usize, const P: usize>(s: &Stream<'_>, row: usize, panel: usize) {
    let (chunk_bytes, scale_bytes) = (s.form.chunk_bytes(), s.form.scale_bytes());
    let mut cursor = Cursor::new(s.form, s.octets.0);
    let mut left = s.octets.1 - s.octets.0;
    // SAFETY: the panels have these octets, x the rows and pairs, acc the rows and panels.
    unsafe {
        let first = s.panel.add(panel * s.panel_bytes);
        let mut x = s.x.cast::<i32>().add(row * s.x_stride);
        let out = s.acc.add(row * s.acc_stride + panel * LANES);
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        if !s.fresh {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = _mm512_loadu_ps(out.add(r * s.acc_stride + p * LANES));
                }
            }
        }
        while left > 0 {
            let count = cursor.count(left);
            let base = first.add(cursor.base);
            let mut scales = [(Avx512::splat(0.0), Avx512::splat(0.0)); P];
            for p in 0..P {
                scales[p] = scale_of::<Avx512>(s.form, base.add(p * s.panel_bytes), cursor.at_group);
            }
            for octet in cursor.at..cursor.at + count {
                let chunk = base.add(scale_bytes + octet / 4 * chunk_bytes);
                for p in 0..P {
                    let chunk = chunk.add(p * s.panel_bytes);
                    ahead::<Avx512>(chunk, chunk_bytes / 4, octet % 4);
                    let weights = pairs_of::<CODE>(chunk, octet % 4, scales[p]);
                    // Inputs of several rows are read again for every panel: as common values they would be spilled.
                    let x = if R > 1 { std::hint::black_box(x) } else { x };
                    for k in 0..4 {
                        for r in 0..R {
                            let factor = _mm512_set1_epi32(*x.add(r * s.x_stride + k));
                            acc[r][p] = _mm512_dpbf16_ps(acc[r][p], halves(weights[k]), halves(factor));
                        }
                    }
                }
                x = x.add(4);
            }
            cursor.pass(s.form, count);
            left -= count;
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(out.add(r * s.acc_stride + p * LANES), acc[r][p]);
            }
        }
    }
}
