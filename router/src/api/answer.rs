//! Runs the sequences of one request (prompts times `n`) side by side and tells what is new in any of them. Dropping an
//! `Answer` drops every stream, which cancels everything in the cluster: that is how a client's disconnect gets there.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::StreamExt;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::choice::{Choice, Delta, End};
use super::error::ApiError;
use super::params::Params;
use crate::inference::{InferenceError, Served, Started, TokenEvent, TokenStream};
use crate::metrics::SequenceMeter;

/// What happened in a choice.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Its `delta` has something new.
    Progress(usize),
    /// It is complete; its `delta` may still hold a rest.
    Ended(usize, End),
    /// All of it failed; nothing follows.
    Failed(ApiError),
}

/// Tokens of a request, as OpenAI counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Of each prompt once, however many choices it has.
    pub prompt_tokens: u32,
    /// Of all choices.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// What of the prompts was not computed.
    pub prompt_tokens_details: PromptDetails,
    /// What of the choices was reasoning.
    pub completion_tokens_details: CompletionDetails,
}

/// Part of `Usage`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CompletionDetails {
    /// Between the marks of reasoning.
    pub reasoning_tokens: u32,
    /// Of the client's prediction: those that came without a step of their own.
    pub accepted_prediction_tokens: u32,
    /// The others of it.
    pub rejected_prediction_tokens: u32,
}

/// Part of `Usage`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PromptDetails {
    /// Found in a prefix cache.
    pub cached_tokens: u32,
}

/// A sequence, about to run.
#[derive(Debug)]
pub struct Lane {
    choice: Choice,
    meter: SequenceMeter,
    prompt_tokens: u32,
    started: Option<Started>,
    served: Option<Served>,
}

impl Lane {
    /// `meter` counts from when the request arrived.
    pub fn new(choice: Choice, meter: SequenceMeter, prompt_tokens: u32) -> Self {
        Self { choice, meter, prompt_tokens, started: None, served: None }
    }
}

struct Running {
    lane: Lane,
    /// None once it has ended.
    stream: Option<TokenStream>,
    /// The first event, taken while waiting for admission.
    peeked: Option<TokenEvent>,
}

/// The sequences of one request.
pub struct Answer {
    running: Vec<Running>,
    /// Choices per prompt that are made.
    made: usize,
    /// Of these, the likeliest that are given.
    given: usize,
    /// Whose turn it is, so that a fast sequence does not hide the others.
    turn: usize,
    prepare_s: f64,
    timings: bool,
    /// The server ends before this answer does.
    over: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Answer {
    /// Lanes of a prompt are neighbours, `best_of` of the `params` each. `prepare_s`: seconds before this, for `timings`. It
    /// fails when `over` is cancelled.
    pub fn new(
        lanes: Vec<(Lane, TokenStream)>,
        params: &Params,
        prepare_s: f64,
        over: &CancellationToken,
    ) -> Self {
        let running = lanes
            .into_iter()
            .map(|(lane, stream)| Running { lane, stream: Some(stream), peeked: None })
            .collect();
        let (made, given) = (params.best_of.max(1), params.n);
        // A token of its own: answers do not meet at one lock.
        let over = Box::pin(over.child_token().cancelled_owned());
        Self { running, made, given, turn: 0, prepare_s, timings: params.timings, over }
    }

    /// Number of choices that are made.
    pub fn choices(&self) -> usize {
        self.running.len()
    }

    /// The choices that are given, in order: of each prompt the likeliest per token. Read when all have ended.
    pub fn kept(&self) -> Vec<usize> {
        let all: Vec<usize> = (0..self.running.len()).collect();
        if self.given >= self.made {
            return all;
        }
        let likelihood = |index: &usize| self.running[*index].lane.choice.mean_logprob();
        let best = all.chunks(self.made).flat_map(|of_prompt| {
            let mut best = of_prompt.to_vec();
            // Stable: among equals the first.
            best.sort_by(|a, b| likelihood(b).total_cmp(&likelihood(a)));
            best.truncate(self.given);
            best
        });
        best.collect()
    }

    /// What is new in a choice.
    pub fn delta(&mut self, index: usize) -> &mut Delta {
        self.running[index].lane.choice.delta()
    }

    /// Waits until the cluster has admitted one of the sequences, so that a refusal can still be an HTTP status.
    pub async fn admitted(&mut self) -> Result<(), ApiError> {
        let result = poll_fn(|cx| {
            for running in &mut self.running {
                let Some(stream) = &mut running.stream else { continue };
                match stream.poll_next_unpin(cx) {
                    Poll::Pending => {}
                    Poll::Ready(Some(Ok(event))) => {
                        running.peeked = Some(event);
                        return Poll::Ready(Ok(()));
                    }
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                    Poll::Ready(None) => return Poll::Ready(Err(ended_early())),
                }
            }
            self.over.as_mut().poll(cx).map(|()| Err(stopping()))
        });
        result.await.inspect_err(|_| self.fail())
    }

    /// The next update; `None`: all choices have ended, or one has failed.
    pub async fn next(&mut self) -> Option<Update> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As `next`.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Update>> {
        let count = self.running.len();
        let mut all_ended = true;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            let running = &mut self.running[index];
            if running.stream.is_none() {
                continue;
            }
            match running.poll(cx) {
                Poll::Pending => all_ended = false,
                Poll::Ready(Ok(None)) => {
                    self.turn = index + 1;
                    return Poll::Ready(Some(Update::Progress(index)));
                }
                Poll::Ready(Ok(Some(end))) => {
                    self.turn = index + 1;
                    return Poll::Ready(Some(Update::Ended(index, end)));
                }
                Poll::Ready(Err(error)) => {
                    self.fail();
                    return Poll::Ready(Some(Update::Failed(error)));
                }
            }
        }
        if all_ended {
            return Poll::Ready(None);
        }
        self.over.as_mut().poll(cx).map(|()| {
            self.fail();
            Some(Update::Failed(stopping()))
        })
    }

    fn fail(&mut self) {
        for running in &mut self.running {
            if running.stream.take().is_some() {
                running.lane.meter.failed();
            }
        }
    }

    /// Tokens up to now.
    pub fn usage(&self) -> Usage {
        let per_prompt = || self.running.iter().step_by(self.made).map(|running| &running.lane);
        let cached = |lane: &Lane| {
            let started = lane.started.map_or(0, |started| started.cached_tokens);
            lane.served.map_or(started, |served| served.cached_tokens)
        };
        let prompt_tokens = per_prompt().map(|lane| lane.prompt_tokens).sum();
        let predicted = || self.running.iter().map(|running| running.lane.choice.predicted_tokens());
        let completion_tokens = self.running.iter().map(|running| running.lane.choice.tokens()).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens_details: CompletionDetails {
                reasoning_tokens: self.running.iter().map(|r| r.lane.choice.reasoning_tokens()).sum(),
                accepted_prediction_tokens: predicted().map(|(accepted, _)| accepted).sum(),
                rejected_prediction_tokens: predicted().map(|(_, rejected)| rejected).sum(),
            },
            prompt_tokens_details: PromptDetails { cached_tokens: per_prompt().map(cached).sum() },
        }
    }

    /// Where a choice's time went, in milliseconds, if the client asked (`baton_timings`).
    pub fn timings(&self, index: usize) -> Option<Value> {
        if !self.timings {
            return None;
        }
        let lane = &self.running[index].lane;
        let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
        let mut value = json!({
            "prepare_ms": self.prepare_s * 1e3,
            "ttft_ms": lane.meter.ttft().map(ms),
            "queue_ms": lane.started.map(|started| ms(started.queue)),
            "admission_ms": lane.started.map(|started| ms(started.admission)),
        });
        if let Some(served) = &lane.served {
            let t = &served.timings;
            value["prefill_ms"] = ms(t.prefill).into();
            value["transfer_exposed_ms"] = ms(t.transfer_exposed).into();
            if !t.transfer_estimated.is_zero() {
                value["transfer_estimated_ms"] = ms(t.transfer_estimated).into();
            }
            if let Some(codec) = t.kv_codec {
                value["kv_codec"] = codec.as_str().into();
            }
            value["first_step_wait_ms"] = ms(t.first_step_wait).into();
            value["first_step_ms"] = ms(t.first_step).into();
            value["decision"] = served.decision.as_str().into();
            value["migrations"] = served.migrations.into();
        }
        Some(value)
    }
}

impl Running {
    /// `Ok(None)`: there is something new. `Ok(Some)`: it has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<End>, ApiError>> {
        loop {
            let event = match (self.peeked.take(), &mut self.stream) {
                (Some(event), _) => event,
                (None, None) => return Poll::Pending,
                (None, Some(stream)) => match stream.poll_next_unpin(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(None) => return Poll::Ready(Err(ended_early())),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                    Poll::Ready(Some(Ok(event))) => event,
                },
            };
            let lane = &mut self.lane;
            match event {
                TokenEvent::Started(started) => {
                    lane.meter.started(&started);
                    lane.started = Some(started);
                }
                TokenEvent::Served(served) => {
                    lane.meter.served(served);
                    lane.served = Some(served);
                }
                TokenEvent::Scored(scores) => {
                    lane.choice.scored(scores);
                    return Poll::Ready(Ok(None));
                }
                TokenEvent::Token(token) => {
                    if token.index != lane.choice.tokens() {
                        let (got, expected) = (token.index, lane.choice.tokens());
                        tracing::error!(got, expected, "a token out of order");
                        return Poll::Ready(Err(InferenceError::Internal(
                            "a token came out of order".into(),
                        )
                        .into()));
                    }
                    lane.meter.token(Instant::now());
                    if let Some(end) = lane.choice.token(token) {
                        self.stream = None; // cancels what the cluster would still generate
                        lane.meter.finished(end.as_str());
                        return Poll::Ready(Ok(Some(end)));
                    }
                    if !lane.choice.delta().is_empty() {
                        return Poll::Ready(Ok(None));
                    }
                }
                TokenEvent::Finished(finished) => {
                    self.stream = None;
                    let end = lane.choice.finish(finished.reason);
                    lane.meter.finished(end.as_str());
                    return Poll::Ready(Ok(Some(end)));
                }
            }
        }
    }
}

fn stopping() -> ApiError {
    ApiError::unavailable("The server is stopping: the answer was cut short.")
}

fn ended_early() -> ApiError {
    tracing::error!("a sequence ended without a finish");
    InferenceError::Internal("the answer broke off".into()).into()
}
