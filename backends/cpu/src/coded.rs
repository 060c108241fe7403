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
//! A product of many rows decodes some inputs of some panels into the first cache and runs the ordinary kernel over them;
//! one of few rows decodes in registers. Both sum the decoded numbers in ascending K, so a row's bits are the same. Decoded
//! numbers are f32. Where the level multiplies bf16 itself, and the step is of bf16, codes are multiplied as they are and
//! a group's sum is scaled; only for tiles of AMX are decoded numbers rounded to bf16.

use backend::{DType, GgufBlock, MatrixView, Quant, QuantView};
use half::{bf16, f16};

use crate::kernel::{
    BLOCK, Bytes, Code, CodedPairs, Decode, E4M3_SCALE, Eighths, Form, Kernels, Layout, ORDER, PairKernels,
    Pairs, Scale, Scaled, Stream, Sweep, Zero,
};
use crate::lanes::LANES;
use crate::memory::Place;
use crate::operand::PairInputs;

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
pub(crate) const DECODED_FLOATS: usize = 8192;
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
        let form = form(view)?;
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
            let panel = self.place.at(output / LANES * self.panel_bytes());
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
        (panel, panels): (usize, usize),
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
                panel: self.place.at(panel * self.panel_bytes()),
                panel_bytes: self.panel_bytes(),
                panels,
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
        (self.inputs / ranges).is_multiple_of(BLOCK) && self.form.is_whole()
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
        let panel_bytes = self.panel_bytes();
        let deep = if rows > Stream::ROWS { BYTES_INPUTS / BLOCK } else { usize::MAX };
        let (first, last) = (from / BLOCK, to / BLOCK);
        let mut block = first;
        while block < last {
            let end = last.min(block.saturating_add(deep));
            // SAFETY: the panels have these blocks, the rest is the caller's.
            unsafe {
                (kernels.bytes)(&Bytes {
                    form: &self.form,
                    panel: self.place.at(panel * panel_bytes),
                    panel_bytes,
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

    /// Whether ranges are whole octets, of which pairs are made, and groups such as the kernel has room for.
    pub(crate) fn has_pairs(&self, ranges: usize) -> bool {
        (self.inputs / ranges).is_multiple_of(8) && Scaled::GROUP_MAX.is_multiple_of(self.form.group)
    }

    /// As [`Coded::sum`], over whole octets, of weights and inputs as pairs of bf16.
    ///
    /// # Safety
    /// As for [`Coded::sum`].
    #[allow(clippy::too_many_arguments)] // the operands of one product
    pub(crate) unsafe fn sum_pairs(
        &self,
        kernels: &PairKernels,
        (from, to): (usize, usize),
        (panel, panels): (usize, usize),
        inputs: PairInputs<'_>,
        rows: usize,
        acc: *mut f32,
        buffer: *mut f32,
    ) {
        let (form, panel_bytes, acc_stride) = (&self.form, self.panel_bytes(), panels * LANES);
        let (x, x_stride) = (inputs.x(), inputs.stride());
        let at = |panel: usize| self.place.at(panel * panel_bytes).cast_const();
        let decode = match kernels.coded {
            CodedPairs::Rounded(decode) => decode,
            CodedPairs::Scaled { product, .. } => {
                // SAFETY: the panels have these octets, the rest is the caller's.
                return unsafe {
                    product(&Scaled {
                        form,
                        panel: at(panel),
                        panel_bytes,
                        panels,
                        octets: (from / 8, to / 8),
                        x,
                        x_stride,
                        sums: inputs.sums(form.group),
                        rows,
                        acc,
                        acc_stride,
                        buffer,
                    });
                };
            }
        };
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
                        decode(&Decode { form, panel: at(panel + first + p), octets, out });
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
                        let panel = self.place.at((part.panel + first + p) * self.panel_bytes());
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
                    });
                }
            }
            k = end;
        }
    }

    /// Writes one panel from up to 16 rows; missing rows are zeros. False when a code is not a number.
    #[must_use]
    pub(crate) fn pack_panel(&self, panel: usize, rows: &[(&MatrixView<'_>, usize)]) -> bool {
        let bytes = self.panel_bytes();
        let start = self.place.at(panel * bytes);
        // SAFETY: this panel's bytes, which no other task touches, written before they are lent.
        let out = unsafe {
            start.write_bytes(0, bytes);
            std::slice::from_raw_parts_mut(start, bytes)
        };
        let groups = self.inputs.div_ceil(self.form.group);
        let mut codes = vec![0u8; self.inputs.next_multiple_of(CHUNK)];
        let (mut scales, mut biases) = (vec![0f32; groups], vec![0f32; groups]);
        let mut numbers = true;
        for (lane, (part, row)) in rows.iter().enumerate() {
            let MatrixView::Quantised(view) = part else { continue };
            match view.format {
                Quant::Fp8 { rows: high, cols: wide } => {
                    let (top, left) = view.origin;
                    codes[..view.cols].copy_from_slice(view.codes(*row));
                    // Both codes of not-a-number have all lower bits.
                    numbers &= codes.iter().fold(0, |bad, code| bad | u8::from(code & 127 == 127)) == 0;
                    for (group, scale) in scales.iter_mut().enumerate() {
                        let col = (left + group * self.form.group) / wide;
                        let stored = view.scales.map_or(1.0, |scales| scales.float((top + row) / high, col));
                        *scale = stored * E4M3_SCALE;
                    }
                }
                _ => view.affine_row(*row, &mut codes[..view.cols], &mut scales, &mut biases),
            }
            self.put_codes(out, lane, &codes);
            match self.form.scale {
                Scale::Minima | Scale::Signed => self.put_super_scales(out, lane, view, *row),
                _ => self.put_scales(out, lane, &scales, &biases),
            }
        }
        numbers
    }

    fn put_codes(&self, out: &mut [u8], lane: usize, codes: &[u8]) {
        let per_block = self.form.span / CHUNK;
        for (at, codes) in codes.as_chunks::<CHUNK>().0.iter().enumerate() {
            let start = at / per_block * self.form.block_bytes()
                + self.form.scale_bytes()
                + at % per_block * self.form.chunk_bytes();
            let chunk = &mut out[start..start + self.form.chunk_bytes()];
            match self.form.code {
                Code::E4m3 => {
                    codes.iter().enumerate().for_each(|(k, code)| chunk[k * LANES + lane] = *code);
                }
                Code::Bytes => {
                    for (octet, eight) in codes.as_chunks::<8>().0.iter().enumerate() {
                        for (line, k) in ORDER.into_iter().enumerate() {
                            chunk[(octet * 8 + line) * LANES + lane] = eight[k];
                        }
                    }
                }
                Code::Planes(bits) => put_planes(chunk, lane, codes, bits),
            }
        }
    }

    fn put_scales(&self, out: &mut [u8], lane: usize, scales: &[f32], biases: &[f32]) {
        let Form { scale: form, group, span, .. } = self.form;
        for (at, (scale, bias)) in scales.iter().zip(biases).enumerate() {
            let block = at / (span / group) * self.form.block_bytes();
            let start = block + at % (span / group) * form.stride();
            let mut put = |at: usize, x: f32| match form {
                Scale::F16(_) => out[start + at * 32 + lane * 2..][..2]
                    .copy_from_slice(&f16::from_f32(x).to_bits().to_ne_bytes()),
                Scale::Bf16(_) => out[start + at * 32 + lane * 2..][..2]
                    .copy_from_slice(&bf16::from_f32(x).to_bits().to_ne_bytes()),
                _ => out[start + at * 64 + lane * 4..][..4].copy_from_slice(&x.to_ne_bytes()),
            };
            put(0, *scale);
            if matches!(form, Scale::F16(Zero::Bias) | Scale::Bf16(Zero::Bias) | Scale::F32(Zero::Bias)) {
                put(1, *bias);
            }
        }
    }

    fn put_super_scales(&self, out: &mut [u8], lane: usize, view: &QuantView<'_>, row: usize) {
        let Quant::Gguf(format) = view.format else { return };
        let form = self.form.scale;
        for (stored, out) in
            view.codes(row).chunks_exact(format.bytes()).zip(out.chunks_exact_mut(self.form.block_bytes()))
        {
            let Some(stored) = format.super_scales(stored) else { return };
            out[lane * 2..][..2].copy_from_slice(&stored.d.to_bits().to_ne_bytes());
            out[32 + lane * 2..][..2].copy_from_slice(&stored.dmin.to_bits().to_ne_bytes());
            for group in 0..format.cols() / self.form.group {
                let at = form.first() + group * form.stride() + lane;
                out[at] = stored.scales[group];
                if form == Scale::Minima {
                    out[at + LANES] = stored.minima[group];
                }
            }
        }
    }
}

/// One output's codes of a chunk into its planes.
fn put_planes(chunk: &mut [u8], lane: usize, codes: &[u8; CHUNK], bits: usize) {
    // (bits of the plane, its lowest bit within the code, its first line)
    let planes: &[(usize, usize, usize)] = match bits {
        2 => &[(2, 0, 0)],
        3 => &[(2, 0, 0), (1, 2, 2)],
        4 => &[(4, 0, 0)],
        5 => &[(4, 0, 0), (1, 4, 4)],
        _ => &[(4, 0, 0), (2, 4, 4)],
    };
    for (width, lowest, first) in planes {
        let per_word = 32 / width;
        for (line, codes) in codes.chunks_exact(per_word).enumerate() {
            let word = codes.iter().enumerate().fold(0u32, |word, (at, code)| {
                word | (u32::from(*code) >> lowest & ((1 << width) - 1)) << (at % 2 * 16 + at / 2 * width)
            });
            let at = ((first + line) * LANES + lane) * 4;
            chunk[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
    }
}

/// How rows of `view` are packed.
fn form(view: &QuantView<'_>) -> Option<Form> {
    let stored = |zero: Zero| {
        let types = [view.scales, view.biases].map(|view| view.map(|view| view.dtype));
        match (types[0], types[1].unwrap_or(types[0]?)) {
            (Some(DType::F16), DType::F16) => Some(Scale::F16(zero)),
            (Some(DType::BF16), DType::BF16) => Some(Scale::Bf16(zero)),
            _ => Some(Scale::F32(zero)),
        }
    };
    let planes = |bits: usize| if bits > 6 { Code::Bytes } else { Code::Planes(bits) };
    let (code, scale, group) = match view.format {
        Quant::Affine { bits, group } => (planes(bits), stored(Zero::Bias)?, group),
        Quant::Int4 { group } => (Code::Planes(4), stored(Zero::Code(8.0))?, group),
        Quant::Fp8 { cols, .. } => {
            let left = view.origin.1 % cols;
            (Code::E4m3, Scale::F32(Zero::Code(0.0)), if left == 0 { cols } else { common(cols, left) })
        }
        Quant::Gguf(block) => match block {
            GgufBlock::Q4_0 => (Code::Planes(4), Scale::F16(Zero::Code(8.0)), 32),
            GgufBlock::Q4_1 => (Code::Planes(4), Scale::F16(Zero::Bias), 32),
            GgufBlock::Q5_0 => (Code::Planes(5), Scale::F16(Zero::Code(16.0)), 32),
            GgufBlock::Q5_1 => (Code::Planes(5), Scale::F16(Zero::Bias), 32),
            GgufBlock::Q8_0 => (Code::Bytes, Scale::F16(Zero::Code(128.0)), 32),
            GgufBlock::Q4K => (Code::Planes(4), Scale::Minima, 32),
            GgufBlock::Q5K => (Code::Planes(5), Scale::Minima, 32),
            GgufBlock::Q6K => (Code::Planes(6), Scale::Signed, 16),
        },
    };
    if group == 0 || group % 8 != 0 {
        return None;
    }
    let whole = match scale {
        Scale::Minima | Scale::Signed => 256,
        // As many groups as fill cache lines with their scales and chunks with their codes.
        _ => {
            let chunks = group / common(group, CHUNK) * CHUNK;
            if (chunks / group * scale.stride()).is_multiple_of(64) { chunks } else { 2 * chunks }
        }
    };
    Some(Form { code, scale, group, span: whole })
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}
