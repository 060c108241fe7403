//! Speculative decoding: what comes next in a sequence is guessed, the guesses are computed in the same step as the token before
//! them, and what the rows draw decides. Guesses come from the sequence itself, for code that is edited, quotes, tables and calls
//! of tools repeat much of what came before, and from a small model beside the large one, where there is one. An answer is the
//! one that it would have been: every token is drawn from its own row, by its own rule, and what was computed behind a wrong
//! guess is written over.
//!
//! [`Lookup`] guesses, and so does a [`Drafter`] ([`model::DraftModel`]); [`worth::Worth`] knows how often guesses hold and what
//! rows cost, and says how many are worth one. Pure but for the model. Called by the leader.

pub(crate) mod model;
pub(crate) mod worth;

use std::time::Duration;

use backend::draw::Rule;

use crate::error::EngineError;

/// Tokens that a passage has to share with the sequence's end.
pub(crate) const AGREED_MIN: usize = 2;

/// Tokens beyond which passages are as good as each other.
const AGREED_MAX: usize = 32;

/// Passages that are looked at, the latest first.
const TRIES: usize = 16;

/// What is no token: stands behind a prediction.
const NONE: u32 = u32::MAX;

/// What may come next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Guess {
    /// In order.
    pub tokens: Vec<u32>,
    /// How many tokens before them the passage shares with the end of the sequence.
    pub agreed: usize,
    /// The passage is the prediction's.
    pub predicted: bool,
    /// The draft model's: no passage.
    pub model: bool,
}

/// Guesses with a model of its own.
pub(crate) trait Drafter {
    /// What follows each of some sequences. Of tokens that it has not read yet it reads no more than takes `within`. An error is
    /// its last word.
    fn guess(&mut self, asks: &[Ask<'_>], within: Duration) -> Result<Drafted, EngineError>;

    /// The job has ended, or was never heard of.
    fn forget(&mut self, job: u64);
}

impl<D: Drafter> Drafter for &mut D {
    fn guess(&mut self, asks: &[Ask<'_>], within: Duration) -> Result<Drafted, EngineError> {
        (**self).guess(asks, within)
    }

    fn forget(&mut self, job: u64) {
        (**self).forget(job);
    }
}

/// A sequence that is guessed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub job: u64,
    /// All of its tokens: those of earlier calls and more.
    pub tokens: &'a [u32],
    /// Tokens to guess at the most; 0: they are only read, for a later guess.
    pub most: usize,
    /// Those with the same may learn of each other's beginnings.
    pub salt: &'a [u8],
    /// How the next token is drawn. The noise of a draw depends on the token's position alone: who draws by the same rule from
    /// a likeness of the row draws the same token more often than not.
    pub rule: Rule,
}

/// What a [`Drafter`] says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drafted {
    /// For each that was asked; `None`: its tokens are still to be read. Empty where nothing can be said, or is asked.
    pub guesses: Vec<Option<Vec<u32>>>,
    /// Rows and time of each step of the draft model.
    pub steps: Vec<(usize, Duration)>,
}

/// A sequence, behind what its client expects of it, and where pairs of tokens stand there. Some twenty bytes per token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lookup {
    /// The prompt's last tokens and the prediction, as if that followed them; [`NONE`]; then the sequence. Empty until the first
    /// guess.
    text: Vec<u32>,
    /// Where the prediction begins and ends there; 0 without one.
    prediction: (usize, usize),
    /// By hash of a pair: the place behind the latest; 0: none. A power of two of them.
    latest: Vec<u32>,
    /// Of the pair before place `2 + i`: the place behind the one before it with that hash; 0: none.
    before: Vec<u32>,
}

impl Lookup {
    /// For a sequence that probably goes on behind its prompt with some of `prediction`.
    pub fn new(prompt: &[u32], prediction: &[u32]) -> Self {
        if prediction.is_empty() {
            return Self::default();
        }
        let tail = &prompt[prompt.len().saturating_sub(AGREED_MAX)..];
        let text = [tail, prediction, &[NONE]].concat();
        Lookup { prediction: (tail.len(), text.len() - 1), text, ..Self::default() }
    }

    /// At most `most` tokens that may follow `tokens`: what followed the longest passage that ends as they do, the latest of
    /// several. `tokens` are those of earlier calls and more.
    pub fn guess(&mut self, tokens: &[u32], most: usize) -> Guess {
        let own = if self.prediction.1 > 0 { self.prediction.1 + 1 } else { 0 };
        self.text.extend_from_slice(&tokens[self.text.len() - own..]);
        if tokens.len() < AGREED_MIN || self.text.len() == AGREED_MIN || most == 0 {
            return Guess::default();
        }
        self.take_in();
        let (text, end) = (&self.text, self.text.len());
        let mut place = self.latest[self.bucket(end)] as usize;
        let (mut best, mut agreed) = (0, 0);
        for _ in 0..TRIES {
            if place == 0 || agreed == AGREED_MAX {
                break;
            }
            let alike = alike(&text[..place], text);
            // Nothing follows the end of a prediction.
            if alike > agreed && text[place] != NONE {
                (best, agreed) = (place, alike);
            }
            place = self.before[place - AGREED_MIN] as usize;
        }
        if agreed < AGREED_MIN {
            return Guess::default();
        }
        // A passage that reaches the end goes on with its own guesses: what repeats, repeats.
        let mut guessed: Vec<u32> = Vec::with_capacity(most);
        for at in best..best + most {
            match text.get(at) {
                Some(&NONE) => break,
                Some(token) => guessed.push(*token),
                None => guessed.push(guessed[at - end]),
            }
        }
        let predicted = (self.prediction.0..self.prediction.1).contains(&best);
        Guess { tokens: guessed, agreed, predicted, model: false }
    }

    /// Notes all pairs but the last, which nothing follows.
    fn take_in(&mut self) {
        let places = self.text.len() - AGREED_MIN;
        if self.latest.len() < places {
            self.latest = vec![0; (2 * places).next_power_of_two()];
            self.before.clear();
        }
        for place in self.before.len() + AGREED_MIN..self.text.len() {
            let bucket = self.bucket(place);
            self.before.push(self.latest[bucket]);
            self.latest[bucket] = place as u32;
        }
    }

    /// Of the pair before `place`.
    fn bucket(&self, place: usize) -> usize {
        let pair = u64::from(self.text[place - 2]) << 32 | u64::from(self.text[place - 1]);
        // The upper bits of a product depend on all of its factor's.
        (pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.latest.len() - 1)
    }
}

/// How many last tokens both have in common, up to [`AGREED_MAX`].
fn alike(a: &[u32], b: &[u32]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take(AGREED_MAX).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guess(tokens: &[u32], most: usize) -> (Vec<u32>, usize) {
        let guess = Lookup::default().guess(tokens, most);
        (guess.tokens, guess.agreed)
    }

    #[test]
    fn the_longest_passage_that_ends_alike_goes_on() {
        // 1 2 3 4 ... 9 2 3 5 ... 1 2 3: the later passage is shorter.
        assert_eq!(guess(&[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2), (vec![4, 9], 3));
        assert_eq!(guess(&[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 2), (vec![5, 1], 3), "the latest of equals");
    }

    /// Protects: a prediction is followed from the answer's first token on, found again behind what differs, and ends.
    #[test]
    fn a_prediction_goes_on_behind_the_prompt() {
        let (prompt, prediction) = ([9, 8, 7], [1, 2, 3, 4, 5]);
        let mut lookup = Lookup::new(&prompt, &prediction);
        let mut guess = |more: &[u32], most| lookup.guess(&[&prompt, more].concat(), most);
        let predicted =
            |tokens: &[u32], agreed| Guess { tokens: tokens.to_vec(), agreed, predicted: true, model: false };
        assert_eq!(guess(&[], 3), predicted(&[1, 2, 3], 3));
        assert_eq!(guess(&[1], 9), predicted(&[2, 3, 4, 5], 4));
        assert_eq!(guess(&[1, 6, 3], 9), Guess::default());
        assert_eq!(guess(&[1, 6, 3, 4], 9), predicted(&[5], 2));
        assert_eq!(guess(&[1, 6, 3, 4, 5], 9), Guess::default(), "nothing follows");
        // The answer's own passage is as long and later.
        let own = guess(&[1, 6, 3, 4, 5, 1, 6], 2);
        assert_eq!(own, Guess { tokens: vec![3, 4], agreed: 2, ..Guess::default() });
    }

    #[test]
    fn one_token_alike_is_none() {
        assert_eq!(guess(&[1, 2, 3, 4, 5, 3], 4), (vec![], 0));
        assert_eq!(guess(&[7], 4), (vec![], 0));
        assert_eq!(guess(&[7, 7], 4), (vec![], 0));
        assert_eq!(guess(&[1, 2, 9, 1, 2], 0), (vec![], 0));
    }

    #[test]
    fn what_repeats_is_guessed_to_repeat() {
        assert_eq!(guess(&[8, 1, 2, 3, 1, 2, 3], 7), (vec![1, 2, 3, 1, 2, 3, 1], 3));
        assert_eq!(guess(&[5; 9], 3), (vec![5; 3], 8));
    }

    /// Tokens that the longest passage shares with the end, or 0, by looking at all of them.
    fn plainly(tokens: &[u32]) -> usize {
        let places = AGREED_MIN..tokens.len();
        let longest = places.map(|place| alike(&tokens[..place], tokens)).max().unwrap_or(0);
        if longest < AGREED_MIN { 0 } else { longest }
    }

    proptest! {
        // A sequence that grows is looked up as one that is given whole, and no passage is longer than the one found as
        // long as there are few.
        #[test]
        fn growing_changes_nothing(tokens in prop::collection::vec(0u32..40, 3..90), most in 1usize..6) {
            let mut growing = Lookup::default();
            for end in 1..=tokens.len() {
                let grown = growing.guess(&tokens[..end], most);
                prop_assert_eq!(&grown, &Lookup::default().guess(&tokens[..end], most));
                let longest = plainly(&tokens[..end]);
                prop_assert!(grown.agreed <= longest);
                if end < 40 {
                    prop_assert_eq!(grown.agreed, longest);
                }
                prop_assert_eq!(grown.tokens.len(), if grown.agreed > 0 { most } else { 0 });
            }
        }
    }
}
