//! What a push is going to cost: how long after the end of the prompt's computation its last byte arrives. Made when the push
//! opens, from measured rates, and compared with what happened. Pure.

use std::time::Duration;

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

#[cfg(test)]
mod tests {
    use super::*;

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
