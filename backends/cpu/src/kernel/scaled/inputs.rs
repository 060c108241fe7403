//! Inputs as whole numbers of 16 bits, made once per row and product (`pair_row`).

use super::multiply::Multiply;
use crate::kernel::{Group, WholeInputs};
use crate::lanes::{LANES, Lanes};

/// How inputs become whole numbers.
///
/// # Safety
/// As for [`Multiply`].
pub(super) trait Whole: Multiply {
    /// The nearest whole numbers of `x`, which are within 16 bits, to `out`; and what adds up to their sum.
    unsafe fn narrowed(x: Self::Floats, out: *mut i16) -> Self::Words;
}

/// The least exponent, as floats store it, that a group's largest input counts with: factors stay normal, and what is smaller
/// than anything that matters becomes zero.
const EXPONENT_MIN: u32 = 30;
/// A group's largest input, as bf16 are, becomes a whole number of so many bits and 1.
const BITS: u32 = 14;

/// Makes inputs whole numbers, group by group: `x = factor * number`, with the largest factor, a power of two, at which a group's
/// largest is exact.
///
/// # Safety
/// Pointers are valid for what the fields say, inputs are bf16 all, and the instructions exist.
#[inline(always)]
pub(super) unsafe fn inputs<M: Whole>(w: &WholeInputs) {
    let (first, last) = w.octets;
    // SAFETY: the caller's.
    unsafe {
        let number = numbers::<M>(w.x, (last - first) * 8);
        let (mut octet, mut groups) = (first, w.groups);
        while octet < last {
            let end = last.min((octet / w.group + 1) * w.group);
            let at = (octet - first) * 8;
            let mut group = group::<M>(w.x.add(at), (end - octet) * 8, w.out.cast::<i16>().add(at));
            if !number {
                group.factor = f32::NAN;
            }
            groups.write(group);
            (octet, groups) = (end, groups.add(1));
        }
    }
}

/// Whether `n` inputs are numbers all.
#[inline(always)]
unsafe fn numbers<M: Whole>(x: *const f32, n: usize) -> bool {
    // SAFETY: the caller's inputs.
    unsafe {
        let zero = M::Floats::splat(0.0);
        // Infinity and what is not a number times zero are not a number.
        let mut check = zero;
        for at in (0..n).step_by(LANES) {
            check = check.madd(M::Floats::load_first(x.add(at), n - at), zero);
        }
        check.total() == 0.0
    }
}

/// A group of `n` inputs.
#[inline(always)]
unsafe fn group<M: Whole>(x: *const f32, n: usize, out: *mut i16) -> Group {
    // SAFETY: the caller's inputs, and room for as many whole numbers.
    unsafe {
        let zero = M::Floats::splat(0.0);
        let mut largest = zero;
        for at in (0..n).step_by(LANES) {
            let x = M::Floats::load_first(x.add(at), n - at);
            largest = largest.at_least(x.at_least(zero.sub(x)));
        }
        let exponent = (largest.peak().to_bits() >> 23 & 0xff).max(EXPONENT_MIN) - BITS;
        let (factor, inverse) = (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        let mut sum = zero;
        for at in (0..n).step_by(LANES) {
            let x = M::Floats::load_first(x.add(at), n - at).mul(M::Floats::splat(inverse));
            let words = match n - at {
                LANES.. => M::narrowed(x, out.add(at)),
                left => {
                    let mut held = [0i16; LANES];
                    let words = M::narrowed(x, held.as_mut_ptr());
                    out.add(at).copy_from_nonoverlapping(held.as_ptr(), left);
                    words
                }
            };
            // Such small whole numbers add up exactly.
            sum = sum.add(M::floats(words));
        }
        Group { factor, sum: sum.total() * factor }
    }
}
