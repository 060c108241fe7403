//! How the numbers of a rectangle travel: exact, or with fewer bits and scales. Pure; the sender encodes what it has read, the receiver
//! decodes before it writes. The loops are plain so that the compiler vectorises them.
//!
//! ```text
//! payload of T tokens of H heads of D elements, [token][head] rows:
//!   exact       rows as they are
//!   fp8, int8   T*H scales (f32, little endian), then T*H rows of D bytes
//!   int4        see codec/int4.rs
//! ```

mod int4;

use std::fmt;
use std::str::FromStr;

use backend::{DType, Plane};
use half::{bf16, f16};

/// Largest finite number of fp8 e4m3.
const FP8_MAX: f32 = 448.0;

/// How values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Codec {
    /// Bit for bit.
    Exact = 0,
    /// 8 bits, 4 of exponent and 3 of mantissa, scaled to the row's largest value.
    Fp8 = 1,
    /// 8 bits, linear, scaled to the row's largest value.
    Int8 = 2,
    /// 4 bits, linear from the smallest to the largest number: of a channel over 64 tokens for keys, of the row for others.
    Int4 = 3,
}

/// Which codec a sender uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecPolicy {
    /// Always this one.
    Always(Codec),
    /// Exact, and [`Codec::Int8`] (of the same size as fp8, and closer: `benches/README.md`) where the measured link is slower than the prompt's computation.
    Auto,
}

/// A text that names no codec policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kv codec {0:?} is not one of exact, auto, fp8, int8, int4")]
pub struct UnknownCodec(String);

/// One head of one token of a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Elements.
    pub dim: usize,
    /// Their type.
    pub dtype: DType,
    /// They are keys, which have channels that are large in every token.
    pub keys: bool,
}

impl Row {
    /// The rows of `plane`.
    pub fn of(plane: &Plane) -> Self {
        Row { dim: plane.dim, dtype: plane.dtype, keys: plane.name == "k" }
    }

    /// Bytes as the stores have it.
    pub fn bytes(self) -> usize {
        self.dim * self.dtype.bytes()
    }
}

impl Codec {
    /// All of them.
    pub const ALL: [Codec; 4] = [Codec::Exact, Codec::Fp8, Codec::Int8, Codec::Int4];

    /// The codec with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Codec::ALL.into_iter().find(|codec| *codec as u8 == number)
    }

    /// Bytes of `tokens` tokens of `heads` heads on the wire.
    pub fn wire_bytes(self, row: Row, heads: usize, tokens: usize) -> usize {
        match self {
            Codec::Exact => heads * tokens * row.bytes(),
            Codec::Fp8 | Codec::Int8 => heads * tokens * (4 + row.dim),
            Codec::Int4 => int4::wire_bytes(row, heads, tokens),
        }
    }

    /// Encodes whole tokens of `heads` heads, appending to `out`. A rest shorter than a token is left out.
    pub fn encode(self, row: Row, heads: usize, bytes: &[u8], out: &mut Vec<u8>) {
        let token_bytes = heads * row.bytes();
        if self == Codec::Exact || token_bytes == 0 {
            out.extend_from_slice(bytes);
            return;
        }
        let tokens = bytes.len() / token_bytes;
        let first = out.len();
        out.resize(first + self.wire_bytes(row, heads, tokens), 0);
        let (bytes, out) = (&bytes[..tokens * token_bytes], &mut out[first..]);
        if self == Codec::Int4 {
            return int4::encode(row, heads, bytes, out);
        }
        let (scales, values) = out.split_at_mut(4 * heads * tokens);
        let mut wide = vec![0.0; row.dim];
        let places = scales.chunks_exact_mut(4).zip(values.chunks_exact_mut(row.dim));
        for (from, (scale, to)) in bytes.chunks_exact(row.bytes()).zip(places) {
            widen(row.dtype, from, &mut wide);
            scale.copy_from_slice(&self.encode_row(&wide, to).to_le_bytes());
        }
    }

    /// Writes one row, a byte per number, and returns its scale.
    fn encode_row(self, wide: &[f32], to: &mut [u8]) -> f32 {
        let top = if self == Codec::Fp8 { FP8_MAX } else { 127.0 };
        let most = wide.iter().fold(0.0f32, |most, x| most.max(x.abs())).min(f32::MAX);
        let scale = most / top;
        // A row of zeros, or of numbers too small to have a scale.
        let inverse = if scale.is_normal() { 1.0 / scale } else { 0.0 };
        let pairs = to.iter_mut().zip(wide);
        match self {
            Codec::Fp8 => pairs.for_each(|(to, x)| *to = to_fp8(x * inverse)),
            _ => pairs.for_each(|(to, x)| *to = to_int(x * inverse, top) as u8),
        }
        if scale.is_normal() { scale } else { 0.0 }
    }

    /// Decodes `tokens` tokens of `heads` heads into `out`, replacing what it holds; `false` when `wire` has another length.
    pub fn decode(self, row: Row, heads: usize, tokens: usize, wire: &[u8], out: &mut Vec<u8>) -> bool {
        if wire.len() != self.wire_bytes(row, heads, tokens) {
            return false;
        }
        out.clear();
        if self == Codec::Exact {
            out.extend_from_slice(wire);
        }
        if self == Codec::Exact || row.bytes() * heads * tokens == 0 {
            return true;
        }
        out.resize(heads * tokens * row.bytes(), 0);
        if self == Codec::Int4 {
            int4::decode(row, heads, wire, out);
            return true;
        }
        let (scales, values) = wire.split_at(4 * heads * tokens);
        let mut wide = vec![0.0; row.dim];
        let places = scales.chunks_exact(4).zip(values.chunks_exact(row.dim));
        for ((scale, from), to) in places.zip(out.chunks_exact_mut(row.bytes())) {
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            let pairs = wide.iter_mut().zip(from);
            match self {
                Codec::Fp8 => pairs.for_each(|(x, v)| *x = from_fp8(*v) * scale),
                _ => pairs.for_each(|(x, v)| *x = f32::from(*v as i8) * scale),
            }
            narrow(row.dtype, &wide, to);
        }
        true
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Codec::Exact => "exact",
            Codec::Fp8 => "fp8",
            Codec::Int8 => "int8",
            Codec::Int4 => "int4",
        })
    }
}

impl FromStr for CodecPolicy {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        if text == "auto" {
            return Ok(CodecPolicy::Auto);
        }
        let named = Codec::ALL.into_iter().find(|codec| codec.to_string() == text);
        named.map(CodecPolicy::Always).ok_or_else(|| UnknownCodec(text.to_owned()))
    }
}

impl fmt::Display for CodecPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CodecPolicy::Always(codec) => codec.fmt(f),
            CodecPolicy::Auto => f.write_str("auto"),
        }
    }
}

impl CodecPolicy {
    /// The codec of a push. `compute_bytes_per_s`: at which rate the prompt's computation makes cache, as it was
    /// measured; `link_bytes_per_s`: what the link to the slowest receiver has carried. Without both, [`Codec::Exact`].
    pub fn choose(self, compute_bytes_per_s: Option<f64>, link_bytes_per_s: Option<f64>) -> Codec {
        match (self, compute_bytes_per_s, link_bytes_per_s) {
            (CodecPolicy::Always(codec), ..) => codec,
            (CodecPolicy::Auto, Some(compute), Some(link)) if link < compute => Codec::Int8,
            (CodecPolicy::Auto, ..) => Codec::Exact,
        }
    }
}

/// Rounds to the nearest, ties to even, within `-top..=top`; not a number is 0.
fn to_int(x: f32, top: f32) -> i8 {
    // Adding and taking away 1.5 * 2^23 rounds as the processor does, without a call.
    const ROUND: f32 = 12_582_912.0;
    ((x.clamp(-top, top) + ROUND) - ROUND) as i8
}

/// To the nearest fp8 e4m3, ties to even; beyond its largest number that number, never a NaN.
fn to_fp8(x: f32) -> u8 {
    let bits = x.to_bits();
    let (sign, magnitude) = ((bits >> 24) as u8 & 0x80, bits & 0x7fff_ffff);
    // 23 - 3 bits of mantissa go; the exponent's bias of 127 becomes 7.
    let odd = (magnitude >> 20) & 1;
    let normal = ((magnitude + 0x0007_ffff + odd) >> 20).wrapping_sub(120 << 3);
    // Below 2^-6 the steps are 2^-9, which is what 2^14 has in its last bit.
    let small = (f32::from_bits(magnitude) + 16384.0).to_bits().wrapping_sub(16384.0f32.to_bits());
    let value = if magnitude < 0x3c80_0000 { small } else { normal.min(0x7e) };
    sign | value as u8
}

/// The value of an fp8 e4m3, whose two NaNs are read as 480.
fn from_fp8(v: u8) -> f32 {
    let magnitude = f32::from_bits(u32::from(v & 0x7f) << 20) * f32::from_bits((127 + 120) << 23);
    if v & 0x80 == 0 { magnitude } else { -magnitude }
}

fn widen(dtype: DType, from: &[u8], wide: &mut [f32]) {
    let pair = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match dtype {
        DType::BF16 => wide.iter_mut().zip(from.chunks_exact(2)).for_each(|(x, b)| {
            *x = f32::from_bits(u32::from(pair(b)) << 16);
        }),
        DType::F16 => wide.iter_mut().zip(from.chunks_exact(2)).for_each(|(x, b)| {
            *x = f16::from_bits(pair(b)).to_f32();
        }),
        DType::F32 => wide.iter_mut().zip(from.chunks_exact(4)).for_each(|(x, b)| {
            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }),
    }
}

fn narrow(dtype: DType, wide: &[f32], to: &mut [u8]) {
    match dtype {
        DType::BF16 => to.chunks_exact_mut(2).zip(wide).for_each(|(b, x)| {
            b.copy_from_slice(&bf16::from_f32(*x).to_le_bytes());
        }),
        DType::F16 => to.chunks_exact_mut(2).zip(wide).for_each(|(b, x)| {
            b.copy_from_slice(&f16::from_f32(*x).to_le_bytes());
        }),
        DType::F32 => to.chunks_exact_mut(4).zip(wide).for_each(|(b, x)| {
            b.copy_from_slice(&x.to_le_bytes());
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every fp8 number by its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa.
    fn value(v: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(v >> 3 & 0xf), f32::from(v & 7));
        let x = match exponent {
            0 => mantissa * 2f32.powi(-9),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if v & 0x80 == 0 { x } else { -x }
    }

    #[test]
    fn fp8_is_read_and_rounded_as_defined() {
        let all: Vec<u8> = (0..=255).filter(|v| v & 0x7f != 0x7f).collect();
        for v in &all {
            assert_eq!(from_fp8(*v), value(*v), "{v:02x}");
            assert_eq!(to_fp8(value(*v)), *v, "{v:02x}");
        }
        // Between two neighbours the nearer one, in the middle the even one.
        for v in 0..0x7e {
            let (low, high) = (value(v), value(v + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(to_fp8(middle), if v % 2 == 0 { v } else { v + 1 }, "{v:02x}");
            assert_eq!(to_fp8(middle - (high - low) / 16.0), v);
            assert_eq!(to_fp8(-(middle + (high - low) / 16.0)), 0x80 | (v + 1));
        }
        assert_eq!((to_fp8(1e9), to_fp8(f32::INFINITY), to_fp8(-500.0)), (0x7e, 0x7e, 0xfe));
    }

    /// Rows of very unlike sizes, zeros among them.
    fn rows(dtype: DType, dim: usize, count: usize) -> (Vec<f32>, Vec<u8>) {
        let mut x = 1u64;
        let wide: Vec<f32> = (0..dim * count)
            .map(|at| {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let unit = (x >> 40) as f32 / (1 << 23) as f32 - 1.0;
                unit * 10f32.powi((at / dim) as i32 % 5 - 2) * f32::from((at / dim % 7 != 3) as u8)
            })
            .collect();
        let mut bytes = vec![0; dim * count * dtype.bytes()];
        narrow(dtype, &wide, &mut bytes);
        let mut rounded = vec![0.0; wide.len()];
        widen(dtype, &bytes, &mut rounded);
        (rounded, bytes)
    }

    #[test]
    fn every_codec_keeps_its_error_bound_for_every_type() {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for dim in [1, 7, 64, 128] {
                let row = Row { dim, dtype, keys: false };
                let (wide, bytes) = rows(dtype, dim, 20);
                // Half a step of the coarsest part, plus the rounding of the type itself.
                for (codec, share) in [
                    (Codec::Exact, 0.0),
                    (Codec::Fp8, 1.0 / 28.0),
                    (Codec::Int8, 0.5 / 127.0),
                    // Between the smallest and the largest are twice the largest, in 15 steps.
                    (Codec::Int4, 1.0 / 15.0),
                ] {
                    let (mut wire, mut back) = (Vec::new(), Vec::new());
                    codec.encode(row, 2, &bytes, &mut wire);
                    assert_eq!(wire.len(), codec.wire_bytes(row, 2, 10));
                    assert!(codec.decode(row, 2, 10, &wire, &mut back));
                    let mut got = vec![0.0; wide.len()];
                    widen(dtype, &back, &mut got);
                    for (want, got) in wide.chunks(dim).zip(got.chunks(dim)) {
                        let most = want.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                        for (want, got) in want.iter().zip(got) {
                            let bound = most * share + most * if share == 0.0 { 0.0 } else { 0.005 };
                            assert!(
                                (want - got).abs() <= bound,
                                "{codec} {dtype} {dim}: {want} came as {got}"
                            );
                        }
                    }
                    assert!(!codec.decode(row, 2, 11, &wire, &mut back));
                }
            }
        }
    }

    #[test]
    fn strange_numbers_do_no_harm() {
        let row = Row { dim: 4, dtype: DType::F32, keys: true };
        let bytes: Vec<u8> =
            [f32::NAN, f32::INFINITY, -1.0, 1e-45].iter().flat_map(|x| x.to_le_bytes()).collect();
        for codec in [Codec::Fp8, Codec::Int8, Codec::Int4] {
            let (mut wire, mut back) = (Vec::new(), Vec::new());
            // One token, and as many as have their scales per channel.
            for tokens in [1, 16] {
                wire.clear();
                codec.encode(row, 1, &bytes.repeat(tokens), &mut wire);
                assert!(codec.decode(row, 1, tokens, &wire, &mut back));
                assert_eq!(back.len(), 16 * tokens);
            }
        }
    }

    #[test]
    fn auto_compresses_only_where_the_link_is_measured_to_be_slower() {
        let auto: CodecPolicy = "auto".parse().unwrap();
        assert_eq!(auto.choose(Some(2e9), Some(1e9)), Codec::Int8);
        assert_eq!(auto.choose(Some(1e9), Some(2e9)), Codec::Exact);
        assert_eq!(auto.choose(None, Some(1.0)), Codec::Exact);
        assert_eq!(auto.choose(Some(1.0), None), Codec::Exact);
        assert_eq!("int4".parse::<CodecPolicy>().unwrap().choose(None, None), Codec::Int4);
        assert!("fp7".parse::<CodecPolicy>().is_err());
    }
}
