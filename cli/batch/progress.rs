//! How far a batch is, as a bar at a terminal and as lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::meter::{Rate, duration};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows one batch.
pub struct Progress {
    bar: Option<ProgressBar>,
    rate: Option<Rate>,
    /// Lines, at the last look.
    done: Option<u64>,
    said: Option<Instant>,
}

impl Progress {
    /// A bar or lines, on standard error.
    pub fn new(terminal: bool) -> Progress {
        let bar = terminal.then(|| {
            let style = ProgressStyle::with_template("{wide_bar} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Progress { bar, rate: None, done: None, said: None }
    }

    /// `counts`: lines in all, good ones, failed ones.
    pub fn show(&mut self, status: &str, counts: [u64; 3], waits: Option<&str>, now: Instant) {
        let [total, completed, failed] = counts;
        let done = completed + failed;
        // What was done before we looked says nothing about the rate.
        let before = self.done.replace(done).unwrap_or(done);
        let rate = self.rate.get_or_insert_with(|| Rate::new(now));
        rate.add(done.saturating_sub(before), now);
        let text = line(status, counts, rate.per_second(now), waits);
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        self.say(&text, now);
    }

    /// Anything else.
    pub fn say(&mut self, text: &str, now: Instant) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None if self.said.is_none_or(|at| now.saturating_duration_since(at) >= LINE_EVERY) => {
                eprintln!("{text}")
            }
            None => return,
        }
        self.said = Some(now);
    }

    /// Leaves the terminal as it was.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `120 of 1000 lines, 3 failed, 35.2/s, 25 s left`
fn line(status: &str, [total, completed, failed]: [u64; 3], rate: f64, waits: Option<&str>) -> String {
    if let Some(waits) = waits {
        return format!("{} of {total} lines, waits: {waits}", completed + failed);
    }
    if status != "in_progress" {
        return status.replace('_', " ");
    }
    let mut text = format!("{} of {total} lines", completed + failed);
    if failed > 0 {
        text += &format!(", {failed} failed");
    }
    if rate > 0.0 {
        let left = total.saturating_sub(completed + failed) as f64 / rate;
        text += &format!(", {rate:.1}/s, {} left", duration(left));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(
            line("in_progress", [1000, 117, 3], 35.2, None),
            "120 of 1000 lines, 3 failed, 35.2/s, 25 s left"
        );
        assert_eq!(line("in_progress", [10, 0, 0], 0.0, None), "0 of 10 lines");
        assert_eq!(line("validating", [0; 3], 0.0, None), "validating");
        assert_eq!(line("in_progress", [10, 1, 0], 1.0, Some("a disk")), "1 of 10 lines, waits: a disk");
    }
}
