//! Measures a link: bytes that the peer reports as landed, over the time in which there was something to send. The engine's
//! report carries it to the router, whose placement needs it. Pure.

use crate::transport::ucx::Way;
use std::time::{Duration, Instant};

/// A sample is taken after so much busy time, or at its end.
const SAMPLE: Duration = Duration::from_millis(200);

/// Fewer bytes say more about latency than about rate.
const SAMPLE_BYTES_MIN: u64 = 256 << 10;

/// Weight of a new sample.
const WEIGHT: f64 = 0.3;

/// One peer's link, all connections together.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    /// Connections with something to send or under way.
    busy: usize,
    since: Option<Instant>,
    sample_bytes: u64,
    total_bytes: u64,
    bytes_per_s: Option<f64>,
    /// What carried payloads there last.
    pub way: Way,
}

impl Meter {
    /// A connection has something to send.
    pub fn begin(&mut self, now: Instant) {
        self.busy += 1;
        if self.busy == 1 {
            self.since = Some(now);
            self.sample_bytes = 0;
        }
    }

    /// The peer has `bytes` more.
    pub fn landed(&mut self, bytes: u64, now: Instant) {
        self.total_bytes += bytes;
        self.sample_bytes += bytes;
        if self.since.is_some_and(|since| now >= since + SAMPLE) {
            self.sample(now);
        }
    }

    /// A connection has nothing to send and nothing under way any more.
    pub fn end(&mut self, now: Instant) {
        self.busy = self.busy.saturating_sub(1);
        if self.busy == 0 {
            self.sample(now);
            self.since = None;
        }
    }

    fn sample(&mut self, now: Instant) {
        let Some(since) = self.since else { return };
        let seconds = now.saturating_duration_since(since).as_secs_f64();
        if self.sample_bytes >= SAMPLE_BYTES_MIN && seconds > 0.0 {
            let rate = self.sample_bytes as f64 / seconds;
            self.bytes_per_s = Some(self.bytes_per_s.map_or(rate, |old| old + WEIGHT * (rate - old)));
        }
        self.since = Some(now);
        self.sample_bytes = 0;
    }

    /// Smoothed rate in bytes per second, once known.
    pub fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s
    }

    /// Bytes landed so far.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_busy_time_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::default();
        meter.begin(at(0));
        meter.landed(1_000_000, at(10));
        meter.end(at(10));
        assert_eq!(meter.bytes_per_s(), Some(1e8));
        meter.begin(at(5_000));
        meter.begin(at(5_005)); // a second connection shares the link
        meter.landed(500_000, at(5_010));
        meter.end(at(5_010));
        meter.landed(500_000, at(5_020));
        meter.end(at(5_020));
        let rate = meter.bytes_per_s().unwrap();
        assert!((rate - (1e8 + 0.3 * (5e7 - 1e8))).abs() < 1.0, "{rate}");
        assert_eq!(meter.total_bytes(), 2_000_000);
    }

    #[test]
    fn a_few_bytes_are_no_sample() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.begin(start);
        meter.landed(1000, start + Duration::from_millis(1));
        meter.end(start + Duration::from_millis(1));
        assert_eq!((meter.bytes_per_s(), meter.total_bytes()), (None, 1000));
    }
}
