//! Inputs as whole numbers of 16 bits, made once per row and product (`pair_row`).

use super::multiply::{Multiply, Words};
use crate::kernel::{Units, WholeInputs};
use crate::lanes::{LANES, Lanes};

/// How inputs become whole numbers.
///
/// # Safety
/// As for [`Multiply`].
pub(super) trait Narrow: Multiply {
    /// The nearest whole numbers of `x`, which are within 16 bits, to `out`; and what adds up to their sum.
    unsafe fn narrowed(x: Self::Floats, out: *mut i16) -> Self::Words;
    /// The sum of all words.
    unsafe fn sum(words: Self::Words) -> i32;
}

/// The least exponent, as floats store it, that a unit's largest input counts with: factors stay normal, and what is smaller
/// than anything that matters becomes zero.
const EXPONENT_MIN: u32 = 30;

/// Makes inputs whole numbers, unit by unit: `x = factor * number`, the factor being the smallest power of two by which the unit's largest is
/// within its bits.
///
/// # Safety
/// Pointers are valid for what the fields say, inputs are bf16 all, and the instructions exist.
#[inline(always)]
pub(super) unsafe fn inputs<M: Narrow>(w: &WholeInputs) {
    let (first, last) = w.octets;
    let unit = w.units.unit / 8;
    // SAFETY: the caller's.
    unsafe {
        let mut check = M::Floats::splat(0.0);
        let (mut octet, mut known) = (first, w.known);
        while octet < last {
            let end = last.min((octet | (unit - 1)) + 1);
            let at = (octet - first) * 8;
            one::<M>(&w.units, (octet, end), w.x.add(at), w.out.cast::<i16>().add(at), known, &mut check);
            (octet, known) = (end, known.add(w.units.words()));
        }
        // One unit's suffices: it is part of every sum.
        if check.total() != 0.0 {
            w.known.cast::<f32>().write(f32::NAN);
        }
    }
}

/// The inputs of octets `[from, to)`, of one unit; what is not a number makes `check` that too.
#[inline(always)]
unsafe fn one<M: Narrow>(
    units: &Units,
    (from, to): (usize, usize),
    x: *const f32,
    out: *mut i16,
    known: *mut i32,
    check: &mut M::Floats,
) {
    let n = (to - from) * 8;
    // SAFETY: the caller's inputs, and room for as many whole numbers and what is known of them.
    unsafe {
        let zero = M::Floats::splat(0.0);
        let mut largest = zero;
        for at in (0..n).step_by(LANES) {
            let x = M::Floats::load_first(x.add(at), n - at);
            largest = largest.at_least(x.at_least(zero.sub(x)));
            // Infinity and what is not a number times zero are not a number.
            *check = check.madd(x, zero);
        }
        let exponent = (largest.peak().to_bits() >> 23 & 0xff).max(EXPONENT_MIN) - (units.bits - 1);
        let (factor, inverse) = (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        known.cast::<f32>().write(factor);
        let shift = units.part_shift();
        let mut octet = from;
        while octet < to {
            let part = octet >> shift;
            let end = to.min((part + 1) << shift);
            let (first, n) = ((octet - from) * 8, (end - octet) * 8);
            let sum = narrowed::<M>(x.add(first), n, inverse, out.add(first));
            let known = known.add(1 + (part & (units.parts() - 1)));
            match units.zero {
                0 => known.cast::<f32>().write(sum as f32 * factor),
                zero => known.write(-zero * sum),
            }
            octet = end;
        }
    }
}

/// `n` inputs times `inverse`; returns the sum of these whole numbers.
#[inline(always)]
unsafe fn narrowed<M: Narrow>(x: *const f32, n: usize, inverse: f32, out: *mut i16) -> i32 {
    // SAFETY: the caller's inputs, and room for as many.
    unsafe {
        let mut sum = M::Words::splat(0);
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
            sum = sum.added(words);
        }
        M::sum(sum)
    }
}
