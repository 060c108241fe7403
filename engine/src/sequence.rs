//! A job on the runner: its request as far as it has come, and its place in the store.

use std::time::{Duration, Instant};

use backend::SeqId;
use tokio::sync::mpsc::UnboundedSender;

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
    /// Positions `[0, computed)` are in the cache.
    pub computed: u32,
    /// Landing or push.
    pub lease: Option<LeaseId>,
    pub events: UnboundedSender<Event>,
    pub arrived: Instant,
    /// When the prompt's cache became usable for generation.
    pub usable: Option<Instant>,
    /// Wait for, and duration of, the first step that generated from that cache.
    pub first_step: Option<(Duration, Duration)>,
}

impl Sequence {
    /// Rows that could be computed now.
    pub fn remaining(&self) -> usize {
        self.request.tokens.len() - self.computed as usize
    }

    /// One row per step, each giving a token.
    pub fn generating(&self) -> bool {
        self.stage == Stage::Running && !matches!(self.kind, Kind::Prefill(_)) && self.remaining() == 1
    }

    pub fn want(&self) -> Want {
        Want {
            job: self.job,
            priority: self.request.priority,
            rows: self.remaining(),
            generating: self.generating(),
        }
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
        let full = request.tokens.len() >= context_tokens as usize;
        (full || self.output_tokens() >= request.max_tokens).then_some(Finish::Length)
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
