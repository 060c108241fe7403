//! Matrices of numbers as the kernels read them: panels of 16 outputs, K-major. bf16 stays bf16 in pairs along K (the
//! layout of AMX and AVX-512 BF16 tiles too), f16 stays f16, f32 stays f32.

use std::ops::Range;

use backend::{DType, MatrixView};
use half::{bf16, f16};

use crate::kernel::{Kernels, Layout, Pairs, Scaled, Sweep};
use crate::lanes::LANES;
use crate::memory::Place;
use crate::operand::{Inputs, Operand};

/// Inputs summed before the next rows come: two panels of them stay in the first cache.
const INPUTS_BLOCK: usize = 256;
const _: () = assert!(INPUTS_BLOCK.is_multiple_of(2));
/// Up to so many rows are a tile or two, and weights are read about once: long streams are best.
const ROWS_STREAMING: usize = 12;
/// Weights of a range that few rows read before those of the next: worth a call.
const STRIP_BYTES: usize = 16 << 10;

/// Panels of numbers.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) layout: Layout,
    /// Ranges of K that are summed apart.
    ranges: usize,
    pub(crate) place: Place,
}

impl Plain {
    /// Panels for `outputs` by `inputs` numbers of `dtype`, without a place yet.
    pub(crate) fn new(outputs: usize, inputs: usize, ranges: usize, dtype: DType) -> Self {
        let layout = match dtype {
            DType::BF16 => Layout::Bf16Pairs,
            DType::F16 => Layout::F16,
            DType::F32 => Layout::F32,
        };
        Plain { outputs, inputs, layout, ranges, place: Place::default() }
    }

    /// Bytes that the place must have.
    pub(crate) fn bytes(&self) -> usize {
        self.outputs.div_ceil(LANES) * self.panel_elements() * self.element_bytes()
    }

    /// Inputs of one range.
    fn range_inputs(&self) -> usize {
        self.inputs / self.ranges
    }

    fn element_bytes(&self) -> usize {
        if self.layout == Layout::F32 { 4 } else { 2 }
    }

    /// Elements of one range of one panel. An odd range of bf16 is padded to whole pairs.
    fn range_elements(&self) -> usize {
        let inputs = self.range_inputs();
        LANES * if self.layout == Layout::Bf16Pairs { inputs.next_multiple_of(2) } else { inputs }
    }

    /// Elements from one panel to the next.
    pub(crate) fn panel_elements(&self) -> usize {
        self.ranges * self.range_elements()
    }

    /// Where input `k` (even) of range `range` of `panel` lies.
    pub(crate) fn at(&self, panel: usize, range: usize, k: usize) -> *const u8 {
        let elements = panel * self.panel_elements() + range * self.range_elements() + k * LANES;
        self.place.at(elements * self.element_bytes())
    }

    /// The inputs' weights of one output, as floats.
    pub(crate) fn output(&self, output: usize, out: &mut [f32]) {
        let (panel, lane) = (output / LANES, output % LANES);
        for (range, out) in out.chunks_exact_mut(self.range_inputs()).enumerate() {
            let at = self.at(panel, range, 0);
            for (k, x) in out.iter_mut().enumerate() {
                // SAFETY: the element of (k, lane) lies within this panel's range, written by `pack_panel`.
                *x = unsafe {
                    match self.layout {
                        Layout::Bf16Pairs => {
                            let pair = at.cast::<u16>().add((k & !1) * LANES + lane * 2);
                            bf16::from_bits(*pair.add(k & 1)).to_f32()
                        }
                        Layout::F16 => f16::from_bits(*at.cast::<u16>().add(k * LANES + lane)).to_f32(),
                        Layout::Bf16 | Layout::F32 => *at.cast::<f32>().add(k * LANES + lane),
                    }
                };
            }
        }
    }

    /// Sums of some ranges, `acc[range][row][panel * 16 + lane]` over their inputs, ranges so many floats apart. Of few rows some
    /// panels pass all ranges before the next come.
    ///
    /// # Safety
    /// `x` and `acc` are valid for the ranges, rows and panels, and the level's instructions exist.
    pub(crate) unsafe fn sum(
        &self,
        kernels: &Kernels,
        ranges: Range<usize>,
        (panel, panels): (usize, usize),
        x: Operand<'_>,
        rows: usize,
        (acc, acc_range): (*mut f32, usize),
    ) {
        let strip = match rows <= Scaled::ROWS_RANGES && ranges.len() > 1 {
            true => (STRIP_BYTES / (self.range_elements() * self.element_bytes())).next_power_of_two().max(2),
            false => panels.max(1),
        };
        for first in (0..panels).step_by(strip) {
            let count = strip.min(panels - first);
            for (at, range) in ranges.clone().enumerate() {
                // SAFETY: these panels of the caller's.
                unsafe {
                    let acc = acc.add(at * acc_range + first * LANES);
                    self.sum_range(
                        kernels,
                        range,
                        (panel + first, count),
                        x.inputs(range),
                        rows,
                        (acc, panels * LANES),
                    );
                }
            }
        }
    }

    /// Sums of one range, rows so many floats apart.
    ///
    /// # Safety
    /// As for [`Plain::sum`].
    pub(crate) unsafe fn sum_range(
        &self,
        kernels: &Kernels,
        range: usize,
        (panel, panels): (usize, usize),
        inputs: Inputs<'_>,
        rows: usize,
        (acc, acc_stride): (*mut f32, usize),
    ) {
        let all = self.range_inputs();
        let many =
            kernels.pairs.filter(|_| inputs.pairs.is_some()).map_or(INPUTS_BLOCK, |pairs| pairs.inputs_block);
        let block = if rows > ROWS_STREAMING { many } else { all };
        for k in (0..all).step_by(block) {
            let (count, fresh) = (block.min(all - k), k == 0);
            let (w, panel_stride) = (self.at(panel, range, k), self.panel_elements());
            // SAFETY: the weights are those of these panels and inputs, the rest is the caller's.
            unsafe {
                match (kernels.pairs, inputs.pairs) {
                    (Some(pairs), Some(x)) if self.layout == Layout::Bf16Pairs => {
                        (pairs.multiply)(&Pairs {
                            x: x.x().add(k / 2),
                            x_stride: x.stride(),
                            rows,
                            w: w.cast(),
                            panel_stride,
                            panels,
                            pairs: count.div_ceil(2),
                            acc,
                            acc_stride,
                            fresh,
                        });
                    }
                    _ => (kernels.sweep)(&Sweep {
                        x: inputs.x.add(k),
                        x_stride: inputs.stride,
                        rows,
                        layout: self.layout,
                        w,
                        panel_stride,
                        k_stride: LANES,
                        panels,
                        k: count,
                        acc,
                        acc_stride,
                        fresh,
                        soon: None,
                    }),
                }
            }
        }
    }

    /// Writes one panel from up to 16 rows of this layout's type; missing rows are zeros.
    pub(crate) fn pack_panel(&self, panel: usize, rows: &[(&MatrixView<'_>, usize)], kernels: &Kernels) {
        let inputs = self.range_inputs();
        let padded = inputs.next_multiple_of(2);
        for range in 0..self.ranges {
            let out = self.at(panel, range, 0).cast_mut();
            match self.layout {
                Layout::Bf16Pairs => {
                    let mut lines = vec![0u16; LANES * padded];
                    for (line, (part, row)) in lines.chunks_exact_mut(padded).zip(rows) {
                        let bytes = &halves(part, *row)[range * inputs * 2..][..inputs * 2];
                        for (x, pair) in line.iter_mut().zip(bytes.as_chunks::<2>().0) {
                            *x = u16::from_le_bytes(*pair);
                        }
                    }
                    let rows = std::array::from_fn(|row| lines[row * padded..].as_ptr().cast::<u8>());
                    // SAFETY: each row has padded / 2 words, and `out` room for 16 times as many: this panel's range,
                    // which no other task writes.
                    unsafe { (kernels.transpose)(&rows, padded / 2, out.cast(), &[]) };
                }
                Layout::F16 => {
                    for (lane, k) in (0..LANES).flat_map(|lane| (0..inputs).map(move |k| (lane, k))) {
                        let half = rows.get(lane).map_or(0, |(part, row)| {
                            let at = (range * inputs + k) * 2;
                            let bytes = halves(part, *row);
                            u16::from_le_bytes([bytes[at], bytes[at + 1]])
                        });
                        // SAFETY: [k][lane] of this panel's range, which no other task writes.
                        unsafe { *out.cast::<u16>().add(k * LANES + lane) = half };
                    }
                }
                Layout::Bf16 | Layout::F32 => {
                    let mut lines = vec![0f32; LANES * inputs];
                    for (line, (part, row)) in lines.chunks_exact_mut(inputs).zip(rows) {
                        part.decode(*row, range * inputs..(range + 1) * inputs, line);
                    }
                    let rows = std::array::from_fn(|row| lines[row * inputs..].as_ptr().cast::<u8>());
                    // SAFETY: each row has `inputs` words, and `out` room for 16 times as many: this panel's range,
                    // which no other task writes.
                    unsafe { (kernels.transpose)(&rows, inputs, out.cast(), &[]) };
                }
            }
        }
    }
}

/// A row of 16-bit numbers.
fn halves<'a>(part: &MatrixView<'a>, row: usize) -> &'a [u8] {
    match part {
        MatrixView::Plain(view) => view.row(row),
        // Only f32 panels are made of decoded numbers.
        MatrixView::Quantised(_) => &[],
    }
}
