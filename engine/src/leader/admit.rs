//! Takes jobs on, or refuses them: room for the prompt, and one block for what is generated, is reserved first.

use std::time::Instant;

use backend::{Fork, SeqId};
use kvtransfer::{SessionId, Ticket};
use tokio::sync::mpsc::UnboundedSender;

use super::lease::Lease;
use super::{Core, since};
use crate::draft::Lookup;
use crate::ledger::LeaseId;
use crate::prefix::Hit;
use crate::request::{Event, Handoff, Job, JobError, Refusal};
use crate::scheduler;
use crate::sequence::{Kind, Sequence, Stage};
use crate::tp::plan::{Land, Op, PushOp};

impl Core<'_> {
    /// Takes a job on: generation is admitted or refused at once, prompts wait for room and rows.
    pub fn submit(
        &mut self,
        now: Instant,
        id: u64,
        job: Job,
        events: UnboundedSender<Event>,
        arrived: Instant,
    ) {
        let (kind, request) = match job {
            Job::Land(request) => (Kind::Land, request),
            Job::Generate(request) => (Kind::Generate, request),
            Job::Prefill(request, handoff) => (Kind::Prefill(handoff), request),
        };
        let mut sequence = Sequence {
            job: id,
            prompt_len: request.tokens.len(),
            kind,
            lookup: Lookup::new(
                request.tokens.get(..request.output_start).unwrap_or_default(),
                &request.prediction,
            ),
            expected: None,
            luck: None,
            request,
            stage: Stage::Waiting,
            seq: SeqId(0),
            computed: 0,
            flights: Vec::new(),
            lease: None,
            events,
            arrived,
            usable: None,
            has_stepped: false,
        };
        let admitted = self.valid(&sequence).and_then(|()| match sequence.kind {
            Kind::Prefill(_) => self.queue(&sequence),
            Kind::Land => self.admit_landing(&mut sequence),
            Kind::Generate => self.admit_generation(now, &mut sequence),
        });
        match admitted {
            Ok(()) => {
                self.totals.counters.requests += 1;
                self.sequences.insert(id, sequence);
            }
            Err(refusal) => sequence.tell(Event::Failed(JobError::Refused(refusal))),
        }
    }

    /// Begins waiting prompts in order while the coming step has rows for them and the store has room.
    pub(super) fn admit_waiting(&mut self, now: Instant) {
        loop {
            let wants: Vec<_> = self.runnable().map(Sequence::want).collect();
            let waiting = self.sequences.values().filter(|s| s.stage == Stage::Waiting);
            let Some(first) = waiting.min_by_key(|s| (std::cmp::Reverse(s.request.priority), s.job)) else {
                return;
            };
            let handoff = matches!(first.kind, Kind::Prefill(Some(_)));
            if scheduler::spare(self.limits(&wants), &wants) == 0
                || self.resident() >= self.setup.options.batch_max
                || (handoff && self.pushes() >= self.setup.options.pushes_max)
            {
                return;
            }
            let job = first.job;
            let Some(mut sequence) = self.sequences.remove(&job) else { return };
            let begun = self.begin_prompt(now, &mut sequence);
            self.sequences.insert(job, sequence);
            if begun.is_err() {
                return;
            }
        }
    }

    fn begin_prompt(&mut self, now: Instant, sequence: &mut Sequence) -> Result<(), Refusal> {
        let cached = self.reserve(sequence, 0)?;
        sequence.stage = Stage::Running;
        let queued = since(now, sequence.arrived);
        sequence.tell(Event::Started { queued, cached_tokens: cached as usize });
        let Kind::Prefill(Some(handoff)) = &sequence.kind else { return Ok(()) };
        let lease = LeaseId(self.next_id());
        let wanted = handoff.tokens.clone();
        let op = PushOp {
            lease,
            seq: sequence.seq,
            cached: wanted.start..cached.clamp(wanted.start, wanted.end),
            request: sequence.request.id.clone(),
            attempt: sequence.request.attempt,
            handoff: handoff.clone(),
        };
        sequence.lease = Some(lease);
        self.leases.insert(lease, Lease::push(sequence.job, self.setup.targets.len()));
        self.emit(Op::Push(op));
        Ok(())
    }

    fn queue(&self, sequence: &Sequence) -> Result<(), Refusal> {
        let waiting = self.sequences.values().filter(|s| s.stage == Stage::Waiting).count();
        if waiting >= self.setup.options.waiting_max {
            return Err(Refusal::NoRoom { tokens: sequence.prompt_len });
        }
        Ok(())
    }

    fn admit_generation(&mut self, now: Instant, sequence: &mut Sequence) -> Result<(), Refusal> {
        let cached = self.admit(sequence)?;
        sequence.stage = Stage::Running;
        sequence.usable = (sequence.remaining() == 1).then_some(now);
        sequence.tell(Event::Admitted { cached_tokens: cached as usize, handoff: None });
        Ok(())
    }

    fn admit_landing(&mut self, sequence: &mut Sequence) -> Result<(), Refusal> {
        let cached = self.admit(sequence)?;
        let lease = LeaseId(self.next_id());
        let handoff = Handoff {
            ticket: Ticket::random(),
            session: SessionId::random(),
            epoch: self.setup.epoch,
            tokens: cached..sequence.prompt_len as u32,
            targets: self.setup.targets.clone(),
            deadline: self.setup.options.land_deadline,
        };
        sequence.stage = Stage::Landing;
        sequence.lease = Some(lease);
        self.leases.insert(lease, Lease::landing(sequence.job, self.setup.targets.len()));
        self.emit(Op::Land(Land {
            lease,
            seq: sequence.seq,
            tokens: handoff.tokens.clone(),
            session: handoff.session,
            ticket: handoff.ticket.clone(),
            request: sequence.request.id.clone(),
            attempt: sequence.request.attempt,
            deadline: handoff.deadline,
        }));
        // The prefill node may connect at once: told when every rank expects it.
        let event = Event::Admitted { cached_tokens: cached as usize, handoff: Some(handoff) };
        self.announcements.push((self.step, sequence.job, event));
        Ok(())
    }

    /// Room to generate, and a place in the batch.
    fn admit(&mut self, sequence: &mut Sequence) -> Result<u32, Refusal> {
        if self.resident() >= self.setup.options.batch_max {
            return Err(Refusal::NoRoom { tokens: sequence.prompt_len });
        }
        self.reserve(sequence, self.setup.block_tokens)
    }

    /// Opens the sequence with room for its prompt and `extra` tokens, sharing what the prefix cache holds of it,
    /// unless all of it has to be computed. Returns the tokens found there. Nothing changes on refusal.
    fn reserve(&mut self, sequence: &mut Sequence, extra: u32) -> Result<u32, Refusal> {
        let capacity = sequence.prompt_len as u32 + extra;
        let request = &sequence.request;
        let hit = match self.setup.options.prefix_cache && !sequence.scores() {
            true => self.prefix.find(&request.cache_salt, &request.tokens),
            false => None,
        };
        // A copy needs room beside its source: without that, the source makes room.
        let hit = hit.filter(|hit| self.takes_over(*hit) || self.has_room(capacity, Some(*hit)));
        if !self.has_room(capacity, hit) {
            return Err(Refusal::NoRoom { tokens: capacity as usize });
        }
        let seq = SeqId(self.next_id());
        let (fresh, spared) = (self.fresh_blocks(capacity, hit), self.spared(hit));
        match hit {
            None => {
                self.evict(fresh, None);
                self.emit(Op::Open { seq, tokens: capacity });
            }
            Some(hit) => {
                // Shared blocks are held before others are evicted; a copy's source is spared until it is copied.
                let moves = self.moves(hit);
                let mode = if moves { Fork::Move } else { Fork::Share };
                let fork = Op::Fork { from: hit.seq, to: seq, tokens: hit.tokens, mode };
                if self.takes_over(hit) {
                    self.emit(fork);
                    if moves {
                        self.prefix.forget(hit.seq);
                    }
                    self.evict(fresh, None);
                } else {
                    self.evict(fresh, spared);
                    self.emit(fork);
                }
                self.emit(Op::Grow { seq, tokens: capacity });
            }
        }
        let cached = hit.map_or(0, |hit| hit.tokens);
        sequence.seq = seq;
        sequence.computed = cached;
        self.totals.counters.cached_tokens += u64::from(cached);
        if self.setup.options.prefix_cache {
            self.prefix.extend(seq, &request.cache_salt, &request.tokens[..cached as usize]);
        }
        Ok(cached)
    }

    /// Blocks to be taken for a sequence of `capacity` tokens that begins with `hit`.
    fn fresh_blocks(&self, capacity: u32, hit: Option<Hit>) -> u32 {
        let shared =
            hit.filter(|hit| self.takes_over(*hit)).map_or(0, |hit| self.ledger.blocks_of(hit.tokens));
        self.ledger.blocks_of(capacity) - shared
    }

    /// Whether the blocks of `hit` serve the new sequence, shared or moved; else they are copied.
    fn takes_over(&self, hit: Hit) -> bool {
        self.setup.shares || self.moves(hit)
    }

    /// Whether a store that cannot share gives all that a kept sequence holds to the one that goes on from it.
    fn moves(&self, hit: Hit) -> bool {
        !self.setup.shares && hit.whole && self.evictable(hit.seq, None)
    }

    /// What must not be evicted for a sequence that begins with `hit`: the source of a copy.
    fn spared(&self, hit: Option<Hit>) -> Option<SeqId> {
        hit.filter(|hit| !self.takes_over(*hit)).map(|hit| hit.seq)
    }

    /// Whether those blocks are free or can be won back.
    fn has_room(&self, capacity: u32, hit: Option<Hit>) -> bool {
        let fresh = self.fresh_blocks(capacity, hit);
        if self.ledger.free() >= fresh {
            return true;
        }
        let spared = self.spared(hit);
        let shared = hit.filter(|hit| self.takes_over(*hit)).map(|hit| (hit.seq, hit.tokens));
        self.ledger.free() + self.ledger.freeable(|seq| self.evictable(seq, spared), shared) >= fresh
    }

    /// Whether it could ever run.
    fn valid(&self, sequence: &Sequence) -> Result<(), Refusal> {
        let invalid = |text: String| Err(Refusal::Invalid(text));
        let (request, len) = (&sequence.request, sequence.prompt_len);
        let context = self.setup.options.context_tokens as usize;
        if len == 0 || request.output_start > len {
            return invalid(format!("output begins at {} of {len} tokens", request.output_start));
        }
        if len >= context {
            return invalid(format!("{len} tokens leave no room for output in a context of {context}"));
        }
        let mut all = request.tokens.iter().chain(&request.prediction);
        if let Some(id) = all.find(|id| **id as usize >= self.setup.vocabulary) {
            return invalid(format!("token {id} in a vocabulary of {}", self.setup.vocabulary));
        }
        if sequence.output_tokens() >= request.max_tokens {
            let (has, max) = (sequence.output_tokens(), request.max_tokens);
            return invalid(format!("{has} of {max} output tokens are there already"));
        }
        let needed = self.ledger.blocks_of(len as u32) + !matches!(sequence.kind, Kind::Prefill(_)) as u32;
        if needed > self.ledger.total() {
            return invalid(format!("{len} tokens need {needed} kv blocks of {}", self.ledger.total()));
        }
        if let Kind::Prefill(Some(handoff)) = &sequence.kind {
            let wanted = &handoff.tokens;
            if wanted.start >= wanted.end || wanted.end as usize != len {
                return invalid(format!("handoff of tokens {}..{} of {len}", wanted.start, wanted.end));
            }
            if handoff.targets.is_empty() {
                return invalid("handoff without targets".into());
            }
        }
        Ok(())
    }

    /// Sequences that hold a place in the batch.
    fn resident(&self) -> usize {
        self.sequences.values().filter(|s| matches!(s.stage, Stage::Landing | Stage::Running)).count()
    }
}
