//! Paces a sender to a rate, as a link of that rate would: the bench's `--link` where no network namespace can be had. Pure.

use std::time::{Duration, Instant};

/// Unused time that may be made up for, so that a late wake-up does not lower the rate.
const BURST: Duration = Duration::from_millis(5);

/// When the next bytes may leave.
#[derive(Clone, Debug)]
pub struct Pace {
    bytes_per_s: u64,
    next: Option<Instant>,
}

impl Pace {
    /// `bytes_per_s`, at least 1.
    pub fn new(bytes_per_s: u64) -> Self {
        Pace { bytes_per_s: bytes_per_s.max(1), next: None }
    }

    /// Books `bytes` and returns when they may leave.
    pub fn book(&mut self, bytes: u64, now: Instant) -> Instant {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let start = self.next.map_or(now, |next| next.max(earliest));
        self.next = Some(start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64));
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_at_the_rate_and_idleness_is_not_saved_up() {
        let now = Instant::now();
        let mut pace = Pace::new(1_000_000);
        assert_eq!(pace.book(500_000, now), now);
        assert_eq!(pace.book(250_000, now), now + Duration::from_millis(500));
        assert_eq!(pace.book(1, now), now + Duration::from_millis(750));
        let later = now + Duration::from_secs(60);
        assert_eq!(pace.book(1_000_000, later), later - BURST);
        assert_eq!(pace.book(1, later), later - BURST + Duration::from_secs(1));
    }
}
