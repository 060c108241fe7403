//! 4 bits per number: 16 values, evenly from the smallest to the largest number of a set. Keys have channels that are large in every token,
//! so their sets are channels over the tokens of a group; all others are heads of one token. Pure; [`super::Codec`] asks.
//!
//! ```text
//! payload of T tokens: groups of 64, the last one of what is left; a group of n tokens of H heads of D elements:
//!   keys, where n is at least 4:  H*D sets, a channel of a head each
//!   otherwise:                    n*H sets, a head of a token each
//!   then                          n*H rows of D values, two to a byte
//! a set: the distance between two of its values, the smallest one (bf16, little endian)
//! ```

use half::bf16;

use super::{Row, narrow, widen};

/// Tokens of a group.
const GROUP_TOKENS: usize = 64;

/// Of fewer tokens the sets of channels would take more than all their numbers in bf16.
const CHANNEL_TOKENS_MIN: usize = 4;

/// Bytes of a set on the wire.
const SET_BYTES: usize = 4;

/// The largest of 16 values.
const TOP: f32 = 15.0;

/// Beyond it numbers are cut off, so that the distance of two is finite.
const FAR: f32 = 1.6e38;

/// Elements that are looked at together.
const LANES: usize = 16;

/// Numbers that share their 16 values: value `v` is `low + v * step`.
#[derive(Clone, Copy, Default)]
struct Set {
    step: f32,
    low: f32,
}

impl Set {
    /// Of the numbers from `low` to `high`; as the wire has it.
    fn between(low: f32, high: f32) -> Set {
        if low > high {
            // Not one of them is a number.
            return Set::default();
        }
        let low = bf16::from_f32(low.clamp(-FAR, FAR)).to_f32();
        let step = bf16::from_f32((high.clamp(-FAR, FAR) - low) / TOP).to_f32();
        Set { step: if step.is_normal() && step > 0.0 { step } else { 0.0 }, low }
    }

    fn inverse(self) -> f32 {
        if self.step > 0.0 { 1.0 / self.step } else { 0.0 }
    }

    fn write(self, to: &mut [u8]) {
        to[..2].copy_from_slice(&bf16::from_f32(self.step).to_le_bytes());
        to[2..].copy_from_slice(&bf16::from_f32(self.low).to_le_bytes());
    }

    fn read(from: &[u8]) -> Set {
        let number = |at: usize| bf16::from_le_bytes([from[at], from[at + 1]]).to_f32();
        Set { step: number(0), low: number(2) }
    }
}

/// Whether a group of `tokens` has a set per channel.
fn by_channel(row: Row, tokens: usize) -> bool {
    row.keys && tokens >= CHANNEL_TOKENS_MIN
}

/// Bytes of one group's sets.
fn sets_bytes(row: Row, heads: usize, tokens: usize) -> usize {
    SET_BYTES * heads * if by_channel(row, tokens) { row.dim } else { tokens }
}

/// Bytes of one group.
fn group_bytes(row: Row, heads: usize, tokens: usize) -> usize {
    sets_bytes(row, heads, tokens) + heads * tokens * row.dim.div_ceil(2)
}

/// Bytes of a payload.
pub(super) fn wire_bytes(row: Row, heads: usize, tokens: usize) -> usize {
    let rest = match tokens % GROUP_TOKENS {
        0 => 0,
        rest => group_bytes(row, heads, rest),
    };
    tokens / GROUP_TOKENS * group_bytes(row, heads, GROUP_TOKENS) + rest
}

/// Fills `wire`, of the right size, from `bytes`: whole tokens of `heads` heads, neither of them empty.
pub(super) fn encode(row: Row, heads: usize, bytes: &[u8], wire: &mut [u8]) {
    let token_bytes = heads * row.bytes();
    let mut wide = vec![0.0; heads * row.dim * GROUP_TOKENS.min(bytes.len() / token_bytes)];
    let mut rest = wire;
    for group in bytes.chunks(GROUP_TOKENS * token_bytes) {
        let tokens = group.len() / token_bytes;
        let wide = &mut wide[..tokens * heads * row.dim];
        widen(row.dtype, group, wide);
        let (now, later) = rest.split_at_mut(group_bytes(row, heads, tokens));
        let (sets, values) = now.split_at_mut(sets_bytes(row, heads, tokens));
        match by_channel(row, tokens) {
            true => encode_channels(row, heads, wide, sets, values),
            false => encode_rows(row, wide, sets, values),
        }
        rest = later;
    }
}

fn encode_channels(row: Row, heads: usize, wide: &[f32], sets: &mut [u8], values: &mut [u8]) {
    let channels = heads * row.dim;
    let (mut low, mut high) = (vec![f32::INFINITY; channels], vec![f32::NEG_INFINITY; channels]);
    for token in wide.chunks_exact(channels) {
        low.iter_mut().zip(token).for_each(|(low, x)| *low = low.min(*x));
        high.iter_mut().zip(token).for_each(|(high, x)| *high = high.max(*x));
    }
    let mut inverse = high;
    for ((low, high), to) in low.iter_mut().zip(&mut inverse).zip(sets.chunks_exact_mut(SET_BYTES)) {
        let set = Set::between(*low, *high);
        set.write(to);
        (*low, *high) = (set.low, set.inverse());
    }
    let mut codes = vec![0; channels];
    let value_bytes = row.dim.div_ceil(2);
    for (token, to) in wide.chunks_exact(channels).zip(values.chunks_exact_mut(heads * value_bytes)) {
        let of = codes.iter_mut().zip(token).zip(low.iter().zip(&inverse));
        of.for_each(|((code, x), (low, inverse))| *code = nearest((x - low) * inverse));
        for (codes, to) in codes.chunks_exact(row.dim).zip(to.chunks_exact_mut(value_bytes)) {
            pack(codes, to);
        }
    }
}

fn encode_rows(row: Row, wide: &[f32], sets: &mut [u8], values: &mut [u8]) {
    let mut codes = vec![0; row.dim];
    let places = sets.chunks_exact_mut(SET_BYTES).zip(values.chunks_exact_mut(row.dim.div_ceil(2)));
    for (from, (set_to, to)) in wide.chunks_exact(row.dim).zip(places) {
        let (low, high) = range(from);
        let set = Set::between(low, high);
        set.write(set_to);
        let inverse = set.inverse();
        codes.iter_mut().zip(from).for_each(|(code, x)| *code = nearest((x - set.low) * inverse));
        pack(&codes, to);
    }
}

/// Decodes a payload of the right size into `out`, of the right size too; neither tokens nor heads are empty.
pub(super) fn decode(row: Row, heads: usize, wire: &[u8], out: &mut [u8]) {
    let token_bytes = heads * row.bytes();
    let channels = heads * row.dim;
    let (mut wide, mut sets) = (vec![0.0; channels], vec![Set::default(); channels]);
    let value_bytes = row.dim.div_ceil(2);
    let mut rest = wire;
    for group in out.chunks_mut(GROUP_TOKENS * token_bytes) {
        let tokens = group.len() / token_bytes;
        let (now, later) = rest.split_at(group_bytes(row, heads, tokens));
        let (from_sets, values) = now.split_at(sets_bytes(row, heads, tokens));
        let mut read = from_sets.chunks_exact(SET_BYTES).map(Set::read);
        let each_token = by_channel(row, tokens);
        if each_token {
            sets.iter_mut().zip(&mut read).for_each(|(to, set)| *to = set);
        }
        for (from, to) in values.chunks_exact(heads * value_bytes).zip(group.chunks_exact_mut(token_bytes)) {
            if !each_token {
                for head in sets.chunks_exact_mut(row.dim) {
                    head.fill(read.next().unwrap_or_default());
                }
            }
            for (from, wide) in from.chunks_exact(value_bytes).zip(wide.chunks_exact_mut(row.dim)) {
                for (pair, v) in wide.chunks_mut(2).zip(from) {
                    pair.iter_mut().zip([v & 0xf, v >> 4]).for_each(|(x, v)| *x = f32::from(v));
                }
            }
            wide.iter_mut().zip(&sets).for_each(|(x, set)| *x = *x * set.step + set.low);
            narrow(row.dtype, &wide, to);
        }
        rest = later;
    }
}

/// The nearest of 0 to 15, ties to even; one of them where it is no number.
fn nearest(x: f32) -> u8 {
    // Adding 2^23 leaves the rounded number in the last bits.
    (x.clamp(0.0, TOP) + 8_388_608.0).to_bits() as u8 & 0xf
}

fn pack(codes: &[u8], to: &mut [u8]) {
    for (to, pair) in to.iter_mut().zip(codes.chunks(2)) {
        *to = pair[0] | pair.get(1).map_or(0, |code| code << 4);
    }
}

/// The smallest and the largest number.
fn range(wide: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (whole, rest) = wide.split_at(wide.len() / LANES * LANES);
    for chunk in whole.chunks_exact(LANES) {
        low.iter_mut().zip(chunk).for_each(|(low, x)| *low = low.min(*x));
        high.iter_mut().zip(chunk).for_each(|(high, x)| *high = high.max(*x));
    }
    let all = |lanes: [f32; LANES], of: fn(f32, f32) -> f32| {
        lanes.into_iter().chain(rest.iter().copied()).reduce(of)
    };
    (all(low, f32::min).unwrap_or(0.0), all(high, f32::max).unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use backend::DType;

    use super::*;
    use crate::Codec;

    const HEADS: usize = 2;

    /// A channel of every head is a hundred times larger than the others, in every token.
    fn keys(tokens: usize, dim: usize) -> Vec<f32> {
        let wave = |at: usize| ((at * 37 % 101) as f32 / 50.0 - 1.0) * 0.5;
        (0..tokens * HEADS * dim).map(|at| wave(at) + if at % dim == 3 { 50.0 } else { 0.0 }).collect()
    }

    fn there_and_back(row: Row, wide: &[f32]) -> Vec<f32> {
        let bytes: Vec<u8> = wide.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tokens = wide.len() / HEADS / row.dim;
        let (mut wire, mut back) = (Vec::new(), Vec::new());
        Codec::Int4.encode(row, HEADS, &bytes, &mut wire);
        assert_eq!(wire.len(), wire_bytes(row, HEADS, tokens));
        assert!(Codec::Int4.decode(row, HEADS, tokens, &wire, &mut back));
        back.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// Protects: what sets per channel are for. A large channel costs the others nothing.
    #[test]
    fn a_large_channel_of_keys_spoils_no_other() {
        for (tokens, dim) in [(64, 8), (4, 9), (195, 33)] {
            let wide = keys(tokens, dim);
            let worst = |keys: bool| {
                let back = there_and_back(Row { dim, dtype: DType::F32, keys }, &wide);
                let small = wide.iter().zip(&back).enumerate().filter(|(at, _)| at % dim != 3);
                small.map(|(_, (x, back))| (x - back).abs()).fold(0.0, f32::max)
            };
            // Half a step of numbers between -0.5 and 0.5; of 50 and them it is 50 times as much. 195 = 3 * 64 + 3 tokens:
            // the last 3 go by rows.
            let bound = if tokens == 195 { 2.0 } else { 0.5 / TOP * 1.05 };
            assert!(worst(true) <= bound, "{tokens} tokens: {}", worst(true));
            assert!(worst(false) > 0.25, "{tokens} tokens: {}", worst(false));
        }
    }

    #[test]
    fn sizes_are_as_the_format_says() {
        let keys = Row { dim: 128, dtype: DType::BF16, keys: true };
        assert_eq!(wire_bytes(keys, 8, 64), 8 * 128 * 4 + 64 * 8 * 64);
        assert_eq!(wire_bytes(keys, 8, 64 + 3), wire_bytes(keys, 8, 64) + 3 * 8 * (4 + 64));
        assert_eq!(wire_bytes(Row { keys: false, ..keys }, 8, 67), 67 * 8 * (4 + 64));
        assert_eq!(wire_bytes(keys, 8, 0), 0);
    }

    /// Numbers that are all alike, or that are the ends of their set, come back as they were.
    #[test]
    fn ends_of_a_set_are_exact_where_bf16_has_them() {
        let row = Row { dim: 4, dtype: DType::F32, keys: false };
        let wide = [0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 1.0, 14.0, 3.5, 3.5, 3.5, 3.5, 0.0, -15.0, -7.0, -1.0];
        assert_eq!(there_and_back(row, &wide), wide);
    }
}
