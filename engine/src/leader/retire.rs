//! How jobs and sequences end, and how room is won back.

use backend::SeqId;

use super::Core;
use crate::request::{Event, Finish, JobError};
use crate::sequence::Stage;
use crate::tp::plan::Op;

impl Core<'_> {
    /// The job's client has left.
    pub fn cancel(&mut self, job: u64) {
        self.drop_job(job);
    }

    /// Ends a job for an error; everything it held is given back.
    pub(super) fn fail(&mut self, job: u64, error: JobError) {
        if let Some(sequence) = self.sequences.get(&job) {
            sequence.tell(Event::Failed(error));
        }
        self.drop_job(job);
    }

    /// Ends a job whose logits are no finite numbers. So may be what is cached of it: whoever begins alike, or tries again, computes
    /// anew.
    pub(super) fn fail_spoiled(&mut self, job: u64, reason: String) {
        if let Some(seq) = self.sequences.get(&job).map(|sequence| sequence.seq) {
            for kept in self.prefix.spoil(seq) {
                self.emit(Op::Close { seq: kept });
            }
        }
        self.fail(job, JobError::Engine(reason));
    }

    /// Ends a job whose answer is complete.
    pub(super) fn finish_job(&mut self, job: u64, reason: Finish) {
        let Some(sequence) = self.sequences.get(&job) else { return };
        let seq = sequence.seq;
        let output_tokens = sequence.output_tokens();
        self.end(job, Event::Finished { reason, output_tokens });
        self.retire(seq);
    }

    /// Gives a running sequence up for room; what is computed of it stays in the prefix cache.
    pub(super) fn preempt(&mut self, job: u64) {
        let Some(sequence) = self.sequences.get(&job) else { return };
        let seq = sequence.seq;
        self.totals.counters.preemptions += 1;
        self.end(job, Event::Preempted);
        self.retire(seq);
    }

    /// Keeps an ended sequence's full blocks for prompts that begin like it, or closes it.
    pub(super) fn retire(&mut self, seq: SeqId) {
        let retired = self.prefix.retire(seq);
        for seq in retired.superfluous {
            self.emit(Op::Close { seq });
        }
        match retired.keep {
            0 => self.emit(Op::Close { seq }),
            keep if self.ledger.capacity(seq) > keep => self.emit(Op::Truncate { seq, tokens: keep }),
            _ => {}
        }
    }

    /// Wins back blocks of kept sequences, least recently used first and from their ends, until `wanted` are free.
    /// Whether that many are. Blocks of `spared` stay.
    pub(super) fn evict(&mut self, wanted: u32, spared: Option<SeqId>) -> bool {
        while self.ledger.free() < wanted {
            let Some(seq) = self.prefix.oldest(|seq| self.evictable(seq, spared)) else { return false };
            let keep = self.ledger.keep_to_free(seq, wanted - self.ledger.free());
            self.prefix.shorten(seq, keep);
            if keep == 0 {
                self.prefix.forget(seq);
                self.emit(Op::Close { seq });
            } else {
                self.emit(Op::Truncate { seq, tokens: keep * self.setup.block_tokens });
            }
        }
        true
    }

    /// Whether closing `seq` gives blocks back now and takes nothing from a running job.
    pub(super) fn evictable(&self, seq: SeqId, spared: Option<SeqId>) -> bool {
        Some(seq) != spared && self.prefix.keeps(seq) && !self.ledger.leased(seq)
    }

    fn drop_job(&mut self, job: u64) {
        let Some(sequence) = self.remove(job) else { return };
        self.announcements.retain(|a| a.1 != job);
        if let Some(lease) = sequence.lease {
            self.abort(lease);
        }
        match sequence.stage {
            Stage::Waiting | Stage::Pushing => {}
            Stage::Running => self.retire(sequence.seq),
            Stage::Landing => {
                self.prefix.forget(sequence.seq);
                self.emit(Op::Close { seq: sequence.seq });
            }
        }
    }
}
