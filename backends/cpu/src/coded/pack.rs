//! From a checkpoint's rows to panels of codes and scales. Called by `packed`, for each panel once, at load.

use backend::{CodeTable, DType, GgufBlock, MatrixView, Quant, QuantView};
use half::{bf16, f16};

use super::{CHUNK, Coded};
use crate::kernel::{Code, E4M3_SCALE, Form, MINIMA_GROUPS, ORDER, Scale, Scaled, Zero};
use crate::lanes::LANES;

/// How rows of `view` are packed.
pub(super) fn form(view: &QuantView<'_>) -> Option<Form> {
    let stored = |zero: Zero| {
        let types = [view.scales, view.biases].map(|view| view.map(|view| view.dtype));
        match (types[0], types[1].unwrap_or(types[0]?)) {
            (Some(DType::F16), DType::F16) => Some(Scale::F16(zero)),
            (Some(DType::BF16), DType::BF16) => Some(Scale::Bf16(zero)),
            _ => Some(Scale::F32(zero)),
        }
    };
    let zero = |table: CodeTable| Zero::Code(table.zero().into());
    let planes = |bits: usize| if bits > 6 { Code::Bytes } else { Code::Planes(bits) };
    let (code, scale, group) = match view.format {
        Quant::Affine { bits, group } => (planes(bits), stored(Zero::Bias)?, group),
        Quant::Int4 { group } => (Code::Planes(4), stored(Zero::Code(8.0))?, group),
        Quant::Fp4 { group } => (Code::Table(CodeTable::E2m1), stored(zero(CodeTable::E2m1))?, group),
        Quant::Fp8 { cols, .. } => {
            let left = view.origin.1 % cols;
            let group = if left == 0 { cols } else { common(cols, left) };
            // A scale of a whole row is repeated, so that a part of the row is no block as long as the row.
            let group = if group > Scaled::UNIT_MAX { common(group, Scaled::UNIT_MAX) } else { group };
            (Code::E4m3, Scale::F32(Zero::Code(0.0)), group)
        }
        Quant::Gguf(block) => match block {
            GgufBlock::Q4_0 => (Code::Planes(4), Scale::F16(Zero::Code(8.0)), 32),
            GgufBlock::Q4_1 => (Code::Planes(4), Scale::F16(Zero::Bias), 32),
            GgufBlock::Q5_0 => (Code::Planes(5), Scale::F16(Zero::Code(16.0)), 32),
            GgufBlock::Q5_1 => (Code::Planes(5), Scale::F16(Zero::Bias), 32),
            GgufBlock::Q8_0 => (Code::Bytes, Scale::F16(Zero::Code(128.0)), 32),
            GgufBlock::Q4K => (Code::Planes(4), Scale::Minima, 32),
            GgufBlock::Q5K => (Code::Planes(5), Scale::Minima, 32),
            GgufBlock::Q2K => (Code::Planes(2), Scale::Fours, 16),
            GgufBlock::Q3K => (Code::Planes(3), Scale::Signed(4), 16),
            GgufBlock::Q6K => (Code::Planes(6), Scale::Signed(32), 16),
            GgufBlock::Iq4Nl => (Code::Table(CodeTable::Iq4), Scale::F16(zero(CodeTable::Iq4)), 32),
            GgufBlock::Iq4Xs => (Code::Table(CodeTable::Iq4), Scale::Signed(CodeTable::Iq4.zero()), 32),
            // Powers of two.
            GgufBlock::Mxfp4 => (Code::Table(CodeTable::E2m1), Scale::Bf16(zero(CodeTable::E2m1)), 32),
        },
    };
    if group == 0 || group % 8 != 0 {
        return None;
    }
    let whole = match scale {
        Scale::Minima | Scale::Fours | Scale::Signed(_) => 256,
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

impl Coded {
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
                Scale::Minima | Scale::Fours | Scale::Signed(_) => {
                    self.put_super_scales(out, lane, view, *row);
                }
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
                Code::Table(table) => {
                    let fours = fours(table);
                    put_planes(chunk, lane, &codes.map(|code| fours[usize::from(code)]), 4);
                }
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
            let out = &mut out[form.first()..];
            if form == Scale::Minima {
                let numbers = stored.scales[..MINIMA_GROUPS].iter().chain(&stored.minima[..MINIMA_GROUPS]);
                put_sixes(out, lane, numbers);
                continue;
            }
            for group in 0..format.cols() / self.form.group {
                // Below a minimum, where there are such.
                out[group * form.stride() + lane] = stored.scales[group] | stored.minima[group] << 4;
            }
        }
    }
}

/// One output's 16 numbers of six bits into three lines; see [`crate::lanes::Lanes::load_six`].
fn put_sixes<'a>(out: &mut [u8], lane: usize, numbers: impl Iterator<Item = &'a u8>) {
    let mut lines = [0u32; 3];
    for (n, number) in numbers.enumerate() {
        lines[n / 8] |= u32::from(number & 15) << (n % 8 * 4);
        lines[2] |= u32::from(number >> 4 & 3) << (n * 2);
    }
    for (line, word) in lines.into_iter().enumerate() {
        out[(line * LANES + lane) * 4..][..4].copy_from_slice(&word.to_ne_bytes());
    }
}

/// The four bits that stand for each of a table's values, which come counted from its zero.
const fn fours(table: CodeTable) -> [u8; 256] {
    let mut fours = [0; 256];
    let mut four = 16;
    while four > 0 {
        four -= 1;
        fours[table.shifted(four) as usize] = four;
    }
    fours
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
