//! How far a transfer is, how fast, and how long it will take, in words. Pure: the time is an argument. Called by `pull`; the rate
//! also by `batch`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hub::Bytes;

/// The rate is that of this long.
const WINDOW: Duration = Duration::from_secs(15);
/// Samples are at least this far apart.
const SAMPLE: Duration = Duration::from_millis(500);

/// How fast something goes on.
pub struct Rate {
    /// All that was done.
    done: u64,
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// Nothing is done yet.
    pub fn new(now: Instant) -> Self {
        Rate { done: 0, samples: VecDeque::from([(now, 0)]) }
    }

    /// So much more is done.
    pub fn add(&mut self, amount: u64, now: Instant) {
        self.done += amount;
        if self.samples.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SAMPLE) {
            self.samples.push_back((now, self.done));
        }
    }

    /// Per second, of late.
    pub fn per_second(&mut self, now: Instant) -> f64 {
        while self.samples.len() > 1
            && self.samples.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= WINDOW)
        {
            self.samples.pop_front();
        }
        let (from, done) = self.samples.front().copied().unwrap_or((now, self.done));
        let seconds = now.saturating_duration_since(from).as_secs_f64();
        if seconds > 0.0 { (self.done - done) as f64 / seconds } else { 0.0 }
    }
}

/// One transfer.
pub struct Meter {
    total: u64,
    there: u64,
    /// Of bytes that were moved, whatever was there before.
    rate: Rate,
}

impl Meter {
    /// A transfer of `total` bytes, `there` of them done before.
    pub fn new(total: u64, there: u64, now: Instant) -> Self {
        Meter { total, there, rate: Rate::new(now) }
    }

    /// `bytes` more are done.
    pub fn moved(&mut self, bytes: u64, now: Instant) {
        self.there += bytes;
        self.rate.add(bytes, now);
    }

    /// What was thought to be there is `less`, or more.
    pub fn correct(&mut self, before: u64, after: u64) {
        self.there = (self.there + after).saturating_sub(before);
    }

    /// `1.20 GB of 4.80 GB, 112.3 MB/s, 32 s left`
    pub fn line(&mut self, now: Instant) -> String {
        let rate = self.rate.per_second(now);
        let so_far = format!("{} of {}", Bytes(self.there.min(self.total)), Bytes(self.total));
        if rate < 1.0 {
            return so_far;
        }
        let left = self.total.saturating_sub(self.there) as f64 / rate;
        format!("{so_far}, {}/s, {} left", Bytes(rate as u64), duration(left))
    }
}

/// `32 s`, `5 min 3 s`, `2 h 4 min`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate is the network's of the last seconds: not what was there before, not that of an hour ago.
    #[test]
    fn rate_and_time_left() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut meter = Meter::new(10_000_000_000, 4_000_000_000, begun);
        assert_eq!(meter.line(at(0)), "4.00 GB of 10.00 GB");
        for second in 1..=100 {
            meter.moved(10_000_000, at(second));
        }
        assert_eq!(meter.line(at(100)), "5.00 GB of 10.00 GB, 10.0 MB/s, 8 min 20 s left");
        for second in 101..=120 {
            meter.moved(100_000_000, at(second));
        }
        assert_eq!(meter.line(at(120)), "7.00 GB of 10.00 GB, 100.0 MB/s, 30 s left");
        // Damaged: one file again.
        meter.correct(3_000_000_000, 0);
        assert_eq!(meter.line(at(120)), "4.00 GB of 10.00 GB, 100.0 MB/s, 1 min 0 s left");
        // Nothing comes any more.
        assert_eq!(meter.line(at(900)), "4.00 GB of 10.00 GB");
    }

    #[test]
    fn durations() {
        assert_eq!([0.2, 59.0, 61.0, 7_500.0].map(duration), ["1 s", "59 s", "1 min 1 s", "2 h 5 min"]);
    }
}
