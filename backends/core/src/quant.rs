//! Quantised matrices as checkpoints store them: what the codes mean, how a part is cut out, and the reference decoder
//! to f32. `models` makes the views, backends multiply by them; a format is read in this file and in `affine`, and
//! nowhere else.

use std::fmt;
use std::ops::Range;

use half::f16;

use crate::weight::{TensorView, widen};
use crate::{BackendError, DType};

/// How codes and scales make numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quant {
    /// MLX affine: `code * scale + bias` per group along a row. Codes of `bits` (2 to 8) are a little-endian stream of
    /// bits in row order; scales and biases `[rows, cols / group]`.
    Affine {
        /// Bits of a code.
        bits: usize,
        /// Columns that share a scale.
        group: usize,
    },
    /// compressed-tensors `pack-quantized`, symmetric: `(code - 8) * scale`, codes of 4 bits, lowest first; scales
    /// `[rows, cols / group]`.
    Int4 {
        /// Columns that share a scale.
        group: usize,
    },
    /// DeepSeek's FP8: E4M3 codes, one f32 scale per block of rows and columns.
    Fp8 {
        /// Rows that share a scale.
        rows: usize,
        /// Columns that share a scale.
        cols: usize,
    },
    /// E2M1 codes of 4 bits, lowest first, as MXFP4 and NVFP4 have them; scales `[rows, cols / group]`.
    Fp4 {
        /// Columns that share a scale.
        group: usize,
    },
    /// GGUF blocks of 32 or 256 columns, scales among the codes.
    Gguf(GgufBlock),
}

/// What codes of 4 bits stand for that are no whole numbers in order: whole numbers all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeTable {
    /// Denser around zero: IQ4_NL and IQ4_XS.
    Iq4,
    /// E2M1, times two.
    E2m1,
}

impl CodeTable {
    /// By code.
    pub const fn values(self) -> [i8; 16] {
        match self {
            Self::Iq4 => [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
            Self::E2m1 => [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
        }
    }

    /// What is added to values so that none is below zero: a power of two.
    pub const fn zero(self) -> u8 {
        match self {
            Self::Iq4 => 128,
            Self::E2m1 => 16,
        }
    }

    /// The value of a code, from [`CodeTable::zero`] on.
    pub const fn shifted(self, code: u8) -> u8 {
        self.zero().wrapping_add_signed(self.values()[code as usize & 15])
    }
}

/// Block formats of GGUF. Source: <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgufBlock {
    /// 32 x 4 bits, `d (q - 8)`.
    Q4_0,
    /// 32 x 4 bits, `d q + m`.
    Q4_1,
    /// 32 x 5 bits, `d (q - 16)`.
    Q5_0,
    /// 32 x 5 bits, `d q + m`.
    Q5_1,
    /// 32 x 8 bits, `d q`.
    Q8_0,
    /// 256 x 2 bits, sixteen scales and minima of 4 bits.
    Q2K,
    /// 256 x 3 bits, sixteen scales of 6 bits.
    Q3K,
    /// 256 x 4 bits, eight scales and minima of 6 bits.
    Q4K,
    /// 256 x 5 bits, eight scales and minima of 6 bits.
    Q5K,
    /// 256 x 6 bits, sixteen scales of 8 bits.
    Q6K,
    /// 32 x 4 bits of [`CodeTable::Iq4`], `d v`.
    Iq4Nl,
    /// 256 x 4 bits of [`CodeTable::Iq4`], eight scales of 6 bits.
    Iq4Xs,
    /// 32 x 4 bits of [`CodeTable::E2m1`], a scale that is a power of two.
    Mxfp4,
}

impl GgufBlock {
    /// All of them.
    pub const ALL: [GgufBlock; 13] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Mxfp4,
    ];

    /// That of this name in GGUF tools.
    pub fn named(name: &str) -> Option<GgufBlock> {
        Self::ALL.into_iter().find(|block| block.name() == name)
    }

    /// Columns of a block.
    pub const fn cols(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl | Self::Mxfp4 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => 256,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Nl => 18,
            Self::Iq4Xs => 136,
            Self::Mxfp4 => 17,
        }
    }

    /// The name in GGUF tools.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
            Self::Mxfp4 => "MXFP4",
        }
    }

    /// What codes stand for, where they are no numbers in order.
    pub const fn table(self) -> Option<CodeTable> {
        match self {
            Self::Iq4Nl | Self::Iq4Xs => Some(CodeTable::Iq4),
            Self::Mxfp4 => Some(CodeTable::E2m1),
            _ => None,
        }
    }

    /// The scale of group `sub` of a block whose codes are of a table, and the 16 bytes of its codes: the first sixteen are the lower
    /// halves.
    pub(crate) fn table_group(self, block: &[u8], sub: usize) -> (f32, &[u8]) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        match self {
            Self::Iq4Xs => (half(0) * f32::from(iq4_scale(block, sub)), &block[8 + sub * 16..][..16]),
            // Half of the power of two, as values are doubled.
            Self::Mxfp4 => (e8m0(block[0]) / 2.0, &block[1..17]),
            _ => (half(0), &block[2..18]),
        }
    }

    /// The numbers of one block.
    fn decode(self, block: &[u8], out: &mut [f32]) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let fifth = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => {
                let (d, mut at) = (half(0), 2);
                let m = match self {
                    Self::Q4_1 | Self::Q5_1 => {
                        at += 2;
                        Some(half(2))
                    }
                    _ => None,
                };
                let (high, zero) = match self {
                    Self::Q5_0 | Self::Q5_1 => {
                        at += 4;
                        (fifth(at - 4), 16)
                    }
                    _ => (0, 8),
                };
                for (j, code) in block[at..at + 16].iter().enumerate() {
                    for (place, four) in [(j, code & 15), (j + 16, code >> 4)] {
                        let q = i32::from(four) | ((high >> place & 1) << 4) as i32;
                        out[place] = match m {
                            Some(m) => q as f32 * d + m,
                            None => (q - zero) as f32 * d,
                        };
                    }
                }
            }
            Self::Q8_0 => {
                let d = half(0);
                for (x, code) in out.iter_mut().zip(&block[2..34]) {
                    *x = f32::from(*code as i8) * d;
                }
            }
            Self::Q2K => {
                let (d, dmin) = (half(80), half(82));
                for (at, x) in out.iter_mut().enumerate() {
                    let both = block[at / 16];
                    let (scale, min) = (d * f32::from(both & 15), dmin * f32::from(both >> 4));
                    *x = scale * f32::from(two_bits(&block[16..80], at)) - min;
                }
            }
            Self::Q3K => {
                let d = half(108);
                for (at, x) in out.iter_mut().enumerate() {
                    let scale = d * f32::from(signed_six_bits(&block[96..108], at / 16));
                    *x = scale * (f32::from(three_bits(block, at)) - 4.0);
                }
            }
            Self::Iq4Nl | Self::Iq4Xs | Self::Mxfp4 => {
                let values = self.table().unwrap_or(CodeTable::Iq4).values();
                for (sub, out) in out.chunks_exact_mut(32).enumerate() {
                    let (scale, codes) = self.table_group(block, sub);
                    for (j, code) in codes.iter().enumerate() {
                        out[j] = scale * f32::from(values[usize::from(code & 15)]);
                        out[j + 16] = scale * f32::from(values[usize::from(code >> 4)]);
                    }
                }
            }
            Self::Q4K | Self::Q5K => {
                let (d, dmin) = (half(0), half(2));
                let (high, codes) =
                    if self == Self::Q5K { (&block[16..48], &block[48..]) } else { (&[][..], &block[16..]) };
                for sub in 0..8 {
                    let (scale, min) = six_bits(&block[4..16], sub);
                    let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
                    for (l, x) in out[sub * 32..][..32].iter_mut().enumerate() {
                        let code = codes[sub / 2 * 32 + l];
                        let four = if sub % 2 == 0 { code & 15 } else { code >> 4 };
                        let fifth = high.get(l).map_or(0, |bits| bits >> sub & 1);
                        *x = scale * f32::from(four | fifth << 4) - min;
                    }
                }
            }
            Self::Q6K => {
                let d = half(208);
                for (at, x) in out.iter_mut().enumerate() {
                    // [half of 128][quarter of 32][l]
                    let (part, quarter, l) = (at / 128, at / 32 % 4, at % 32);
                    let low = block[part * 64 + quarter % 2 * 32 + l];
                    let low = if quarter < 2 { low & 15 } else { low >> 4 };
                    let high = block[128 + part * 32 + l] >> (quarter * 2) & 3;
                    let scale = block[192 + part * 8 + quarter * 2 + l / 16] as i8;
                    *x = d * f32::from(scale) * (f32::from(low | high << 4) - 32.0);
                }
            }
        }
    }
}

/// Scale and minimum of sub-block `sub` of 8, of the 12 packed bytes of Q4_K and Q5_K.
pub(crate) fn six_bits(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let both = packed[sub + 4];
        (both & 15 | packed[sub - 4] >> 6 << 4, both >> 4 | packed[sub] >> 6 << 4)
    }
}

/// Code `at` of the 256 of Q2_K and Q3_K whose two bits are in 64 bytes: `[half of 128][l]`, four quarters of 32 in a byte.
pub(crate) fn two_bits(packed: &[u8], at: usize) -> u8 {
    packed[at / 128 * 32 + at % 32] >> (at / 32 % 4 * 2) & 3
}

/// Code `at` of a block of Q3_K: the third bits come first, those of element `l` of each eighth in byte `l`.
pub(crate) fn three_bits(block: &[u8], at: usize) -> u8 {
    two_bits(&block[32..96], at) | (block[at % 32] >> (at / 32) & 1) << 2
}

/// Scale `sub` of 16, of the 12 packed bytes of Q3_K: four bits of the first eight and of the others, then two bits of all.
pub(crate) fn signed_six_bits(packed: &[u8], sub: usize) -> i8 {
    let low = packed[sub % 8] >> (sub / 8 * 4) & 15;
    let high = packed[8 + sub % 4] >> (sub / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// Two to the power that the byte says; 255 is not a number.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => 2f32.powi(-127),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Scale `sub` of 8, of a block of IQ4_XS.
pub(crate) fn iq4_scale(block: &[u8], sub: usize) -> i8 {
    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * sub) & 3;
    let low = block[4 + sub / 2] >> (sub % 2 * 4) & 15;
    (low | (high as u8) << 4) as i8 - 32
}

impl Quant {
    /// Columns can be cut at multiples of this only.
    pub const fn align_cols(self) -> usize {
        match self {
            Quant::Affine { group, .. } | Quant::Int4 { group } | Quant::Fp4 { group } => group,
            Quant::Fp8 { .. } => 1,
            Quant::Gguf(block) => block.cols(),
        }
    }

    /// Bytes of the codes of `cols` columns (a multiple of [`Quant::align_cols`]).
    pub const fn code_bytes(self, cols: usize) -> usize {
        match self {
            Quant::Affine { bits, .. } => cols * bits / 8,
            Quant::Int4 { .. } | Quant::Fp4 { .. } => cols / 2,
            Quant::Fp8 { .. } => cols,
            Quant::Gguf(block) => cols / block.cols() * block.bytes(),
        }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Quant::Affine { bits, group } => write!(f, "mlx {bits}-bit, groups of {group}"),
            Quant::Int4 { group } => write!(f, "int4, groups of {group}"),
            Quant::Fp8 { rows, cols } => write!(f, "fp8, blocks of {rows} x {cols}"),
            Quant::Fp4 { group } => write!(f, "fp4, groups of {group}"),
            Quant::Gguf(block) => f.write_str(block.name()),
        }
    }
}

/// A quantised matrix `[rows, cols]`, or a part of one.
#[derive(Clone, Copy, Debug)]
pub struct QuantView<'a> {
    /// Tensor name as in the checkpoint, for messages.
    pub name: &'a str,
    /// What the codes mean.
    pub format: Quant,
    /// Number of rows (outputs).
    pub rows: usize,
    /// Number of columns (inputs, K).
    pub cols: usize,
    /// Bytes from the codes of one row to those of the next.
    pub row_stride_bytes: usize,
    /// Codes, beginning at `[0, 0]`.
    pub bytes: &'a [u8],
    /// Scales, beginning with the one of `[0, 0]`; `None` where they are among the codes.
    pub scales: Option<TensorView<'a>>,
    /// Biases of [`Quant::Affine`], as the scales.
    pub biases: Option<TensorView<'a>>,
    /// Row and column of `[0, 0]` within its scale's block: `(0, 0)` but in parts of [`Quant::Fp8`].
    pub origin: (usize, usize),
}

impl<'a> QuantView<'a> {
    /// Errors when codes or scales are fewer than the shape needs, or the shape is not one of the format.
    pub fn check(&self) -> Result<(), BackendError> {
        let error = |reason: String| Err(BackendError::Weight { name: self.name.to_owned(), reason });
        let (rows, cols, format) = (self.rows, self.cols, self.format);
        let sane = match format {
            Quant::Affine { bits, group } => (2..=8).contains(&bits) && group % 8 == 0 && group > 0,
            Quant::Int4 { group } | Quant::Fp4 { group } => group % 8 == 0 && group > 0,
            Quant::Fp8 { rows, cols } => rows > 0 && cols > 0,
            Quant::Gguf(_) => true,
        };
        if !sane || rows == 0 || cols == 0 || cols % format.align_cols() != 0 {
            return error(format!("{rows} x {cols} elements of {format}"));
        }
        let row = format.code_bytes(cols);
        let needed = (rows - 1).checked_mul(self.row_stride_bytes).and_then(|all| all.checked_add(row));
        if self.row_stride_bytes < row && rows > 1 || needed.is_none_or(|needed| self.bytes.len() < needed) {
            return error(format!("{} bytes of codes for {rows} x {cols} of {format}", self.bytes.len()));
        }
        let scales = match format {
            Quant::Affine { group, .. } | Quant::Int4 { group } | Quant::Fp4 { group } => {
                Some((rows, cols / group))
            }
            Quant::Fp8 { rows: high, cols: wide } => {
                let (row, col) = self.origin;
                Some(((row + rows).div_ceil(high), (col + cols).div_ceil(wide)))
            }
            Quant::Gguf(_) => None,
        };
        let biases = scales.filter(|_| matches!(format, Quant::Affine { .. }));
        for (what, wanted, view) in [("scales", scales, self.scales), ("biases", biases, self.biases)] {
            match (wanted, view) {
                (None, None) => {}
                (Some((rows, cols)), Some(view)) if view.rows >= rows && view.cols >= cols => view.check()?,
                (_, view) => {
                    let got = view.map_or((0, 0), |view| (view.rows, view.cols));
                    let wanted = wanted.unwrap_or((0, 0));
                    return error(format!("{what} {got:?} where {wanted:?} are needed"));
                }
            }
        }
        Ok(())
    }

    /// Rows and columns of this one. Errors when columns are not cut at [`Quant::align_cols`], or outside.
    pub fn cut(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Self, BackendError> {
        let align = self.format.align_cols();
        let inside = rows.end <= self.rows && cols.end <= self.cols && !rows.is_empty() && !cols.is_empty();
        if !inside || !cols.start.is_multiple_of(align) || !cols.end.is_multiple_of(align) {
            let (all_rows, all_cols) = (self.rows, self.cols);
            let reason =
                format!("rows {rows:?}, columns {cols:?} of {all_rows} x {all_cols} in groups of {align}");
            return Err(BackendError::Weight { name: self.name.to_owned(), reason });
        }
        let start = rows.start * self.row_stride_bytes + self.format.code_bytes(cols.start);
        let mut origin = (0, 0);
        let (scale_rows, scale_cols) = match self.format {
            Quant::Affine { group, .. } | Quant::Int4 { group } | Quant::Fp4 { group } => {
                (rows.clone(), cols.start / group..cols.end / group)
            }
            Quant::Fp8 { rows: high, cols: wide } => {
                let (top, left) = (self.origin.0 + rows.start, self.origin.1 + cols.start);
                origin = (top % high, left % wide);
                let down = top / high..(self.origin.0 + rows.end).div_ceil(high);
                (down, left / wide..(self.origin.1 + cols.end).div_ceil(wide))
            }
            Quant::Gguf(_) => (0..0, 0..0),
        };
        let part = |view: Option<TensorView<'a>>| {
            view.map(|view| view.cut(scale_rows.clone(), scale_cols.clone())).transpose()
        };
        Ok(QuantView {
            rows: rows.len(),
            cols: cols.len(),
            bytes: self.bytes.get(start..).unwrap_or_default(),
            scales: part(self.scales)?,
            biases: part(self.biases)?,
            origin,
            ..*self
        })
    }

    /// The codes of row `row`.
    pub fn codes(&self, row: usize) -> &'a [u8] {
        let start = row * self.row_stride_bytes;
        &self.bytes[start..start + self.format.code_bytes(self.cols)]
    }

    /// Columns `cols` (at multiples of [`Quant::align_cols`]) of row `row` in f32, each product and sum rounded once as
    /// the format's own library does. `out` is as long as `cols`.
    pub fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let codes = &self.codes(row)[self.format.code_bytes(cols.start)..self.format.code_bytes(cols.end)];
        match self.format {
            Quant::Gguf(block) => {
                let blocks = codes.chunks_exact(block.bytes());
                blocks.zip(out.chunks_exact_mut(block.cols())).for_each(|(b, out)| block.decode(b, out));
            }
            Quant::Affine { bits, group } => {
                let bytes = group * bits / 8;
                for (at, (codes, out)) in
                    codes.chunks_exact(bytes).zip(out.chunks_exact_mut(group)).enumerate()
                {
                    let at = cols.start / group + at;
                    let scale = self.scales.map_or(1.0, |scales| scales.float(row, at));
                    let bias = self.biases.map_or(0.0, |biases| biases.float(row, at));
                    for (i, x) in out.iter_mut().enumerate() {
                        *x = f32::from(code(codes, i, bits)) * scale + bias;
                    }
                }
            }
            Quant::Int4 { group } => {
                for (at, (codes, out)) in
                    codes.chunks_exact(group / 2).zip(out.chunks_exact_mut(group)).enumerate()
                {
                    let scale = self.scales.map_or(1.0, |s| s.float(row, cols.start / group + at));
                    for (i, x) in out.iter_mut().enumerate() {
                        *x = (f32::from(code(codes, i, 4)) - 8.0) * scale;
                    }
                }
            }
            Quant::Fp4 { group } => {
                let values = CodeTable::E2m1.values();
                for (at, (codes, out)) in
                    codes.chunks_exact(group / 2).zip(out.chunks_exact_mut(group)).enumerate()
                {
                    let scale = self.scales.map_or(1.0, |s| s.float(row, cols.start / group + at)) / 2.0;
                    for (i, x) in out.iter_mut().enumerate() {
                        *x = f32::from(values[usize::from(code(codes, i, 4))]) * scale;
                    }
                }
            }
            Quant::Fp8 { rows: high, cols: wide } => {
                let down = (self.origin.0 + row) / high;
                for (col, (code, x)) in cols.zip(codes.iter().zip(out)) {
                    let scale = self.scales.map_or(1.0, |s| s.float(down, (self.origin.1 + col) / wide));
                    *x = e4m3(*code) * scale;
                }
            }
        }
    }
}

/// Code `index` of a little-endian stream of codes of `bits`.
pub(crate) fn code(stream: &[u8], index: usize, bits: usize) -> u8 {
    let (byte, shift) = (index * bits / 8, index * bits % 8);
    let pair = u16::from(stream[byte]) | u16::from(stream.get(byte + 1).copied().unwrap_or(0)) << 8;
    (pair >> shift) as u8 & ((1u16 << bits) - 1) as u8
}

/// E4M3 without infinities, as FP8 checkpoints have it.
pub fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (code >> 3 & 15, f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 8.0 * 2f32.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    };
    if code & 128 != 0 { -magnitude } else { magnitude }
}

/// A matrix `[rows, cols]` as a checkpoint stores it.
#[derive(Clone, Copy, Debug)]
pub enum MatrixView<'a> {
    /// Numbers.
    Plain(TensorView<'a>),
    /// Codes and scales.
    Quantised(QuantView<'a>),
}

impl<'a> MatrixView<'a> {
    /// Tensor name as in the checkpoint, for messages.
    pub fn name(&self) -> &'a str {
        match self {
            MatrixView::Plain(view) => view.name,
            MatrixView::Quantised(view) => view.name,
        }
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        match self {
            MatrixView::Plain(view) => view.rows,
            MatrixView::Quantised(view) => view.rows,
        }
    }

    /// Number of columns (inputs, K).
    pub fn cols(&self) -> usize {
        match self {
            MatrixView::Plain(view) => view.cols,
            MatrixView::Quantised(view) => view.cols,
        }
    }

    /// Columns can be cut at multiples of this only.
    pub fn align_cols(&self) -> usize {
        match self {
            MatrixView::Plain(_) => 1,
            MatrixView::Quantised(view) => view.format.align_cols(),
        }
    }

    /// Bytes of the matrix itself, scales included.
    pub fn len_bytes(&self) -> u64 {
        let plain = |view: &TensorView<'_>| (view.rows * view.cols * view.dtype.bytes()) as u64;
        match self {
            MatrixView::Plain(view) => plain(view),
            MatrixView::Quantised(view) => {
                let codes = (view.rows * view.format.code_bytes(view.cols)) as u64;
                codes + [&view.scales, &view.biases].into_iter().flatten().map(plain).sum::<u64>()
            }
        }
    }

    /// Errors when there are fewer bytes than the shape needs.
    pub fn check(&self) -> Result<(), BackendError> {
        match self {
            MatrixView::Plain(view) => view.check(),
            MatrixView::Quantised(view) => view.check(),
        }
    }

    /// Rows and columns of this one. Errors when that lies outside, or a quantised group would be cut.
    pub fn cut(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Self, BackendError> {
        match self {
            MatrixView::Plain(view) => view.cut(rows, cols).map(MatrixView::Plain),
            MatrixView::Quantised(view) => view.cut(rows, cols).map(MatrixView::Quantised),
        }
    }

    /// Columns `cols` of row `row` in f32; see [`QuantView::decode`].
    pub fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        match self {
            MatrixView::Plain(view) => {
                let item = view.dtype.bytes();
                widen(view.dtype, &view.row(row)[cols.start * item..cols.end * item], out);
            }
            MatrixView::Quantised(view) => view.decode(row, cols, out),
        }
    }

    /// The element type, when the matrix is not quantised.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            MatrixView::Plain(view) => Some(view.dtype),
            MatrixView::Quantised(_) => None,
        }
    }
}

impl<'a> From<TensorView<'a>> for MatrixView<'a> {
    fn from(view: TensorView<'a>) -> Self {
        MatrixView::Plain(view)
    }
}

impl<'a> From<QuantView<'a>> for MatrixView<'a> {
    fn from(view: QuantView<'a>) -> Self {
        MatrixView::Quantised(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_is_what_the_format_says() {
        // Zero, smallest subnormal, smallest normal, one, largest, its negative.
        let cases =
            [(0, 0.0), (1, 2f32.powi(-9)), (8, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0), (0xfe, -448.0)];
        for (code, want) in cases {
            assert_eq!(e4m3(code), want, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan());
    }

    #[test]
    fn codes_of_every_width_come_out_of_the_stream() {
        for bits in 2..=8 {
            let values: Vec<u8> =
                (0..16u32).map(|i| (i * 7 + 1) as u8 & ((1u16 << bits) - 1) as u8).collect();
            let mut stream = vec![0u8; 2 * bits];
            for (i, value) in values.iter().enumerate() {
                for bit in 0..bits {
                    let at = i * bits + bit;
                    stream[at / 8] |= (value >> bit & 1) << (at % 8);
                }
            }
            let got: Vec<u8> = (0..16).map(|i| code(&stream, i, bits)).collect();
            assert_eq!(got, values, "{bits} bits");
        }
    }

    #[test]
    fn a_part_of_an_fp8_matrix_keeps_its_scales() {
        // 3 x 5 codes in blocks of 2 x 2: 2 x 3 scales.
        let codes: Vec<u8> = (0x30..0x3f).collect();
        let scales: Vec<u8> = (1..=6u8).flat_map(|s| f32::from(s).to_le_bytes()).collect();
        let scales = TensorView {
            name: "s",
            dtype: DType::F32,
            rows: 2,
            cols: 3,
            row_stride_bytes: 12,
            bytes: &scales,
        };
        let whole = QuantView {
            name: "w",
            format: Quant::Fp8 { rows: 2, cols: 2 },
            rows: 3,
            cols: 5,
            row_stride_bytes: 5,
            bytes: &codes,
            scales: Some(scales),
            biases: None,
            origin: (0, 0),
        };
        whole.check().unwrap();
        let mut all = [[0.0; 5]; 3];
        (0..3).for_each(|row| whole.decode(row, 0..5, &mut all[row]));
        // Row 2, column 4 is in the block of scale 6.
        assert_eq!(all[2][4], e4m3(0x3e) * 6.0);
        let part = whole.cut(1..3, 1..4).unwrap().cut(0..2, 1..3).unwrap();
        part.check().unwrap();
        for row in 0..2 {
            let mut got = [0.0; 2];
            part.decode(row, 0..2, &mut got);
            assert_eq!(got, all[row + 1][2..4]);
        }
    }

    #[test]
    fn a_group_is_not_cut_and_a_short_matrix_is_refused() {
        let codes = [0; 2 * 36];
        let whole = QuantView {
            name: "w",
            format: Quant::Gguf(GgufBlock::Q4_0),
            rows: 2,
            cols: 64,
            row_stride_bytes: 36,
            bytes: &codes,
            scales: None,
            biases: None,
            origin: (0, 0),
        };
        whole.check().unwrap();
        assert!(whole.cut(0..2, 16..32).is_err());
        assert_eq!(whole.cut(1..2, 32..64).unwrap().codes(0).len(), 18);
        assert!(QuantView { bytes: &codes[..71], ..whole }.check().is_err());
        assert!(QuantView { cols: 48, ..whole }.check().is_err());
    }
}
