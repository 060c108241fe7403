//! Whole numbers of 16 bits by AVX-512 VNNI. Codes come out of their planes by a shift and a mask.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::ahead::Ahead;
use super::super::bytes::ORDER;
use super::super::bytes_vnni::octet_of;
use super::super::codes::{BYTES, plane_bits};
use super::inputs::Narrow;
use super::multiply::{Multiply, Task, Words};
use super::tile::{Sums, by_pairs};
use super::unit::together;
use super::{Scaled, each_row};
use crate::lanes::avx512::{Avx512, four, line, six};
use crate::lanes::{E2M1, IQ4, LANES, values};

/// Pairs of whole numbers; sums are whole too.
pub(super) struct WordsVnni;

// SAFETY (all blocks here): the product runs only where AVX-512 VNNI and VBMI were detected, and the caller gives memory as each
// method says.
impl Multiply for WordsVnni {
    type Floats = Avx512;
    type Words = __m512i;

    const WHOLE: bool = true;
    const ROWS_FIRST: usize = 8;
    const ROWS_FOLLOWING: usize = 12;
    const PANELS: usize = 2;

    #[inline(always)]
    unsafe fn pair<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> __m512i {
        // SAFETY: see the impl.
        unsafe {
            // Where a pair's bits begin in planes of 2, 1 and 4 bits.
            let (two, one, four) = (8 * (octet % 2) + 2 * pair, 4 * octet + pair, 4 * pair);
            match CODE {
                2 => and(moved(line(chunk, octet / 2), two, 0), 3),
                3 => {
                    let low = moved(line(chunk, octet / 2), two, 0);
                    joined(low, 3, moved(line(chunk, 2), one, 2), 7)
                }
                // The last four bits have nothing above.
                4 if pair == 3 => moved(line(chunk, octet), 12, 0),
                // A permutation of 32 halves does not look at what is above five bits.
                IQ4 | E2M1 => {
                    let table: &'static [u16; 32] = const { &halves(CODE) };
                    let table = _mm512_loadu_si512(table.as_ptr().cast());
                    _mm512_permutexvar_epi16(moved(line(chunk, octet), four, 0), table)
                }
                4 => and(moved(line(chunk, octet), four, 0), 15),
                5 => joined(moved(line(chunk, octet), four, 0), 15, moved(line(chunk, 4), one, 4), 31),
                6 => {
                    let high = moved(line(chunk, 4 + octet / 2), two, 4);
                    joined(moved(line(chunk, octet), four, 0), 15, high, 63)
                }
                _ => {
                    debug_assert!(const { CODE <= BYTES });
                    let bytes: &'static [[u8; 64]; 2] = const { &[bytes(0), bytes(1)] };
                    let control = _mm512_loadu_si512(bytes[pair / 2].as_ptr().cast());
                    let words = line(chunk, 2 * octet + pair % 2);
                    _mm512_maskz_permutexvar_epi8(0x5555_5555_5555_5555, control, words)
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add<const IN_TURN: bool>(sums: __m512i, codes: __m512i, inputs: i32) -> __m512i {
        // SAFETY: see the impl.
        unsafe { add_products::<IN_TURN>(sums, codes, _mm512_set1_epi32(inputs)) }
    }

    /// Codes come out of planes as bytes in half the time, which counts while rows are very few: inputs are parted into their upper and
    /// lower bytes then, and those sums joined.
    #[inline(always)]
    unsafe fn octets<const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
        s: &Scaled<'_>,
        (chunk, from): (*const u8, usize),
        x: *const i32,
        ahead: Ahead,
        sums: &mut Sums<Self, R, P>,
    ) {
        // SAFETY: see the impl.
        unsafe {
            // Codes count as bytes with a sign, too.
            if const { plane_bits(CODE) == 0 || CODE == IQ4 || R > 2 } {
                return by_pairs::<Self, CODE, SCALES, R, P>(s, (chunk, from), x, ahead, sums);
            }
            let mut parted = MaybeUninit::<[Parted; R]>::uninit();
            let parted = parted.as_mut_ptr().cast::<i32>();
            let mut upper = [[_mm512_setzero_si512(); P]; R];
            each_row!(R, r => {
                part::<CODE, SCALES>(s.row_of(x, r), parted.add(r * 16));
            });
            // What was stored is loaded: the compiler would take it out of registers, word by word.
            asm!("/* {0} */", in(reg) parted, options(nostack, preserves_flags));
            each_row!(const { together(CODE, SCALES) }, octet => {
                ahead.ask_octet::<Avx512, CODE, P>(s.panel_bytes, chunk, from + octet);
                let mut codes = [[_mm512_setzero_si512(); 2]; P];
                for (p, codes) in codes.iter_mut().enumerate() {
                    *codes = octet_of::<CODE>(chunk.add(p * s.panel_bytes), from + octet);
                }
                each_row!(R, r => {
                    let parted = parted.add(r * 16 + octet * 4);
                    each_row!(2, half => {
                        let above = _mm512_set1_epi32(*parted.add(2 * half));
                        let below = _mm512_set1_epi32(*parted.add(2 * half + 1));
                        for p in 0..P {
                            upper[r][p] = _mm512_dpbusd_epi32(upper[r][p], codes[p][half], above);
                            sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], below, codes[p][half]);
                        }
                    }; 0 1);
                });
            }; 0 1 2 3);
            each_row!(R, r => {
                for p in 0..P {
                    sums[r][p] = _mm512_add_epi32(sums[r][p], _mm512_slli_epi32::<8>(upper[r][p]));
                }
            });
        }
    }

    #[inline(always)]
    unsafe fn floats(sums: __m512i) -> Avx512 {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_cvtepi32_ps(sums) })
    }

    #[inline(always)]
    unsafe fn apart<T: Task>(task: T) {
        // SAFETY: see the impl.
        unsafe { apart(task) }
    }
}

// SAFETY (all blocks here): as above; these are instructions of AVX-512 BW.
impl Words for __m512i {
    #[inline(always)]
    unsafe fn splat(word: i32) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_set1_epi32(word) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_load_si512(at.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm512_store_si512(at.cast(), self) }
    }

    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())) }
    }

    #[inline(always)]
    unsafe fn four(at: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { four::<false>(at) }
    }

    #[inline(always)]
    unsafe fn six(at: *const u8, n: usize) -> Self {
        // SAFETY: see the impl.
        unsafe { six(at, n) }
    }

    #[inline(always)]
    unsafe fn twice(self) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_mask_blend_epi16(0xaaaa_aaaa, self, _mm512_slli_epi32::<16>(self)) }
    }

    #[inline(always)]
    unsafe fn added(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn plus(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_add_epi32(self, _mm512_mullo_epi32(a, b)) }
    }

    #[inline(always)]
    unsafe fn halves_less(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_sub_epi16(self, other) }
    }

    #[inline(always)]
    unsafe fn halves_times(self, other: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { _mm512_mullo_epi16(self, other) }
    }
}

impl Narrow for WordsVnni {
    #[inline(always)]
    unsafe fn narrowed(x: Avx512, out: *mut i16) -> __m512i {
        // SAFETY: see the other impl.
        unsafe {
            let words = _mm512_cvtps_epi32(x.0);
            _mm256_storeu_si256(out.cast(), _mm512_cvtsepi32_epi16(words));
            words
        }
    }

    #[inline(always)]
    unsafe fn sum(words: __m512i) -> i32 {
        // SAFETY: see the other impl.
        unsafe { _mm512_reduce_add_epi32(words) }
    }
}

/// The inputs of 32 codes: for each octet, four by four as [`octet_of`] has them, their upper bytes and their lower bytes.
#[repr(C, align(64))]
struct Parted([i32; 16]);

/// Parts the inputs of a chunk, or of half of one.
#[inline(always)]
unsafe fn part<const CODE: usize, const SCALES: bool>(x: *const i32, out: *mut i32) {
    const PLACES: [u8; 64] = {
        let mut bytes = [0; 64];
        let mut at = 0;
        while at < 64 {
            let (word, input) = (at % 16 / 4, ORDER[at % 16 / 8 * 4 + at % 4]);
            bytes[at] = (2 * input + (word + 1) % 2) as u8;
            at += 1;
        }
        bytes
    };
    // SAFETY: the caller's inputs, and room for as many.
    unsafe {
        match const { together(CODE, SCALES) == 2 } {
            true => {
                let parted = _mm256_shuffle_epi8(
                    _mm256_loadu_si256(x.cast()),
                    _mm256_loadu_si256(PLACES.as_ptr().cast()),
                );
                _mm256_store_si256(out.cast(), parted);
            }
            false => {
                let parted = _mm512_shuffle_epi8(
                    _mm512_loadu_si512(x.cast()),
                    _mm512_loadu_si512(PLACES.as_ptr().cast()),
                );
                _mm512_store_si512(out.cast(), parted);
            }
        }
    }
}

/// `sums` and the products of pairs. The compiler makes two instructions of the intrinsic, which are as quick one after the other but
/// take as long again where many sums are in flight.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products<const IN_TURN: bool>(mut sums: __m512i, codes: __m512i, inputs: __m512i) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        match IN_TURN {
            true => asm!(
                "vpdpwssd {sums}, {codes}, {inputs}",
                sums = inout(zmm_reg) sums,
                codes = in(zmm_reg) codes,
                inputs = in(zmm_reg) inputs,
                options(nomem, nostack, preserves_flags),
            ),
            false => asm!(
                "vpdpwssd {sums}, {codes}, {inputs}",
                sums = inout(zmm_reg) sums,
                codes = in(zmm_reg) codes,
                inputs = in(zmm_reg) inputs,
                options(pure, nomem, nostack, preserves_flags),
            ),
        }
    }
    sums
}

/// # Safety
/// This machine has AVX-512 VNNI and VBMI; the rest is the task's.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn apart<T: Task>(task: T) {
    // SAFETY: the caller's.
    unsafe { task.run() }
}

/// In every half the bits from `from` on, moved to `to`.
#[inline(always)]
unsafe fn moved(words: __m512i, from: usize, to: usize) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe {
        match from >= to {
            true => _mm512_srlv_epi16(words, _mm512_set1_epi16((from - to) as i16)),
            false => _mm512_sllv_epi16(words, _mm512_set1_epi16((to - from) as i16)),
        }
    }
}

/// The bits of `mask` in every half.
#[inline(always)]
unsafe fn and(words: __m512i, mask: i16) -> __m512i {
    // SAFETY: register arithmetic of this level.
    unsafe { _mm512_and_si512(words, _mm512_set1_epi16(mask)) }
}

/// Of every half the bits of `mask` from `low`, and those of `code` above from `high`.
#[inline(always)]
unsafe fn joined(low: __m512i, mask: i16, high: __m512i, code: i16) -> __m512i {
    /// Bits of the mask from the first, the others from the second.
    const SELECT: i32 = 0xca;
    // SAFETY: register arithmetic of this level.
    unsafe { and(_mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi16(mask), low, high), code) }
}

/// Which byte of four lines, each of 16 outputs, is the lower one of every half, for lines `first` and `first + 2`; see
/// [`super::super::ORDER`].
const fn bytes(first: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut at = 0;
    while at < 64 {
        out[at] = ((first + at / 2 % 2 * 2) * LANES + at / 4) as u8;
        at += 1;
    }
    out
}

/// [`values`] as halves, twice.
const fn halves(code: usize) -> [u16; 32] {
    let (values, mut out) = (values(code), [0; 32]);
    let mut at = 0;
    while at < 32 {
        out[at] = values[at % 16] as u16;
        at += 1;
    }
    out
}
