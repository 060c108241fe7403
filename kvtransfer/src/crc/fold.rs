//! CRC32C by carry-less multiplication, 256 bytes at a time: several times as fast as the processor's own CRC instructions where
//! the bytes are in a cache, and no slower than memory where they are not. Used by [`super::append`] where the processor has it.
//!
//! A message is a polynomial, its checksum what is left of it modulo P. Four registers of four lanes of 128 bits hold what has come so
//! far; 2048 bits further on, a lane's halves are worth x^2112 and x^2048 times as much, modulo P, and are added to what is there. In
//! the end 256 bytes are left that have the same checksum as everything before.

use std::arch::x86_64::_mm_cvtsi32_si128;
use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_clmulepi64_epi128, _mm512_loadu_si512, _mm512_set_epi64,
    _mm512_storeu_si512, _mm512_ternarylogic_epi64, _mm512_xor_si512, _mm512_zextsi128_si512,
};

/// Bytes of a round.
pub(super) const ROUND: usize = 256;

/// Asked of memory so far ahead: what a processor fetches by itself ends at every page.
const AHEAD: usize = 2048;

/// P without x^32, the highest power in the lowest bit, as everything here.
const P: u32 = 0x82f6_3b78;

/// x^`power` modulo P, as the high half of 64 bits.
const fn x_to(power: u32) -> i64 {
    let mut value = 1u32 << 31;
    let mut left = power;
    while left > 0 {
        value = if value & 1 == 1 { value >> 1 ^ P } else { value >> 1 };
        left -= 1;
    }
    ((value as u64) << 32) as i64
}

/// A lane's first half times x^(2048 + 64), its second one times x^2048. A product of two 64-bit halves comes out with one power
/// more than their own, which the factors leave out.
const FIRST: i64 = x_to(2048 + 64 - 1);
const SECOND: i64 = x_to(2048 - 1);

/// Whether this processor can.
pub(super) fn can() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("pclmulqdq")
}

/// The checksum of what `crc` is of, followed by `bytes`: whole rounds, at least one.
#[target_feature(enable = "avx512f,vpclmulqdq,pclmulqdq")]
pub(super) fn append(crc: u32, bytes: &[u8]) -> u32 {
    let load = |round: &[u8; ROUND], at: usize| {
        // SAFETY: 64 of the round's bytes, of any alignment.
        unsafe { _mm512_loadu_si512(round.as_ptr().add(64 * at).cast()) }
    };
    let (rounds, _) = bytes.as_chunks::<ROUND>();
    let Some((first, rounds)) = rounds.split_first() else { return crc };
    let factors = _mm512_set_epi64(SECOND, FIRST, SECOND, FIRST, SECOND, FIRST, SECOND, FIRST);
    let further = |sum: __m512i, next: __m512i| {
        let first = _mm512_clmulepi64_epi128::<0x00>(sum, factors);
        let second = _mm512_clmulepi64_epi128::<0x11>(sum, factors);
        _mm512_ternarylogic_epi64::<0x96>(first, second, next)
    };
    let before = _mm512_zextsi128_si512(_mm_cvtsi32_si128(!crc as i32));
    let mut sums = [_mm512_xor_si512(load(first, 0), before), load(first, 1), load(first, 2), load(first, 3)];
    for round in rounds {
        for (at, sum) in sums.iter_mut().enumerate() {
            // Touches nothing, wherever it points.
            _mm_prefetch::<_MM_HINT_T0>(round.as_ptr().wrapping_add(AHEAD + 64 * at).cast());
            *sum = further(*sum, load(round, at));
        }
    }
    let mut left = [0u8; ROUND];
    for (at, sum) in sums.iter().enumerate() {
        // SAFETY: 64 of the buffer's bytes, of any alignment.
        unsafe { _mm512_storeu_si512(left.as_mut_ptr().add(64 * at).cast(), *sum) };
    }
    // Begins with what an empty sum is before its bits are turned.
    crc32c::crc32c_append(!0, &left)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: both ends compute the same, whatever their processors can.
    #[test]
    fn it_is_the_checksum_that_others_compute() {
        if !can() {
            eprintln!("no carry-less multiplication here: nothing was tested");
            return;
        }
        let bytes: Vec<u8> =
            (0..8 * ROUND as u32 + 64).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for start in [0, 1, 17, 63] {
            for rounds in 1..=8 {
                for crc in [0, !0, 0x1234_5678] {
                    let part = &bytes[start..start + rounds * ROUND];
                    // SAFETY: the processor can.
                    let got = unsafe { append(crc, part) };
                    assert_eq!(
                        got,
                        crc32c::crc32c_append(crc, part),
                        "{rounds} rounds from {start} after {crc:#x}"
                    );
                }
            }
        }
    }
}
