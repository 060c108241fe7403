//! The life of one request over all its attempts: queue, attempt, migration, end. What the client sees is one stream.
//!
//! Caller: [`super::Dispatch`], which polls [`drive`] inside the client's stream: dropping that drops everything.

use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::Shared;
use super::attempt::{Attempt, FailureKind, Remains};
use super::book::Wanted;
use super::counts::Cause;
use super::merge::{Merge, TooFarAhead};
use super::prefix::Chain;
use super::spans::Spans;
use super::wire;
use crate::inference::{
    Decision, FinishReason, Finished, GenerateRequest, InferenceError, KvCodec, Score, Served, Started,
    Timings, Token, TokenEvent,
};
use crate::placement::Ask;

/// Where the client's events go.
pub type Out = mpsc::Sender<Result<TokenEvent, InferenceError>>;

/// Calls that outlive the answer are read to their end for this long.
const REMAINS_MAX: Duration = Duration::from_secs(30);

/// Pauses before asking again a cluster that did not accept: doubling from the first to the last.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(50);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(1);

/// Pauses between migrations that brought no token: none at first, then four times longer each, up to the last.
const MIGRATE_AGAIN_MIN: Duration = Duration::from_millis(100);
const MIGRATE_AGAIN_MAX: Duration = Duration::from_secs(5);

/// A node scored tokens of the prompt that are not the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it scored tokens {start}..{end} of the prompt, {next} is the next")]
pub struct OutOfPlace {
    start: u32,
    end: usize,
    next: u32,
}

/// What outlives an attempt.
pub struct Progress {
    request: GenerateRequest,
    out: Out,
    output: Vec<u32>,
    /// Tokens of the prompt that the client was told the likelihood of; the first has none and counts as told.
    scored: u32,
    merge: Merge,
    chain: Chain,
    /// Counts every try that a node may have heard of, so that frames of an old one never land.
    attempt: u32,
    /// Told to the client once.
    started: Option<Started>,
    served: Served,
    /// The client has heard of `served`, and hears of what is new in it.
    served_is_told: bool,
    queued: Duration,
    /// Of this attempt: when it was accepted, what its group held, whether its prompt is computed.
    accepted_at: Option<Instant>,
    admitted_cached_tokens: u32,
    has_prompt: bool,
    /// For its trace.
    pub spans: Spans,
}

impl Progress {
    fn new(request: GenerateRequest, out: Out, shared: &Shared) -> Progress {
        let chain = Chain::new(&shared.hash_keys, &request.cache_salt, &request.tokens);
        Progress {
            spans: Spans::new(&request),
            request,
            out,
            output: Vec::new(),
            scored: 1,
            merge: Merge::default(),
            chain,
            attempt: 0,
            started: None,
            served: Served {
                cached_tokens: 0,
                decision: Decision::Local,
                migrations: 0,
                timings: Timings::default(),
            },
            served_is_told: false,
            queued: Duration::ZERO,
            accepted_at: None,
            admitted_cached_tokens: 0,
            has_prompt: false,
        }
    }

    /// The message of this attempt.
    pub fn sequence(&self) -> v1::Sequence {
        wire::sequence(&self.request, &self.output, self.attempt, self.awaits_scores())
    }

    /// Hashes of the whole blocks of prompt and output.
    pub fn blocks(&self) -> &[u64] {
        self.chain.blocks()
    }

    /// Time in the router's queue, up to the first acceptance.
    pub fn queue(&self) -> Duration {
        self.queued
    }

    /// The index of the next token for the client.
    pub fn next_index(&self) -> u32 {
        self.merge.next_index()
    }

    /// This attempt has computed the prompt.
    pub fn attempt_has_prompt(&self) -> bool {
        self.has_prompt
    }

    /// What the group of this attempt held when it admitted.
    pub fn admitted_cached_tokens(&self) -> u32 {
        self.admitted_cached_tokens
    }

    /// A node has accepted the attempt; the client hears of the first.
    pub async fn accepted(&mut self, started: Started, decision: Decision) {
        self.accepted_at = Some(Instant::now());
        self.spans.accepted();
        self.admitted_cached_tokens = started.cached_tokens;
        if self.started.is_none() {
            self.started = Some(started);
            self.served.decision = decision;
            self.served.timings.queue = started.queue;
            self.served.timings.admission = started.admission;
            // Without a receiver this future is about to be dropped.
            let _ = self.out.send(Ok(TokenEvent::Started(started))).await;
        }
    }

    /// The prompt is computed; `cached_tokens` of it were not.
    pub async fn computed(&mut self, cached_tokens: u32) {
        self.has_prompt = true;
        self.spans.computed();
        if !self.served_is_told {
            self.served.cached_tokens = cached_tokens.min(self.request.tokens.len() as u32);
            self.served.timings.prefill = self.accepted_at.map(|at| at.elapsed()).unwrap_or_default();
            self.served_is_told = true;
            self.tell_served().await;
        }
    }

    /// The push is acknowledged.
    pub async fn pushed(&mut self, pushed: &proto::v1::Pushed) {
        if self.served.migrations == 0 {
            self.served.timings.transfer_exposed = Duration::from_micros(pushed.exposed_us);
            self.served.timings.transfer_estimated = Duration::from_micros(pushed.estimated_us);
            self.served.timings.kv_codec = KvCodec::parse(&pushed.codec);
            self.tell_served().await;
        }
    }

    /// The group's first step of this attempt.
    pub async fn first_step(&mut self, wait: Duration, step: Duration) {
        self.served.timings.first_step_wait = wait;
        self.served.timings.first_step = step;
        self.tell_served().await;
    }

    async fn migrated(&mut self) {
        self.served.migrations += 1;
        self.tell_served().await;
    }

    async fn tell_served(&self) {
        if self.served_is_told {
            // Without a receiver this future is about to be dropped.
            let _ = self.out.send(Ok(TokenEvent::Served(self.served))).await;
        }
    }

    /// Sends what is in order to the client, each index once.
    pub async fn deliver(&mut self, token: Token) -> Result<(), TooFarAhead> {
        for token in self.merge.take(token)? {
            self.spans.token();
            self.output.push(token.id);
            self.chain.push(token.id);
            let _ = self.out.send(Ok(TokenEvent::Token(token))).await;
        }
        Ok(())
    }

    /// Tokens of the prompt are still to be scored.
    pub fn awaits_scores(&self) -> bool {
        self.request.prompt_logprobs.is_some() && (self.scored as usize) < self.request.tokens.len()
    }

    /// Sends what is new of the prompt's scores to the client: another attempt begins them again. Errors when a node left
    /// some out, or tells what nobody asked.
    pub async fn scored(&mut self, scored: proto::v1::Scored) -> Result<(), OutOfPlace> {
        let end = scored.start as usize + scored.scores.len();
        let asked = self.request.prompt_logprobs.is_some() && end <= self.request.tokens.len();
        let Some(known) = self.scored.checked_sub(scored.start).filter(|_| asked) else {
            return Err(OutOfPlace { start: scored.start, end, next: self.scored });
        };
        let new: Vec<Score> = wire::scores(scored.scores).skip(known as usize).collect();
        if !new.is_empty() {
            self.scored += new.len() as u32;
            // Without a receiver this future is about to be dropped.
            let _ = self.out.send(Ok(TokenEvent::Scored(new))).await;
        }
        Ok(())
    }

    fn wanted(&self, arrival: u64, deadline: Instant) -> Wanted {
        let tokens = self.request.tokens.len() + self.output.len();
        Wanted {
            priority: self.request.priority,
            arrival,
            ask: Ask {
                tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
                one_token: self.request.max_tokens.saturating_sub(self.next_index()) <= 1,
            },
            // A prompt that is scored is computed whole: it shares nothing.
            blocks: if self.awaits_scores() { Arc::default() } else { self.chain.blocks().into() },
            fresh: self.started.is_none(),
            deadline,
        }
    }

    fn finished(&self, reason: FinishReason) -> Finished {
        Finished { reason, output_tokens: self.next_index() }
    }

    fn next_attempt(&mut self) {
        self.attempt += 1;
        self.begin_attempt();
    }

    fn begin_attempt(&mut self) {
        self.merge.restart();
        self.has_prompt = false;
        self.accepted_at = None;
    }
}

/// Failures since the last new token.
#[derive(Debug, Default)]
struct Trouble {
    since: Option<Instant>,
    not_accepted: u32,
    migrations: u32,
    last: String,
    /// Of the last, if it was a migration.
    cause: Option<Cause>,
}

impl Trouble {
    fn note(&mut self, message: String) {
        self.since.get_or_insert_with(Instant::now);
        self.last = message;
    }
}

/// Serves a request to its end, and tells the client everything through `out`.
pub async fn drive(shared: Arc<Shared>, request: GenerateRequest, out: Out) {
    let mut ending = Ending { shared: &shared, told: false };
    let mut progress = Progress::new(request, out, &shared);
    let result = serve(&shared, &mut progress).await;
    ending.told = true;
    match result {
        Ok((finished, remains)) => {
            progress.spans.finished(finished.output_tokens);
            shared.counts.has_finished();
            if !remains.is_empty() {
                tokio::spawn(remains.run_out(REMAINS_MAX));
            }
            let _ = progress.out.send(Ok(TokenEvent::Finished(finished))).await;
        }
        Err(error) => {
            shared.counts.has_failed();
            progress.spans.gave_up(&error.to_string());
            let request = &progress.request.id;
            match &error {
                // Its client's doing, or a busy time.
                InferenceError::Invalid(_) | InferenceError::Overloaded { .. } => {
                    tracing::debug!(request, %error, "request refused");
                }
                _ => tracing::warn!(request, %error, "request failed"),
            }
            let _ = progress.out.send(Err(error)).await;
        }
    }
}

async fn serve(shared: &Arc<Shared>, progress: &mut Progress) -> Result<(Finished, Remains), InferenceError> {
    let arrival = shared.book.arrival();
    let arrived = Instant::now();
    let mut trouble = Trouble::default();
    loop {
        let deadline = match &progress.started {
            None => arrived + shared.config.queue_deadline,
            Some(_) => trouble.since.unwrap_or_else(Instant::now) + shared.config.hold,
        };
        let asked = Instant::now();
        let queue = progress.spans.queue();
        let grant = shared.book.place(progress.wanted(arrival, deadline)).await;
        queue.end();
        if progress.started.is_none() {
            progress.queued += asked.elapsed();
        }
        let grant = match grant {
            // It has grown until its group was full, and no group is larger: that is the longest answer there can be.
            Err(InferenceError::Invalid(_)) if trouble.cause == Some(Cause::Preempted) => {
                return Ok((progress.finished(FinishReason::Length), Remains::default()));
            }
            grant => grant.map_err(|error| explained(error, &trouble))?,
        };
        progress.begin_attempt();
        progress.spans.attempt(progress.attempt);
        let delivered = progress.next_index();
        let attempt =
            Attempt { nodes: &shared.nodes, config: &shared.config, counts: &shared.counts, grant: &grant };
        let failure = match attempt.run(progress).await {
            Ok((reason, remains)) => {
                grant.held_by_decode(progress.blocks());
                return Ok((progress.finished(reason), remains));
            }
            Err(failure) => failure,
        };
        drop(grant);
        progress.spans.failed(&failure.message);
        if progress.next_index() > delivered {
            trouble = Trouble::default();
        }
        trouble.note(failure.message);
        trouble.cause = match failure.kind {
            FailureKind::Migrate(cause) => Some(cause),
            _ => None,
        };
        let (request, last) = (&progress.request.id, &trouble.last);
        match failure.kind {
            FailureKind::Refused => {
                tracing::debug!(request, last, "no room, waiting for a change");
                // The group reserved before the prefill node refused: its session is of this attempt.
                if progress.accepted_at.is_some() {
                    progress.next_attempt();
                }
            }
            FailureKind::Invalid if progress.next_index() == 0 => {
                return Err(InferenceError::Invalid(trouble.last));
            }
            FailureKind::Invalid => return Err(InferenceError::Internal(trouble.last)),
            FailureKind::NotAccepted => {
                tracing::info!(request, attempt = progress.attempt, last, "not accepted");
                let pause = ASK_AGAIN_MIN.saturating_mul(1 << trouble.not_accepted.min(10));
                trouble.not_accepted += 1;
                progress.next_attempt();
                sleep(pause.min(ASK_AGAIN_MAX)).await;
            }
            FailureKind::Migrate(cause) => {
                tracing::info!(
                    request,
                    attempt = progress.attempt,
                    cause = cause.as_str(),
                    last,
                    "migrating"
                );
                shared.counts.migrated(cause);
                progress.spans.migrate(cause);
                progress.migrated().await;
                trouble.migrations += 1;
                progress.next_attempt();
                let tries = shared.config.migrations_without_token_max;
                if trouble.migrations > tries {
                    return Err(InferenceError::Unavailable(format!(
                        "gave up after {} attempts without a new token: {}",
                        trouble.migrations, trouble.last
                    )));
                }
                if let Some(before) = trouble.migrations.checked_sub(2) {
                    let pause = MIGRATE_AGAIN_MIN.saturating_mul(4u32.saturating_pow(before));
                    sleep(pause.min(MIGRATE_AGAIN_MAX)).await;
                }
            }
        }
    }
}

/// An error of the queue, with what went wrong before it.
fn explained(error: InferenceError, trouble: &Trouble) -> InferenceError {
    match error {
        InferenceError::Unavailable(reason) if !trouble.last.is_empty() => {
            InferenceError::Unavailable(format!("{reason}; before that: {}", trouble.last))
        }
        other => other,
    }
}

/// Counts a request whose client left before its end.
struct Ending<'a> {
    shared: &'a Shared,
    told: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if !self.told {
            self.shared.counts.was_cancelled();
        }
    }
}
