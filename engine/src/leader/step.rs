//! What every rank does next, and what becomes of the tokens that it draws.

use std::cmp::Reverse;
use std::ops::Range;
use std::time::{Duration, Instant};

use backend::{Draw, Drawn, Rule, SeqId};

use super::{Core, Totals, since};
use crate::draft::Guess;
use crate::request::{Event, JobError, Token};
use crate::sampler::{self, SampleError, Sampled};
use crate::scheduler::{self, Limits, Share, Want};
use crate::score;
use crate::sequence::{Expected, Flight, Kind, Sequence, Stage, finish_code};
use crate::tp::plan::{Export, Op, Plan, Wanted};
use kvtransfer::Close;

/// Prompt rows beside generation while the prefill rate is unknown.
const ROWS_BESIDE_UNKNOWN: usize = 64;

/// Prompt rows beside generation on the slowest machine: prompts must go on.
const ROWS_BESIDE_MIN: usize = 16;

/// Steps that are planned before the first of them is done: one runs, the next is ready when it ends.
const UNDER_WAY_MAX: usize = 2;

/// A plan and whose rows it computes.
pub(crate) struct Step {
    pub plan: Plan,
    parts: Vec<Part>,
    /// The last run of the batch is a probe's.
    scratch: Option<SeqId>,
}

/// Rows of a job in a step.
struct Part {
    job: u64,
    /// Its positions `[start, end)`.
    start: u32,
    end: u32,
    /// It generates, rather than reads its prompt.
    generating: bool,
    /// Of these, the ones whose logits score the prompt's next token.
    scored: Range<u32>,
    /// Its last row gives a token.
    draws: bool,
    /// What that token and those after it were guessed to be: a row each from `end` on.
    guess: Guess,
}

impl Core<'_> {
    /// The next step. `None`: nothing to do until a step under way is done, or, when there is none, something arrives.
    pub fn plan(&mut self, now: Instant) -> Option<Step> {
        let needs_host = self.sequences.values().any(Sequence::needs_host);
        // Sequences that generate stay together: a step without those that wait for the host would cost as much.
        if self.under_way >= UNDER_WAY_MAX || needs_host || !self.make_room_to_generate() {
            return None;
        }
        self.admit_waiting(now);
        let wants: Vec<_> = self.runnable().map(Sequence::want).collect();
        let mut guesses = self.guesses(&wants)?;
        let shares = scheduler::next(self.limits(&wants), &wants);
        let mut plan = Plan { step: self.step, ..Plan::default() };
        let add = |share: &Share| {
            let guess = guesses.remove(&share.job).unwrap_or_default();
            self.add_run(&mut plan, *share, guess)
        };
        let parts = shares.iter().filter_map(add).collect();
        let scratch = self.add_probe(&mut plan);
        if self.idle() && self.unaudited && self.ops.is_empty() {
            self.unaudited = false;
            self.emit(Op::Audit { held: self.ledger.held(), total: self.ledger.total() });
        }
        if self.ops.is_empty() && plan.batch.runs.is_empty() {
            return None;
        }
        plan.ops = std::mem::take(&mut self.ops);
        if !plan.batch.runs.is_empty() {
            self.latest = self.step;
            self.under_way += 1;
        }
        self.step += 1;
        Some(Step { plan, parts, scratch })
    }

    /// Takes in what the leader computed for `step`, between `began` and `ended`; steps in order. `drawn`: one for each of
    /// the plan's rows.
    pub fn done(&mut self, step: Step, began: Instant, ended: Instant, drawn: Vec<Drawn>) {
        if step.plan.batch.runs.is_empty() {
            return;
        }
        self.under_way -= 1;
        let took = since(ended, began);
        self.measure(&step, took);
        let mut drawn = drawn.into_iter();
        for part in &step.parts {
            let scored: Vec<Drawn> = drawn.by_ref().take(part.scored.len()).collect();
            let rows = usize::from(part.draws) + part.guess.tokens.len();
            let drawn: Vec<Drawn> = drawn.by_ref().take(rows).collect();
            // Its answer has ended meanwhile: this part was planned in advance, and too many.
            let Some(sequence) = self.sequences.get_mut(&part.job) else { continue };
            sequence.flights.retain(|flight| flight.step != step.plan.step);
            if part.generating && !sequence.has_stepped {
                sequence.has_stepped = true;
                let wait = sequence.usable.map_or(Duration::ZERO, |usable| since(began, usable));
                sequence.tell(Event::FirstStep { wait, step: took });
            }
            self.keep_prefix(part.job, part.start, part.end);
            let Some(sequence) = self.sequences.get_mut(&part.job) else { continue };
            if let Err(reason) = tell_scores(&part.scored, &scored, sequence) {
                self.fail_spoiled(part.job, reason);
                continue;
            }
            if part.draws {
                self.draw_rows(part, drawn, ended);
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
        for reply in self.probing.drain(..) {
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
        let context = self.setup.options.context_tokens;
        self.sequences.values().filter(move |s| s.runnable(self.latest, context))
    }

    fn add_run(&mut self, plan: &mut Plan, share: Share, guess: Guess) -> Option<Part> {
        let sequence = self.sequences.get_mut(&share.job)?;
        let (start, end) = (sequence.computed, sequence.computed + share.rows as u32);
        let generating = sequence.generating();
        let known = &sequence.request.tokens;
        match sequence.flights.last() {
            // Its one row.
            Some(flight) => plan.batch.push_drawn(sequence.seq, start, flight.row),
            None => plan.batch.push(
                sequence.seq,
                start,
                &[&known[start as usize..end as usize], &guess.tokens].concat(),
            ),
        }
        let scored = sequence.scored(start, end);
        let first = (plan.batch.rows() - guess.tokens.len() - share.rows) as u32;
        let row = |position| Wanted { row: first + (position - start), draw: Draw::Logits };
        plan.rows.extend(scored.clone().map(row));
        let draws = end as usize == sequence.len();
        if draws {
            let rule = |position| sampler::on_device(&sequence.request, position as usize);
            let on_device = rule(end).is_some() && guess.tokens.is_empty();
            let flight = Flight { step: plan.step, row: plan.rows.len() as u32, on_device };
            let positions = end..=end + guess.tokens.len() as u32;
            plan.rows.extend(positions.map(|position| wanted(first + position - start - 1, rule(position))));
            sequence.flights.push(flight);
        }
        sequence.computed = end;
        let part = Part { job: share.job, start, end, generating, scored, draws, guess };
        let Kind::Prefill(Some(handoff)) = &sequence.kind else { return Some(part) };
        let tokens = start.max(handoff.tokens.start)..end.min(handoff.tokens.end);
        if let Some(lease) = sequence.lease
            && !tokens.is_empty()
        {
            plan.exports.push(Export { lease, seq: sequence.seq, tokens });
        }
        Some(part)
    }

    /// A row of a scratch sequence when somebody asked for a probe and there is a block for it.
    fn add_probe(&mut self, plan: &mut Plan) -> Option<SeqId> {
        if self.probes.is_empty() || !self.probing.is_empty() || !self.evict(1, None) {
            return None;
        }
        self.probing = std::mem::take(&mut self.probes);
        let seq = SeqId(self.next_id());
        self.emit(Op::Open { seq, tokens: 1 });
        plan.batch.push(seq, 0, &[0]);
        plan.rows.push(wanted(plan.batch.rows() as u32 - 1, Some(Rule::GREEDY)));
        Some(seq)
    }

    /// Gives every generating sequence room for its next row: from the prefix cache, then by preempting the youngest
    /// of the lowest priority. False: that has to wait, for a step under way draws tokens that belong to its answer.
    fn make_room_to_generate(&mut self) -> bool {
        let mut order: Vec<(Reverse<i32>, u64)> = self
            .runnable()
            .filter(|s| s.generating())
            .map(|s| (Reverse(s.request.priority), s.job))
            .collect();
        order.sort_unstable();
        for (_, job) in order {
            while let Some(sequence) = self.sequences.get(&job) {
                let (seq, tokens) = (sequence.seq, sequence.len() as u32);
                if self.ledger.capacity(seq) >= tokens {
                    break;
                }
                if self.evict(1, None) {
                    self.emit(Op::Grow { seq, tokens });
                    break;
                }
                if self.under_way > 0 {
                    return false;
                }
                let generates = |s: &&Sequence| !matches!(s.kind, Kind::Prefill(_));
                let victim =
                    self.runnable().filter(generates).min_by_key(|s| (s.request.priority, u64::MAX - s.job));
                let victim = victim.map_or(job, |s| s.job);
                self.preempt(victim);
            }
        }
        true
    }

    /// What the rows of a part drew: a token, and one more behind each that was guessed right.
    fn draw_rows(&mut self, part: &Part, drawn: Vec<Drawn>, now: Instant) {
        let guessed = &part.guess.tokens;
        let (mut drawn, mut held) = (drawn.into_iter(), 0);
        while let Some(sequence) = self.sequences.get_mut(&part.job) {
            let at = sequence.request.tokens.len();
            // What passages are worth is learned of those without a row, too.
            let untried = guessed.is_empty() || part.guess.model;
            let expected = sequence.expected.filter(|expected| untried && expected.at == at);
            let sampled = match sampled(drawn.next(), sequence) {
                Ok(sampled) => sampled,
                Err(Undrawn::NotFinite(reason)) => return self.fail_spoiled(part.job, reason),
                Err(Undrawn::Refused(reason)) => return self.fail(part.job, JobError::Engine(reason)),
            };
            if let Some(Expected { id, agreed, .. }) = expected {
                self.totals.worth.tried(agreed, 1, usize::from(id == sampled.id));
            }
            let right = guessed.get(held) == Some(&sampled.id);
            if right {
                // The row of the token that was guessed is a row of the answer.
                sequence.computed += 1;
            }
            self.draw(part.job, sampled, right && part.guess.predicted, now);
            if !right {
                break;
            }
            let computed = part.end + held as u32;
            self.keep_prefix(part.job, computed, computed + 1);
            held += 1;
        }
        let luck = self.sequences.get_mut(&part.job).and_then(|sequence| sequence.luck.as_mut());
        match luck {
            Some(luck) if part.guess.model => luck.tried(guessed.len(), held),
            Some(luck) => luck.rests(),
            None => {}
        }
        if guessed.is_empty() {
            return;
        }
        let Totals { counters, worth, .. } = &mut self.totals;
        let (drafted, held) = (guessed.len() as u64, held as u64);
        counters.drafts += 1;
        counters.draft_tokens += drafted;
        counters.accepted_tokens += held;
        if part.guess.model {
            counters.model_draft_tokens += drafted;
            counters.model_accepted_tokens += held;
            worth.tried_model(guessed.len(), held as usize);
        } else {
            worth.tried(part.guess.agreed, guessed.len(), held as usize);
        }
    }

    /// Positions `[start, end)` of a job are computed, and all tokens there are known: full blocks serve prompts that begin alike.
    fn keep_prefix(&mut self, job: u64, start: u32, end: u32) {
        let block = self.setup.block_tokens;
        let Some(sequence) = self.sequences.get(&job) else { return };
        if self.setup.options.prefix_cache && end / block > start / block {
            let computed = &sequence.request.tokens[..end as usize];
            self.prefix.extend(sequence.seq, &sequence.request.cache_salt, computed);
        }
    }

    /// A drawn token: told, appended, and the end of the answer if it ends it.
    fn draw(&mut self, job: u64, sampled: Sampled, predicted: bool, now: Instant) {
        let Some(sequence) = self.sequences.get_mut(&job) else { return };
        sequence.request.tokens.push(sampled.id);
        let finish = sequence.finish(self.setup.options.context_tokens);
        self.totals.counters.generated_tokens += 1;
        sequence.tell(Event::Token(Token {
            index: sequence.output_tokens() - 1,
            id: sampled.id,
            logprob: sampled.logprob,
            top: sampled.top,
            predicted,
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
        let rows = |generating: bool| -> usize {
            let parts = step.parts.iter().filter(|part| part.generating == generating);
            parts.map(|part| (part.end - part.start) as usize).sum()
        };
        let (prompt, generated) = (rows(false), rows(true));
        self.totals.counters.prompt_tokens += prompt as u64;
        if prompt == 0 && generated > 0 {
            self.totals.worth.step(step.plan.batch.rows(), took);
        }
        // Rows that are scored cost the host more than the device, and those of guesses are more than one per sequence: they
        // say nothing of other prompts and steps.
        if step.parts.iter().all(|part| part.scored.is_empty() && part.guess.tokens.is_empty()) {
            self.totals.rates.step(prompt, generated, took);
        }
    }
}

/// A row for the device to draw from by `rule`, or for the host.
fn wanted(row: u32, rule: Option<Rule>) -> Wanted {
    Wanted { row, draw: rule.map_or(Draw::Logits, Draw::Token) }
}

/// Tells how likely the tokens after positions `scored` are. Errors say why nobody knows.
fn tell_scores(scored: &Range<u32>, rows: &[Drawn], sequence: &Sequence) -> Result<(), String> {
    let Some(top) = sequence.request.prompt_logprobs.filter(|_| !scored.is_empty()) else { return Ok(()) };
    let start = scored.start as usize + 1;
    let tokens = &sequence.request.tokens[start..scored.end as usize + 1];
    let scores = score::scores(rows, tokens, start, top as usize)?;
    sequence.tell(Event::Scored { start, scores });
    Ok(())
}

/// Why a row gives no token.
enum Undrawn {
    /// The model computed something that is no number.
    NotFinite(String),
    Refused(String),
}

/// The next token of `sequence`.
fn sampled(drawn: Option<Drawn>, sequence: &mut Sequence) -> Result<Sampled, Undrawn> {
    match drawn {
        Some(Drawn::Token(id)) => Ok(Sampled { id, logprob: None, top: Vec::new() }),
        Some(Drawn::Logits(logits)) => {
            sampler::sample(&logits, &mut sequence.request).map_err(|error| match error {
                SampleError::NotFinite { .. } => Undrawn::NotFinite(error.to_string()),
                _ => Undrawn::Refused(error.to_string()),
            })
        }
        Some(Drawn::NotFinite { id }) => {
            let position = sequence.request.tokens.len();
            Err(Undrawn::NotFinite(format!("logit of id {id} at position {position} is not finite")))
        }
        None => Err(Undrawn::Refused("the step drew no token".into())),
    }
}
