//! Quantised matrices as the kernels read them: panels of 16 outputs, K-major, codes and scales as small as in the
//! checkpoint. A panel is a row of blocks ([`Form`]); a block is the scales of its groups, 16 lanes each, and then the
//! codes of 32 inputs after 32. Codes of 8 bits are lines of 16 bytes (whole numbers in an order by eight, so that four
//! lines are what a product of bytes takes). Codes of 2 to 6 bits are planes of 16 words, one per output: a plane holds
//! 4, 2 or 1 bits of consecutive inputs, the even ones in a word's lower half and the odd ones in its upper half, lowest
//! first, so that a shift brings 16 outputs of an input, or of a pair, in place:
//!
//! ```text
//! bits   lines of 32 inputs
//! 4      4 x [16] words of 8 inputs x 4 bits
//! 2      2 x [16] words of 16 inputs x 2 bits
//! 3      those of 2, then 1 x [16] words of 32 inputs x 1 bit (the highest)
//! 5      those of 4, then 1 x [16] words of 32 inputs x 1 bit
//! 6      those of 4, then 2 x [16] words of 16 inputs x 2 bits
//! ```
//!
//! Four bits may stand for the values of a table (IQ4, E2M1), which takes a permutation where codes come out of their planes; from there
//! on those are codes of 8 or 5 bits that count from a zero.
//!
//! A product of many rows decodes some inputs of some panels into the first cache and runs the ordinary kernel over them;
//! one of few rows decodes in registers. Both sum the decoded numbers in ascending K, so a row's bits are the same. Decoded
//! numbers are f32. Where the level multiplies pairs, and the step is of bf16, codes are multiplied as they are and a group's
//! sum is scaled; only E4M3, for tiles of AMX, is decoded to numbers rounded to bf16.

mod pack;

use std::ops::Range;

use backend::QuantView;

use crate::kernel::{
    BLOCK, Bytes, CodedPairs, Decode, Eighths, Form, Kernels, Layout, PairKernels, Pairs, Scaled, Stream,
    Stretch, Sweep,
};
use crate::lanes::LANES;
use crate::memory::Place;
use crate::operand::PairInputs;
use crate::pair_row::PairKind;

/// Inputs of a chunk of codes.
const CHUNK: usize = 32;
/// Panels and inputs decoded at once for few rows: long products, so that many sums are in flight.
const FEW_ROWS: (usize, usize) = (8, 64);
/// The same for many rows, which pass by while two panels stay in the first cache.
const MANY_ROWS: (usize, usize) = (2, 128);
/// Up to here rows are few.
const ROWS_STREAMING: usize = 12;

/// Inputs in 8 bits summed before the next panels come: 96 rows of them stay in the second cache.
const BYTES_INPUTS: usize = 2048;

/// Floats that a sum decodes into.
pub(crate) const DECODED_FLOATS: usize = 9216;
const _: () = assert!(Scaled::BUFFER_FLOATS <= DECODED_FLOATS);
const _: () = assert!(FEW_ROWS.0 * FEW_ROWS.1 * LANES <= DECODED_FLOATS);
const _: () = assert!(MANY_ROWS.0 * MANY_ROWS.1 * LANES <= DECODED_FLOATS);

/// Panels of codes and scales.
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) form: Form,
    pub(crate) place: Place,
}

/// Some panels by some rows; `x` is at input `origin`, where sums begin.
struct Part {
    panel: usize,
    panels: usize,
    x: *const f32,
    x_stride: usize,
    rows: usize,
    acc: *mut f32,
    origin: usize,
}

impl Coded {
    /// Panels for `view` alone, without a place yet; `None` where its scales change within 8 inputs.
    pub(crate) fn new(view: &QuantView<'_>) -> Option<Self> {
        let form = pack::form(view)?;
        Some(Coded { outputs: view.rows, inputs: view.cols, form, place: Place::default() })
    }

    /// Bytes that the place must have.
    pub(crate) fn bytes(&self) -> usize {
        self.outputs.div_ceil(LANES) * self.panel_bytes()
    }

    fn panel_bytes(&self) -> usize {
        self.inputs.div_ceil(self.form.span) * self.form.block_bytes()
    }

    /// The inputs' weights of one output, as floats.
    pub(crate) fn output(&self, kernels: &Kernels, output: usize, out: &mut [f32]) {
        const STEP: usize = 64;
        let mut lines = [0f32; STEP * LANES];
        for (at, out) in out.chunks_mut(STEP).enumerate() {
            let octets = (at * STEP / 8, (at * STEP + out.len()).div_ceil(8));
            let panel = self.start(output / LANES);
            // SAFETY: the panel has these octets (its blocks are whole chunks), and `lines` room for 8 of them.
            unsafe {
                (kernels.decode)(&Decode { form: &self.form, panel, octets, out: lines.as_mut_ptr() });
            }
            for (x, line) in out.iter_mut().zip(lines.chunks_exact(LANES)) {
                *x = line[output % LANES];
            }
        }
    }

    /// Sums over inputs `[from, to)`: `acc[row][panel * 16 + lane]`, `x` beginning at the first of them.
    ///
    /// # Safety
    /// `x` and `acc` are valid for the rows and panels, `buffer` for [`DECODED_FLOATS`], and the level's instructions
    /// exist.
    #[allow(clippy::too_many_arguments)] // the operands of one product, named by its two callers
    pub(crate) unsafe fn sum(
        &self,
        kernels: &Kernels,
        (from, to): (usize, usize),
        Stretch { panel, panels, soon }: Stretch,
        x: *const f32,
        x_stride: usize,
        rows: usize,
        acc: *mut f32,
        buffer: *mut f32,
    ) {
        let part = Part { panel, panels, x, x_stride, rows, acc, origin: from };
        // A range may begin and end within eight inputs.
        let (first, last) = (from.next_multiple_of(8), to / 8 * 8);
        // SAFETY: the caller's.
        unsafe {
            if rows > Stream::ROWS || first >= last {
                return self.decoded(kernels, &part, (from, to), buffer);
            }
            if from < first {
                self.decoded(kernels, &part, (from, first), buffer);
            }
            (kernels.stream)(&Stream {
                form: &self.form,
                panel: self.start(panel),
                panel_bytes: self.panel_bytes(),
                panels,
                soon,
                octets: (first / 8, last / 8),
                x: x.add(first - from),
                x_stride,
                rows,
                acc,
                acc_stride: panels * LANES,
                fresh: first == from,
            });
            if last < to {
                self.decoded(kernels, &part, (last, to), buffer);
            }
        }
    }

    /// Whether ranges are whole blocks of 32 and codes whole numbers: what products of bytes are for.
    pub(crate) fn has_bytes(&self, ranges: usize) -> bool {
        (self.inputs / ranges).is_multiple_of(BLOCK) && self.form.has_blocks()
    }

    /// Where a panel begins.
    pub(crate) fn start(&self, panel: usize) -> *const u8 {
        self.place.at(panel * self.panel_bytes())
    }

    /// As [`Coded::sum`], over whole blocks, of inputs in 8 bits.
    ///
    /// # Safety
    /// As for [`Coded::sum`]; `x` are blocks, rows so many apart.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    pub(crate) unsafe fn sum_bytes(
        &self,
        kernels: &Kernels,
        (from, to): (usize, usize),
        (panel, panels): (usize, usize),
        (x, x_stride): (*const Eighths, usize),
        rows: usize,
        acc: *mut f32,
    ) {
        let deep = if rows > Stream::ROWS { BYTES_INPUTS / BLOCK } else { usize::MAX };
        let (first, last) = (from / BLOCK, to / BLOCK);
        let mut block = first;
        while block < last {
            let end = last.min(block.saturating_add(deep));
            // SAFETY: the panels have these blocks, the rest is the caller's.
            unsafe {
                (kernels.bytes)(&Bytes {
                    form: &self.form,
                    panel: self.start(panel),
                    panel_bytes: self.panel_bytes(),
                    panels,
                    blocks: (block, end),
                    x: x.add(block - first),
                    x_stride,
                    rows,
                    acc,
                    acc_stride: panels * LANES,
                    fresh: block == first,
                });
            }
            block = end;
        }
    }

    /// What rows of pairs a level's products with these take: ranges are whole octets, of which pairs are made, and groups such as
    /// the kernels have room for.
    pub(crate) fn pairs(&self, kernels: &Kernels, ranges: usize) -> Option<PairKind> {
        let each = self.inputs / ranges;
        let fits = each.is_multiple_of(8) && Scaled::UNIT_MAX.is_multiple_of(self.form.group);
        match (kernels.whole, kernels.pairs) {
            _ if !fits => None,
            (Some(_), _) if self.form.is_whole() => Some(PairKind::Whole(self.form.units(each))),
            (_, pairs) => pairs.map(|_| PairKind::Bf16),
        }
    }

    /// As [`Coded::sum`], over some of `all` ranges of whole octets, of weights and inputs as pairs of the `kind` that these take:
    /// `inputs` are those of the first range, and the sums of ranges lie so many floats apart.
    ///
    /// # Safety
    /// As for [`Coded::sum`].
    #[allow(clippy::too_many_arguments)] // the operands of one product
    pub(crate) unsafe fn sum_pairs(
        &self,
        kernels: &Kernels,
        kind: PairKind,
        (ranges, all): (Range<usize>, usize),
        Stretch { panel, panels, soon }: Stretch,
        inputs: PairInputs<'_>,
        rows: usize,
        (acc, acc_range): (*mut f32, usize),
        buffer: *mut f32,
    ) {
        let each = self.inputs / all;
        let product = match (kind, kernels.whole, kernels.pairs.map(|pairs| (pairs, pairs.coded))) {
            (PairKind::Whole(_), Some(whole), _) => whole.product,
            (_, _, Some((_, CodedPairs::Scaled(product)))) => product,
            (_, _, Some((pairs, CodedPairs::Rounded(decode)))) => {
                for (at, range) in ranges.enumerate() {
                    let (summed, inputs) = ((range * each, (range + 1) * each), inputs.of(range));
                    // SAFETY: the caller's.
                    unsafe {
                        let acc = acc.add(at * acc_range);
                        self.sum_rounded(&pairs, decode, summed, (panel, panels), inputs, rows, acc, buffer);
                    }
                }
                return;
            }
            (_, _, None) => return,
        };
        let together = if rows <= Scaled::ROWS_RANGES { ranges.len().max(1) } else { 1 };
        for (at, range) in ranges.enumerate().step_by(together) {
            let inputs = inputs.of(range);
            let row = match kind {
                PairKind::Whole(units) => inputs.whole(&units),
                PairKind::Bf16 => None,
            };
            let row = row.unwrap_or(inputs.bf16());
            // SAFETY: the panels have these octets, the rest is the caller's.
            unsafe {
                product(&Scaled {
                    form: &self.form,
                    units: self.form.units(each),
                    panel: self.start(panel),
                    panel_bytes: self.panel_bytes(),
                    panels,
                    soon,
                    octets: (range * each / 8, (range + 1) * each / 8),
                    ranges: together,
                    x: row.pairs,
                    x_stride: inputs.stride(),
                    known: row.known,
                    known_range: row.known_range,
                    bytes: row.bytes,
                    bytes_range: row.bytes_range,
                    rows,
                    acc: acc.add(at * acc_range),
                    acc_range,
                    acc_stride: panels * LANES,
                    buffer,
                });
            }
        }
    }

    /// Products of pairs over inputs `[from, to)`, of weights rounded to bf16.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    unsafe fn sum_rounded(
        &self,
        kernels: &PairKernels,
        decode: unsafe fn(&Decode<'_>),
        (from, to): (usize, usize),
        (panel, panels): (usize, usize),
        inputs: PairInputs<'_>,
        rows: usize,
        acc: *mut f32,
        buffer: *mut f32,
    ) {
        let (form, acc_stride) = (&self.form, panels * LANES);
        let (x, x_stride) = (inputs.x(), inputs.stride());
        let (wide, deep) = if rows > ROWS_STREAMING { MANY_ROWS } else { FEW_ROWS };
        // A pair takes a float's place: twice as many inputs at once.
        let deep = 2 * deep;
        let mut k = from;
        while k < to {
            // Cut at multiples of 32 from where the sum begins, whatever the number of rows: tiles add 32 inputs apart.
            let end = to.min(k + deep);
            for first in (0..panels).step_by(wide) {
                let count = wide.min(panels - first);
                // SAFETY: the panels have these octets, and the buffer room for `deep` inputs of `wide` panels.
                unsafe {
                    for p in 0..count {
                        let out = buffer.add(p * deep / 2 * LANES);
                        let octets = (k / 8, end / 8);
                        decode(&Decode { form, panel: self.start(panel + first + p), octets, out });
                    }
                    (kernels.multiply)(&Pairs {
                        x: x.add((k - from) / 2),
                        x_stride,
                        rows,
                        w: buffer.cast(),
                        panel_stride: deep * LANES,
                        panels: count,
                        pairs: (end - k) / 2,
                        acc: acc.add(first * LANES),
                        acc_stride,
                        fresh: k == from,
                    });
                }
            }
            k = end;
        }
    }

    /// [`Coded::sum`] for some of the inputs of a part, through memory.
    unsafe fn decoded(&self, kernels: &Kernels, part: &Part, (from, to): (usize, usize), buffer: *mut f32) {
        let (wide, deep) = if part.rows > ROWS_STREAMING { MANY_ROWS } else { FEW_ROWS };
        let mut k = from;
        while k < to {
            // Whole octets are decoded; the product skips what is not asked for.
            let end = to.min((k / deep + 1) * deep);
            let octets = (k / 8, end.div_ceil(8));
            let skipped = k % 8;
            for first in (0..part.panels).step_by(wide) {
                let count = wide.min(part.panels - first);
                // SAFETY: the panels have these octets, and the buffer room for `deep` inputs of `wide` panels.
                unsafe {
                    for p in 0..count {
                        let panel = self.start(part.panel + first + p);
                        let out = buffer.add(p * deep * LANES);
                        (kernels.decode)(&Decode { form: &self.form, panel, octets, out });
                    }
                    (kernels.sweep)(&Sweep {
                        x: part.x.add(k - part.origin),
                        x_stride: part.x_stride,
                        rows: part.rows,
                        layout: Layout::F32,
                        w: buffer.add(skipped * LANES).cast(),
                        panel_stride: deep * LANES,
                        k_stride: LANES,
                        panels: count,
                        k: end - k,
                        acc: part.acc.add(first * LANES),
                        acc_stride: part.panels * LANES,
                        fresh: k == part.origin,
                        soon: None,
                    });
                }
            }
            k = end;
        }
    }
}
