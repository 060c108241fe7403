//! How many guessed tokens are worth a row each: measured, both how often guesses hold and what steps of so many rows take, and
//! what guessing takes where a draft model does it.

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

/// The same of a draft model's, which somebody chose for this model.
const ODDS_MODEL: f32 = 0.75;

/// Weight of the newest try of a guess.
const NEWEST_ODDS: f32 = 0.05;

/// The same of a draft model's for one sequence, of which there are fewer.
const NEWEST_LUCK: f32 = 0.1;

/// What is known against a draft model's guesses wears off by so much with every step that has none, so that they are tried again.
const WORN_LUCK: f32 = 1.0 / 128.0;

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
    luck: Luck,
    times: Times,
    drafting: Times,
}

/// How often a draft model's guesses hold: of one sequence, or of all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Luck {
    odds: f32,
    /// Steps since any was tried.
    idle: u32,
}

impl Luck {
    /// Steps without a try are forgiven.
    pub fn believed(&self) -> f32 {
        1.0 - (1.0 - self.odds) * (-WORN_LUCK * self.idle as f32).exp()
    }

    /// A step had none.
    pub fn rests(&mut self) {
        self.idle = self.idle.saturating_add(1);
    }

    /// Of `guessed` in a row the first `held` were right.
    pub fn tried(&mut self, guessed: usize, held: usize) {
        self.learn(NEWEST_LUCK, guessed, held);
    }

    fn learn(&mut self, newest: f32, guessed: usize, held: usize) {
        self.idle = 0;
        for at in 0..guessed.min(held + 1) {
            self.odds += newest * (f32::from(at < held) - self.odds);
        }
    }
}

/// Whose guess it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// A passage that agrees in so many tokens.
    Passage { agreed: usize },
    /// The draft model, with such luck.
    Model(Luck),
}

/// Rows for guesses.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Lengths {
    /// Of each guess, how many tokens get one.
    pub each: Vec<usize>,
    /// Tokens per second that are expected of the step; 0: nobody knows yet.
    pub rate: f32,
}

impl Lengths {
    /// Whether any guess gets one.
    pub fn any(&self) -> bool {
        self.each.iter().any(|length| *length > 0)
    }
}

/// Of steps, by their rows.
#[derive(Clone, Copy, Debug, Default)]
struct Times([Time; ROWS.len()]);

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

impl Times {
    /// Another step has been.
    fn age(&mut self) {
        self.0.iter_mut().for_each(|time| time.age = time.age.saturating_add(1));
    }

    /// A step of `rows` rows took so long.
    fn took(&mut self, rows: usize, took: Duration) {
        let Some(class) = class(rows) else { return };
        let mut newest = took.as_secs_f32().max(1e-6);
        if let Some(fewer) = class.checked_sub(1).and_then(|class| self.seconds(ROWS[class])) {
            newest = newest.min(fewer * rows as f32 * HELD_UP);
        }
        let time = &mut self.0[class];
        let forgotten = time.seconds == 0.0 || time.age > OLD;
        time.seconds = if forgotten { newest } else { time.seconds + NEWEST_TIME * (newest - time.seconds) };
        time.age = 0;
        time.count = time.count.saturating_add(1);
    }

    /// Whether steps of all numbers from `first` on, up to that of `rows`, were measured: those are tried one after the other.
    fn within_reach(&self, first: usize, rows: usize) -> bool {
        let (Some(first), Some(last)) = (class(first), class(rows)) else { return false };
        self.0[first..last].iter().all(|time| time.seconds > 0.0)
    }

    /// Believed time of a step of so many rows: not less than of fewer. One that was never measured takes as long as the next
    /// smaller one, so that it is tried. `None`: no such step was measured, or it is too large.
    fn seconds(&self, rows: usize) -> Option<f32> {
        let upto = &self.0[..=class(rows)?];
        let most = upto.iter().map(Time::believed).fold(0.0, f32::max);
        (most > 0.0).then_some(most)
    }
}

impl Default for Worth {
    fn default() -> Self {
        Worth {
            odds: [ODDS; AGREED.len() + 1],
            luck: Luck { odds: ODDS_MODEL, idle: 0 },
            times: Times::default(),
            drafting: Times::default(),
        }
    }
}

impl Worth {
    /// A step of `rows` rows, all of sequences that generate, took so long.
    pub fn step(&mut self, rows: usize, took: Duration) {
        if class(rows).is_some() {
            self.times.age();
            self.drafting.age();
            self.luck.rests();
        }
        self.times.took(rows, took);
    }

    /// A step of the draft model's.
    pub fn drafted(&mut self, rows: usize, took: Duration) {
        self.drafting.took(rows, took);
    }

    /// Of `drafted` guesses, behind `agreed` tokens that agreed, the first `held` were right.
    pub fn tried(&mut self, agreed: usize, drafted: usize, held: usize) {
        for at in 0..drafted.min(held + 1) {
            let odds = &mut self.odds[kind(agreed + at)];
            *odds += NEWEST_ODDS * (f32::from(at < held) - *odds);
        }
    }

    /// The same of the draft model's, for any sequence.
    pub fn tried_model(&mut self, drafted: usize, held: usize) {
        self.luck.learn(NEWEST_ODDS, drafted, held);
    }

    /// The draft model's luck with a sequence of which nothing is known.
    pub fn luck(&self) -> Luck {
        self.luck
    }

    /// How many of each guess's tokens are worth a row beside `generating` rows, `most` rows in all: those with which a step
    /// gives most tokens in its time, the draft model's included. `guesses`: whose, and how long. None until a step was measured.
    pub fn lengths(&self, generating: usize, most: usize, guesses: &[(Source, usize)]) -> Lengths {
        let mut lengths = Lengths { each: vec![0; guesses.len()], rate: 0.0 };
        let Some(plain) = self.times.seconds(generating) else { return lengths };
        // (chance, guess, which token of it), every row after those before it in its guess: chances only fall within one.
        let mut rows: Vec<(f32, usize, usize)> = Vec::new();
        for (index, &(source, guessed)) in guesses.iter().enumerate() {
            let mut chance = 1.0;
            for at in 0..guessed {
                chance *= self.chance(source, at);
                rows.push((chance, index, at));
            }
        }
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        rows.truncate(most.saturating_sub(generating));
        lengths.rate = generating as f32 / plain;
        let (mut kept, mut tokens) = (0, generating as f32);
        // How many sequences the draft model guesses for, and how far.
        let (mut drafted, mut depth) = (0, 0);
        for (count, (chance, index, at)) in (1..).zip(&rows) {
            tokens += chance;
            if let Source::Model(_) = guesses[*index].0 {
                drafted += usize::from(*at == 0);
                depth = depth.max(at + 1);
            }
            let tried = self.times.within_reach(generating, generating + count);
            let Some(seconds) = self.times.seconds(generating + count).filter(|_| tried) else { break };
            let rate = tokens / (seconds + self.drafting(drafted) * depth as f32);
            if rate > lengths.rate {
                (lengths.rate, kept) = (rate, count);
            }
        }
        rows[..kept].iter().for_each(|(_, index, _)| lengths.each[*index] += 1);
        lengths
    }

    /// How often token `at` of a guess holds if those before it do.
    pub fn chance(&self, source: Source, at: usize) -> f32 {
        match source {
            Source::Passage { agreed } => self.odds[kind(agreed + at)],
            Source::Model(luck) => luck.believed(),
        }
    }

    /// Seconds of a step of the draft model's; one that was never measured takes none, so that it is tried.
    fn drafting(&self, rows: usize) -> f32 {
        self.drafting.seconds(rows.max(1)).unwrap_or(0.0)
    }

    /// How often guesses behind so many tokens that agreed hold.
    #[cfg(test)]
    pub fn odds(&self, agreed: usize) -> f32 {
        self.odds[kind(agreed)]
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

    /// Of guesses by passages.
    fn rows(worth: &Worth, generating: usize, most: usize, guesses: &[(usize, usize)]) -> Vec<usize> {
        let passage = |&(agreed, len): &(usize, usize)| (Source::Passage { agreed }, len);
        worth.lengths(generating, most, &guesses.iter().map(passage).collect::<Vec<_>>()).each
    }

    /// Tokens of the draft model's guess that are worth a row for one sequence.
    fn drafts(worth: &Worth, luck: Luck) -> usize {
        worth.lengths(1, 64, &[(Source::Model(luck), 8)]).each[0]
    }

    #[test]
    fn nothing_is_tried_before_it_is_known_what_a_step_takes() {
        let mut worth = Worth::default();
        assert_eq!(rows(&worth, 1, 64, &[(LONG, 8)]), [0]);
        for (most, next) in [(1, 2), (2, 3), (3, 4), (4, 6), (6, 8)] {
            worth.step(most, Duration::from_millis(10));
            assert_eq!(
                rows(&worth, 1, 64, &[(LONG, 9)]),
                [next - 1],
                "more rows are tried, little by little"
            );
        }
        assert_eq!(rows(&worth, 9, 64, &[(LONG, 8)]), [3]);
    }

    #[test]
    fn rows_that_cost_as_much_as_tokens_are_not_taken() {
        let worth = measured(|rows| 10 * rows as u64);
        assert_eq!(rows(&worth, 1, 64, &[(LONG, 8)]), [0]);
        let worth = measured(|_| 10);
        assert_eq!(rows(&worth, 1, 64, &[(LONG, 8)]), [8]);
        assert_eq!(rows(&worth, 30, 64, &[(LONG, 8), (2, 8)]), [1, 1], "no more than 32 rows");
        assert_eq!(rows(&worth, 2, 5, &[(LONG, 8), (2, 8)]), [2, 1]);
    }

    #[test]
    fn guesses_that_hold_are_drawn_out_and_those_that_fail_are_left() {
        // Half as much again for every doubling.
        let mut worth = measured(|rows| (10.0 * (rows as f32).powf(0.58)) as u64);
        for _ in 0..200 {
            worth.tried(LONG, 8, 8);
            worth.tried(2, 8, 0);
        }
        assert_eq!(rows(&worth, 1, 64, &[(LONG, 15), (2, 15)]), [15, 0]);
        for _ in 0..200 {
            worth.tried(LONG, 8, 0);
        }
        assert_eq!(rows(&worth, 1, 64, &[(LONG, 15), (2, 15)]), [0, 0]);
    }

    /// Protects: the first guess of a passage that hardly agrees counts by itself, those behind it by a passage that agrees.
    #[test]
    fn only_what_was_tried_is_learned() {
        let mut worth = Worth::default();
        worth.tried(2, 8, 2);
        assert!(worth.odds[kind(2)] > ODDS && worth.odds[kind(3)] > ODDS && worth.odds[kind(4)] < ODDS);
        assert_eq!(worth.odds[kind(6)], ODDS);
    }

    /// Protects: what the draft model takes for each token of a guess is part of what a step costs.
    #[test]
    fn a_draft_model_is_asked_as_far_as_its_time_is_won_back() {
        let far = |ms| {
            let mut worth = measured(|_| 20);
            (0..OFTEN).for_each(|_| worth.drafted(1, Duration::from_millis(ms)));
            (0..200).for_each(|_| worth.tried_model(4, 3));
            drafts(&worth, worth.luck())
        };
        assert_eq!([far(0), far(20), far(40)], [8, 0, 0]);
        assert!((1..8).contains(&far(5)), "{}", far(5));
        let mut worth = measured(|_| 20);
        (0..OFTEN).for_each(|_| worth.drafted(1, Duration::from_millis(5)));
        let (luck, passage) = (worth.luck(), Source::Passage { agreed: LONG });
        (0..200).for_each(|_| worth.tried(LONG, 8, 8));
        let both = worth.lengths(2, 64, &[(Source::Model(luck), 8), (passage, 8)]);
        assert!(both.each[0] < 8 && both.each[1] == 8, "passages cost nothing: {both:?}");
    }

    /// Protects: a draft model that is unlike the model, or answers drawn at random, cost little, and are tried again.
    #[test]
    fn a_draft_model_without_luck_is_tried_now_and_then() {
        let mut worth = measured(|_| 20);
        (0..OFTEN).for_each(|_| worth.drafted(1, Duration::from_millis(5)));
        let mut luck = worth.luck();
        assert!(drafts(&worth, luck) > 1);
        let mut run = |steps: usize, held: usize| {
            let mut tried = 0;
            for _ in 0..steps {
                match drafts(&worth, luck) {
                    0 => luck.rests(),
                    guessed => {
                        tried += 1;
                        luck.tried(guessed, held.min(guessed));
                        worth.drafted(1, Duration::from_millis(5));
                    }
                }
                worth.step(1, Duration::from_millis(20));
            }
            tried
        };
        run(100, 0);
        let tried = run(1000, 0);
        assert!((5..60).contains(&tried), "{tried} of 1000");
        let tried = run(1000, 8);
        assert!(tried > 800, "{tried} of 1000");
    }

    #[test]
    fn one_slow_step_is_forgotten() {
        let mut worth = Worth::default();
        (0..OFTEN).for_each(|_| worth.step(1, Duration::from_millis(10)));
        (0..8).for_each(|_| worth.tried(LONG, 8, 0));
        worth.step(2, Duration::from_secs(1));
        assert_eq!(rows(&worth, 1, 64, &[(LONG, 8)]), [0]);
        let steps = (1..9999).find(|_| {
            worth.step(1, Duration::from_millis(10));
            rows(&worth, 1, 64, &[(LONG, 8)]) != [0]
        });
        assert!(steps.is_some_and(|steps| steps < 256), "{steps:?}");
        // Who is slow again and again is asked less and less.
        let mut asked = 0;
        for _ in 0..8192 {
            let rows = 1 + rows(&worth, 1, 64, &[(LONG, 1)])[0];
            asked += rows - 1;
            worth.step(rows, Duration::from_millis(if rows > 1 { 100 } else { 10 }));
        }
        assert!((5..20).contains(&asked), "{asked}");
    }
}
