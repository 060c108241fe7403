//! What multiplies pairs of inputs by pairs of codes, 16 outputs at once: the vocabulary in which [`super`] is written.

use super::super::ahead::Ahead;
use super::Scaled;
use super::tile::{Sums, by_pairs};
use crate::lanes::Lanes;

/// One way to multiply. A pair of inputs is a word of 32 bits, the first in the lower half; so is a pair of codes.
///
/// # Safety
/// Methods may only be called where the instructions exist, and memory arguments must be valid for what each method names.
pub(super) trait Multiply {
    /// What sums of units are scaled in.
    type Floats: Lanes;
    /// 16 words: pairs of codes, or sums.
    type Words: Words;

    /// Whether inputs are whole numbers, of which something is known by unit.
    const WHOLE: bool;
    /// Rows of the first tile at most, by [`PANELS`](Self::PANELS) enough sums in flight, with registers left for taking codes
    /// apart: 8 or 4.
    const ROWS_FIRST: usize;
    /// Rows of another tile at most: 12 or 6.
    const ROWS_FOLLOWING: usize;
    /// Panels of a tile: 1 or 2.
    const PANELS: usize;

    /// Pair `pair` of the four of octet `octet` of a chunk of this code.
    unsafe fn pair<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> Self::Words;
    /// `sums` and the products of the pairs of `codes` by the pair `inputs`. `IN_TURN`: where this is written and not where the compiler
    /// thinks better, which some tiles of many rows and one panel leave with sums in memory.
    unsafe fn add<const IN_TURN: bool>(sums: Self::Words, codes: Self::Words, inputs: i32) -> Self::Words;
    /// Adds the octets of a chunk from octet `from` on, so many as are taken [`together`](super::unit::together), by the inputs at
    /// `x`, to the sums of a group, and asks for what lies behind them.
    #[inline(always)]
    unsafe fn octets<const CODE: usize, const SCALES: bool, const R: usize, const P: usize>(
        s: &Scaled<'_>,
        (chunk, from): (*const u8, usize),
        x: *const i32,
        ahead: Ahead,
        sums: &mut Sums<Self, R, P>,
    ) where
        Self: Sized,
    {
        // SAFETY: the caller's.
        unsafe { by_pairs::<Self, CODE, SCALES, R, P>(s, (chunk, from), x, ahead, sums) }
    }
    /// Sums as floats.
    unsafe fn floats(sums: Self::Words) -> Self::Floats;
    /// Runs a task as a function of its own: within a larger one its addresses would be spilled.
    unsafe fn apart<T: Task>(task: T);
}

/// 16 words of 32 bits, or as many pairs of halves.
///
/// # Safety
/// As for [`Multiply`].
pub(super) trait Words: Copy {
    /// The same word everywhere.
    unsafe fn splat(word: i32) -> Self;
    /// 16 words at `at`, a multiple of 64 bytes.
    unsafe fn load(at: *const f32) -> Self;
    /// 16 words at `at`, a multiple of 64 bytes.
    unsafe fn store(self, at: *mut f32);
    /// 16 signed bytes at `at`.
    unsafe fn bytes(at: *const u8) -> Self;
    /// The lower four bits of 16 bytes at `at`.
    unsafe fn four(at: *const u8) -> Self;
    /// As [`Lanes::load_six`].
    unsafe fn six(at: *const u8, n: usize) -> Self;
    /// Words, of 16 bits each, in both halves.
    unsafe fn twice(self) -> Self;
    /// The sums of words.
    unsafe fn added(self, other: Self) -> Self;
    /// The sums of words and the products of two more.
    unsafe fn plus(self, a: Self, b: Self) -> Self;
    /// Halves less those of `other`.
    unsafe fn halves_less(self, other: Self) -> Self;
    /// Halves times those of `other`.
    unsafe fn halves_times(self, other: Self) -> Self;
}

/// See [`Multiply::apart`].
pub(super) trait Task {
    /// # Safety
    /// The instructions of the task's [`Multiply`] exist; the rest is the task's.
    unsafe fn run(self);
}
