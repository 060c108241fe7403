//! Quantised matrices for tests: random codes and scales, written into bytes by the formats' own descriptions, and the
//! numbers that they mean in f64. Nothing here is shared with the decoders that are tested.

use half::f16;

use super::{Random, Tensor};
use crate::{DType, GgufBlock, Quant, QuantView};

/// Formats that the suite tests: those of checkpoints people have, and blocks that fit nothing.
pub const QUANTS: &[Quant] = &[
    Quant::Affine { bits: 2, group: 64 },
    Quant::Affine { bits: 3, group: 64 },
    Quant::Affine { bits: 4, group: 32 },
    Quant::Affine { bits: 4, group: 64 },
    Quant::Affine { bits: 5, group: 64 },
    Quant::Affine { bits: 6, group: 64 },
    Quant::Affine { bits: 8, group: 32 },
    Quant::Affine { bits: 8, group: 128 },
    Quant::Int4 { group: 32 },
    Quant::Int4 { group: 128 },
    Quant::Fp8 { rows: 128, cols: 128 },
    Quant::Fp8 { rows: 3, cols: 5 },
    // A scale per output, and one of the whole matrix.
    Quant::Fp8 { rows: 1, cols: 1 << 12 },
    Quant::Fp8 { rows: 1 << 12, cols: 1 << 12 },
    Quant::Gguf(GgufBlock::Q4_0),
    Quant::Gguf(GgufBlock::Q4_1),
    Quant::Gguf(GgufBlock::Q5_0),
    Quant::Gguf(GgufBlock::Q5_1),
    Quant::Gguf(GgufBlock::Q8_0),
    Quant::Gguf(GgufBlock::Q2K),
    Quant::Gguf(GgufBlock::Q3K),
    Quant::Gguf(GgufBlock::Q4K),
    Quant::Gguf(GgufBlock::Q5K),
    Quant::Gguf(GgufBlock::Q6K),
    Quant::Gguf(GgufBlock::Iq4Nl),
    Quant::Gguf(GgufBlock::Iq4Xs),
    Quant::Gguf(GgufBlock::Mxfp4),
    Quant::Fp4 { group: 16 },
    Quant::Fp4 { group: 32 },
];

/// What four bits stand for: E2M1, and the values of IQ4_NL and IQ4_XS.
const E2M1: [f64; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
const IQ4: [f64; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// A quantised matrix `[rows, cols]` and its numbers.
pub(super) struct Coded {
    pub(super) format: Quant,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) bytes: Vec<u8>,
    scales: Option<Tensor>,
    biases: Option<Tensor>,
    /// Row-major.
    pub(super) values: Vec<f64>,
}

impl Coded {
    /// Random codes; numbers of about 0.1. `scales` is the type of scales where a format leaves it open.
    pub(super) fn random(seed: u64, format: Quant, scales: DType, rows: usize, cols: usize) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut coded =
            Coded { format, rows, cols, bytes: Vec::new(), scales: None, biases: None, values: Vec::new() };
        match format {
            Quant::Affine { bits, group } => coded.grouped(&mut random, bits, group, scales, true),
            Quant::Int4 { group } => coded.grouped(&mut random, 4, group, scales, false),
            Quant::Fp4 { group } => coded.fp4(&mut random, group, scales),
            Quant::Fp8 { rows: high, cols: wide } => coded.fp8(&mut random, high, wide),
            Quant::Gguf(block) => {
                for _ in 0..rows * cols / block.cols() {
                    coded.block(&mut random, block);
                }
            }
        }
        assert_eq!(coded.values.len(), rows * cols);
        coded
    }

    pub(super) fn view(&self) -> QuantView<'_> {
        QuantView {
            name: "test",
            format: self.format,
            rows: self.rows,
            cols: self.cols,
            row_stride_bytes: self.bytes.len() / self.rows,
            bytes: &self.bytes,
            scales: self.scales.as_ref().map(Tensor::view),
            biases: self.biases.as_ref().map(Tensor::view),
            origin: (0, 0),
        }
    }

    /// The numbers of a part.
    pub(super) fn part(&self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Vec<f64> {
        rows.flat_map(|row| self.values[row * self.cols..][cols.clone()].to_vec()).collect()
    }

    /// Codes of `bits` in a stream, lowest bit first; `code * scale + bias`, or `(code - 8) * scale`.
    fn grouped(&mut self, random: &mut Random, bits: usize, group: usize, dtype: DType, biased: bool) {
        let groups = self.rows * self.cols / group;
        let middle = f64::from(1u32 << (bits - 1));
        let scales = Tensor::new(
            dtype,
            self.rows,
            self.cols / group,
            (0..groups).map(|_| 0.4 / middle * (0.3 + random.unit())),
        );
        let biases = Tensor::new(
            dtype,
            self.rows,
            self.cols / group,
            scales.values.iter().map(|s| -middle * s + 0.02),
        );
        for row in 0..self.rows {
            let mut stream = vec![false; self.cols * bits];
            for col in 0..self.cols {
                let code = random.next() >> 20 & ((1 << bits) - 1);
                (0..bits).for_each(|bit| stream[col * bits + bit] = code >> bit & 1 == 1);
                let at = row * (self.cols / group) + col / group;
                let offset = if biased { biases.values[at] } else { -8.0 * scales.values[at] };
                self.values.push(code as f64 * scales.values[at] + offset);
            }
            let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
            self.bytes.extend(stream.chunks(8).map(byte));
        }
        self.scales = Some(scales);
        self.biases = biased.then_some(biases);
    }

    /// Sign, 4 bits of exponent (bias 7), 3 bits of fraction; one scale per block of rows and columns.
    fn fp8(&mut self, random: &mut Random, high: usize, wide: usize) {
        let (down, across) = (self.rows.div_ceil(high), self.cols.div_ceil(wide));
        let scales =
            Tensor::new(DType::F32, down, across, (0..down * across).map(|_| 0.05 * (0.3 + random.unit())));
        for row in 0..self.rows {
            for col in 0..self.cols {
                let bits = random.next() >> 20;
                // Exponents from that of subnormals to the range of 4.
                let (sign, exponent, fraction) = (bits & 1, (bits >> 1) % 10, bits >> 8 & 7);
                self.bytes.push((sign << 7 | exponent << 3 | fraction) as u8);
                let magnitude = match exponent {
                    0 => fraction as f64 / 512.0,
                    _ => (8 + fraction) as f64 / 8.0 * 2f64.powi(exponent as i32 - 7),
                };
                let scale = scales.values[row / high * across + col / wide];
                self.values.push(if sign == 1 { -magnitude } else { magnitude } * scale);
            }
        }
        self.scales = Some(scales);
    }

    /// Codes of 4 bits, lowest first, times a scale per group.
    fn fp4(&mut self, random: &mut Random, group: usize, dtype: DType) {
        let groups = self.rows * self.cols / group;
        let numbers = (0..groups).map(|_| 0.06 * (0.3 + random.unit()));
        let scales = Tensor::new(dtype, self.rows, self.cols / group, numbers);
        for at in (0..self.rows * self.cols).step_by(2) {
            let code = (random.next() >> 20) as u8;
            self.bytes.push(code);
            let scale = scales.values[at / group];
            self.values.extend([code & 15, code >> 4].map(|code| E2M1[usize::from(code)] * scale));
        }
        self.scales = Some(scales);
    }

    /// One block of GGUF.
    fn block(&mut self, random: &mut Random, block: GgufBlock) {
        let half = |x: f64| f16::from_f64(x);
        let mut codes = |bits: u32| -> Vec<u8> {
            (0..block.cols()).map(|_| (random.next() >> 20 & ((1 << bits) - 1)) as u8).collect()
        };
        match block {
            GgufBlock::Q4_0 | GgufBlock::Q4_1 | GgufBlock::Q5_0 | GgufBlock::Q5_1 => {
                let five = matches!(block, GgufBlock::Q5_0 | GgufBlock::Q5_1);
                let minimum = matches!(block, GgufBlock::Q4_1 | GgufBlock::Q5_1);
                let q = codes(if five { 5 } else { 4 });
                let d = half(0.02 * (0.3 + random.unit()));
                let m = half(-0.15 * random.unit());
                self.bytes.extend(d.to_le_bytes());
                if minimum {
                    self.bytes.extend(m.to_le_bytes());
                }
                if five {
                    let high = (0..32).fold(0u32, |high, j| high | u32::from(q[j] >> 4) << j);
                    self.bytes.extend(high.to_le_bytes());
                }
                self.bytes.extend((0..16).map(|j| q[j] & 15 | (q[j + 16] & 15) << 4));
                let zero = if five { 16.0 } else { 8.0 };
                self.values.extend(q.iter().map(|q| match minimum {
                    true => d.to_f64() * f64::from(*q) + m.to_f64(),
                    false => d.to_f64() * (f64::from(*q) - zero),
                }));
            }
            GgufBlock::Q8_0 => {
                let q = codes(8);
                let d = half(0.002 * (0.3 + random.unit()));
                self.bytes.extend(d.to_le_bytes());
                self.bytes.extend_from_slice(&q);
                self.values.extend(q.iter().map(|q| d.to_f64() * f64::from(*q as i8)));
            }
            GgufBlock::Q2K => {
                let (q, scales, minima) = (codes(2), codes(4), codes(4));
                let (d, dmin) = (half(0.015 * (0.3 + random.unit())), half(0.02 * (0.3 + random.unit())));
                self.bytes.extend((0..16).map(|sub| scales[sub] | minima[sub] << 4));
                // Of each 128: one byte has element l of four thirty-twos.
                for part in 0..2 {
                    let of = |l: usize, quarter: usize| q[part * 128 + quarter * 32 + l] << (2 * quarter);
                    self.bytes.extend((0..32).map(|l| of(l, 0) | of(l, 1) | of(l, 2) | of(l, 3)));
                }
                self.bytes.extend(d.to_le_bytes());
                self.bytes.extend(dmin.to_le_bytes());
                self.values.extend(q.iter().enumerate().map(|(at, q)| {
                    let (scale, minimum) = (f64::from(scales[at / 16]), f64::from(minima[at / 16]));
                    d.to_f64() * scale * f64::from(*q) - dmin.to_f64() * minimum
                }));
            }
            GgufBlock::Q3K => {
                let (q, scales) = (codes(3), codes(6));
                let d = half(0.003 * (0.3 + random.unit()));
                self.bytes.extend(
                    (0..32).map(|l| (0..8).fold(0, |byte, eighth| byte | q[eighth * 32 + l] >> 2 << eighth)),
                );
                for part in 0..2 {
                    let of =
                        |l: usize, quarter: usize| (q[part * 128 + quarter * 32 + l] & 3) << (2 * quarter);
                    self.bytes.extend((0..32).map(|l| of(l, 0) | of(l, 1) | of(l, 2) | of(l, 3)));
                }
                // Four lower bits of scales j and j + 8, then two upper bits of j, j + 4, j + 8 and j + 12.
                self.bytes.extend((0..8).map(|j| scales[j] & 15 | (scales[j + 8] & 15) << 4));
                let upper = |j: usize| scales[j] >> 4;
                let byte = |j| upper(j) | upper(j + 4) << 2 | upper(j + 8) << 4 | upper(j + 12) << 6;
                self.bytes.extend((0..4).map(byte));
                self.bytes.extend(d.to_le_bytes());
                self.values.extend(
                    q.iter().enumerate().map(|(at, q)| {
                        d.to_f64() * (f64::from(scales[at / 16]) - 32.0) * (f64::from(*q) - 4.0)
                    }),
                );
            }
            GgufBlock::Iq4Nl => {
                let q = codes(4);
                let d = half(0.002 * (0.3 + random.unit()));
                self.bytes.extend(d.to_le_bytes());
                self.bytes.extend((0..16).map(|j| q[j] | q[j + 16] << 4));
                self.values.extend(q.iter().map(|q| d.to_f64() * IQ4[usize::from(*q)]));
            }
            GgufBlock::Iq4Xs => {
                let (q, scales) = (codes(4), codes(6));
                let d = half(0.0001 * (0.3 + random.unit()));
                self.bytes.extend(d.to_le_bytes());
                let high = (0..8).fold(0u16, |high, sub| high | u16::from(scales[sub] >> 4) << (2 * sub));
                self.bytes.extend(high.to_le_bytes());
                self.bytes.extend((0..4).map(|j| scales[2 * j] & 15 | (scales[2 * j + 1] & 15) << 4));
                for part in q.chunks(32) {
                    self.bytes.extend((0..16).map(|j| part[j] | part[j + 16] << 4));
                }
                self.values.extend(
                    q.iter().enumerate().map(|(at, q)| {
                        d.to_f64() * (f64::from(scales[at / 32]) - 32.0) * IQ4[usize::from(*q)]
                    }),
                );
            }
            GgufBlock::Mxfp4 => {
                let (q, exponent) = (codes(4), (random.next() >> 20 & 3) as u8);
                self.bytes.push(120 + exponent);
                self.bytes.extend((0..16).map(|j| q[j] | q[j + 16] << 4));
                let scale = 2f64.powi(i32::from(exponent) - 7);
                self.values.extend(q.iter().map(|q| E2M1[usize::from(*q)] * scale));
            }
            GgufBlock::Q4K | GgufBlock::Q5K => {
                let five = block == GgufBlock::Q5K;
                let q = codes(if five { 5 } else { 4 });
                let (scales, minima) = (codes(6), codes(6));
                let (d, dmin) = (half(0.0006 * (0.3 + random.unit())), half(0.005 * (0.3 + random.unit())));
                self.bytes.extend(d.to_le_bytes());
                self.bytes.extend(dmin.to_le_bytes());
                // 12 bytes: scales 0..4 with the upper bits of 4..8, minima 0..4 likewise, lower bits of 4..8.
                self.bytes.extend((0..4).map(|j| scales[j] | scales[j + 4] >> 4 << 6));
                self.bytes.extend((0..4).map(|j| minima[j] | minima[j + 4] >> 4 << 6));
                self.bytes.extend((4..8).map(|j| scales[j] & 15 | (minima[j] & 15) << 4));
                if five {
                    self.bytes.extend(
                        (0..32).map(|l| (0..8).fold(0, |byte, sub| byte | q[sub * 32 + l] >> 4 << sub)),
                    );
                }
                // 64 numbers in 32 bytes: the first 32 in the lower halves.
                for pair in 0..4 {
                    self.bytes
                        .extend((0..32).map(|l| q[pair * 64 + l] & 15 | (q[pair * 64 + 32 + l] & 15) << 4));
                }
                self.values.extend(q.iter().enumerate().map(|(at, q)| {
                    let (scale, minimum) = (f64::from(scales[at / 32]), f64::from(minima[at / 32]));
                    d.to_f64() * scale * f64::from(*q) - dmin.to_f64() * minimum
                }));
            }
            GgufBlock::Q6K => {
                let (q, scales) = (codes(6), codes(8));
                let d = half(0.00008 * (0.3 + random.unit()));
                // Of each 128: quarters 0 and 2 share the bytes of 32, 1 and 3 those of the next 32.
                for part in 0..2 {
                    let low = |at: usize| q[part * 128 + at] & 15;
                    self.bytes.extend((0..64).map(|at| low(at) | low(at + 64) << 4));
                }
                for part in 0..2 {
                    let high = |at: usize| q[part * 128 + at] >> 4;
                    let byte = |l| high(l) | high(l + 32) << 2 | high(l + 64) << 4 | high(l + 96) << 6;
                    self.bytes.extend((0..32).map(byte));
                }
                self.bytes.extend_from_slice(&scales[..16]);
                self.bytes.extend(d.to_le_bytes());
                self.values.extend(
                    q.iter().enumerate().map(|(at, q)| {
                        d.to_f64() * f64::from(scales[at / 16] as i8) * (f64::from(*q) - 32.0)
                    }),
                );
            }
        }
    }
}
