//! What multiplies pairs of inputs by pairs of codes, 16 outputs at once: the vocabulary in which [`super`] is written.

use crate::lanes::Lanes;

/// One way to multiply. A pair of inputs is a word of 32 bits, the first in the lower half; so is a pair of codes.
///
/// # Safety
/// Methods may only be called where the instructions exist, and memory arguments must be valid for what each method names.
pub(super) trait Multiply {
    /// What sums of groups are scaled in.
    type Floats: Lanes;
    /// 16 words: pairs of codes, or sums.
    type Words: Copy;

    /// Whether inputs are whole numbers, which groups have factors for, and offsets sums.
    const WHOLE: bool;
    /// Rows of the first tile at most, by [`PANELS`](Self::PANELS) enough sums in flight, with registers left for taking codes
    /// apart: 8 or 4.
    const ROWS_FIRST: usize;
    /// Rows of another tile at most: 12 or 6.
    const ROWS_FOLLOWING: usize;
    /// Panels of a tile: 1 or 2.
    const PANELS: usize;

    unsafe fn zero() -> Self::Words;
    /// 16 words at `at`, a multiple of 64 bytes.
    unsafe fn load(at: *const f32) -> Self::Words;
    /// 16 words at `at`, a multiple of 64 bytes.
    unsafe fn store(words: Self::Words, at: *mut f32);
    /// Pair `pair` of the four of octet `octet` of a chunk of this code.
    unsafe fn pair<const CODE: usize>(chunk: *const u8, octet: usize, pair: usize) -> Self::Words;
    /// `sums` and the products of the pairs of `codes` by the pair `inputs`.
    unsafe fn add(sums: Self::Words, codes: Self::Words, inputs: i32) -> Self::Words;
    /// Sums as floats.
    unsafe fn floats(sums: Self::Words) -> Self::Floats;
    /// Runs a task as a function of its own: within a larger one its addresses would be spilled.
    unsafe fn apart<T: Task>(task: T);
}

/// See [`Multiply::apart`].
pub(super) trait Task {
    /// # Safety
    /// The instructions of the task's [`Multiply`] exist; the rest is the task's.
    unsafe fn run(self);
}
