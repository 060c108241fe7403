//! What nodes ask of the engine and what they hear back. One job is one call of a router: it ends with exactly one of
//! [`Event::Finished`], [`Event::Pushed`], [`Event::Preempted`] or [`Event::Failed`], or by dropping [`Events`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use backend::KvSpec;

use crate::score::Score;

/// A prompt and what was generated of its answer so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// The router's id of the client's request.
    pub id: String,
    /// 0 at first; counts migrations.
    pub attempt: u32,
    /// Prompt, then output so far; at least one token.
    pub tokens: Vec<u32>,
    /// `tokens[output_start..]` are output.
    pub output_start: usize,
    /// Output tokens in all, counted from `output_start`.
    pub max_tokens: usize,
    /// Stop ids are masked before this many output tokens.
    pub min_tokens: usize,
    /// Ids that end the answer.
    pub stop_ids: Vec<u32>,
    /// Go on past stop ids.
    pub ignore_eos: bool,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Prefixes are shared within equal salts only.
    pub cache_salt: Vec<u8>,
    /// Lower runs later; 0 is interactive.
    pub priority: i32,
    /// What the output must look like, and how far it has come in it.
    pub grammar: Option<grammar::Automaton>,
    /// Whoever computes the prompt tells how likely each of its tokens is, with this many of the most likely ids; it
    /// computes all of it then, whatever its cache holds.
    pub prompt_logprobs: Option<u32>,
    /// What the client expects of the output; only guesses of what comes next are taken from it.
    pub prediction: Vec<u32>,
}

/// How tokens are drawn: a pure function of (seed, position, logits, tokens so far).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// Nucleus, in (0, 1].
    pub top_p: f32,
    /// Most likely ids kept; 0: all.
    pub top_k: u32,
    /// Least probability kept, relative to the most likely id's.
    pub min_p: f32,
    /// Subtracted once for an id that the output holds.
    pub presence_penalty: f32,
    /// Subtracted for each time that the output holds an id.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of ids in prompt and output; 1: none.
    pub repetition_penalty: f32,
    /// Pinned by the router, so that every attempt draws the same numbers.
    pub seed: u64,
    /// Added to the logits of these ids.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Report the drawn id's log probability.
    pub logprobs: bool,
    /// And those of this many most likely ids.
    pub top_logprobs: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            logit_bias: BTreeMap::new(),
            logprobs: false,
            top_logprobs: 0,
        }
    }
}

/// One piece of work.
#[derive(Clone, Debug)]
pub enum Job {
    /// Decode: room is reserved, the prompt's KV lands from a prefill node, then tokens are generated.
    Land(Request),
    /// Decode: the group computes the prompt itself, then generates.
    Generate(Request),
    /// Prefill: compute the prompt, push its KV as it appears (none wanted without a handoff), sample one token.
    Prefill(Request, Option<Handoff>),
}

/// A place for KV to land, made by a decode group's engine, used by a prefill node's.
#[derive(Clone, Debug, PartialEq)]
pub struct Handoff {
    /// Single-use secret of the session.
    pub ticket: kvtransfer::Ticket,
    /// Names the session on the KV port.
    pub session: kvtransfer::SessionId,
    /// Epoch of the decode group; frames of another epoch never land.
    pub epoch: u64,
    /// Positions that the group wants.
    pub tokens: Range<u32>,
    /// One target per decode rank.
    pub targets: Vec<Target>,
    /// Without progress for this long the reservation lapses.
    pub deadline: Duration,
}

/// One decode rank as a receiver of KV.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Tensor-parallel rank.
    pub rank: usize,
    /// `host:port` of its KV port, best first.
    pub addresses: Vec<String>,
    /// What the rank holds.
    pub spec: KvSpec,
}

/// What a job reports, in order.
#[derive(Clone, Debug)]
pub enum Event {
    /// First event of [`Job::Land`] and [`Job::Generate`]: room is reserved.
    Admitted {
        /// Prompt tokens that the engine's own cache holds.
        cached_tokens: usize,
        /// Where the KV is to land, for [`Job::Land`].
        handoff: Option<Handoff>,
    },
    /// First event of [`Job::Prefill`]: its first chunk is in the coming step.
    Started {
        /// Time in the engine's queue.
        queued: Duration,
        /// Prompt tokens that the engine's own cache holds.
        cached_tokens: usize,
    },
    /// [`Job::Land`]: the session is complete on every rank.
    Landed {
        /// Payload bytes over all ranks.
        bytes: u64,
        /// From the last frame to the cache being usable.
        ready_after: Duration,
    },
    /// [`Request::prompt_logprobs`], before the first token: those of the prompt's tokens from `start` on, in order. The
    /// first is of position 1, for nothing comes before position 0.
    Scored {
        /// Position of the first.
        start: usize,
        /// Of consecutive tokens, at least one.
        scores: Vec<Score>,
    },
    /// [`Job::Land`] and [`Job::Generate`], before the first token that a decode step drew.
    FirstStep {
        /// From the cache being usable to the start of that step.
        wait: Duration,
        /// Duration of the step.
        step: Duration,
    },
    /// A token, in order of index.
    Token(Token),
    /// [`Job::Prefill`] with a handoff: every receiver has all of its bytes. Ends the job.
    Pushed {
        /// Payload bytes.
        bytes: u64,
        /// From the end of the last layer's compute to the last acknowledgement.
        exposed: Duration,
        /// What that was estimated to be when the push began, where the rates were known.
        estimate: Option<Duration>,
        /// How the numbers travelled.
        codec: kvtransfer::Codec,
    },
    /// The answer, or a prefill without handoff, is complete. Ends the job.
    Finished {
        /// Why.
        reason: Finish,
        /// Tokens of output in all, earlier attempts included.
        output_tokens: usize,
    },
    /// The engine gave the sequence up for room; the router continues it. Ends the job.
    Preempted,
    /// The job failed. Ends the job.
    Failed(JobError),
}

impl Event {
    /// Whether it ends the job.
    pub fn is_last(&self) -> bool {
        matches!(self, Event::Pushed { .. } | Event::Finished { .. } | Event::Preempted | Event::Failed(_))
    }
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Position in the output.
    pub index: usize,
    /// Token id.
    pub id: u32,
    /// Log probability where asked for.
    pub logprob: Option<f32>,
    /// Most likely ids with theirs, where asked for.
    pub top: Vec<(u32, f32)>,
    /// It was guessed by [`Request::prediction`], and cost no step of its own.
    pub predicted: bool,
    /// Set when this token ends the answer.
    pub finish: Option<Finish>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop id was drawn.
    Stop,
    /// `max_tokens` were generated, or the context is full.
    Length,
}

/// Why a job was not taken on. Nothing of it remains.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No room now; later there may be.
    #[error("no room for {tokens} tokens of KV now")]
    NoRoom {
        /// Tokens that were to be reserved.
        tokens: usize,
    },
    /// The engine is draining or regrouping.
    #[error("{0}")]
    Unavailable(String),
    /// It could never run.
    #[error("{0}")]
    Invalid(String),
}

/// Why an accepted job ended without its result. The router retries elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The KV session failed or did not begin in time.
    #[error("kv session: {0}")]
    Session(String),
    /// The device or another rank failed; the group restarts with a new epoch.
    #[error("engine: {0}")]
    Engine(String),
    /// Not admitted after all (see the reason).
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// State of an engine, for heartbeats and metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Epoch of the tensor-parallel group.
    pub epoch: u64,
    /// Sequences being computed or generated.
    pub running: usize,
    /// Jobs waiting.
    pub waiting: usize,
    /// Prompt tokens not yet computed, waiting and running.
    pub waiting_tokens: usize,
    /// Blocks by owner; `free + used + cached + reserved + quarantined == total` when idle.
    pub blocks: Blocks,
    /// Measured, smoothed; 0: not yet known.
    pub prefill_tokens_per_s: f32,
    /// Measured, smoothed; 0: not yet known.
    pub decode_step_ms: f32,
    /// Measured rate of KV pushes per peer address, in 1e9 bytes per second, and bytes sent.
    pub links: Vec<(String, f32, u64)>,
    /// Totals since start.
    pub counters: Counters,
}

/// Blocks of the KV store by owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blocks {
    /// Tokens per block.
    pub block_tokens: u32,
    /// All.
    pub total: u32,
    /// Free.
    pub free: u32,
    /// Held by running sequences.
    pub used: u32,
    /// Held by the prefix cache alone; evictable.
    pub cached: u32,
    /// Held by sequences whose KV has not landed yet.
    pub reserved: u32,
    /// Closed, but under a lease.
    pub quarantined: u32,
    /// Times that the idle store's sum was not its total. Stays 0.
    pub audit_errors: u32,
}

/// Totals since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Jobs accepted.
    pub requests: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// KV payload bytes sent or received.
    pub kv_bytes: u64,
    /// Times that tokens of a sequence were guessed ahead.
    pub drafts: u64,
    /// Tokens guessed so, which each took a row.
    pub draft_tokens: u64,
    /// Of them, those that were drawn.
    pub accepted_tokens: u64,
    /// Of those that took a row, the ones of the draft model.
    pub model_draft_tokens: u64,
    /// Of them, those that were drawn.
    pub model_accepted_tokens: u64,
    /// Time that the draft model has taken, its reading included.
    pub model_draft_time: Duration,
    /// Sequences given up for room.
    pub preemptions: u64,
    /// KV sessions that failed.
    pub failed_sessions: u64,
    /// Connections of KV pushes that were lost and replaced.
    pub kv_resumed: u64,
    /// Of them, those whose payloads went by UCX and go over the connection since.
    pub kv_fallbacks: u64,
    /// Of them, those that were left because nothing came back by their path.
    pub kv_silent: u64,
    /// KV payload bytes sent that receivers read out of a device's memory.
    pub kv_unstaged_bytes: u64,
}
