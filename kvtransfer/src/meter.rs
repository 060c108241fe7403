//! Measures a link: bytes that the peer reports as landed, over the time in which there was something to send. The engine's
//! report carries it to the router, whose placement needs it. Pure.

use crate::transport::ucx::Way;
use std::time::{Duration, Instant};

/// A sample is taken after so much busy time, or where it ends.
const SAMPLE: Duration = Duration::from_millis(200);

/// Fewer bytes say more about latency than about rate: they count together with those of the next busy time.
const SAMPLE_BYTES_MIN: u64 = 256 << 10;

/// Weight of a new sample.
const WEIGHT: f64 = 0.3;

/// One peer's link, all connections together.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    /// Connections with something to send or under way.
    busy: usize,
    since: Option<Instant>,
    /// Earlier busy time that is not in a sample yet.
    busy_s: f64,
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
        if let Some(since) = self.since.replace(now) {
            self.busy_s += now.saturating_duration_since(since).as_secs_f64();
        }
        if self.sample_bytes >= SAMPLE_BYTES_MIN
            && let Some(rate) = self.so_far()
        {
            self.bytes_per_s = Some(self.bytes_per_s.map_or(rate, |old| old + WEIGHT * (rate - old)));
            (self.busy_s, self.sample_bytes) = (0.0, 0);
        }
    }

    /// The rate of what is not in a sample yet.
    fn so_far(&self) -> Option<f64> {
        (self.busy_s > 0.0 && self.sample_bytes > 0).then(|| self.sample_bytes as f64 / self.busy_s)
    }

    /// Smoothed rate in bytes per second, once known.
    pub fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s
    }

    /// The same, or before that what a few bytes have shown, which is rather too low.
    pub fn about_bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s.or_else(|| self.so_far())
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

    /// Protects: pushes of small models are measured too, of which each alone is too few bytes.
    #[test]
    fn a_few_bytes_count_with_those_that_follow() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::default();
        let mut push = |begin: u64, bytes| {
            meter.begin(at(begin));
            meter.landed(bytes, at(begin + 1));
            meter.end(at(begin + 1));
            (meter.bytes_per_s(), meter.about_bytes_per_s(), meter.total_bytes())
        };
        assert_eq!(push(0, 1000), (None, Some(1e6), 1000));
        let (rate, about, _) = push(50, SAMPLE_BYTES_MIN - 1001);
        assert_eq!(
            (rate, about.map(f64::round)),
            (None, Some(((SAMPLE_BYTES_MIN - 1) as f64 / 2e-3).round()))
        );
        let (rate, about, _) = push(90, 1);
        assert_eq!((rate, rate), (about, Some(SAMPLE_BYTES_MIN as f64 / 3e-3)));
    }
}
