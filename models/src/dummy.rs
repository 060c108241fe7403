//! Random weights for `--load-format dummy`: every element is a pure function of (seed, tensor, position), so that any
//! rank makes its part alone. The scale keeps activations near 1 through any depth.

use std::ops::Range;

use backend::DType;
use half::{bf16, f16};
use sha2::{Digest, Sha256};

use crate::tensors::Role;

/// Distinct values of a tensor; five draws of 12 bits come from one 64-bit word.
const LEVELS: usize = 1 << 12;
const DRAWS: usize = 5;

/// Uniform values in `[centre - spread, centre + spread]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale {
    centre: f32,
    spread: f32,
}

impl Scale {
    /// For a tensor of `role` with `inputs` columns. A matrix has the standard deviation `inputs^-0.5`.
    pub(crate) fn of(role: Role, inputs: usize) -> Scale {
        match role {
            // A uniform value's standard deviation is its spread over the root of 3.
            Role::Matrix => Scale { centre: 0.0, spread: (3.0 / inputs as f32).sqrt() },
            Role::Norm => Scale { centre: 1.0, spread: 0.1 },
            Role::Bias => Scale { centre: 0.0, spread: 0.05 },
        }
    }

    /// The value of one of `LEVELS` levels.
    fn value(self, level: usize) -> f32 {
        let unit = (level as f32 + 0.5) / LEVELS as f32 * 2.0 - 1.0;
        self.centre + self.spread * unit
    }
}

/// Little-endian `[rows, cols]` of a tensor with `width` columns.
pub(crate) fn bytes(
    seed: u64,
    name: &str,
    scale: Scale,
    dtype: DType,
    width: usize,
    rows: Range<usize>,
    cols: Range<usize>,
) -> Vec<u8> {
    let digest = Sha256::digest(format!("{seed}/{name}"));
    let key = digest.iter().take(8).fold(0u64, |key, byte| key << 8 | u64::from(*byte));
    let place = Place { key, width, rows, cols };
    match dtype {
        DType::F32 => fill(&place, |level| scale.value(level).to_le_bytes()),
        DType::F16 => fill(&place, |level| f16::from_f32(scale.value(level)).to_le_bytes()),
        DType::BF16 => fill(&place, |level| bf16::from_f32(scale.value(level)).to_le_bytes()),
    }
}

/// A part of one tensor.
struct Place {
    key: u64,
    width: usize,
    rows: Range<usize>,
    cols: Range<usize>,
}

fn fill<const ITEM: usize>(place: &Place, encode: impl Fn(usize) -> [u8; ITEM]) -> Vec<u8> {
    let levels: Vec<[u8; ITEM]> = (0..LEVELS).map(encode).collect();
    let mut out = Vec::with_capacity(place.rows.len() * place.cols.len() * ITEM);
    for row in place.rows.clone() {
        let first = row * place.width + place.cols.start;
        let (mut block, mut draw) = (first / DRAWS, first % DRAWS);
        let mut word = mix(place.key, block) >> (12 * draw);
        for _ in place.cols.clone() {
            if draw == DRAWS {
                (block, draw) = (block + 1, 0);
                word = mix(place.key, block);
            }
            out.extend_from_slice(&levels[word as usize % LEVELS]);
            word >>= 12;
            draw += 1;
        }
    }
    out
}

/// The finaliser of splitmix64.
fn mix(key: u64, block: usize) -> u64 {
    let mut word = key.wrapping_add((block as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_cut_from_the_same_tensor() {
        let scale = Scale::of(Role::Matrix, 7);
        let make = |rows, cols| bytes(3, "w", scale, DType::F32, 7, rows, cols);
        let whole = make(0..6, 0..7);
        for (rows, cols) in [(0..6, 2..5), (3..4, 0..7), (1..6, 6..7), (5..6, 1..3)] {
            let part = make(rows.clone(), cols.clone());
            let mut cut = Vec::new();
            for row in rows {
                cut.extend_from_slice(&whole[(row * 7 + cols.start) * 4..(row * 7 + cols.end) * 4]);
            }
            assert_eq!(part, cut);
        }
        assert_ne!(whole, bytes(4, "w", scale, DType::F32, 7, 0..6, 0..7));
        assert_ne!(whole, bytes(3, "v", scale, DType::F32, 7, 0..6, 0..7));
    }

    #[test]
    fn a_matrix_has_the_variance_that_keeps_activations() {
        let raw = bytes(1, "w", Scale::of(Role::Matrix, 400), DType::F32, 400, 0..100, 0..400);
        let values: Vec<f32> =
            raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32;
        // 40,000 draws: the standard error of the mean is 0.05 / 200.
        assert!(mean.abs() < 1e-3, "mean {mean}");
        assert!((variance * 400.0 - 1.0).abs() < 0.03, "variance {variance}");
    }
}
