//! What a push is going to cost: how long after the end of the prompt's computation its last byte arrives. Made when the push
//! opens, from measured rates, and compared with what happened; and how the piece that is made last is cut, so that it is as short
//! as it can be. Pure.
//!
//! Cache leaves layer by layer, so where the link keeps up nothing is left at the end but one layer of the last chunk:
//!
//! ```text
//! exposed = last chunk x bytes per token / layers / link rate  <=  computation of the last chunk / layers
//! ```
//!
//! which is why chunks are not made smaller for it. A prompt is computed in full chunks and what is left over, which is the
//! smallest last chunk of all ways to compute it in so many steps. A smaller one takes one step more, which reads all weights
//! once more, to save at most a chunk's computation over the number of layers: an 8B model on 10GbE (128 KiB and 512 tokens
//! in 32 layers) could save 1.8 ms of 1,490, and its weights alone take longer to read on any machine. Where the link does not keep
//! up, what is exposed is what it is behind by, of chunks of any size. What is left to choose is the last piece's frames
//! ([`Last`]): large ones wait for their checksum or encoding before they leave and leave connections idle at the end, small ones cost
//! time each.

use std::time::Duration;

/// What a frame is taken to cost beside its bytes, at both ends together: a head, locks, system calls. This and the two below need
/// to be right within a factor of a few: the frame goes by the root of their ratio.
const FRAME_S: f64 = 20e-6;

/// What a byte costs at an end before it may leave: its checksum.
const EXACT_S: f64 = 0.15e-9;

/// The same where numbers are encoded, and decoded after.
const CODED_S: f64 = 2e-9;

/// Frames below this are not worth their heads.
const FRAME_BYTES_MIN: usize = 32 << 10;

/// What is known of a push before it begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Bytes of cache.
    pub bytes: u64,
    /// Bytes that cross the link: fewer where a codec is used.
    pub wire_bytes: u64,
    /// Of them, those of the piece that is made last and cannot leave before: one layer of one chunk.
    pub last_wire_bytes: u64,
    /// At which rate the prompt's computation makes cache.
    pub made_bytes_per_s: f64,
    /// What the links to the receivers have carried, together.
    pub link_bytes_per_s: f64,
}

impl Plan {
    /// From the end of the computation to the last byte: what the link cannot carry while there is computation, and at least the
    /// last piece. `None`: a rate is not known.
    pub fn exposed(&self) -> Option<Duration> {
        let known = |rate: f64| rate.is_finite() && rate > 0.0;
        if !known(self.made_bytes_per_s) || !known(self.link_bytes_per_s) {
            return None;
        }
        let seconds = |bytes: u64, rate: f64| bytes as f64 / rate;
        let link = seconds(self.wire_bytes, self.link_bytes_per_s);
        let compute = seconds(self.bytes, self.made_bytes_per_s);
        let least = seconds(self.last_wire_bytes.min(self.wire_bytes), self.link_bytes_per_s);
        // An hour is as good as never, and a duration that there is.
        Some(Duration::from_secs_f64((link - compute).max(least).min(3600.0)))
    }
}

/// The piece of a push that is made last: one layer of the last chunk. Nothing is computed while it travels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Last {
    /// Bytes that cross the link.
    pub wire_bytes: u64,
    /// Its numbers are encoded.
    pub coded: bool,
    /// Connections that share it.
    pub lanes: usize,
    /// What they have carried together, where it is known.
    pub link_bytes_per_s: Option<f64>,
}

impl Last {
    /// Payload of its frames, at most `most`, with which its last byte lands soonest. With frames of `f` bytes in `n` lanes it takes
    ///
    /// ```text
    /// bytes / rate  +  f x outside  +  f x (n - 1) / rate  +  bytes / f / n x FRAME_S
    /// the link         first frame     last frame, in one     all frames
    ///                  made ready      lane of n
    /// ```
    pub fn frame_bytes(&self, most: usize) -> usize {
        let lanes = self.lanes.max(1) as f64;
        let outside = if self.coded { CODED_S } else { EXACT_S };
        let alone = self.link_bytes_per_s.filter(|rate| *rate > 0.0).map_or(0.0, |rate| (lanes - 1.0) / rate);
        let best = (self.wire_bytes as f64 / lanes * FRAME_S / (outside + alone)).sqrt();
        (best as usize).max(FRAME_BYTES_MIN).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One layer of 512 tokens of an 8B model: 2 MiB.
    const LAST: Last = Last { wire_bytes: 2 << 20, coded: false, lanes: 1, link_bytes_per_s: Some(1.17e9) };

    /// sqrt(2 MiB x 20 us / 0.15 ns) = 517 KiB; with encoding 142 KiB; over two ports sqrt(1 MiB x 20 us / (0.15 ns + 1 / 2.34 GB/s)).
    #[test]
    fn the_last_piece_goes_in_smaller_frames_where_they_wait_for_more() {
        assert_eq!(LAST.frame_bytes(1 << 20) >> 10, 516);
        assert_eq!(Last { coded: true, ..LAST }.frame_bytes(1 << 20) >> 10, 141);
        let ports = Last { lanes: 2, link_bytes_per_s: Some(2.34e9), ..LAST };
        assert_eq!(ports.frame_bytes(1 << 20) >> 10, 186);
        // The slower the link, the more it matters that no lane is idle.
        assert_eq!(Last { link_bytes_per_s: Some(0.234e9), ..ports }.frame_bytes(1 << 20) >> 10, 67);
        let few = Last { wire_bytes: 4096, ..LAST };
        assert_eq!((few.frame_bytes(1 << 20), few.frame_bytes(5000)), (FRAME_BYTES_MIN, 5000));
        assert_eq!(Last { wire_bytes: 1 << 30, ..LAST }.frame_bytes(1 << 20), 1 << 20);
    }

    /// Protects: the reason why chunks are as large as computation wants them. Over any link that keeps up, what a smaller last chunk
    /// could save is at most the chunk's computation over the number of layers.
    #[test]
    fn the_last_chunk_exposes_at_most_a_layer_of_its_computation() {
        let (token, layers, made) = (131_072u64, 32u64, 5500.0);
        for link_bytes_per_s in [5500.0 * 131_072.0, 1.17e9, 12.5e9] {
            for chunk in [64, 512, 2048] {
                let plan = Plan {
                    bytes: 8192 * token,
                    wire_bytes: 8192 * token,
                    last_wire_bytes: chunk * token / layers,
                    made_bytes_per_s: made * token as f64,
                    link_bytes_per_s,
                };
                let computed = chunk as f64 / made / layers as f64;
                assert!(plan.exposed().unwrap().as_secs_f64() <= computed * 1.0001, "{plan:?}");
            }
        }
    }

    /// 8,192 tokens of an 8B model, made at 5,500 tokens/s, over 1.17 GB/s: the transfer hides, but for one layer of the last chunk
    /// of 512 tokens: 512 x 4 KiB / 1.17 GB/s = 1.8 ms.
    #[test]
    fn a_transfer_hides_behind_compute_where_the_link_is_faster() {
        let token = 131_072;
        let plan = Plan {
            bytes: 8192 * token,
            wire_bytes: 8192 * token,
            last_wire_bytes: 512 * 4096,
            made_bytes_per_s: 5500.0 * token as f64,
            link_bytes_per_s: 1.17e9,
        };
        assert_eq!(plan.exposed().unwrap().as_micros(), 1792);
        // Over 1 GbE: 9.177 s of link less 1.489 s of compute.
        let slow = Plan { link_bytes_per_s: 0.117e9, ..plan };
        assert_eq!(slow.exposed().unwrap().as_millis(), 7687);
        let unknown = Plan { made_bytes_per_s: 0.0, ..plan };
        assert_eq!(unknown.exposed(), None);
    }
}
