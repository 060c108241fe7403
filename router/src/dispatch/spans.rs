//! The spans of one request in the cluster, for traces. Each field holds what runs now; putting another in its place ends it.
//!
//! ```text
//! generate        all of it
//!   queue         for a place, before every attempt
//!   attempt       what one pair of nodes made of it; the decode group's span is beneath
//!     reserve     the group's answer to the call for room
//!     prefill     the call to the prefill node, to its first token; the node's span is beneath
//!     kv transfer from that token to the landed cache
//!     decode      from the landed cache to the last token
//!   first token   from the beginning to what the client sees first
//!   migration     from a failure to the next acceptance
//! ```
//!
//! Caller: [`super::request`], through which [`super::attempt`] tells what happens.

use cluster::traces::{Scope, Span};
use tokio::time::Instant;

use super::counts::Cause;
use crate::inference::GenerateRequest;

/// What runs.
#[derive(Debug)]
pub struct Spans {
    generate: Span,
    begun: Instant,
    attempt: Span,
    prefill: Span,
    transfer: Span,
    decode: Span,
    migration: Span,
    has_token: bool,
}

impl Spans {
    /// The request begins.
    pub fn new(request: &GenerateRequest) -> Spans {
        let mut generate = request.trace.span("generate");
        generate.set("baton.sequence", request.id.as_str());
        generate.set("baton.prompt_tokens", request.tokens.len());
        Spans {
            generate,
            begun: Instant::now(),
            attempt: Span::default(),
            prefill: Span::default(),
            transfer: Span::default(),
            decode: Span::default(),
            migration: Span::default(),
            has_token: false,
        }
    }

    /// Waits for a place, as long as the span is held.
    pub fn queue(&self) -> Span {
        self.generate.scope().span("queue")
    }

    /// Nodes are chosen.
    pub fn attempt(&mut self, number: u32) {
        self.attempt = self.generate.scope().span("attempt");
        self.attempt.set("baton.attempt", number);
    }

    /// Where calls and phases of this attempt belong.
    pub fn within_attempt(&self) -> Scope {
        self.attempt.scope()
    }

    /// A node has accepted.
    pub fn accepted(&mut self) {
        self.migration = Span::default();
    }

    /// The prefill node is called; where its own span belongs.
    pub fn prefill(&mut self, node: &str) -> Scope {
        self.prefill = self.attempt.scope().span("prefill");
        self.prefill.set("baton.node", node);
        self.prefill.scope()
    }

    /// The prompt is computed.
    pub fn computed(&mut self) {
        if self.prefill.is_on() {
            self.prefill = Span::default();
            self.transfer = self.attempt.scope().span("kv transfer");
        }
    }

    /// The group has the cache.
    pub fn landed(&mut self) {
        self.transfer = Span::default();
        self.decode = self.attempt.scope().span("decode");
    }

    /// A token goes to the client.
    pub fn token(&mut self) {
        if !self.has_token {
            self.has_token = true;
            self.generate.scope().span_since("first token", self.begun.into_std()).end();
        }
    }

    /// The attempt is over.
    pub fn failed(&mut self, why: &str) {
        self.attempt.fail(why);
        self.close();
    }

    /// It goes on elsewhere.
    pub fn migrate(&mut self, cause: Cause) {
        self.migration = self.generate.scope().span("migration");
        self.migration.set("baton.cause", cause.as_str());
    }

    /// All is told.
    pub fn finished(&mut self, output_tokens: u32) {
        self.generate.set("baton.output_tokens", output_tokens);
        self.close();
    }

    /// No answer.
    pub fn gave_up(&mut self, why: &str) {
        self.generate.fail(why);
        self.close();
    }

    fn close(&mut self) {
        (self.prefill, self.transfer, self.decode) = (Span::default(), Span::default(), Span::default());
        self.attempt = Span::default();
    }
}
