//! The leader's decisions: which jobs are admitted, what every rank does in the next step, what jobs are told. Pure but
//! for the jobs' event channels: commands, notices and what steps drew go in, plans come out. Called by [`crate::runner`].
//!
//! A step is planned while the one before it runs. Of a token that is still being drawn the plan says from which row it
//! comes; everything else about it is known: its position, its room, and whether the answer can end with it for its
//! length. When a stop id ends the answer after all, or its client leaves, the row that was planned too many is dropped
//! when its step is done, and its place in the store goes with the sequence: no prefix ends behind what was kept. What
//! needs the tokens themselves waits for them: a draw on the host, a sequence given up for room, and guesses of what follows.

mod admit;
mod draft;
mod lease;
mod retire;
mod step;
#[cfg(test)]
mod tests;

pub(crate) use step::Step;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use backend::{KvUsage, SeqId};
use tokio::sync::oneshot;

use crate::draft::Drafter;
use crate::draft::worth::Worth;
use crate::leader::lease::Lease;
use crate::ledger::{LeaseId, Ledger, Owner};
use crate::options::EngineOptions;
use crate::prefix::{Namer, PrefixCache};
use crate::rates::Rates;
use crate::request::{Blocks, Counters, Event, JobError, Report, Target};
use crate::sequence::{Sequence, Stage};
use crate::tp::plan::Op;

/// What the group of this epoch is.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub options: EngineOptions,
    pub epoch: u64,
    /// One per rank.
    pub targets: Vec<Target>,
    /// Width of the logits.
    pub vocabulary: usize,
    /// Blocks of every rank's store: the least of all ranks.
    pub blocks: u32,
    pub block_tokens: u32,
    /// Forked prefixes share blocks.
    pub shares: bool,
    /// Secret of the prefix names.
    pub secret: [u8; 16],
}

/// Numbers that outlive an epoch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub counters: Counters,
    pub rates: Rates,
    pub worth: Worth,
    pub audit_errors: u32,
    /// Sequences and leases are never numbered twice.
    pub next_id: u64,
}

pub(crate) struct Core<'d> {
    setup: Setup,
    totals: Totals,
    /// A draft model, until it fails.
    drafter: Option<Box<dyn Drafter + 'd>>,
    ledger: Ledger,
    prefix: PrefixCache,
    /// By job, which is in order of arrival.
    sequences: BTreeMap<u64, Sequence>,
    leases: BTreeMap<LeaseId, Lease>,
    /// Operations of the next plan.
    ops: Vec<Op>,
    /// Number of the next plan.
    step: u64,
    /// The latest plan with rows.
    latest: u64,
    /// Steps with rows that are not done.
    under_way: usize,
    /// Plans that each rank has carried out.
    executed: Vec<u64>,
    /// (plan, job, event): told when every rank has carried out the plan.
    announcements: Vec<(u64, u64, Event)>,
    probes: Vec<oneshot::Sender<Result<Duration, JobError>>>,
    /// Probes that a step under way serves, or one that is done.
    probing: Vec<oneshot::Sender<Result<Duration, JobError>>>,
    /// Time of their step, until they are answered.
    probed: Option<Duration>,
    /// Something happened since the last audit.
    unaudited: bool,
    /// The book contradicts itself: a fault of this program, which ends the epoch.
    fault: Option<String>,
}

impl<'d> Core<'d> {
    pub fn new(setup: Setup, totals: Totals) -> Self {
        let namer = Namer::new(setup.secret);
        Core {
            totals,
            drafter: None,
            ledger: Ledger::new(setup.blocks, setup.block_tokens, setup.shares),
            prefix: PrefixCache::new(namer, setup.block_tokens),
            sequences: BTreeMap::new(),
            leases: BTreeMap::new(),
            ops: Vec::new(),
            step: 1,
            latest: 0,
            under_way: 0,
            executed: vec![0; setup.targets.len()],
            announcements: Vec::new(),
            probes: Vec::new(),
            probing: Vec::new(),
            probed: None,
            unaudited: false,
            fault: None,
            setup,
        }
    }

    /// Guesses come from `drafter`, too.
    pub fn draft_with(&mut self, drafter: impl Drafter + 'd) {
        self.drafter = Some(Box::new(drafter));
    }

    /// Asks for the time of a step on a scratch sequence.
    pub fn probe(&mut self, reply: oneshot::Sender<Result<Duration, JobError>>) {
        self.probes.push(reply);
    }

    /// Ends everything; what outlives the epoch is left.
    pub fn finish(mut self, error: &JobError) -> Totals {
        let jobs: Vec<u64> = self.sequences.keys().copied().collect();
        for job in jobs {
            self.end(job, Event::Failed(error.clone()));
        }
        for reply in self.probes.drain(..).chain(self.probing.drain(..)) {
            // One who has left needs no answer.
            let _ = reply.send(Err(error.clone()));
        }
        self.totals
    }

    /// What ends the epoch, if the book contradicts itself.
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Nothing runs, waits or is in flight.
    pub fn idle(&self) -> bool {
        self.sequences.is_empty()
            && self.leases.is_empty()
            && self.probes.is_empty()
            && self.probing.is_empty()
    }

    /// State now; `usage` is the leader's store.
    pub fn report(&mut self, usage: KvUsage, links: Vec<(String, f32, u64)>) -> Report {
        let waiting = |s: &&Sequence| s.stage == Stage::Waiting;
        let prompt =
            |s: &&Sequence| s.stage != Stage::Landing && s.stage != Stage::Pushing && !s.generating();
        Report {
            epoch: self.setup.epoch,
            running: self.sequences.values().filter(|s| !waiting(s)).count(),
            waiting: self.sequences.values().filter(waiting).count(),
            waiting_tokens: self.sequences.values().filter(prompt).map(|s| s.remaining()).sum(),
            blocks: self.blocks(usage),
            prefill_tokens_per_s: self.totals.rates.prefill_tokens_per_s(),
            decode_step_ms: self.totals.rates.decode_step_ms(),
            links,
            counters: self.totals.counters,
        }
    }

    /// State after the epoch: nothing runs and, by the store, nothing is held.
    pub fn last_report(&self, usage: KvUsage) -> Report {
        Report {
            epoch: self.setup.epoch,
            blocks: Blocks {
                block_tokens: self.setup.block_tokens,
                total: usage.total,
                free: usage.free,
                used: usage.used,
                quarantined: usage.quarantined,
                audit_errors: self.totals.audit_errors,
                ..Blocks::default()
            },
            prefill_tokens_per_s: self.totals.rates.prefill_tokens_per_s(),
            decode_step_ms: self.totals.rates.decode_step_ms(),
            counters: self.totals.counters,
            ..Report::default()
        }
    }

    /// Held blocks by the book, the others by the store: when idle the sum must be the total.
    fn blocks(&mut self, usage: KvUsage) -> Blocks {
        let reserved: Vec<SeqId> =
            self.sequences.values().filter(|s| s.stage == Stage::Landing).map(|s| s.seq).collect();
        let counted = self.ledger.count(|seq| match () {
            () if reserved.contains(&seq) => Owner::Reserved,
            () if self.prefix.keeps(seq) => Owner::Cached,
            () => Owner::Running,
        });
        Blocks {
            total: usage.total,
            free: usage.free,
            quarantined: usage.quarantined,
            audit_errors: self.totals.audit_errors,
            ..counted
        }
    }

    fn next_id(&mut self) -> u64 {
        self.totals.next_id += 1;
        self.totals.next_id
    }

    /// Adds an operation to the next plan and to the book.
    fn emit(&mut self, op: Op) {
        let booked = match &op {
            Op::Open { seq, tokens } => self.ledger.open(*seq, *tokens),
            Op::Grow { seq, tokens } => self.ledger.grow(*seq, *tokens),
            Op::Fork { from, to, tokens, mode } => self.ledger.fork(*from, *to, *tokens, *mode),
            Op::Truncate { seq, tokens } => self.ledger.truncate(*seq, *tokens),
            Op::Close { seq } => self.ledger.close(*seq),
            Op::Land(land) => self.ledger.lease(land.lease, land.seq, land.tokens.clone()),
            Op::Push(push) => self.ledger.lease(push.lease, push.seq, push.handoff.tokens.clone()),
            Op::Commit { .. } | Op::Abort { .. } | Op::PushClose { .. } | Op::Audit { .. } => Ok(()),
        };
        if let Err(error) = booked {
            self.fault = Some(format!("book of blocks, step {}, {op:?}: {error}", self.step));
        }
        self.unaudited |= !matches!(op, Op::Audit { .. });
        self.ops.push(op);
    }

    /// Ends a job with its last event.
    fn end(&mut self, job: u64, event: Event) {
        if let Some(sequence) = self.remove(job) {
            sequence.tell(event);
        }
    }

    /// Takes a job out.
    fn remove(&mut self, job: u64) -> Option<Sequence> {
        if let Some(drafter) = &mut self.drafter {
            drafter.forget(job);
        }
        self.sequences.remove(&job)
    }

    /// Tells what waited for every rank to have carried out a plan.
    fn announce(&mut self) {
        let executed = self.executed.iter().copied().min().unwrap_or_default();
        let (due, later) = std::mem::take(&mut self.announcements).into_iter().partition(|a| a.0 <= executed);
        self.announcements = later;
        let due: Vec<(u64, u64, Event)> = due;
        for (_, job, event) in due {
            if let Some(sequence) = self.sequences.get(&job) {
                sequence.tell(event);
            }
        }
    }
}

/// Seconds from `earlier` to `later`, zero when they are swapped.
fn since(later: Instant, earlier: Instant) -> Duration {
    later.saturating_duration_since(earlier)
}
