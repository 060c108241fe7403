//! Plain arrays, left to the compiler: what aarch64 and old x86 run.

use super::{E2M1, IQ4, LANES, Lanes, place_of, table_of, values};

/// Sixteen floats in memory order.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn each(self, f: impl Fn(f32) -> f32) -> Self {
        Portable(self.0.map(f))
    }

    #[inline(always)]
    fn pairs(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self.0;
        for (a, b) in out.iter_mut().zip(other.0) {
            *a = f(*a, b);
        }
        Portable(out)
    }

    #[inline(always)]
    fn fold(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut held = self.0;
        for half in [8, 4, 2, 1] {
            for at in 0..half {
                held[at] = f(held[at], held[at + half]);
            }
        }
        held[0]
    }
}

/// `c + a * b`: fused where that is one instruction, since a library call would be many.
#[inline(always)]
fn madd(c: f32, a: f32, b: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { c + a * b }
}

/// IEEE half to single, exactly, in operations that the compiler vectorises.
#[inline(always)]
fn widen_f16(half: u16) -> f32 {
    let (sign, rest) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff) << 13);
    // The exponents' biases differ by 112; an exponent of all ones stays so.
    let scaled = (f32::from_bits(rest) * f32::from_bits((127 + 112) << 23)).to_bits();
    let widened = if half & 0x7c00 == 0x7c00 { rest | 0x7f80_0000 } else { scaled };
    f32::from_bits(widened | sign)
}

// SAFETY (all blocks here): the caller gives memory for the elements that each method names.
impl Lanes for Portable {
    // 32 registers of 4 floats on aarch64, 16 on x86.
    const REGISTERS: usize = if cfg!(target_arch = "aarch64") { 7 } else { 4 };

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the impl.
        Portable(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the impl.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: see the impl.
        let halves = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Portable(halves.map(|half| f32::from_bits(u32::from(half) << 16)))
    }

    #[inline(always)]
    unsafe fn load_bf16_even(p: *const u16) -> Self {
        // SAFETY: see the impl.
        let words = unsafe { p.cast::<[u32; LANES]>().read_unaligned() };
        Portable(words.map(|word| f32::from_bits(word << 16)))
    }

    #[inline(always)]
    unsafe fn load_bf16_odd(p: *const u16) -> Self {
        // SAFETY: see the impl.
        let words = unsafe { p.cast::<[u32; LANES]>().read_unaligned() };
        Portable(words.map(|word| f32::from_bits(word & 0xffff_0000)))
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: see the impl.
        let halves = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Portable(halves.map(widen_f16))
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        // SAFETY: see the impl.
        Portable(unsafe { p.cast::<[u8; LANES]>().read() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: see the impl.
        Portable(unsafe { p.cast::<[i8; LANES]>().read() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_six(p: *const u8, n: usize) -> Self {
        // SAFETY: see the impl; three lines.
        let line = |at: usize| unsafe { p.cast::<[u32; LANES]>().add(at).read_unaligned() };
        let (low, high) = (line(n / 8), line(2));
        let number = |lane| (low[lane] >> (n % 8 * 4) & 15) | (high[lane] >> (n * 2) & 3) << 4;
        Portable(std::array::from_fn(|lane| number(lane) as f32))
    }

    #[inline(always)]
    unsafe fn load_four<const UPPER: bool>(p: *const u8) -> Self {
        // SAFETY: see the impl.
        let bytes = unsafe { p.cast::<[u8; LANES]>().read() };
        Portable(bytes.map(|byte| f32::from(if UPPER { byte >> 4 } else { byte & 15 })))
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: see the impl.
        let codes = unsafe { p.cast::<[u8; LANES]>().read() };
        Portable(codes.map(|code| widen_f16(u16::from(code & 128) << 8 | u16::from(code & 127) << 7)))
    }

    #[inline(always)]
    unsafe fn codes<const CODE: usize>(chunk: *const u8, octet: usize) -> [Self; 8] {
        // (bits of the low plane, bits of the high plane)
        let (own, more) = match CODE {
            2 => (2, 0),
            3 => (2, 1),
            4 | IQ4 | E2M1 => (4, 0),
            5 => (4, 1),
            _ => (4, 2),
        };
        // SAFETY: a chunk has the lines of its planes, of 16 words.
        let plane = |first: usize, bits: usize| unsafe {
            let line = chunk.cast::<[u32; LANES]>().add(first + octet * bits / 4).read_unaligned();
            line.map(|word| word >> (4 * bits * octet % 16))
        };
        let low = plane(0, own);
        let high = if more == 0 { [0; LANES] } else { plane(own, more) };
        std::array::from_fn(|k| {
            Portable(std::array::from_fn(|lane| {
                let low = low[lane] >> place_of(own, k) & ((1 << own) - 1);
                let high = high[lane] >> place_of(more, k) & ((1 << more) - 1);
                let code = low | high << own;
                match table_of(CODE) {
                    Some(_) => f32::from(const { values(CODE) }[code as usize]),
                    None => code as f32,
                }
            }))
        })
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        let halves = self.0.map(|x| (x.to_bits() >> 16) as u16);
        // SAFETY: see the impl.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(halves) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.pairs(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.pairs(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.pairs(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.pairs(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn madd(self, a: Self, b: Self) -> Self {
        let mut out = self.0;
        for (at, x) in out.iter_mut().enumerate() {
            *x = madd(*x, a.0[at], b.0[at]);
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        self.pairs(limit, |x, limit| if limit < x { limit } else { x })
    }

    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        self.pairs(limit, |x, limit| if limit > x { limit } else { x })
    }

    #[inline(always)]
    unsafe fn zero_below(self, limit: Self, other: Self) -> Self {
        let mut out = other.0;
        for (at, x) in out.iter_mut().enumerate() {
            *x = if self.0[at] < limit.0[at] { 0.0 } else { *x };
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn nearest(self) -> Self {
        // Adding 1.5 * 2^23 leaves no room for a fraction: right for |x| < 2^22, all that exp needs.
        self.each(|x| (x + 12_582_912.0) - 12_582_912.0)
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        self.each(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        self.each(|x| {
            let bits = x.to_bits();
            let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
            f32::from_bits(if x.is_nan() { bits | 0x40_0000 } else { nearest } & 0xffff_0000)
        })
    }

    #[inline(always)]
    unsafe fn only(self, from: usize, to: usize, other: f32) -> Self {
        let mut out = self.0;
        for (at, x) in out.iter_mut().enumerate() {
            *x = if at >= from && at < to { *x } else { other };
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        self.fold(|a, b| a + b)
    }

    #[inline(always)]
    unsafe fn peak(self) -> f32 {
        self.fold(|a, b| if b > a { b } else { a })
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[*const u8; LANES], words: usize, out: *mut u32) {
        for (lane, row) in rows.iter().enumerate() {
            for word in 0..words {
                // SAFETY: see the impl.
                unsafe { *out.add(word * LANES + lane) = row.cast::<u32>().add(word).read_unaligned() };
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}

    #[inline(always)]
    unsafe fn prefetch_far(_p: *const u8) {}
}
