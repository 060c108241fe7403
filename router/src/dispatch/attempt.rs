//! One attempt at a request: the calls to a decode group and a prefill node, until the answer ends or something fails.
//!
//! ```text
//! Handoff      Generate -> Admitted{handoff} ; Prefill(handoff) -> First ; Landed ; Tokens... ; Finished
//! Local        Generate(prefill_here) -> Admitted ; Tokens... ; Finished
//! PrefillOnly  Prefill -> First
//! ```
//!
//! Caller: [`super::request`], which owns what outlives an attempt. Dropping the future drops both calls.

mod course;

use std::sync::Arc;
use std::time::Duration;

use cluster::{Member, Shutdown};
use futures::StreamExt;
use proto::v1::generate_event::Event as DecodeEvent;
use proto::v1::{self, Role};
use tokio::time::{Instant, timeout};
use tonic::{Request, Status, Streaming};

use super::book::Grant;
use super::counts::Cause;
use super::nodes::{Meaning, Nodes, meaning, one_line};
use super::request::Progress;
use super::{DispatchConfig, counts::Counts};
use crate::inference::{FinishReason, Started};
use course::Course;

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
        Course::new(self, prefill, decode, calls).run(progress).await
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
            () = decode.departed.cancelled() => Err(Status::unavailable("it is not in the cluster any more")),
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
        // A prefill node guesses nothing.
        let sequence = v1::Sequence { prediction: Vec::new(), ..progress.sequence() };
        let mut request = Request::new(v1::PrefillRequest { sequence: Some(sequence), handoff });
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
            () = prefill.departed.cancelled() => Err(Status::unavailable("it is not in the cluster any more")),
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
        Some(DecodeEvent::Scored(_)) => "scored",
        Some(DecodeEvent::FirstStep(_)) => "first step",
        None => "none",
    }
}
