//! Measured speed, smoothed: what placement estimates with. Pure.

use std::time::Duration;

/// Weight of the newest measurement.
const NEWEST: f32 = 0.2;

/// Smoothed rates of steps; 0 while unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    prefill_tokens_per_s: f32,
    decode_step_ms: f32,
}

impl Rates {
    /// A step of `prompt` rows and `generated` rows took so long. Steps of generation alone tell the decode time; steps
    /// in which prompts dominate tell the prefill rate, by the time that they take beyond a decode step.
    pub fn step(&mut self, prompt: usize, generated: usize, took: Duration) {
        let seconds = took.as_secs_f32().max(1e-6);
        if prompt == 0 && generated > 0 {
            smooth(&mut self.decode_step_ms, seconds * 1e3);
        }
        if prompt > generated {
            let decode = if generated > 0 { self.decode_step_ms * 1e-3 } else { 0.0 };
            // A step that took hardly longer than a decode step tells nothing about its prompts.
            if seconds > 1.2 * decode {
                smooth(&mut self.prefill_tokens_per_s, prompt as f32 / (seconds - decode));
            }
        }
    }

    /// Prompt rows that take about so long; `None` while the rate is unknown.
    pub fn prompt_rows_within(&self, time: Duration) -> Option<usize> {
        let rate = self.prefill_tokens_per_s;
        (rate > 0.0).then_some((rate * time.as_secs_f32()) as usize)
    }

    /// Prompt tokens per second of prefill steps.
    pub fn prefill_tokens_per_s(&self) -> f32 {
        self.prefill_tokens_per_s
    }

    /// Milliseconds of a step that only generates.
    pub fn decode_step_ms(&self) -> f32 {
        self.decode_step_ms
    }
}

fn smooth(value: &mut f32, newest: f32) {
    *value = if *value == 0.0 { newest } else { *value + NEWEST * (newest - *value) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_measurement_counts_whole_and_later_ones_move_it() {
        let mut rates = Rates::default();
        rates.step(100, 0, Duration::from_secs(1));
        assert_eq!(rates.prefill_tokens_per_s(), 100.0);
        rates.step(200, 0, Duration::from_secs(1));
        assert!((rates.prefill_tokens_per_s() - 120.0).abs() < 1e-3);
        assert_eq!(rates.decode_step_ms(), 0.0);
    }

    #[test]
    fn a_step_tells_only_what_dominates_it() {
        let mut rates = Rates::default();
        rates.step(1, 8, Duration::from_millis(10));
        assert_eq!(rates, Rates::default());
        rates.step(0, 8, Duration::from_millis(10));
        assert!((rates.decode_step_ms() - 10.0).abs() < 1e-3);
        rates.step(16, 8, Duration::from_millis(11));
        assert_eq!(
            (rates.prefill_tokens_per_s(), rates.prompt_rows_within(Duration::from_secs(1))),
            (0.0, None)
        );
    }

    #[test]
    fn prompts_beside_generation_cost_what_they_add() {
        let mut rates = Rates::default();
        rates.step(0, 8, Duration::from_millis(100));
        rates.step(50, 8, Duration::from_millis(200));
        assert!((rates.prefill_tokens_per_s() - 500.0).abs() < 1.0);
        let rows = rates.prompt_rows_within(Duration::from_millis(100));
        assert!(rows.is_some_and(|rows| (49..=50).contains(&rows)), "{rows:?}");
    }
}
