//! What one sequence adds to the metrics, from its request to its end. `api::answer` tells it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{DecisionLabel, Metrics, Reason};
use crate::api::Caller;
use crate::inference::{Served, Started};

/// Follows one sequence. Dropped before an end was reported, it counts as aborted: the client went away.
#[derive(Debug)]
pub struct SequenceMeter {
    metrics: Arc<Metrics>,
    arrived: Instant,
    accepted: Option<Instant>,
    served: Option<Served>,
    first: Option<Instant>,
    last: Instant,
    prompt_tokens: u32,
    tokens: u32,
    ended: bool,
    /// Whose tokens they are; `None` where nobody needs a key.
    caller: Option<Arc<Caller>>,
}

impl SequenceMeter {
    /// `arrived`: when the request's body was complete.
    pub fn new(metrics: Arc<Metrics>, arrived: Instant, prompt_tokens: u32) -> Self {
        metrics.series.prompt_tokens.inc_by(prompt_tokens.into());
        Self {
            metrics,
            arrived,
            accepted: None,
            served: None,
            first: None,
            last: arrived,
            prompt_tokens,
            tokens: 0,
            ended: false,
            caller: None,
        }
    }

    /// Counts the sequence's tokens as `caller`'s.
    pub fn of(mut self, caller: Option<Arc<Caller>>) -> Self {
        if let Some(caller) = &caller {
            caller.used(self.prompt_tokens, self.arrived);
        }
        self.caller = caller;
        self
    }

    /// The sequence is admitted.
    pub fn started(&mut self, started: &Started) {
        self.accepted = Some(Instant::now());
        self.metrics.series.queue.observe(started.queue.as_secs_f64());
        self.metrics.series.admission.observe(started.admission.as_secs_f64());
    }

    /// The cluster tells how it serves the sequence, in place of what it told before.
    pub fn served(&mut self, served: Served) {
        self.served = Some(served);
    }

    /// A token came.
    pub fn token(&mut self, now: Instant) {
        self.tokens += 1;
        self.metrics.series.generation_tokens.inc();
        if let Some(caller) = &self.caller {
            caller.used(1, now);
        }
        match self.first {
            None => {
                self.first = Some(now);
                self.metrics.series.ttft.observe((now - self.arrived).as_secs_f64());
            }
            Some(_) => {
                let gap = (now - self.last).as_secs_f64();
                self.metrics.series.itl.observe(gap);
                self.metrics.series.itl_before.observe(gap);
            }
        }
        self.last = now;
    }

    /// From the request to the first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.first.map(|first| first - self.arrived)
    }

    /// The sequence is complete. `reason`: `stop` or `length`.
    pub fn finished(&mut self, reason: &'static str) {
        self.end(reason);
        let m = &self.metrics.series;
        m.e2e.observe(self.arrived.elapsed().as_secs_f64());
        m.request_prompt.observe(self.prompt_tokens.into());
        m.request_generation.observe(self.tokens.into());
        m.request_generation_max.observe(self.tokens.into());
        if let Some(accepted) = self.accepted {
            m.inference.observe((self.last.max(accepted) - accepted).as_secs_f64());
        }
        if let Some(first) = self.first.filter(|_| self.tokens > 1) {
            let decode = (self.last - first).as_secs_f64();
            m.decode.observe(decode);
            m.tpot.observe(decode / f64::from(self.tokens - 1));
        }
        // Where no node was asked there is nothing to tell.
        let Some(served) = &self.served else { return };
        m.prefix_queries.inc_by(self.prompt_tokens.into());
        m.prefix_hits.inc_by(served.cached_tokens.into());
        m.decisions.get_or_create(&DecisionLabel { decision: served.decision.as_str() }).inc();
        m.migrations.inc_by(served.migrations.into());
        let t = &served.timings;
        let parts = [
            (&m.prefill, t.prefill),
            (&m.transfer_exposed, t.transfer_exposed),
            (&m.transfer_estimated, t.transfer_estimated),
            (&m.first_step_wait, t.first_step_wait),
            (&m.first_step, t.first_step),
        ];
        for (metric, part) in parts.into_iter().filter(|(_, part)| !part.is_zero()) {
            metric.observe(part.as_secs_f64());
        }
    }

    /// The sequence failed.
    pub fn failed(&mut self) {
        self.end("error");
    }

    fn end(&mut self, finished_reason: &'static str) {
        self.ended = true;
        self.metrics.series.ended.get_or_create(&Reason { finished_reason }).inc();
    }
}

impl Drop for SequenceMeter {
    fn drop(&mut self) {
        if !self.ended {
            self.end("abort");
        }
    }
}
