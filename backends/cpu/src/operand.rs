//! Rows of an activation as products take them: floats, and beside them what the level and the weight want, pairs of bf16 or of
//! whole numbers, or whole numbers of 8 bits. Made once per product (`step`, `moe`); every task reads its rows and range.

use std::ptr;

use crate::act::{CpuAct, Raw};
use crate::kernel::{BLOCK, BLOCK_FLOATS, Eighths, Units};
use crate::packed::Packed;
use crate::pair_row::PairRow;
use crate::step::CpuStep;

/// Rows of an activation in other forms than floats.
pub(crate) struct Operands {
    pairs: Option<CpuAct>,
    bytes: Option<CpuAct>,
}

impl Operands {
    /// All rows for products with `weight`: the one that they were made for, or one of the same shape and formats.
    pub(crate) fn of<'a>(&'a self, x: &'a CpuAct, weight: &'a Packed) -> Operand<'a> {
        Operand {
            weight,
            x: x.floats.as_ptr(),
            pairs: self.pairs.as_ref().map(|act| act.floats.as_ptr().cast()),
            bytes: self.bytes.as_ref().map(|act| act.floats.as_ptr().cast()),
        }
    }
}

/// Addresses of rows that `weight` is multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) weight: &'a Packed,
    x: *const f32,
    pairs: Option<*const i32>,
    bytes: Option<*const Eighths>,
}

/// What a sum over a range of inputs multiplies: rows that begin at the first of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs<'a> {
    /// `[rows][input]`, rows `stride` apart.
    pub(crate) x: *const f32,
    pub(crate) stride: usize,
    /// The same as pairs, where the level wants them and the values are bf16.
    pub(crate) pairs: Option<PairInputs<'a>>,
    /// The same in 8 bits, rows so many blocks apart, where they are asked for.
    pub(crate) bytes: Option<(*const Eighths, usize)>,
}

/// Rows of pairs, for the inputs of one range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairInputs<'a> {
    start: *const i32,
    row: &'a PairRow,
    range: usize,
}

/// What a product of codes takes of a row, for the inputs of one range: see [`crate::kernel::Scaled`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodedRow {
    pub(crate) pairs: *const i32,
    /// Null where the level does not take them.
    pub(crate) bytes: *const u8,
    pub(crate) bytes_range: usize,
    pub(crate) known: *const i32,
    pub(crate) known_range: usize,
}

impl PairInputs<'_> {
    /// The same rows' inputs of another range.
    pub(crate) fn of(self, range: usize) -> Self {
        PairInputs { range, ..self }
    }

    /// The first row's pairs of bf16.
    pub(crate) fn x(&self) -> *const i32 {
        self.start.wrapping_add(self.row.pairs(self.range))
    }

    /// Words from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.row.stride
    }

    /// The first row's pairs of bf16, of which nothing more is known.
    pub(crate) fn bf16(&self) -> CodedRow {
        let (bytes, known) = (ptr::null(), ptr::null());
        CodedRow { pairs: self.x(), bytes, bytes_range: 0, known, known_range: 0 }
    }

    /// The first row's whole numbers in such units.
    pub(crate) fn whole(&self, units: &Units) -> Option<CodedRow> {
        let (set, range) = (self.row.whole(units)?, self.range);
        Some(CodedRow {
            pairs: self.start.wrapping_add(set.pairs_of(range)),
            bytes: set.bytes_of(range).map_or(ptr::null(), |bytes| self.start.wrapping_add(bytes).cast()),
            bytes_range: set.bytes_range(),
            known: self.start.wrapping_add(set.known_of(range)),
            known_range: set.known_range,
        })
    }
}

impl<'a> Operand<'a> {
    /// Whether these are whole numbers of 16 bits, for some of the weight's segments at least.
    pub(crate) fn is_whole(&self) -> bool {
        self.pairs.is_some() && self.weight.pair_row.has_whole()
    }

    /// Rows from `row` on.
    pub(crate) fn rows_from(self, row: usize) -> Self {
        let Operand { weight, x, pairs, bytes } = self;
        Operand {
            weight,
            x: x.wrapping_add(row * weight.inputs),
            pairs: pairs.map(|at| at.wrapping_add(row * weight.pair_row.stride)),
            bytes: bytes.map(|at| at.wrapping_add(row * blocks(weight))),
        }
    }

    /// The inputs of range `range`.
    pub(crate) fn inputs(self, range: usize) -> Inputs<'a> {
        let Operand { weight, x, pairs, bytes } = self;
        let first = range * weight.range_inputs();
        Inputs {
            x: x.wrapping_add(first),
            stride: weight.inputs,
            pairs: pairs.map(|start| PairInputs { start, row: &weight.pair_row, range }),
            bytes: bytes.map(|at| (at.wrapping_add(first / BLOCK), blocks(weight))),
        }
    }
}

/// Blocks of a row in 8 bits.
fn blocks(weight: &Packed) -> usize {
    weight.inputs / BLOCK
}

impl CpuStep<'_> {
    /// Rows of `x`, rounded already, in the forms that the level and the settings have for `weight`.
    pub(crate) fn operands(&self, x: &CpuAct, weight: &Packed) -> Operands {
        Operands { pairs: self.pairs(x, weight), bytes: self.bytes(x, weight) }
    }

    fn pairs(&self, x: &CpuAct, weight: &Packed) -> Option<CpuAct> {
        let kernels = self.device.kernels;
        let width = weight.pair_row.stride;
        (self.device.bf16() && width > 0).then(|| {
            let mut pairs = self.act(x.rows, width);
            let (from, to) = (x.floats.as_slice(), Raw(pairs.floats.as_mut_ptr()));
            self.each_row(x.rows, x.width, |row| {
                // SAFETY: the row's floats, and room for its pairs, which only this task writes.
                unsafe {
                    let x = from[row * x.width..].as_ptr();
                    weight.pair_row.fill(kernels, x, to.row(row, width).cast());
                };
            });
            pairs
        })
    }

    fn bytes(&self, x: &CpuAct, weight: &Packed) -> Option<CpuAct> {
        let kernels = self.device.kernels;
        (self.device.int8() && weight.has_bytes()).then(|| {
            let blocks = blocks(weight);
            let width = blocks * BLOCK_FLOATS;
            let mut bytes = self.act(x.rows, width);
            let (from, to) = (x.floats.as_slice(), Raw(bytes.floats.as_mut_ptr()));
            self.each_row(x.rows, x.width, |row| {
                // SAFETY: the row's floats, and room for its blocks, which only this task writes.
                unsafe {
                    let to = to.row(row, width).cast();
                    (kernels.quantise)(from[row * x.width..].as_ptr(), blocks, to);
                };
            });
            bytes
        })
    }
}
