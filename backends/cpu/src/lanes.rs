//! Sixteen floats at a time: the vocabulary in which every kernel is written once. One implementation per instruction
//! level; results may differ between levels (fused or not), never within one.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

use backend::CodeTable;

/// Floats of a [`Lanes`].
pub(crate) const LANES: usize = 16;

/// Where the `bits` of input `k` of eight begin in a word of a plane of [`crate::coded`], from the first input's on.
pub(crate) const fn place_of(bits: usize, k: usize) -> usize {
    k % 2 * 16 + k / 2 * bits
}

/// E4M3 in the places of an IEEE half is smaller by this: the exponents' biases differ by 8.
pub(crate) const E4M3_FACTOR: f32 = 1.0 / 256.0;

/// Codes of planes that are no numbers of so many bits, as constants: four bits that stand for the values of a table.
pub(crate) const IQ4: usize = 10;
pub(crate) const E2M1: usize = 11;

/// The table of such a code.
pub(crate) const fn table_of(code: usize) -> Option<CodeTable> {
    match code {
        IQ4 => Some(CodeTable::Iq4),
        E2M1 => Some(CodeTable::E2m1),
        _ => None,
    }
}

/// What four bits of `code` stand for, from its zero on; themselves where it has no table.
pub(crate) const fn values(code: usize) -> [u8; 16] {
    let mut values = [0; 16];
    let mut four = 0;
    while four < 16 {
        values[four as usize] = match table_of(code) {
            Some(table) => table.shifted(four),
            None => four,
        };
        four += 1;
    }
    values
}

/// Sixteen `f32`. Pointers need no alignment.
///
/// # Safety
/// Methods may only be called where the level's instructions exist, and memory arguments must be valid for the elements
/// named at each method.
pub(crate) trait Lanes: Copy {
    /// How many values of this type the registers hold besides a product's factors; chooses its tiles.
    const REGISTERS: usize;

    unsafe fn splat(x: f32) -> Self;
    /// 16 floats at `p`.
    unsafe fn load(p: *const f32) -> Self;
    /// 16 floats at `p`.
    unsafe fn store(self, p: *mut f32);
    /// 16 bf16 at `p`.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// The first of each of 16 pairs of bf16 at `p`.
    unsafe fn load_bf16_even(p: *const u16) -> Self;
    /// The second of each of 16 pairs of bf16 at `p`.
    unsafe fn load_bf16_odd(p: *const u16) -> Self;
    /// 16 IEEE halves at `p`.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// 16 unsigned bytes at `p`, as whole numbers.
    unsafe fn load_u8(p: *const u8) -> Self;
    /// 16 signed bytes at `p`, as whole numbers.
    unsafe fn load_i8(p: *const u8) -> Self;
    /// Number `n` of the 16 of six bits at `p`, three lines: a line of four bits of the first eight, one of the others, and a line
    /// of two bits of all, lowest first.
    unsafe fn load_six(p: *const u8, n: usize) -> Self;
    /// The lower or upper four bits of 16 bytes at `p`, as whole numbers.
    unsafe fn load_four<const UPPER: bool>(p: *const u8) -> Self;
    /// 16 E4M3 at `p`, each times [`E4M3_FACTOR`]; not-a-number comes out as a number.
    unsafe fn load_e4m3(p: *const u8) -> Self;
    /// Codes of `CODE` (2 to 6 bits, or of a table) at 8 consecutive inputs, as whole numbers: those of eighth `octet` of the 32
    /// inputs at `chunk`, in the planes of [`crate::coded`].
    unsafe fn codes<const CODE: usize>(chunk: *const u8, octet: usize) -> [Self; 8];
    /// The upper halves to 16 bf16 at `p`: exact for values that are bf16 already.
    unsafe fn store_bf16(self, p: *mut u16);

    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self + a * b`, fused where the level has it.
    unsafe fn madd(self, a: Self, b: Self) -> Self;
    /// The smaller; `self` where it is not a number.
    unsafe fn at_most(self, limit: Self) -> Self;
    /// The larger; `self` where it is not a number.
    unsafe fn at_least(self, limit: Self) -> Self;
    /// Zero where `self < limit`, else `other`.
    unsafe fn zero_below(self, limit: Self, other: Self) -> Self;
    /// The nearest whole number, ties to even.
    unsafe fn nearest(self) -> Self;
    /// `2^self` for whole numbers in `[-126, 127]`.
    unsafe fn power_of_two(self) -> Self;
    /// Rounded to bf16, nearest even; not-a-number stays so.
    unsafe fn round_bf16(self) -> Self;
    /// Lanes outside `[from, to)` replaced by `other`.
    unsafe fn only(self, from: usize, to: usize, other: f32) -> Self;
    /// The sum, as a tree of halves.
    unsafe fn total(self) -> f32;
    /// The largest lane.
    unsafe fn peak(self) -> f32;
    /// Words `[0, words)` of 16 rows, `out[word * 16 + row]`.
    unsafe fn transpose(rows: &[*const u8; LANES], words: usize, out: *mut u32);
    /// Brings the cache line at `p` near; any address will do.
    unsafe fn prefetch(p: *const u8);
    /// The same, as near as the second cache: more of these are on their way at once.
    unsafe fn prefetch_far(p: *const u8);

    /// The first `n <= 16` floats at `p`, zeros after.
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        if n >= LANES {
            // SAFETY: n floats at p are the caller's.
            return unsafe { Self::load(p) };
        }
        let mut held = [0.0f32; LANES];
        // SAFETY: n floats at p are the caller's, and n < 16.
        unsafe {
            std::ptr::copy_nonoverlapping(p, held.as_mut_ptr(), n);
            Self::load(held.as_ptr())
        }
    }

    /// The first `n <= 16` lanes to `p`.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        // SAFETY: n floats at p are the caller's.
        unsafe {
            if n >= LANES {
                return self.store(p);
            }
            let mut held = [0.0f32; LANES];
            self.store(held.as_mut_ptr());
            std::ptr::copy_nonoverlapping(held.as_ptr(), p, n);
        }
    }

    /// `e^self`, within 2 units in the last place of the result for arguments in `[-87, 88]`; 0 below, at most e^88.02
    /// above. Source: Cephes expf.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: register arithmetic of this level.
        unsafe {
            let x = self.at_most(Self::splat(88.02)).at_least(Self::splat(-87.33));
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).nearest();
            // x - n ln 2, the logarithm in two parts so that the first product is exact
            let r = x.madd(n, Self::splat(-0.693_359_4)).madd(n, Self::splat(2.121_944_4e-4));
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::splat(c).madd(p, r);
            }
            let e = Self::splat(1.0).add(r.madd(p, r.mul(r)));
            self.zero_below(Self::splat(-87.33), e.mul(n.power_of_two()))
        }
    }

    /// `2^self`, within 2 units in the last place of the result for arguments in `[-126, 127]`; 0 below.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: register arithmetic of this level.
        unsafe {
            let n = self.at_least(Self::splat(-126.0)).nearest();
            let e = self.at_least(Self::splat(-126.0)).sub(n).exp2_of_half();
            self.zero_below(Self::splat(-126.0), e.mul(n.power_of_two()))
        }
    }

    /// `2^self` in `[-1/2, 1/2]`: 1 and a polynomial of degree 6 without a constant, near the best there is.
    #[inline(always)]
    unsafe fn exp2_of_half(self) -> Self {
        // SAFETY: register arithmetic of this level.
        unsafe {
            let mut p = Self::splat(1.545_316_3e-4);
            for c in [1.339_086_3e-3, 9.618_083e-3, 5.550_357e-2, 2.402_265e-1, 6.931_472e-1, 1.0] {
                p = Self::splat(c).madd(p, self);
            }
            p
        }
    }

    /// `self`, rounded to bf16 when asked.
    #[inline(always)]
    unsafe fn rounded(self, bf16: bool) -> Self {
        // SAFETY: register arithmetic of this level.
        if bf16 { unsafe { self.round_bf16() } } else { self }
    }
}
