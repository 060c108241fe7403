//! Guesses in the next step: which sequences have rows for what they probably draw next.

use std::collections::BTreeMap;

use super::Core;
use crate::draft::Guess;
use crate::draft::worth::ROWS_MAX;
use crate::scheduler::Want;
use crate::sequence::Expected;
use crate::tp::plan::Op;

/// What is guessed, by job.
pub(super) type Guesses = BTreeMap<u64, Guess>;

impl Core {
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
        let mut guesses = Vec::new();
        for want in wants {
            let Some(sequence) = self.sequences.get_mut(&want.job) else { continue };
            // The row itself draws one of those that are left.
            let left = sequence.len_max(context).saturating_sub(sequence.len() + 1);
            let guess = sequence.lookup.guess(&sequence.request.tokens, most.min(left));
            let expected =
                |id: &u32| Expected { at: sequence.request.tokens.len(), id: *id, agreed: guess.agreed };
            sequence.expected = guess.tokens.first().map(expected);
            guesses.push((want.job, guess));
        }
        let lengths: Vec<_> = guesses.iter().map(|(_, guess)| (guess.agreed, guess.tokens.len())).collect();
        let lengths = self.totals.worth.lengths(wants.len(), self.setup.options.step_tokens, &lengths);
        if lengths.iter().any(|length| *length > 0) && self.under_way > 0 {
            return None;
        }
        let mut kept = Guesses::new();
        for ((job, mut guess), length) in guesses.into_iter().zip(lengths) {
            guess.tokens.truncate(self.room_to_guess(job, length));
            if !guess.tokens.is_empty() {
                kept.insert(job, guess);
            }
        }
        Some(kept)
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
