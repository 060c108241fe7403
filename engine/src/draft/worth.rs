//! How many guessed tokens are worth a row each: measured, both how often guesses hold and what steps of so many rows take.

use std::time::Duration;

use super::AGREED_MIN;

/// Steps are told apart by their rows, up to each of these: small products cost by their number.
const ROWS: [usize; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];

/// No step is measured that has more.
pub(crate) const ROWS_MAX: usize = ROWS[ROWS.len() - 1];

/// Guesses are told apart by how many tokens before them agreed, up to each of these, and beyond.
const AGREED: [usize; 5] = [AGREED_MIN, 3, 5, 8, 16];

/// What is believed of guesses before any was tried.
const ODDS: f32 = 0.5;

/// Weight of the newest try of a guess.
const NEWEST_ODDS: f32 = 0.05;

/// Weight of the newest step's time.
const NEWEST_TIME: f32 = 0.2;

/// What is believed of a time wears off by so much with every other step, so that it is measured again at some time; sooner by as
/// much as it was measured less often than [`OFTEN`].
const WORN: f32 = 1.0 / 512.0;
const OFTEN: u32 = 8;

/// A step that was held up is not believed to have taken longer than so many times what its rows take one by one.
const HELD_UP: f32 = 4.0;

/// A time that is older than so many steps counts no more when there is a new one.
const OLD: u32 = 64;

/// How often guesses hold, and what steps take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Worth {
    odds: [f32; AGREED.len() + 1],
    times: [Time; ROWS.len()],
}

/// Of steps of a number of rows.
#[derive(Clone, Copy, Debug, Default)]
struct Time {
    /// Smoothed; 0: not measured.
    seconds: f32,
    /// Steps since then.
    age: u32,
    /// How often it was measured.
    count: u32,
}

impl Time {
    fn believed(&self) -> f32 {
        let sooner = OFTEN as f32 / self.count.clamp(1, OFTEN) as f32;
        self.seconds * (-WORN * sooner * self.age as f32).exp()
    }
}

impl Default for Worth {
    fn default() -> Self {
        Worth { odds: [ODDS; AGREED.len() + 1], times: [Time::default(); ROWS.len()] }
    }
}

impl Worth {
    /// A step of `rows` rows, all of sequences that generate, took so long.
    pub fn step(&mut self, rows: usize, took: Duration) {
        let Some(class) = class(rows) else { return };
        let mut newest = took.as_secs_f32().max(1e-6);
        if let Some(fewer) = class.checked_sub(1).and_then(|class| self.seconds(ROWS[class])) {
            newest = newest.min(fewer * rows as f32 * HELD_UP);
        }
        for time in &mut self.times {
            time.age = time.age.saturating_add(1);
        }
        let time = &mut self.times[class];
        let forgotten = time.seconds == 0.0 || time.age > OLD;
        time.seconds = if forgotten { newest } else { time.seconds + NEWEST_TIME * (newest - time.seconds) };
        time.age = 0;
        time.count = time.count.saturating_add(1);
    }

    /// Of `drafted` guesses, behind `agreed` tokens that agreed, the first `held` were right.
    pub fn tried(&mut self, agreed: usize, drafted: usize, held: usize) {
        for at in 0..drafted.min(held + 1) {
            let odds = &mut self.odds[kind(agreed + at)];
            *odds += NEWEST_ODDS * (f32::from(at < held) - *odds);
        }
    }

    /// How many of each guess's tokens are worth a row beside `generating` rows, `most` rows in all: those with which a step
    /// gives most tokens in its time. `guesses`: tokens that agreed, tokens guessed. All 0 until a step was measured.
    pub fn lengths(&self, generating: usize, most: usize, guesses: &[(usize, usize)]) -> Vec<usize> {
        let mut lengths = vec![0; guesses.len()];
        let Some(plain) = self.seconds(generating) else { return lengths };
        // (chance, guess), every row after those before it in its guess: chances only fall within one.
        let mut rows: Vec<(f32, usize)> = Vec::new();
        for (index, &(agreed, guessed)) in guesses.iter().enumerate() {
            let mut chance = 1.0;
            for at in 0..guessed {
                chance *= self.odds[kind(agreed + at)];
                rows.push((chance, index));
            }
        }
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        rows.truncate(most.saturating_sub(generating));
        let (mut best, mut kept) = (generating as f32 / plain, 0);
        let mut tokens = generating as f32;
        for (count, (chance, _)) in (1..).zip(&rows) {
            tokens += chance;
            let tried = self.within_reach(generating, generating + count);
            let Some(seconds) = self.seconds(generating + count).filter(|_| tried) else { break };
            if tokens / seconds > best {
                (best, kept) = (tokens / seconds, count);
            }
        }
        rows[..kept].iter().for_each(|(_, index)| lengths[*index] += 1);
        lengths
    }

    /// How often guesses behind so many tokens that agreed hold.
    #[cfg(test)]
    pub fn odds(&self, agreed: usize) -> f32 {
        self.odds[kind(agreed)]
    }

    /// Whether steps of all numbers from `generating` on, up to that of `rows`, were measured: those are tried one after the other.
    fn within_reach(&self, generating: usize, rows: usize) -> bool {
        let (Some(first), Some(last)) = (class(generating), class(rows)) else { return false };
        self.times[first..last].iter().all(|time| time.seconds > 0.0)
    }

    /// Believed time of a step of so many rows: not less than of fewer. One that was never measured takes as long as the next
    /// smaller one, so that it is tried. `None`: no such step was measured, or it is too large.
    fn seconds(&self, rows: usize) -> Option<f32> {
        let upto = &self.times[..=class(rows)?];
        let most = upto.iter().map(Time::believed).fold(0.0, f32::max);
        (most > 0.0).then_some(most)
    }
}

fn class(rows: usize) -> Option<usize> {
    ROWS.iter().position(|upto| rows <= *upto)
}

fn kind(agreed: usize) -> usize {
    AGREED.iter().position(|upto| agreed <= *upto).unwrap_or(AGREED.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: usize = 20;

    /// Steps that take `ms` of their rows.
    fn measured(ms: impl Fn(usize) -> u64) -> Worth {
        let mut worth = Worth::default();
        for _ in 0..OFTEN {
            ROWS.iter().for_each(|rows| worth.step(*rows, Duration::from_millis(ms(*rows))));
        }
        worth
    }

    #[test]
    fn nothing_is_tried_before_it_is_known_what_a_step_takes() {
        let mut worth = Worth::default();
        assert_eq!(worth.lengths(1, 64, &[(LONG, 8)]), [0]);
        for (rows, next) in [(1, 2), (2, 3), (3, 4), (4, 6), (6, 8)] {
            worth.step(rows, Duration::from_millis(10));
            assert_eq!(
                worth.lengths(1, 64, &[(LONG, 9)]),
                [next - 1],
                "more rows are tried, little by little"
            );
        }
        assert_eq!(worth.lengths(9, 64, &[(LONG, 8)]), [3]);
    }

    #[test]
    fn rows_that_cost_as_much_as_tokens_are_not_taken() {
        let worth = measured(|rows| 10 * rows as u64);
        assert_eq!(worth.lengths(1, 64, &[(LONG, 8)]), [0]);
        let worth = measured(|_| 10);
        assert_eq!(worth.lengths(1, 64, &[(LONG, 8)]), [8]);
        assert_eq!(worth.lengths(30, 64, &[(LONG, 8), (2, 8)]), [1, 1], "no more than 32 rows");
        assert_eq!(worth.lengths(2, 5, &[(LONG, 8), (2, 8)]), [2, 1]);
    }

    #[test]
    fn guesses_that_hold_are_drawn_out_and_those_that_fail_are_left() {
        // Half as much again for every doubling.
        let mut worth = measured(|rows| (10.0 * (rows as f32).powf(0.58)) as u64);
        for _ in 0..200 {
            worth.tried(LONG, 8, 8);
            worth.tried(2, 8, 0);
        }
        assert_eq!(worth.lengths(1, 64, &[(LONG, 15), (2, 15)]), [15, 0]);
        for _ in 0..200 {
            worth.tried(LONG, 8, 0);
        }
        assert_eq!(worth.lengths(1, 64, &[(LONG, 15), (2, 15)]), [0, 0]);
    }

    /// Protects: the first guess of a passage that hardly agrees counts by itself, those behind it by a passage that agrees.
    #[test]
    fn only_what_was_tried_is_learned() {
        let mut worth = Worth::default();
        worth.tried(2, 8, 2);
        assert!(worth.odds[kind(2)] > ODDS && worth.odds[kind(3)] > ODDS && worth.odds[kind(4)] < ODDS);
        assert_eq!(worth.odds[kind(6)], ODDS);
    }

    #[test]
    fn one_slow_step_is_forgotten() {
        let mut worth = Worth::default();
        (0..OFTEN).for_each(|_| worth.step(1, Duration::from_millis(10)));
        (0..8).for_each(|_| worth.tried(LONG, 8, 0));
        worth.step(2, Duration::from_secs(1));
        assert_eq!(worth.lengths(1, 64, &[(LONG, 8)]), [0]);
        let steps = (1..9999).find(|_| {
            worth.step(1, Duration::from_millis(10));
            worth.lengths(1, 64, &[(LONG, 8)]) != [0]
        });
        assert!(steps.is_some_and(|steps| steps < 256), "{steps:?}");
        // Who is slow again and again is asked less and less.
        let mut asked = 0;
        for _ in 0..8192 {
            let rows = 1 + worth.lengths(1, 64, &[(LONG, 1)])[0];
            asked += rows - 1;
            worth.step(rows, Duration::from_millis(if rows > 1 { 100 } else { 10 }));
        }
        assert!((5..20).contains(&asked), "{asked}");
    }
}
