//! Landings and pushes as the leader sees them: complete when every rank has said so, given up when one fails.

use std::time::{Duration, Instant};

use kvtransfer::{Close, Codec};

use super::{Core, since};
use crate::ledger::LeaseId;
use crate::request::{Event, JobError};
use crate::sequence::{Stage, finish_of};
use crate::tp::plan::{Arrived, Notice, Op};

/// A transfer on all ranks.
pub(super) struct Lease {
    /// Whose it is, until that job ends.
    job: Option<u64>,
    landing: bool,
    /// Ranks that have said how it ended for them; they hold no block for it any more.
    ended: Vec<bool>,
    bytes: u64,
    /// The coarsest of the ranks'.
    codec: Codec,
    /// The longest of the ranks'.
    estimate: Option<Duration>,
    close: Option<Close>,
    /// When the last rank's last frame or acknowledgement came.
    last: Option<Instant>,
    /// When the last layer of a push was computed.
    pub(super) computed: Option<Instant>,
}

impl Lease {
    pub(super) fn landing(job: u64, ranks: usize) -> Self {
        Lease {
            job: Some(job),
            landing: true,
            ended: vec![false; ranks],
            bytes: 0,
            codec: Codec::Exact,
            estimate: None,
            close: None,
            last: None,
            computed: None,
        }
    }

    pub(super) fn push(job: u64, ranks: usize) -> Self {
        Lease { landing: false, ..Lease::landing(job, ranks) }
    }
}

impl Core<'_> {
    /// Takes in what a rank says. [`Notice::Failed`] is the runner's to handle.
    pub fn notice(&mut self, now: Instant, rank: usize, notice: Notice) {
        match notice {
            Notice::Executed { step } => {
                if let Some(executed) = self.executed.get_mut(rank) {
                    *executed = step;
                }
                self.announce();
            }
            Notice::Landed { lease, result, age } => {
                let result = result.map(|Arrived { bytes, close }| (bytes, Some(close)));
                self.ended(now, rank, lease, result, age);
            }
            Notice::Pushed { lease, result, age } => {
                if let (Ok(sent), Some(lease)) = (&result, self.leases.get_mut(&lease)) {
                    lease.codec = lease.codec.max(sent.codec);
                    lease.estimate = lease.estimate.max(sent.estimate);
                }
                self.ended(now, rank, lease, result.map(|sent| (sent.bytes, None)), age);
            }
            Notice::Audited { disagreement: Some(text) } => {
                tracing::error!(rank, "store audit: {text}");
                self.totals.audit_errors += 1;
            }
            Notice::Audited { disagreement: None } | Notice::Failed { .. } => {}
        }
    }

    /// Pushes that are not complete.
    pub(super) fn pushes(&self) -> usize {
        self.leases.values().filter(|lease| !lease.landing).count()
    }

    /// Gives a transfer up. Its blocks come back when every rank has let go.
    pub(super) fn abort(&mut self, lease: LeaseId) {
        if let Some(entry) = self.leases.get_mut(&lease)
            && entry.job.take().is_some()
        {
            self.emit(Op::Abort { lease });
        }
    }

    fn ended(
        &mut self,
        now: Instant,
        rank: usize,
        id: LeaseId,
        result: Result<(u64, Option<Close>), String>,
        age: Duration,
    ) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let Some(ended) = lease.ended.get_mut(rank) else { return };
        *ended = true;
        let job = lease.job;
        let failure = match result {
            Ok((_, close)) if lease.close.is_some() && lease.close != close => {
                Some(format!("rank {rank} was told {close:?}, another {:?}", lease.close))
            }
            Ok((bytes, close)) => {
                lease.bytes += bytes;
                lease.close = close;
                lease.last = lease.last.max(now.checked_sub(age));
                None
            }
            Err(reason) => Some(format!("rank {rank}: {reason}")),
        };
        if let (Some(job), Some(reason)) = (job, failure) {
            self.totals.counters.failed_sessions += 1;
            self.fail(job, JobError::Session(reason));
        }
        self.settle(now, id);
    }

    /// Completes a transfer when every rank has ended it.
    fn settle(&mut self, now: Instant, id: LeaseId) {
        let complete = self.leases.get(&id).is_some_and(|lease| lease.ended.iter().all(|ended| *ended));
        let Some(lease) = complete.then(|| self.leases.remove(&id)).flatten() else { return };
        if let Some(job) = lease.job {
            self.totals.counters.kv_bytes += lease.bytes;
            if lease.landing {
                self.emit(Op::Commit { lease: id });
                self.landed(now, job, lease);
            } else if self.sequences.get(&job).is_some_and(|s| s.stage != Stage::Pushing) {
                self.emit(Op::Abort { lease: id });
                self.fail(job, JobError::Session("acknowledged before it was closed".into()));
            } else {
                let exposed = match (lease.last, lease.computed) {
                    (Some(last), Some(computed)) => since(last, computed),
                    _ => Duration::ZERO,
                };
                let Lease { bytes, codec, estimate, .. } = lease;
                self.end(job, Event::Pushed { bytes, exposed, codec, estimate });
            }
        }
        self.ledger.unlease(id);
        self.unaudited = true;
    }

    /// Every rank has the whole session, and takes it in with the next plan: the sequence runs from there.
    fn landed(&mut self, now: Instant, job: u64, lease: Lease) {
        let Some(close) = lease.close else {
            return self.fail(job, JobError::Session("landed without an end".into()));
        };
        let finish = match finish_of(close.finish) {
            Ok(_) if close.token as usize >= self.setup.vocabulary => {
                let text = format!("token {} in a vocabulary of {}", close.token, self.setup.vocabulary);
                return self.fail(job, JobError::Session(text));
            }
            Ok(finish) => finish,
            Err(text) => return self.fail(job, JobError::Session(text)),
        };
        let Some(sequence) = self.sequences.get_mut(&job) else { return };
        let ready_after = lease.last.map_or(Duration::ZERO, |last| since(now, last));
        sequence.tell(Event::Landed { bytes: lease.bytes, ready_after });
        sequence.stage = Stage::Running;
        sequence.lease = None;
        sequence.computed = sequence.prompt_len as u32;
        sequence.usable = Some(now);
        let (seq, computed) = (sequence.seq, sequence.request.tokens.clone());
        let salt = sequence.request.cache_salt.clone();
        sequence.request.tokens.push(close.token);
        let finish = finish.or_else(|| sequence.finish(self.setup.options.context_tokens));
        if self.setup.options.prefix_cache {
            self.prefix.extend(seq, &salt, &computed);
        }
        if let Some(reason) = finish {
            self.finish_job(job, reason);
        }
    }
}
