//! Says how far a load is, in the log. Called by the thread that loads.

use std::time::{Duration, Instant};

use models::Progress;

use crate::memory::gib;

/// Before the first line: short loads need none.
const FIRST: Duration = Duration::from_secs(2);
/// Between two lines at the most; it begins with [`FIRST`] and doubles.
const PAUSE_MAX: Duration = Duration::from_secs(16);

/// What `up` shows of a node's log although it shows little else.
pub const TARGET: &str = "loading";

/// Hears of every weight, says something now and then.
pub(crate) fn progress(model: String) -> impl FnMut(Progress) {
    let begun = Instant::now();
    let (mut next, mut pause) = (begun + FIRST, FIRST);
    move |progress| {
        let now = Instant::now();
        if now >= next {
            pause = (pause * 2).min(PAUSE_MAX);
            next = now + pause;
            tracing::info!(target: TARGET, "loading {model}: {}", line(progress, now - begun));
        }
    }
}

/// `12 of 36 layers, 3.2 GiB of 9.8 GiB, 1.1 GiB/s, 6 s left`
fn line(progress: Progress, since: Duration) -> String {
    let Progress { layers, layers_total, bytes, bytes_total } = progress;
    let so_far = format!("{layers} of {layers_total} layers, {} of {}", gib(bytes), gib(bytes_total));
    let rate = bytes as f64 / since.as_secs_f64();
    if !rate.is_finite() || rate < 1.0 {
        return so_far;
    }
    let left = bytes_total.saturating_sub(bytes) as f64 / rate;
    format!("{so_far}, {}/s, {left:.0} s left", gib(rate as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_rate_and_time_left() {
        let progress = Progress { layers: 12, layers_total: 36, bytes: 3 << 30, bytes_total: 9 << 30 };
        assert_eq!(
            line(progress, Duration::from_secs(4)),
            "12 of 36 layers, 3.0 GiB of 9.0 GiB, 768.0 MiB/s, 8 s left"
        );
        let nothing = Progress { layers: 0, layers_total: 36, bytes: 0, bytes_total: 9 << 30 };
        assert_eq!(line(nothing, Duration::from_secs(4)), "0 of 36 layers, 0.0 MiB of 9.0 GiB");
    }
}
