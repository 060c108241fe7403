//! An attempt under way: what both nodes say, in which order it counts, and what follows when one of them is lost.

use std::future::pending;
use std::time::Duration;

use futures::StreamExt;
use proto::v1::generate_event::Event as DecodeEvent;
use proto::v1::prefill_event::Event as PrefillEvent;
use proto::v1::{self, Role};
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};

use super::super::counts::Cause;
use super::super::nodes::{Meaning, meaning};
use super::super::request::Progress;
use super::super::wire;
use super::{Attempt, Failure, FailureKind, Peer, Remains, protocol};
use crate::inference::FinishReason;

/// The prefill node was lost after its first token: so long the group may still say that everything landed.
const LANDED_GRACE: Duration = Duration::from_millis(500);

/// A node that was asked how likely the prompt's tokens are begins the answer.
const UNSCORED: &str = "it drew a token before it had scored the prompt";

/// An attempt under way.
pub struct Course<'a> {
    attempt: &'a Attempt<'a>,
    prefill: Option<Peer>,
    decode: Option<Peer>,
    calls: Remains,
    /// The group has the whole cache, landed or computed: the prefill node is no longer needed.
    landed: bool,
    /// The group has said how the answer ends; tokens before that may still be on their way.
    ended: Option<(FinishReason, u32)>,
    /// The prefill node was lost after its first token; the group must land by then, or this is the failure.
    doubt: Option<(Instant, Failure)>,
}

enum Heard {
    Prefill(Option<Result<v1::PrefillEvent, Status>>),
    Decode(Option<Result<v1::GenerateEvent, Status>>),
    Departed(Role),
    Silence,
}

impl<'a> Course<'a> {
    /// Of these calls, just begun.
    pub fn new(
        attempt: &'a Attempt<'a>,
        prefill: Option<Peer>,
        decode: Option<Peer>,
        calls: Remains,
    ) -> Self {
        Course { attempt, prefill, decode, calls, landed: false, ended: None, doubt: None }
    }

    /// Listens to both calls until the answer is complete, or something fails.
    pub async fn run(mut self, progress: &mut Progress) -> Result<(FinishReason, Remains), Failure> {
        let mut heard_last = Instant::now();
        loop {
            if let Some((reason, output_tokens)) = self.ended {
                if progress.next_index() >= output_tokens {
                    self.calls.decode = None;
                    return Ok((reason, self.calls));
                }
                if self.calls.prefill.is_none() {
                    return Err(self.missing_tokens(progress, output_tokens));
                }
            }
            let silence_max = match self.landed {
                true => self.attempt.config.token_silence_max,
                false => self.attempt.config.prompt_silence_max,
            };
            let limit = match &self.doubt {
                Some((by, _)) => *by,
                None => heard_last + silence_max,
            };
            let prefill_matters = self.calls.prefill.is_some() && !self.landed;
            // In this order: the first token and what the push took are told before what the group made of them.
            let heard = tokio::select! {
                biased;
                event = next(&mut self.calls.prefill) => Heard::Prefill(event),
                event = next(&mut self.calls.decode) => Heard::Decode(event),
                () = departed(&self.prefill, prefill_matters) => Heard::Departed(Role::Prefill),
                () = departed(&self.decode, self.ended.is_none()) => Heard::Departed(Role::Decode),
                () = sleep_until(limit) => Heard::Silence,
            };
            heard_last = Instant::now();
            match heard {
                Heard::Prefill(Some(Ok(event))) => {
                    if let Some(reason) = self.prefill_said(event, progress).await? {
                        return Ok((reason, self.calls));
                    }
                }
                Heard::Prefill(Some(Err(status))) => self.prefill_ended(Some(status), progress)?,
                Heard::Prefill(None) => self.prefill_ended(None, progress)?,
                Heard::Decode(Some(Ok(event))) => self.decode_said(event, progress).await?,
                // All is said already, only the first token is still on its way.
                Heard::Decode(None | Some(Err(_))) if self.ended.is_some() => self.calls.decode = None,
                Heard::Decode(Some(Err(status))) => return Err(self.decode_broke(&status)),
                Heard::Decode(None) => {
                    return Err(self.decode_broke(&Status::unavailable("its stream ended without an end")));
                }
                Heard::Departed(role) => {
                    return Err(self.silent(role, Cause::LeaseExpired, "it is not in the cluster any more"));
                }
                Heard::Silence => {
                    if let Some((_, failure)) = self.doubt {
                        return Err(failure);
                    }
                    let role =
                        if self.landed || self.prefill.is_none() { Role::Decode } else { Role::Prefill };
                    let text = format!("nothing heard for {silence_max:?}");
                    return Err(self.silent(role, Cause::Stalled, &text));
                }
            }
        }
    }

    /// Returns the reason if the first token ends the answer.
    async fn prefill_said(
        &mut self,
        event: v1::PrefillEvent,
        progress: &mut Progress,
    ) -> Result<Option<FinishReason>, Failure> {
        match event.event {
            Some(PrefillEvent::First(first)) => {
                let finish = wire::finish(first.finish());
                if progress.awaits_scores() {
                    return Err(self.wrong(Role::Prefill, UNSCORED));
                }
                let token = first.token.map(wire::token);
                // What the group has generated since waits in the merge for this one.
                let Some(token) = token.filter(|token| token.index == progress.next_index()) else {
                    return Err(self.wrong(Role::Prefill, "its first token is not the one awaited"));
                };
                self.attempt.grant.computed(Some(first.cached_tokens), progress.blocks());
                progress.computed(first.cached_tokens).await;
                self.deliver(token, Role::Prefill, progress).await?;
                // Only one token was wanted: that is its length.
                Ok(finish.or((self.decode.is_none()).then_some(FinishReason::Length)))
            }
            Some(PrefillEvent::Scored(scored)) => {
                self.scored(scored, Role::Prefill, progress).await?;
                Ok(None)
            }
            Some(PrefillEvent::Pushed(pushed)) => {
                progress.pushed(&pushed).await;
                Ok(None)
            }
            Some(PrefillEvent::Started(_)) | None => Ok(None),
        }
    }

    /// The prefill call is over, with or without an error.
    fn prefill_ended(&mut self, status: Option<Status>, progress: &Progress) -> Result<(), Failure> {
        self.calls.prefill = None;
        let Some(peer) = &self.prefill else { return Ok(()) };
        if !progress.attempt_has_prompt() {
            let status =
                status.unwrap_or_else(|| Status::unavailable("its stream ended without a first token"));
            return Err(self.attempt.broken(peer, &status));
        }
        match status {
            Some(status) if !self.landed && self.ended.is_none() => {
                // The bytes may all have arrived before it was lost: the group knows.
                let failure = self.attempt.broken(peer, &status);
                let failure = match failure.kind {
                    FailureKind::Migrate(_) => failure,
                    _ => Failure { kind: FailureKind::Migrate(Cause::PrefillLost), ..failure },
                };
                self.doubt = Some((Instant::now() + LANDED_GRACE, failure));
            }
            _ => {}
        }
        Ok(())
    }

    async fn decode_said(
        &mut self,
        event: v1::GenerateEvent,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        match event.event {
            Some(DecodeEvent::Tokens(tokens)) => {
                // With a handoff the group generates only from a landed cache.
                self.land(progress);
                for token in tokens.tokens {
                    if self.prefill.is_none() && !progress.attempt_has_prompt() {
                        if progress.awaits_scores() {
                            return Err(self.wrong(Role::Decode, UNSCORED));
                        }
                        let cached = progress.admitted_cached_tokens();
                        self.attempt.grant.computed(None, progress.blocks());
                        progress.computed(cached).await;
                    }
                    self.deliver(wire::token(token), Role::Decode, progress).await?;
                }
                Ok(())
            }
            Some(DecodeEvent::Scored(scored)) => self.scored(scored, Role::Decode, progress).await,
            Some(DecodeEvent::Landed(_)) => {
                self.land(progress);
                Ok(())
            }
            Some(DecodeEvent::FirstStep(first)) => {
                let (wait, step) =
                    (Duration::from_micros(first.wait_us), Duration::from_micros(first.step_us));
                progress.first_step(wait, step).await;
                Ok(())
            }
            Some(DecodeEvent::Finished(finished)) => {
                let Some(reason) = wire::finish(finished.reason()) else {
                    return Err(self.wrong(Role::Decode, "it finished without a reason"));
                };
                self.land(progress);
                self.ended = Some((reason, finished.output_tokens));
                Ok(())
            }
            Some(DecodeEvent::Preempted(preempted)) => Err(Failure {
                kind: FailureKind::Migrate(Cause::Preempted),
                message: match &self.decode {
                    Some(peer) => format!("node {} preempted: {}", peer.member.join.name, preempted.reason),
                    None => preempted.reason,
                },
            }),
            Some(DecodeEvent::Admitted(_)) => Err(self.wrong(Role::Decode, "it admitted twice")),
            None => Ok(()),
        }
    }

    fn land(&mut self, progress: &mut Progress) {
        if !self.landed {
            self.landed = true;
            progress.spans.landed();
            self.doubt = None;
            self.attempt.grant.held_by_decode(progress.blocks());
        }
    }

    async fn deliver(
        &self,
        token: crate::inference::Token,
        role: Role,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        progress.deliver(token).await.map_err(|error| self.wrong(role, &error.to_string()))
    }

    async fn scored(&self, scored: v1::Scored, role: Role, progress: &mut Progress) -> Result<(), Failure> {
        progress.scored(scored).await.map_err(|error| self.wrong(role, &error.to_string()))
    }

    fn decode_broke(&mut self, status: &Status) -> Failure {
        // The session failed because the prefill node was lost: that is the cause to tell.
        if let (Meaning::Session, Some((_, failure))) = (meaning(status), self.doubt.take()) {
            return failure;
        }
        match &self.decode {
            Some(peer) => self.attempt.broken(peer, status),
            None => Failure {
                kind: FailureKind::Migrate(Cause::DecodeLost),
                message: status.message().to_string(),
            },
        }
    }

    fn missing_tokens(&self, progress: &Progress, output_tokens: u32) -> Failure {
        let next = progress.next_index();
        self.wrong(
            Role::Decode,
            &format!("it finished after {output_tokens} tokens, token {next} never came"),
        )
    }

    fn silent(&self, role: Role, cause: Cause, what: &str) -> Failure {
        let failure = self.wrong(role, what);
        Failure { kind: FailureKind::Migrate(cause), ..failure }
    }

    /// A node does not keep to the protocol: no new work for it for a moment, and the request goes on elsewhere.
    fn wrong(&self, role: Role, what: &str) -> Failure {
        let peer = match role {
            Role::Prefill => self.prefill.as_ref(),
            _ => self.decode.as_ref(),
        };
        match peer {
            Some(peer) => {
                self.attempt.suspect(peer, what);
                protocol(&peer.member, what)
            }
            None => Failure { kind: FailureKind::Migrate(Cause::Protocol), message: what.to_string() },
        }
    }
}

async fn next<T>(call: &mut Option<Streaming<T>>) -> Option<Result<T, Status>> {
    match call {
        Some(call) => call.next().await,
        None => pending().await,
    }
}

async fn departed(peer: &Option<Peer>, matters: bool) {
    match peer {
        Some(peer) if matters => peer.departed.cancelled().await,
        _ => pending().await,
    }
}
