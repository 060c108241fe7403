//! One attempt at a request: the calls to a decode group and a prefill node, until the answer ends or something fails.
//!
//! ```text
//! Handoff      Generate -> Admitted{handoff} ; Prefill(handoff) -> First ; Landed ; Tokens... ; Finished
//! Local        Generate(prefill_here) -> Admitted ; Tokens... ; Finished
//! PrefillOnly  Prefill -> First
//! ```
//!
//! Caller: [`super::request`], which owns what outlives an attempt. Dropping the future drops both calls.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Member, Shutdown};
use futures::StreamExt;
use proto::v1::generate_event::Event as DecodeEvent;
use proto::v1::prefill_event::Event as PrefillEvent;
use proto::v1::{self, Role};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Request, Status, Streaming};

use super::book::Grant;
use super::counts::Cause;
use super::nodes::{Meaning, Nodes, meaning, one_line};
use super::request::Progress;
use super::wire;
use super::{DispatchConfig, counts::Counts};
use crate::inference::{FinishReason, Started};

/// The prefill node was lost after its first token: so long the group may still say that everything landed.
const LANDED_GRACE: Duration = Duration::from_millis(500);

/// Why an attempt failed.
#[derive(Debug)]
pub struct Failure {
    /// What follows from it.
    pub kind: FailureKind,
    /// One line for people.
    pub message: String,
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A node had no room: the same attempt, later.
    Refused,
    /// A node could not be asked, or is not taking work: another attempt, later.
    NotAccepted,
    /// After acceptance: a migration.
    Migrate(Cause),
    /// Never possible.
    Invalid,
}

/// Calls that outlive the answer: a group that hears of the end through the KV session, a push that is not yet
/// acknowledged. Dropping them would cancel what is as good as done.
#[derive(Default)]
pub struct Remains {
    decode: Option<Streaming<v1::GenerateEvent>>,
    prefill: Option<Streaming<v1::PrefillEvent>>,
}

impl Remains {
    /// Reads the calls to their ends, for `limit` at the most.
    pub async fn run_out(self, limit: Duration) {
        let drain = async {
            if let Some(mut call) = self.prefill {
                while let Some(Ok(_)) = call.next().await {}
            }
            if let Some(mut call) = self.decode {
                while let Some(Ok(_)) = call.next().await {}
            }
        };
        let _ = timeout(limit, drain).await;
    }

    /// Nothing is open.
    pub fn is_empty(&self) -> bool {
        self.decode.is_none() && self.prefill.is_none()
    }
}

/// What an attempt works with.
pub struct Attempt<'a> {
    /// How nodes are called.
    pub nodes: &'a Nodes,
    /// Bounds.
    pub config: &'a DispatchConfig,
    /// What is counted.
    pub counts: &'a Counts,
    /// Who does what.
    pub grant: &'a Grant,
}

/// A node of this attempt, and the token that is cancelled when it departs.
struct Peer {
    member: Arc<Member>,
    role: Role,
    departed: Shutdown,
}

impl Attempt<'_> {
    /// Runs it to its end: the answer is complete, with the calls that are left to end by themselves, or a failure.
    pub async fn run(&self, progress: &mut Progress) -> Result<(FinishReason, Remains), Failure> {
        let prefill = self.peer(&self.grant.prefill, Role::Prefill);
        let decode = self.peer(&self.grant.decode, Role::Decode);
        let mut calls = Remains::default();
        let mut handoff = None;
        if let Some(decode) = &decode {
            let (call, admitted) = self.reserve(decode, progress).await?;
            handoff = admitted.handoff;
            calls.decode = Some(call);
        }
        if let Some(prefill) = &prefill {
            if decode.is_some() && handoff.is_none() {
                return Err(protocol(
                    &prefill.member,
                    "the decode group admitted without a place for the KV",
                ));
            }
            calls.prefill = Some(self.compute(prefill, handoff, progress).await?);
        }
        Course { attempt: self, prefill, decode, calls, landed: false, ended: None, doubt: None }
            .run(progress)
            .await
    }

    fn peer(&self, member: &Option<Arc<Member>>, role: Role) -> Option<Peer> {
        let member = member.clone()?;
        let departed = self.nodes.departure(&member);
        Some(Peer { member, role, departed })
    }

    /// Asks the group for room and waits for its answer.
    async fn reserve(
        &self,
        decode: &Peer,
        progress: &mut Progress,
    ) -> Result<(Streaming<v1::GenerateEvent>, v1::Admitted), Failure> {
        let asked = Instant::now();
        let request = v1::GenerateRequest {
            sequence: Some(progress.sequence()),
            prefill_here: self.grant.prefill.is_none(),
        };
        let within = progress.spans.within_attempt();
        let mut request = Request::new(request);
        within.mark(request.metadata_mut());
        let mut span = within.span("reserve");
        span.set("baton.node", decode.member.join.name.as_str());
        let call = async {
            let mut client = self.nodes.decode(&decode.member)?;
            let mut call = client.generate(request).await?.into_inner();
            let first = call.message().await?;
            Ok::<_, Status>((call, first.and_then(|message| message.event)))
        };
        let limit = self.config.admission_max;
        let answer = tokio::select! {
            answer = timeout(limit, call) => {
                answer.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {limit:?}"))))
            }
            () = decode.departed.cancelled() => Err(Status::unavailable("it stopped reporting")),
        };
        if let Err(status) = &answer {
            span.fail(status.message());
        }
        span.end();
        match answer {
            Ok((call, Some(DecodeEvent::Admitted(admitted)))) => {
                self.grant.admitted(admitted.cached_tokens, progress.blocks());
                let started = Started {
                    cached_tokens: admitted.cached_tokens,
                    queue: progress.queue(),
                    admission: asked.elapsed(),
                };
                progress.accepted(started, self.grant.placement.decision()).await;
                Ok((call, admitted))
            }
            Ok((_, event)) => {
                Err(protocol(&decode.member, &format!("its first event is {}", decode_name(&event))))
            }
            Err(status) => {
                self.counts.refused_by_decode();
                Err(self.not_accepted(decode, &status))
            }
        }
    }

    /// Gives the prompt to the prefill node.
    async fn compute(
        &self,
        prefill: &Peer,
        handoff: Option<v1::Handoff>,
        progress: &mut Progress,
    ) -> Result<Streaming<v1::PrefillEvent>, Failure> {
        let asked = Instant::now();
        let mut request = Request::new(v1::PrefillRequest { sequence: Some(progress.sequence()), handoff });
        progress.spans.prefill(&prefill.member.join.name).mark(request.metadata_mut());
        let call = async {
            let mut client = self.nodes.prefill(&prefill.member)?;
            Ok::<_, Status>(client.prefill(request).await?.into_inner())
        };
        let limit = self.config.admission_max;
        let answer = tokio::select! {
            answer = timeout(limit, call) => {
                answer.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {limit:?}"))))
            }
            () = prefill.departed.cancelled() => Err(Status::unavailable("it stopped reporting")),
        };
        match answer {
            Ok(call) => {
                if self.grant.placement.decode().is_none() {
                    let started =
                        Started { queue: progress.queue(), admission: asked.elapsed(), ..Started::default() };
                    progress.accepted(started, self.grant.placement.decision()).await;
                }
                Ok(call)
            }
            Err(status) => {
                self.counts.refused_by_prefill();
                Err(self.not_accepted(prefill, &status))
            }
        }
    }

    /// No new work for the node for a moment.
    fn suspect(&self, peer: &Peer, why: &str) {
        self.grant.failed(peer.role);
        self.nodes.suspect(&peer.member, why);
    }

    /// A node did not take the work.
    fn not_accepted(&self, peer: &Peer, status: &Status) -> Failure {
        let message = one_line(&peer.member, status);
        let kind = match meaning(status) {
            Meaning::Full => {
                self.grant.refused(peer.role);
                FailureKind::Refused
            }
            Meaning::Invalid => FailureKind::Invalid,
            Meaning::Session | Meaning::Lost => {
                self.suspect(peer, &message);
                FailureKind::NotAccepted
            }
        };
        Failure { kind, message }
    }

    /// A node failed the work that it had taken.
    fn broken(&self, peer: &Peer, status: &Status) -> Failure {
        let message = one_line(&peer.member, status);
        let kind = match (meaning(status), peer.role) {
            (Meaning::Invalid, _) => FailureKind::Invalid,
            // A prefill node says on the open call that it has no room after all.
            (Meaning::Full, Role::Prefill) => {
                self.counts.refused_by_prefill();
                self.grant.refused(Role::Prefill);
                FailureKind::Refused
            }
            (Meaning::Full, _) => FailureKind::Migrate(Cause::Preempted),
            (Meaning::Session, _) => FailureKind::Migrate(Cause::Session),
            (Meaning::Lost, role) => {
                self.suspect(peer, &message);
                FailureKind::Migrate(match role {
                    Role::Prefill => Cause::PrefillLost,
                    _ => Cause::DecodeLost,
                })
            }
        };
        Failure { kind, message }
    }
}

/// An attempt under way.
struct Course<'a> {
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

impl Course<'_> {
    async fn run(mut self, progress: &mut Progress) -> Result<(FinishReason, Remains), Failure> {
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
                    return Err(self.silent(role, Cause::LeaseExpired, "it stopped reporting"));
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
                let token = first.token.map(wire::token);
                // What the group has generated since waits in the merge for this one.
                let Some(token) = token.filter(|token| token.index == progress.next_index()) else {
                    return Err(self.wrong(Role::Prefill, "its first token is not the one awaited"));
                };
                self.attempt.grant.computed(Some(first.cached_tokens), progress.blocks());
                progress.computed(first.cached_tokens);
                self.deliver(token, Role::Prefill, progress).await?;
                // Only one token was wanted: that is its length.
                Ok(finish.or((self.decode.is_none()).then_some(FinishReason::Length)))
            }
            Some(PrefillEvent::Pushed(pushed)) => {
                progress.pushed(&pushed);
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
                        let cached = progress.admitted_cached_tokens();
                        self.attempt.grant.computed(None, progress.blocks());
                        progress.computed(cached);
                    }
                    self.deliver(wire::token(token), Role::Decode, progress).await?;
                }
                Ok(())
            }
            Some(DecodeEvent::Landed(_)) => {
                self.land(progress);
                Ok(())
            }
            Some(DecodeEvent::Finished(finished)) => {
                let Some(reason) = wire::finish(finished.reason()) else {
                    return Err(self.wrong(Role::Decode, "it finished without a reason"));
                };
                progress.first_step(
                    Duration::from_micros(finished.first_step_wait_us),
                    Duration::from_micros(finished.first_step_us),
                );
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

fn protocol(member: &Arc<Member>, what: &str) -> Failure {
    Failure {
        kind: FailureKind::Migrate(Cause::Protocol),
        message: format!("node {}: {what}", member.join.name),
    }
}

fn decode_name(event: &Option<DecodeEvent>) -> &'static str {
    match event {
        Some(DecodeEvent::Admitted(_)) => "admitted",
        Some(DecodeEvent::Landed(_)) => "landed",
        Some(DecodeEvent::Tokens(_)) => "tokens",
        Some(DecodeEvent::Finished(_)) => "finished",
        Some(DecodeEvent::Preempted(_)) => "preempted",
        None => "none",
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
