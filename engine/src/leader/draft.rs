//! Guesses in the next step: which sequences have rows for what they probably draw next.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Core;
use crate::draft::worth::{Lengths, Luck, ROWS_MAX, Source};
use crate::draft::{Ask, Guess};
use crate::sampler;
use crate::scheduler::Want;
use crate::sequence::{Expected, Stage};
use crate::tp::plan::Op;

/// Reading ahead while there is nothing else to do holds up whoever comes for no longer.
const READ_AHEAD_MAX: Duration = Duration::from_millis(20);

/// What is guessed, by job.
pub(super) type Guesses = BTreeMap<u64, Guess>;

/// What may be guessed of a sequence.
struct Chance {
    job: u64,
    /// What a passage says.
    passage: Guess,
    /// The draft model's with the sequence, if there is one.
    luck: Option<Luck>,
    /// Tokens that the draft model could guess.
    most: usize,
}

impl Chance {
    fn by_passage(&self) -> (Source, usize) {
        (Source::Passage { agreed: self.passage.agreed }, self.passage.tokens.len())
    }

    fn by_model(&self) -> Option<(Source, usize)> {
        self.luck.map(|luck| (Source::Model(luck), self.most))
    }
}

impl Core<'_> {
    /// Guesses for sequences that `wants` names, as many as are worth it, with room for them. Prompts leave no rows that cost less
    /// than others: beside them nothing is guessed. `None`: guesses are worth it, and the step under way has to end first,
    /// for they begin behind what it draws.
    pub(super) fn guesses(&mut self, wants: &[Want]) -> Option<Guesses> {
        let most = self.setup.options.draft_max;
        let streams = (1..ROWS_MAX).contains(&wants.len()) && wants.iter().all(|want| want.generating);
        if most == 0 || !streams || !self.probes.is_empty() {
            return Some(Guesses::new());
        }
        let context = self.setup.options.context_tokens;
        let drafter = self.drafter.is_some();
        let mut chances = Vec::new();
        for want in wants {
            let Some(sequence) = self.sequences.get_mut(&want.job) else { continue };
            // The row itself draws one of those that are left.
            let left = sequence.len_max(context).saturating_sub(sequence.len() + 1);
            let most = most.min(left);
            let passage = sequence.lookup.guess(&sequence.request.tokens, most);
            let expected =
                |id: &u32| Expected { at: sequence.request.tokens.len(), id: *id, agreed: passage.agreed };
            sequence.expected = passage.tokens.first().map(expected);
            let luck = drafter.then(|| *sequence.luck.get_or_insert(self.totals.worth.luck()));
            chances.push(Chance { job: want.job, passage, luck, most });
        }
        let plain = self.lengths(chances.iter().map(Chance::by_passage));
        let either: Vec<_> = chances.iter().map(|chance| self.likelier(chance)).collect();
        let with = if drafter { self.lengths(either.iter().copied()) } else { Lengths::default() };
        let drafts = with.rate > plain.rate;
        let lengths = if drafts { &with } else { &plain };
        if lengths.any() && self.under_way > 0 {
            return None;
        }
        let by_model = |at: usize| drafts && lengths.each[at] > 0 && matches!(either[at].0, Source::Model(_));
        let asked = (0..chances.len()).filter(|at| by_model(*at));
        let asked: Vec<_> = asked.map(|at| (chances[at].job, lengths.each[at])).collect();
        let mut drafted = self.draft(&asked, self.setup.options.stall_max);
        let mut kept = Guesses::new();
        for (at, Chance { job, passage, .. }) in chances.into_iter().enumerate() {
            let (mut guess, length) = match drafted.remove(&job) {
                Some(tokens) => (Guess { tokens, model: true, ..Guess::default() }, lengths.each[at]),
                None if by_model(at) => (passage, lengths.each[at].min(plain.each[at])),
                None => (passage, lengths.each[at]),
            };
            guess.tokens.truncate(length);
            guess.tokens.truncate(self.room_to_guess(job, guess.tokens.len()));
            if !guess.tokens.is_empty() {
                kept.insert(job, guess);
            }
        }
        Some(kept)
    }

    /// While there is nothing else to do the draft model reads prompts whose cache is on its way. False: there is nothing to read.
    pub fn read_ahead(&mut self) -> bool {
        let guess = (Source::Model(self.totals.worth.luck()), self.setup.options.draft_max);
        if self.drafter.is_none() || !self.lengths([guess]).any() {
            return false;
        }
        let landing = self.sequences.values().filter(|sequence| sequence.stage == Stage::Landing);
        let asked: Vec<_> = landing.map(|sequence| (sequence.job, 0)).collect();
        !asked.is_empty() && self.draft(&asked, READ_AHEAD_MAX).len() < asked.len() && self.drafter.is_some()
    }

    /// What the draft model says of jobs, at most so many tokens of each. Nothing of those that it has to read on. One that fails is
    /// asked no more.
    fn draft(&mut self, asked: &[(u64, usize)], within: Duration) -> BTreeMap<u64, Vec<u32>> {
        let mut said = BTreeMap::new();
        let mut asks = Vec::new();
        for (job, most) in asked {
            let Some(sequence) = self.sequences.get(job) else { continue };
            let tokens = &sequence.request.tokens[..];
            // What the host does beside (penalties, masks, grammars) is left to luck.
            let rule = sampler::rule(&sequence.request.sampling, tokens.len());
            asks.push(Ask { job: *job, tokens, most: *most, salt: &sequence.request.cache_salt, rule });
        }
        let Some(drafter) = self.drafter.as_mut().filter(|_| !asks.is_empty()) else { return said };
        let drafted = match drafter.guess(&asks, within) {
            Ok(drafted) => drafted,
            Err(error) => {
                tracing::warn!("the draft model has failed, and guesses no more: {error}");
                self.sequences.keys().for_each(|job| drafter.forget(*job));
                self.drafter = None;
                return said;
            }
        };
        for (Ask { job, most, .. }, guess) in asks.iter().zip(drafted.guesses) {
            let Some(mut guess) = guess else { continue };
            // Tables of logits differ in padding.
            let ours = guess.iter().take_while(|id| (**id as usize) < self.setup.vocabulary).count();
            guess.truncate(ours.min(*most));
            said.insert(*job, guess);
        }
        for (job, guess) in &said {
            let luck = self.sequences.get_mut(job).and_then(|sequence| sequence.luck.as_mut());
            // It has no room for the sequence, or does not know its tokens.
            if let (Some(luck), true) = (luck, guess.is_empty()) {
                luck.tried(1, 0);
            }
        }
        for (rows, took) in drafted.steps {
            self.totals.worth.drafted(rows, took);
            self.totals.counters.model_draft_time += took;
        }
        said
    }

    /// Whose guess holds more often; the draft model's is as long as wanted.
    fn likelier(&self, chance: &Chance) -> (Source, usize) {
        let worth = &self.totals.worth;
        let passage = chance.by_passage();
        let better =
            |model: &(Source, usize)| passage.1 == 0 || worth.chance(model.0, 0) > worth.chance(passage.0, 0);
        chance.by_model().filter(better).unwrap_or(passage)
    }

    fn lengths(&self, guesses: impl IntoIterator<Item = (Source, usize)>) -> Lengths {
        let guesses: Vec<_> = guesses.into_iter().collect();
        self.totals.worth.lengths(guesses.len(), self.setup.options.step_tokens, &guesses)
    }

    /// How many of `wanted` guesses there is room for, of free blocks alone.
    fn room_to_guess(&mut self, job: u64, wanted: usize) -> usize {
        let Some(sequence) = self.sequences.get(&job) else { return 0 };
        let (seq, len) = (sequence.seq, sequence.len() as u32);
        let (tokens, capacity) = (len + wanted as u32, self.ledger.capacity(seq));
        if tokens <= capacity {
            return wanted;
        }
        if self.ledger.blocks_of(tokens) - self.ledger.blocks_of(capacity) <= self.ledger.free() {
            self.emit(Op::Grow { seq, tokens });
            return wanted;
        }
        capacity.saturating_sub(len) as usize
    }
}
