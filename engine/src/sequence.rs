//! A job on the runner: its request as far as it has come, and its place in the store.

use std::ops::Range;
use std::time::Instant;

use backend::SeqId;
use tokio::sync::mpsc::UnboundedSender;

use crate::draft::Lookup;
use crate::draft::worth::Luck;
use crate::ledger::LeaseId;
use crate::request::{Event, Finish, Handoff, Request};
use crate::scheduler::Want;

/// What the job is for.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// KV lands, then tokens are generated.
    Land,
    /// The prompt is computed here, then tokens are generated.
    Generate,
    /// The prompt is computed and pushed, one token is sampled.
    Prefill(Option<Handoff>),
}

/// How far the job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A prompt that has no room or rows yet.
    Waiting,
    /// Room is reserved, KV lands.
    Landing,
    /// Rows are computed.
    Running,
    /// All is computed and handed to the push, which goes on.
    Pushing,
}

/// A token that a step under way draws.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flight {
    /// The plan of that step.
    pub step: u64,
    /// Its place among the rows that something is drawn from.
    pub row: u32,
    /// The device draws it, and the next step can take it from there: no guesses follow it.
    pub on_device: bool,
}

/// A guess of one token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// Its place among the sequence's tokens.
    pub at: usize,
    pub id: u32,
    /// See [`crate::draft::Guess::agreed`].
    pub agreed: usize,
}

/// One job.
pub(crate) struct Sequence {
    pub job: u64,
    pub kind: Kind,
    /// Its `tokens` grow as tokens are drawn.
    pub request: Request,
    pub prompt_len: usize,
    pub stage: Stage,
    /// In the store from admission to retirement.
    pub seq: SeqId,
    /// Positions `[0, computed)` are in the cache once the steps under way are done.
    pub computed: u32,
    /// Tokens that come after `request.tokens`, of the steps under way, in order. Where tokens are guessed ahead there may
    /// come more with the last.
    pub flights: Vec<Flight>,
    /// Where its passages stand, for guesses.
    pub lookup: Lookup,
    /// What was guessed last, whether it had a row or not.
    pub expected: Option<Expected>,
    /// The draft model's with this sequence, once it could have been asked.
    pub luck: Option<Luck>,
    /// Landing or push.
    pub lease: Option<LeaseId>,
    pub events: UnboundedSender<Event>,
    pub arrived: Instant,
    /// When the prompt's cache became usable for generation.
    pub usable: Option<Instant>,
    /// A step has generated from that cache.
    pub has_stepped: bool,
}

impl Sequence {
    /// Tokens once the steps under way are done.
    pub fn len(&self) -> usize {
        self.request.tokens.len() + self.flights.len()
    }

    /// Rows that no step computes yet.
    pub fn remaining(&self) -> usize {
        self.len() - self.computed as usize
    }

    /// Whether the next step can have rows of it. A token in flight serves while the step that draws it is `latest`, the
    /// one before the next, and only if the answer cannot end with it for its length.
    pub fn runnable(&self, latest: u64, context_tokens: u32) -> bool {
        let goes_on = |flight: &Flight| {
            let generates = !matches!(self.kind, Kind::Prefill(_));
            flight.on_device && flight.step == latest && generates && !self.full(self.len(), context_tokens)
        };
        self.stage == Stage::Running && self.flights.last().is_none_or(goes_on)
    }

    /// The host draws a token that later rows need, or looks which guesses hold.
    pub fn needs_host(&self) -> bool {
        !matches!(self.kind, Kind::Prefill(_)) && self.flights.last().is_some_and(|flight| !flight.on_device)
    }

    /// One row per step, giving a token; guesses of what follows may have rows beside it.
    pub fn generating(&self) -> bool {
        self.stage == Stage::Running && !matches!(self.kind, Kind::Prefill(_)) && self.remaining() == 1
    }

    pub fn want(&self) -> Want {
        Want {
            job: self.job,
            priority: self.request.priority,
            rows: self.remaining(),
            generating: self.generating(),
            scored: !self.scored(self.computed, self.len() as u32).is_empty(),
        }
    }

    /// Whether tokens of its prompt are scored here: then nothing of it is taken from the cache.
    pub fn scores(&self) -> bool {
        self.request.prompt_logprobs.is_some() && !matches!(self.kind, Kind::Land)
    }

    /// Of its rows `[start, end)`, those whose logits score the prompt's next token.
    pub fn scored(&self, start: u32, end: u32) -> Range<u32> {
        let last = self.request.output_start.saturating_sub(1) as u32;
        if self.scores() { start..end.min(last).max(start) } else { start..start }
    }

    pub fn output_tokens(&self) -> usize {
        self.request.tokens.len() - self.request.output_start
    }

    /// Tells whoever asked; one who has left cancels by that.
    pub fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Whether the last token ends the answer.
    pub fn finish(&self, context_tokens: u32) -> Option<Finish> {
        let request = &self.request;
        let stopped = request.tokens.last().is_some_and(|id| request.stop_ids.contains(id));
        if stopped && !request.ignore_eos {
            return Some(Finish::Stop);
        }
        self.full(request.tokens.len(), context_tokens).then_some(Finish::Length)
    }

    /// Whether an answer of `len` tokens, prompt included, is as long as it may be.
    fn full(&self, len: usize, context_tokens: u32) -> bool {
        len >= self.len_max(context_tokens)
    }

    /// Tokens, prompt included, with which its answer is as long as it may be.
    pub fn len_max(&self, context_tokens: u32) -> usize {
        let most = self.request.output_start.saturating_add(self.request.max_tokens);
        most.min(context_tokens as usize)
    }
}

/// A finish reason as the KV session carries it.
pub(crate) fn finish_code(finish: Option<Finish>) -> u8 {
    match finish {
        None => 0,
        Some(Finish::Stop) => 1,
        Some(Finish::Length) => 2,
    }
}

/// The finish reason of a code; `Err`: no such code.
pub(crate) fn finish_of(code: u8) -> Result<Option<Finish>, String> {
    match code {
        0 => Ok(None),
        1 => Ok(Some(Finish::Stop)),
        2 => Ok(Some(Finish::Length)),
        _ => Err(format!("unknown finish reason {code}")),
    }
}
