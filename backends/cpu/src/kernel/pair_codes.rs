//! Codes of quantised weights as pairs of bf16, in registers: they are whole numbers (or E4M3), which are bf16 as they are.
//! Called by `scaled`.

use std::arch::x86_64::*;

use super::codes::{BYTES, E4M3};
use crate::lanes::avx512::{Avx512, line};
use crate::lanes::{LANES, Lanes};

/// What codes of up to 6 bits are as bf16.
#[derive(Clone, Copy)]
pub(super) struct Table(__m512i, __m512i);

impl Table {
    #[inline(always)]
    pub(super) unsafe fn new<const CODE: usize>() -> Self {
        let words: &'static [u16; 64] = const { &numbers(CODE) };
        // SAFETY: two times 32 words.
        unsafe {
            Table(
                _mm512_loadu_si512(words.as_ptr().cast()),
                _mm512_loadu_si512(words.as_ptr().add(32).cast()),
            )
        }
    }
}

/// The codes of `code` bits as bf16. An index has more bits than a code, which are ignored by repeating the numbers.
const fn numbers(code: usize) -> [u16; 64] {
    let mut words = [0; 64];
    let mut at = 0;
    while at < 64 {
        let number = if code <= 6 { at % (1 << code) } else { 0 };
        // Whole numbers of 7 bits have nothing in the lower half of a float.
        words[at] = ((number as f32).to_bits() >> 16) as u16;
        at += 1;
    }
    words
}

/// Every half moved down.
#[inline(always)]
unsafe fn down(words: __m512i, by: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe { _mm512_srlv_epi16(words, _mm512_set1_epi16(by as i16)) }
}

/// In every half the bit `from`, moved to `to`.
#[inline(always)]
unsafe fn moved(words: __m512i, from: usize, to: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        match from >= to {
            true => down(words, from - to),
            false => _mm512_sllv_epi16(words, _mm512_set1_epi16((to - from) as i16)),
        }
    }
}

/// Pair `pair` of the four of an octet: two inputs' codes of 16 outputs as bf16.
///
/// # Safety
/// `chunk` is of this code, `octet` and `pair` below 4, and the machine has AVX-512 BF16.
#[inline(always)]
pub(super) unsafe fn pair_of<const CODE: usize>(
    chunk: *const u8,
    octet: usize,
    pair: usize,
    table: Table,
) -> __m512i {
    /// Bits of the mask from the first, the others from the second.
    const SELECT: i32 = 0xca;
    // SAFETY: the caller's chunk is of this code.
    unsafe {
        match CODE {
            2 => {
                let low = down(line(chunk, octet / 2), 8 * (octet % 2) + 2 * pair);
                _mm512_permutexvar_epi16(low, table.0)
            }
            3 => {
                let low = down(line(chunk, octet / 2), 8 * (octet % 2) + 2 * pair);
                let high = moved(line(chunk, 2), 4 * octet + pair, 2);
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(3), low, high);
                _mm512_permutexvar_epi16(index, table.0)
            }
            4 => _mm512_permutexvar_epi16(down(line(chunk, octet), 4 * pair), table.0),
            5 => {
                let (low, high) =
                    (down(line(chunk, octet), 4 * pair), moved(line(chunk, 4), 4 * octet + pair, 4));
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(15), low, high);
                _mm512_permutexvar_epi16(index, table.0)
            }
            6 => {
                let high = moved(line(chunk, 4 + octet / 2), 8 * (octet % 2) + 2 * pair, 4);
                let low = down(line(chunk, octet), 4 * pair);
                let index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(15), low, high);
                _mm512_permutex2var_epi16(table.0, index, table.1)
            }
            _ => {
                // The upper halves of floats: such small numbers have nothing below.
                let (even, odd) = match CODE {
                    // Where inputs are: see [`super::ORDER`].
                    BYTES => (octet * 8 + pair % 2 * 4 + pair / 2, octet * 8 + pair % 2 * 4 + pair / 2 + 2),
                    _ => (octet * 8 + 2 * pair, octet * 8 + 2 * pair + 1),
                };
                let (even, odd) = (number::<CODE>(chunk, even), number::<CODE>(chunk, odd));
                let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                _mm512_ternarylogic_epi32::<SELECT>(upper, odd, _mm512_srli_epi32::<16>(even))
            }
        }
    }
}

/// Line `n` of codes of 8 bits as floats.
#[inline(always)]
unsafe fn number<const CODE: usize>(chunk: *const u8, n: usize) -> __m512i {
    // SAFETY: the caller's chunk has this line.
    unsafe {
        let at = chunk.add(n * LANES);
        let number = if CODE == E4M3 { Avx512::load_e4m3(at) } else { Avx512::load_u8(at) };
        _mm512_castps_si512(number.0)
    }
}
