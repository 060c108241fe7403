//! Time for records, which a system clock that jumps cannot break: what is to expire in a day does not expire now because the
//! clock was set to another year. While the process runs, time passes as the monotonic clock says; from run to run it goes on
//! from the last moment that was written down, forward by at most [`STEP_MAX`]. Used by `store`.

use std::time::{Duration, Instant};

/// The longest time that can have passed between two runs: more is taken for a wrong clock.
pub const STEP_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Seconds since 1970 that never go back.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    base: u64,
    begun: Instant,
}

impl Clock {
    /// `wall`: what the system's clock says, in seconds since 1970. `last`: the last moment that was written down; 0: never.
    pub fn new(wall: u64, last: u64, begun: Instant) -> Clock {
        let base = if last == 0 { wall } else { wall.clamp(last, last.saturating_add(STEP_MAX.as_secs())) };
        Clock { base, begun }
    }

    /// Seconds since 1970.
    pub fn now(&self, instant: Instant) -> u64 {
        self.base + instant.saturating_duration_since(self.begun).as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_between_runs_are_bounded() {
        let begun = Instant::now();
        let at = |wall, last| Clock::new(wall, last, begun).now(begun + Duration::from_secs(5));
        assert_eq!(at(1_000, 0), 1_005);
        assert_eq!(at(1_060, 1_000), 1_065);
        // Set back to 1970, and to another century.
        assert_eq!(at(0, 1_000), 1_005);
        assert_eq!(at(5_000_000_000, 1_000), 1_005 + STEP_MAX.as_secs());
    }
}
