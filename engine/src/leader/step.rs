//! What every rank does next, and what its logits become.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use backend::{Batch, SeqId};

use super::{Core, since};
use crate::request::{Event, JobError, Token};
use crate::sampler::{self, Sampled};
use crate::scheduler::{self, Limits, Share, Want};
use crate::sequence::{Kind, Sequence, Stage, finish_code};
use crate::tp::plan::{Export, Op, Plan};
use kvtransfer::Close;

/// Prompt rows beside generation while the prefill rate is unknown.
const ROWS_BESIDE_UNKNOWN: usize = 64;

/// Prompt rows beside generation on the slowest machine: prompts must go on.
const ROWS_BESIDE_MIN: usize = 16;

/// A plan and whose rows it computes.
pub(crate) struct Step {
    pub plan: Plan,
    shares: Vec<Share>,
    /// The last run of the batch is a probe's.
    scratch: Option<SeqId>,
}

impl Core {
    /// The next step; `None`: nothing to do until something arrives.
    pub fn plan(&mut self, now: Instant) -> Option<Step> {
        self.make_room_to_generate();
        self.admit_waiting(now);
        let wants: Vec<_> = self.runnable().map(Sequence::want).collect();
        let shares = scheduler::next(self.limits(&wants), &wants);
        let mut plan = Plan { step: self.step, ..Plan::default() };
        for share in &shares {
            self.add_run(&mut plan, *share);
        }
        let scratch = self.add_probe(&mut plan.batch);
        plan.rows.extend(scratch.map(|_| plan.batch.rows() as u32 - 1));
        if self.idle() && self.unaudited && self.ops.is_empty() {
            self.unaudited = false;
            self.emit(Op::Audit { held: self.ledger.held(), total: self.ledger.total() });
        }
        if self.ops.is_empty() && plan.batch.runs.is_empty() {
            return None;
        }
        plan.ops = std::mem::take(&mut self.ops);
        self.step += 1;
        Some(Step { plan, shares, scratch })
    }

    /// Takes in what the leader computed for `step`, between `started` and `ended`. `logits`: one row of vocabulary
    /// width for each of the plan's rows.
    pub fn done(&mut self, step: Step, started: Instant, ended: Instant, logits: &[f32]) {
        let took = since(ended, started);
        self.measure(&step, took);
        let width = logits.len() / step.plan.rows.len().max(1);
        let mut rows = logits.chunks_exact(width.max(1));
        for share in &step.shares {
            let Some(sequence) = self.sequences.get_mut(&share.job) else { continue };
            if sequence.generating() && sequence.first_step.is_none() {
                sequence.first_step =
                    Some((sequence.usable.map_or(Duration::ZERO, |u| since(started, u)), took));
            }
            let before = sequence.computed;
            sequence.computed += share.rows as u32;
            let block = self.setup.block_tokens;
            if self.setup.options.prefix_cache && sequence.computed / block > before / block {
                let computed = &sequence.request.tokens[..sequence.computed as usize];
                self.prefix.extend(sequence.seq, &sequence.request.cache_salt, computed);
            }
            if sequence.remaining() == 0 {
                let row = rows.next().unwrap_or_default();
                match sampler::sample(row, &sequence.request) {
                    Ok(sampled) => self.draw(share.job, sampled, ended),
                    Err(error) => self.fail(share.job, JobError::Engine(error.to_string())),
                }
            }
        }
        if let Some(seq) = step.scratch {
            self.emit(Op::Close { seq });
            self.probed = Some(took);
        }
    }

    /// Whether a probe can be answered.
    pub fn has_probed(&self) -> bool {
        self.probed.is_some()
    }

    /// Answers probes whose step is done.
    pub fn answer_probes(&mut self) {
        let Some(took) = self.probed.take() else { return };
        for reply in self.probes.drain(..) {
            // One who has left needs no answer.
            let _ = reply.send(Ok(took));
        }
    }

    /// Bounds of the next step: while sequences generate, prompts get what they can compute without holding them up.
    pub(super) fn limits(&self, wants: &[Want]) -> Limits {
        let limits = self.setup.options.limits();
        let generating = wants.iter().filter(|want| want.generating).count();
        if generating == 0 {
            return limits;
        }
        let rows = self.totals.rates.prompt_rows_within(self.setup.options.stall_max);
        let beside = rows.unwrap_or(ROWS_BESIDE_UNKNOWN).max(ROWS_BESIDE_MIN);
        Limits { step_tokens: limits.step_tokens.min(generating + beside), ..limits }
    }

    /// Sequences whose rows can be computed.
    pub(super) fn runnable(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values().filter(|s| s.stage == Stage::Running)
    }

    fn add_run(&mut self, plan: &mut Plan, share: Share) {
        let Some(sequence) = self.sequences.get(&share.job) else { return };
        let (start, end) = (sequence.computed, sequence.computed + share.rows as u32);
        plan.batch.push(sequence.seq, start, &sequence.request.tokens[start as usize..end as usize]);
        if end as usize == sequence.request.tokens.len() {
            plan.rows.push(plan.batch.rows() as u32 - 1);
        }
        let Kind::Prefill(Some(handoff)) = &sequence.kind else { return };
        let tokens = start.max(handoff.tokens.start)..end.min(handoff.tokens.end);
        if let Some(lease) = sequence.lease
            && !tokens.is_empty()
        {
            plan.exports.push(Export { lease, seq: sequence.seq, tokens });
        }
    }

    /// A row of a scratch sequence when somebody asked for a probe and there is a block for it.
    fn add_probe(&mut self, batch: &mut Batch) -> Option<SeqId> {
        if self.probes.is_empty() || !self.evict(1, None) {
            return None;
        }
        let seq = SeqId(self.next_id());
        self.emit(Op::Open { seq, tokens: 1 });
        batch.push(seq, 0, &[0]);
        Some(seq)
    }

    /// Gives every generating sequence room for its next row: from the prefix cache, then by preempting the youngest
    /// of the lowest priority.
    fn make_room_to_generate(&mut self) {
        let mut order: Vec<(Reverse<i32>, u64)> = self
            .runnable()
            .filter(|s| s.generating())
            .map(|s| (Reverse(s.request.priority), s.job))
            .collect();
        order.sort_unstable();
        for (_, job) in order {
            while let Some(sequence) = self.sequences.get(&job) {
                let (seq, tokens) = (sequence.seq, sequence.request.tokens.len() as u32);
                if self.ledger.capacity(seq) >= tokens {
                    break;
                }
                if self.evict(1, None) {
                    self.emit(Op::Grow { seq, tokens });
                    break;
                }
                let generates = |s: &&Sequence| !matches!(s.kind, Kind::Prefill(_));
                let victim =
                    self.runnable().filter(generates).min_by_key(|s| (s.request.priority, u64::MAX - s.job));
                let victim = victim.map_or(job, |s| s.job);
                self.preempt(victim);
            }
        }
    }

    /// A drawn token: told, appended, and the end of the answer if it ends it.
    fn draw(&mut self, job: u64, sampled: Sampled, now: Instant) {
        let Some(sequence) = self.sequences.get_mut(&job) else { return };
        sequence.request.tokens.push(sampled.id);
        let finish = sequence.finish(self.setup.options.context_tokens);
        self.totals.counters.generated_tokens += 1;
        sequence.tell(Event::Token(Token {
            index: sequence.output_tokens() - 1,
            id: sampled.id,
            logprob: sampled.logprob,
            top: sampled.top,
            finish,
        }));
        let seq = sequence.seq;
        match (&sequence.kind, sequence.lease) {
            (Kind::Prefill(Some(_)), Some(lease)) => {
                sequence.stage = Stage::Pushing;
                if let Some(entry) = self.leases.get_mut(&lease) {
                    entry.computed = Some(now);
                }
                let close = Close { token: sampled.id, finish: finish_code(finish) };
                self.emit(Op::PushClose { lease, close });
                self.retire(seq);
            }
            (Kind::Prefill(_), _) => self.finish_job(job, finish.unwrap_or(crate::request::Finish::Length)),
            (Kind::Land | Kind::Generate, _) => {
                sequence.usable.get_or_insert(now);
                if let Some(reason) = finish {
                    self.finish_job(job, reason);
                }
            }
        }
    }

    fn measure(&mut self, step: &Step, took: Duration) {
        let (mut prompt, mut generated) = (0, 0);
        for share in &step.shares {
            match self.sequences.get(&share.job).is_some_and(Sequence::generating) {
                true => generated += share.rows,
                false => prompt += share.rows,
            }
        }
        self.totals.counters.prompt_tokens += prompt as u64;
        self.totals.rates.step(prompt, generated, took);
    }
}
