//! Quantised rows as codes with a scale and a bias per group, which most formats are when they are looked at so. For
//! backends whose device multiplies by that form only (MLX).

use std::ops::Range;

use half::f16;

use crate::quant::{code, iq4_scale, signed_six_bits, six_bits, three_bits, two_bits};
use crate::{CodeTable, GgufBlock, Quant, QuantView};

/// Numbers as `code * scale + bias`, computed in f32 with every product and sum rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffineForm {
    /// Bits of a code.
    pub bits: usize,
    /// Columns that share scale and bias.
    pub group: usize,
}

impl Quant {
    /// The form in which this format's numbers come out the same to the bit; `None` where there is none (FP8).
    pub const fn affine(self) -> Option<AffineForm> {
        let (bits, group) = match self {
            Quant::Affine { bits, group } => (bits, group),
            Quant::Int4 { group } => (4, group),
            Quant::Fp8 { .. } => return None,
            Quant::Gguf(GgufBlock::Q4_0 | GgufBlock::Q4_1 | GgufBlock::Q4K) => (4, 32),
            Quant::Gguf(GgufBlock::Q5_0 | GgufBlock::Q5_1 | GgufBlock::Q5K) => (5, 32),
            Quant::Fp4 { group } => (5, group),
            Quant::Gguf(GgufBlock::Mxfp4) => (5, 32),
            Quant::Gguf(GgufBlock::Q8_0 | GgufBlock::Iq4Nl | GgufBlock::Iq4Xs) => (8, 32),
            Quant::Gguf(GgufBlock::Q2K) => (2, 16),
            Quant::Gguf(GgufBlock::Q3K) => (3, 16),
            Quant::Gguf(GgufBlock::Q6K) => (6, 16),
        };
        Some(AffineForm { bits, group })
    }
}

impl QuantView<'_> {
    /// A row in its [`Quant::affine`] form: `codes` one per byte, `[cols]`; `scales` and `biases` `[cols / group]`. Formats
    /// without such a form are left as they are.
    pub fn affine_row(&self, row: usize, codes: &mut [u8], scales: &mut [f32], biases: &mut [f32]) {
        let stream = self.codes(row);
        match self.format {
            Quant::Fp8 { .. } => {}
            Quant::Affine { bits, .. } => {
                codes.iter_mut().enumerate().for_each(|(i, out)| *out = code(stream, i, bits));
                for (at, (scale, bias)) in scales.iter_mut().zip(biases).enumerate() {
                    *scale = self.scales.map_or(1.0, |scales| scales.float(row, at));
                    *bias = self.biases.map_or(0.0, |biases| biases.float(row, at));
                }
            }
            Quant::Int4 { .. } => {
                codes.iter_mut().enumerate().for_each(|(i, out)| *out = code(stream, i, 4));
                for (at, (scale, bias)) in scales.iter_mut().zip(biases).enumerate() {
                    *scale = self.scales.map_or(1.0, |scales| scales.float(row, at));
                    *bias = -8.0 * *scale;
                }
            }
            Quant::Fp4 { .. } => {
                let table = CodeTable::E2m1;
                codes.iter_mut().enumerate().for_each(|(i, out)| *out = table.shifted(code(stream, i, 4)));
                for (at, (scale, bias)) in scales.iter_mut().zip(biases).enumerate() {
                    *scale = self.scales.map_or(1.0, |scales| scales.float(row, at)) / 2.0;
                    *bias = -f32::from(table.zero()) * *scale;
                }
            }
            Quant::Gguf(block) => {
                let groups = block.cols() / self.format.affine().map_or(block.cols(), |form| form.group);
                for (at, bytes) in stream.chunks_exact(block.bytes()).enumerate() {
                    let part = |n: usize| -> Range<usize> { at * n..(at + 1) * n };
                    let codes = &mut codes[part(block.cols())];
                    block.affine(bytes, codes, &mut scales[part(groups)], &mut biases[part(groups)]);
                }
            }
        }
    }
}

/// Where the codes of Q3_K count from when they are multiplied by their scales: 31 times -4 is the least, -32 times -4 the largest.
const Q3K_LEAST: i16 = -124;

impl Quant {
    /// As [`Quant::affine`], of wider codes where those have larger groups (Q3_K).
    pub const fn wide_affine(self) -> Option<AffineForm> {
        match self {
            Quant::Gguf(GgufBlock::Q3K) => Some(AffineForm { bits: 8, group: 256 }),
            other => other.affine(),
        }
    }
}

impl QuantView<'_> {
    /// A row in its [`Quant::wide_affine`] form; see [`QuantView::affine_row`].
    pub fn wide_affine_row(&self, row: usize, codes: &mut [u8], scales: &mut [f32], biases: &mut [f32]) {
        let Quant::Gguf(GgufBlock::Q3K) = self.format else {
            return self.affine_row(row, codes, scales, biases);
        };
        let blocks = self.codes(row).chunks_exact(GgufBlock::Q3K.bytes());
        for ((block, codes), (scale, bias)) in
            blocks.zip(codes.chunks_exact_mut(256)).zip(scales.iter_mut().zip(biases))
        {
            *scale = f16::from_le_bytes([block[108], block[109]]).to_f32();
            *bias = f32::from(Q3K_LEAST) * *scale;
            for (at, code) in codes.iter_mut().enumerate() {
                let scale = i16::from(signed_six_bits(&block[96..108], at / 16));
                *code = (scale * (i16::from(three_bits(block, at)) - 4) - Q3K_LEAST) as u8;
            }
        }
    }
}

/// The scales among the codes of a block of 256 columns, as they are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuperScales {
    /// Factor of the scales.
    pub d: f16,
    /// Factor of the minima; 0 where there are none.
    pub dmin: f16,
    /// Scale of each group: unsigned of 4 or 6 bits where there are minima, else signed of 6 or 8.
    pub scales: [u8; 16],
    /// Minimum of each group, 4 or 6 bits.
    pub minima: [u8; 16],
}

impl GgufBlock {
    /// The scales of one block; `None` for blocks of 32.
    pub fn super_scales(self, block: &[u8]) -> Option<SuperScales> {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
        let (mut scales, mut minima) = ([0; 16], [0; 16]);
        match self {
            Self::Q4K | Self::Q5K => {
                for sub in 0..8 {
                    (scales[sub], minima[sub]) = six_bits(&block[4..16], sub);
                }
                Some(SuperScales { d: half(0), dmin: half(2), scales, minima })
            }
            Self::Q2K => {
                for (sub, both) in block[..16].iter().enumerate() {
                    (scales[sub], minima[sub]) = (both & 15, both >> 4);
                }
                Some(SuperScales { d: half(80), dmin: half(82), scales, minima })
            }
            Self::Q3K => {
                scales = std::array::from_fn(|sub| signed_six_bits(&block[96..108], sub) as u8);
                Some(SuperScales { d: half(108), dmin: f16::ZERO, scales, minima })
            }
            Self::Iq4Xs => {
                (0..8).for_each(|sub| scales[sub] = iq4_scale(block, sub) as u8);
                Some(SuperScales { d: half(0), dmin: f16::ZERO, scales, minima })
            }
            Self::Q6K => {
                scales.copy_from_slice(&block[192..208]);
                Some(SuperScales { d: half(208), dmin: f16::ZERO, scales, minima })
            }
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => None,
            Self::Iq4Nl | Self::Mxfp4 => None,
        }
    }

    /// One block; the numbers are those of its decoder.
    fn affine(self, block: &[u8], codes: &mut [u8], scales: &mut [f32], biases: &mut [f32]) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => {
                let five = matches!(self, Self::Q5_0 | Self::Q5_1);
                let offset = matches!(self, Self::Q4_1 | Self::Q5_1);
                let mut at = if offset { 4 } else { 2 };
                scales[0] = half(0);
                biases[0] = match (offset, five) {
                    (true, _) => half(2),
                    (false, true) => -16.0 * scales[0],
                    (false, false) => -8.0 * scales[0],
                };
                let mut high = 0;
                if five {
                    high = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
                    at += 4;
                }
                for (j, byte) in block[at..at + 16].iter().enumerate() {
                    for (place, four) in [(j, byte & 15), (j + 16, byte >> 4)] {
                        codes[place] = four | ((high >> place & 1) << 4) as u8;
                    }
                }
            }
            Self::Q8_0 => {
                scales[0] = half(0);
                biases[0] = -128.0 * scales[0];
                for (code, byte) in codes.iter_mut().zip(&block[2..34]) {
                    *code = byte ^ 128;
                }
            }
            Self::Q2K => {
                let (d, dmin) = (half(80), half(82));
                codes.iter_mut().enumerate().for_each(|(at, code)| *code = two_bits(&block[16..80], at));
                for (both, (scale, bias)) in block.iter().zip(scales.iter_mut().zip(biases)) {
                    (*scale, *bias) = (d * f32::from(both & 15), -(dmin * f32::from(both >> 4)));
                }
            }
            Self::Q3K => {
                let d = half(108);
                codes.iter_mut().enumerate().for_each(|(at, code)| *code = three_bits(block, at));
                for (sub, (scale, bias)) in scales.iter_mut().zip(biases).enumerate() {
                    *scale = d * f32::from(signed_six_bits(&block[96..108], sub));
                    *bias = -4.0 * *scale;
                }
            }
            Self::Iq4Nl | Self::Iq4Xs | Self::Mxfp4 => {
                let table = self.table().unwrap_or(CodeTable::Iq4);
                for (sub, codes) in codes.chunks_exact_mut(32).enumerate() {
                    let (scale, bytes) = self.table_group(block, sub);
                    (scales[sub], biases[sub]) = (scale, -f32::from(table.zero()) * scale);
                    for (j, byte) in bytes.iter().enumerate() {
                        (codes[j], codes[j + 16]) = (table.shifted(byte & 15), table.shifted(byte >> 4));
                    }
                }
            }
            Self::Q4K | Self::Q5K => {
                let (d, dmin) = (half(0), half(2));
                let five = self == Self::Q5K;
                let (high, stream) =
                    if five { (&block[16..48], &block[48..]) } else { (&[][..], &block[16..]) };
                for sub in 0..8 {
                    let (scale, min) = six_bits(&block[4..16], sub);
                    (scales[sub], biases[sub]) = (d * f32::from(scale), -(dmin * f32::from(min)));
                    for (l, code) in codes[sub * 32..][..32].iter_mut().enumerate() {
                        let byte = stream[sub / 2 * 32 + l];
                        let four = if sub % 2 == 0 { byte & 15 } else { byte >> 4 };
                        *code = four | high.get(l).map_or(0, |bits| bits >> sub & 1) << 4;
                    }
                }
            }
            Self::Q6K => {
                let d = half(208);
                for (at, code) in codes.iter_mut().enumerate() {
                    // [half of 128][quarter of 32][l]
                    let (part, quarter, l) = (at / 128, at / 32 % 4, at % 32);
                    let low = block[part * 64 + quarter % 2 * 32 + l];
                    let low = if quarter < 2 { low & 15 } else { low >> 4 };
                    *code = low | (block[128 + part * 32 + l] >> (quarter * 2) & 3) << 4;
                }
                for (at, (scale, bias)) in scales.iter_mut().zip(biases).enumerate() {
                    *scale = d * f32::from(block[192 + at] as i8);
                    *bias = -32.0 * *scale;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, TensorView};

    /// Every format's affine form gives the bits of its decoder.
    #[test]
    fn affine_forms_are_the_decoders_numbers() {
        let others = [3, 4, 6, 8]
            .map(|bits| Quant::Affine { bits, group: 64 })
            .into_iter()
            .chain([Quant::Int4 { group: 32 }, Quant::Fp4 { group: 32 }]);
        let (rows, cols) = (3, 512);
        for format in GgufBlock::ALL.map(Quant::Gguf).into_iter().chain(others) {
            // Bytes whose halves are small numbers: no infinities.
            let row_bytes = format.code_bytes(cols);
            let bytes: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 31 + i / 7) as u8 & 0xbf).collect();
            let halves: Vec<u8> =
                (0..rows * 16).flat_map(|i| f16::from_f32(0.25 + i as f32 * 0.01).to_le_bytes()).collect();
            let groups = format.affine().map_or(0, |form| cols / form.group);
            let scales = TensorView {
                name: "scales",
                dtype: DType::F16,
                rows,
                cols: groups,
                row_stride_bytes: 32,
                bytes: &halves,
            };
            let gguf = matches!(format, Quant::Gguf(_));
            let view = QuantView {
                name: "test",
                format,
                rows,
                cols,
                row_stride_bytes: row_bytes,
                bytes: &bytes,
                scales: (!gguf).then_some(scales),
                biases: matches!(format, Quant::Affine { .. }).then_some(scales),
                origin: (0, 0),
            };
            view.check().unwrap();
            for (row, wide) in (0..rows).flat_map(|row| [(row, false), (row, true)]) {
                let form = if wide { format.wide_affine() } else { format.affine() }.unwrap();
                let mut want = vec![0.0; cols];
                view.decode(row, 0..cols, &mut want);
                let groups = cols / form.group;
                let (mut codes, mut scales, mut biases) =
                    (vec![0; cols], vec![0.0; groups], vec![0.0; groups]);
                match wide {
                    true => view.wide_affine_row(row, &mut codes, &mut scales, &mut biases),
                    false => view.affine_row(row, &mut codes, &mut scales, &mut biases),
                }
                for (col, want) in want.iter().enumerate() {
                    let at = col / form.group;
                    let got = f32::from(codes[col]) * scales[at] + biases[at];
                    assert!(
                        usize::from(codes[col]) < 1 << form.bits,
                        "{format}, {form:?}: code {}",
                        codes[col]
                    );
                    assert_eq!(got, *want, "{format}, {form:?}: row {row}, column {col}");
                }
            }
        }
    }
}
