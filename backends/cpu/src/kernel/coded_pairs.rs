//! E4M3 as pairs of bf16, for products in tiles ([`super::tiles`]): decoded numbers are rounded to bf16.

use std::arch::x86_64::*;

use super::codes::{Cursor, Decode, E4M3, ahead, octet_of, scale_of};
use crate::lanes::avx512::Avx512;
use crate::lanes::{LANES, Lanes};

/// As [`Decode`] of E4M3, to `out[pair][16][2]` of bf16: a pair takes the place of a line of floats.
///
/// # Safety
/// Pointers are valid for what the fields say, and this machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn decode(d: &Decode<'_>) {
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
                for (at, pair) in pairs_of(chunk, octet % 4, scales).into_iter().enumerate() {
                    _mm512_storeu_si512(out.add(at * LANES).cast(), pair);
                }
                out = out.add(4 * LANES);
            }
        }
        cursor.pass(d.form, count);
        left -= count;
    }
}

/// The numbers of 8 inputs as four pairs.
#[inline(always)]
unsafe fn pairs_of(chunk: *const u8, octet: usize, (scale, offset): (Avx512, Avx512)) -> [__m512i; 4] {
    // SAFETY: the caller's chunk is of E4M3.
    unsafe {
        let v = octet_of::<Avx512, E4M3>(chunk, octet);
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
