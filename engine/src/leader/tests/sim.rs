//! The leader's decisions against simulated ranks: stores that account like real ones and remember which tokens each
//! sequence holds, and a "model" whose logits are a function of exactly those tokens.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use backend::paged::{Access, LeaseId as PageLease, Pages};
use backend::{Drawn, Fork, Input, KvSpec, KvUsage, SeqId};
use kvtransfer::{Close, Codec};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::leader::{Core, Setup, Step, Totals};
use crate::ledger::LeaseId;
use crate::options::EngineOptions;
use crate::request::{Blocks, Event, Handoff, Job, JobError, Refusal, Request, Target, Token};
use crate::tp::plan::{Arrived, Notice, Op, Plan, Sent};

pub const VOCABULARY: usize = 32;
const BLOCK: u32 = 4;

/// One rank's store and transfers.
pub struct Rank {
    pub pages: Pages,
    held: HashMap<SeqId, Vec<u32>>,
    pub leases: HashMap<LeaseId, (SeqId, PageLease)>,
}

pub struct Sim {
    pub core: Core<'static>,
    pub ranks: Vec<Rank>,
    /// Landings that ranks expect: (lease, tokens of the sequence).
    pub landings: Vec<LeaseId>,
    pub pushes: Vec<LeaseId>,
    /// Tokens of each job when its landing was asked for.
    pub landing_tokens: HashMap<LeaseId, Vec<u32>>,
    next_job: u64,
    pub now: Instant,
    /// See [`Sim::ahead`].
    ahead: bool,
    /// Steps that are not done.
    pub running: VecDeque<Running>,
    /// What the rows of the latest step drew.
    drawn: Vec<Option<u32>>,
    /// The next token after some.
    pub model: fn(&[u32]) -> u32,
}

/// A step that every rank carries out.
pub struct Running {
    pub step: Step,
    pub drawn: Vec<Drawn>,
}

pub fn options() -> EngineOptions {
    EngineOptions {
        context_tokens: 64,
        batch_max: 4,
        step_tokens: 16,
        chunk_tokens: 8,
        draft_max: 0,
        ..EngineOptions::default()
    }
}

pub fn request(tokens: &[u32], max_tokens: usize) -> Request {
    Request { tokens: tokens.to_vec(), output_start: tokens.len(), max_tokens, ..Request::default() }
}

/// The next token after `tokens`, as the simulated model has it.
pub fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7u32, |h, t| h.wrapping_mul(31).wrapping_add(*t + 1)) % VOCABULARY as u32
}

/// What an undisturbed run of `request` gives.
pub fn expected(request: &Request) -> Vec<u32> {
    let mut tokens = request.tokens.clone();
    while tokens.len() - request.output_start < request.max_tokens {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(request.tokens.len())
}

impl Sim {
    pub fn new(ranks: usize, blocks: u32, options: EngineOptions) -> Self {
        Sim::with_store(ranks, blocks, options, true)
    }

    pub fn with_store(ranks: usize, blocks: u32, options: EngineOptions, shares: bool) -> Self {
        let target = |rank| Target { rank, addresses: vec![], spec: KvSpec { layers: 1, planes: vec![] } };
        let setup = Setup {
            options,
            epoch: 1,
            targets: (0..ranks).map(target).collect(),
            vocabulary: VOCABULARY,
            blocks,
            block_tokens: BLOCK,
            shares,
            secret: [1; 16],
        };
        let rank =
            || Rank { pages: Pages::new(1, blocks, BLOCK), held: HashMap::new(), leases: HashMap::new() };
        Sim {
            core: Core::new(setup, Totals::default()),
            ranks: (0..ranks).map(|_| rank()).collect(),
            landings: vec![],
            pushes: vec![],
            landing_tokens: HashMap::new(),
            next_job: 1,
            now: Instant::now(),
            ahead: false,
            running: VecDeque::new(),
            drawn: vec![],
            model: next_token,
        }
    }

    /// Steps are planned while the one before runs, or not.
    pub fn ahead(self, ahead: bool) -> Self {
        Sim { ahead, ..self }
    }

    pub fn submit(&mut self, job: Job) -> (u64, UnboundedReceiver<Event>) {
        let (sender, receiver) = unbounded_channel();
        let id = self.next_job;
        self.next_job += 1;
        let landing = match &job {
            Job::Land(request) => Some(request.tokens.clone()),
            _ => None,
        };
        self.core.submit(self.now, id, job, sender, self.now);
        let lease = self.core.sequences.get(&id).and_then(|s| s.lease);
        if let (Some(lease), Some(tokens)) = (lease, landing) {
            self.landing_tokens.insert(lease, tokens);
        }
        (id, receiver)
    }

    /// One step on all ranks, or its end where steps are planned ahead; false: nothing to do.
    pub fn step(&mut self) -> bool {
        match self.core.plan(self.now) {
            Some(step) => {
                self.begin(step);
                self.ahead || self.finish()
            }
            None => self.finish(),
        }
    }

    /// Every rank carries out `step`.
    pub fn begin(&mut self, step: Step) {
        assert_eq!(self.core.fault(), None);
        assert!(step.plan.batch.rows() <= self.core.setup.options.step_tokens);
        let mut drawn = Vec::new();
        let mut notices = Vec::new();
        for rank in 0..self.ranks.len() {
            drawn = self.execute(rank, &step.plan, &mut notices);
        }
        if !step.plan.batch.runs.is_empty() {
            let id = |drawn: &Drawn| if let Drawn::Token(id) = drawn { Some(*id) } else { None };
            self.drawn = drawn.iter().map(id).collect();
        }
        let number = step.plan.step;
        self.running.push_back(Running { step, drawn });
        for rank in 0..self.ranks.len() {
            self.core.notice(self.now, rank, Notice::Executed { step: number });
        }
        for (rank, notice) in notices {
            self.core.notice(self.now, rank, notice);
        }
    }

    /// The oldest step that runs is done; false: none runs.
    pub fn finish(&mut self) -> bool {
        let Some(Running { step, drawn }) = self.running.pop_front() else { return false };
        self.now += Duration::from_millis(1);
        self.core.done(step, self.now, self.now, drawn);
        self.core.answer_probes();
        true
    }

    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if !self.step() {
                return;
            }
        }
        panic!("never idle");
    }

    fn execute(&mut self, rank: usize, plan: &Plan, notices: &mut Vec<(usize, Notice)>) -> Vec<Drawn> {
        for op in &plan.ops {
            self.apply(rank, op, notices);
        }
        let Rank { pages, held, .. } = &mut self.ranks[rank];
        let mut inputs = plan.batch.ids.iter();
        let mut drawn = Vec::new();
        let mut row = 0;
        for run in &plan.batch.runs {
            let tokens = held.get_mut(&run.seq).expect("an open sequence");
            assert!(tokens.len() >= run.start as usize, "sequence {} has a gap", run.seq);
            // What was guessed wrong is written over.
            assert!(tokens.len() == run.start as usize || self.core.setup.options.draft_max > 0);
            tokens.truncate(run.start as usize);
            let before = tokens.len();
            pages.writable(run.seq, 0..1, run.start..run.start + run.len).expect("rows of its own");
            pages.fill(run.seq, 0..1, run.start..run.start + run.len).expect("room");
            tokens.extend(inputs.by_ref().take(run.len as usize).map(|input| match *input {
                Input::Id(id) => id,
                Input::Drawn(row) => self.drawn[row as usize].expect("a token drawn by the step before"),
            }));
            for wanted in plan.rows.iter().filter(|wanted| (row..row + run.len).contains(&wanted.row)) {
                let seen = &tokens[..before + (wanted.row - row) as usize + 1];
                let mut logits = vec![0.0; VOCABULARY];
                logits[(self.model)(seen) as usize] = 1.0;
                drawn.push(backend::draw::drawn(&logits, &wanted.draw));
            }
            row += run.len;
        }
        drawn
    }

    fn apply(&mut self, rank: usize, op: &Op, notices: &mut Vec<(usize, Notice)>) {
        let Rank { pages, held, leases } = &mut self.ranks[rank];
        match op {
            Op::Open { seq, tokens } => {
                pages.open(*seq, *tokens).expect("room");
                held.insert(*seq, vec![]);
            }
            Op::Grow { seq, tokens } => pages.grow(*seq, *tokens).expect("room"),
            Op::Fork { from, to, tokens, mode } => {
                if self.core.setup.shares || *mode == Fork::Move {
                    pages.fork(*from, *to, *tokens, *mode).expect("a prefix");
                } else {
                    pages.open(*to, *tokens).expect("room for a copy");
                    pages.fill(*to, 0..1, 0..*tokens).expect("room");
                }
                let prefix = held[from][..*tokens as usize].to_vec();
                if *mode == Fork::Move {
                    held.remove(from);
                }
                held.insert(*to, prefix);
            }
            Op::Truncate { seq, tokens } => {
                pages.truncate(*seq, *tokens).expect("known");
                held.get_mut(seq).expect("known").truncate(*tokens as usize);
            }
            Op::Close { seq } => {
                pages.close(*seq).expect("known");
                held.remove(seq);
            }
            Op::Land(land) => {
                let lease =
                    pages.lease(land.seq, 0..1, land.tokens.clone(), Access::Write).expect("writable");
                leases.insert(land.lease, (land.seq, lease));
                if rank == 0 {
                    self.landings.push(land.lease);
                }
            }
            Op::Commit { lease } => {
                let (seq, page) = leases.remove(lease).expect("landed");
                pages.release(page);
                let tokens = self.landing_tokens[lease].clone();
                let from = held[&seq].len() as u32;
                assert_eq!(held[&seq][..], tokens[..from as usize], "a true prefix");
                pages.fill(seq, 0..1, from..tokens.len() as u32).expect("room");
                held.insert(seq, tokens);
            }
            Op::Push(push) => {
                // The real leases come and go layer by layer; one that lives as long is the worst case for room.
                let computed = held[&push.seq].len() as u32;
                assert!(push.cached.is_empty() || push.cached.end <= computed);
                let lease = pages.lease(push.seq, 0..1, push.cached.clone(), Access::Read).expect("computed");
                leases.insert(push.lease, (push.seq, lease));
                if rank == 0 {
                    self.pushes.push(push.lease);
                }
            }
            Op::Abort { lease } => {
                let landing = self.landings.contains(lease);
                if let Some((_, page)) = leases.remove(lease) {
                    pages.release(page);
                    let (lease, result, age) = (*lease, "cancelled".to_owned(), Duration::ZERO);
                    notices.push((
                        rank,
                        match landing {
                            true => Notice::Landed { lease, result: Err(result), age },
                            false => Notice::Pushed { lease, result: Err(result), age },
                        },
                    ));
                }
            }
            Op::PushClose { .. } => {}
            Op::Audit { held, total } => {
                let usage = pages.usage();
                assert_eq!((usage.used, usage.total, usage.quarantined), (*held, *total, 0));
            }
        }
    }

    /// The oldest landing arrives on every rank.
    pub fn land(&mut self, close: Close) {
        let lease = self.landings.remove(0);
        for rank in 0..self.ranks.len() {
            let result = Ok(Arrived { bytes: 100, close });
            self.core.notice(self.now, rank, Notice::Landed { lease, result, age: Duration::ZERO });
        }
    }

    /// The oldest push is acknowledged on every rank.
    pub fn pushed(&mut self) {
        let lease = self.pushes.remove(0);
        for rank in 0..self.ranks.len() {
            if let Some((_, page)) = self.ranks[rank].leases.remove(&lease) {
                self.ranks[rank].pages.release(page);
            }
            self.core.notice(
                self.now,
                rank,
                Notice::Pushed {
                    lease,
                    result: Ok(Sent { bytes: 50, codec: Codec::Int4, estimate: None }),
                    age: Duration::ZERO,
                },
            );
        }
    }

    pub fn blocks(&mut self) -> Blocks {
        let usage: KvUsage = self.ranks[0].pages.usage();
        let blocks = self.core.blocks(usage);
        let sum = blocks.free + blocks.used + blocks.cached + blocks.reserved + blocks.quarantined;
        assert_eq!(sum, blocks.total, "{blocks:?}");
        assert_eq!(self.core.ledger.free(), blocks.free, "{blocks:?}");
        blocks
    }
}

pub fn events(receiver: &mut UnboundedReceiver<Event>) -> Vec<Event> {
    std::iter::from_fn(|| receiver.try_recv().ok()).collect()
}

pub fn tokens(events: &[Event]) -> Vec<u32> {
    let ids = |event: &Event| match event {
        Event::Token(Token { id, .. }) => Some(*id),
        _ => None,
    };
    events.iter().filter_map(ids).collect()
}

pub fn refusal(events: &[Event]) -> &Refusal {
    match events {
        [Event::Failed(JobError::Refused(refusal))] => refusal,
        other => panic!("{other:?}"),
    }
}

pub fn handoff(tokens: std::ops::Range<u32>) -> Option<Handoff> {
    let target = Target { rank: 0, addresses: vec![], spec: KvSpec { layers: 1, planes: vec![] } };
    Some(Handoff {
        ticket: kvtransfer::Ticket::from_bytes([0; 32]),
        session: kvtransfer::SessionId::from_bytes([0; 16]),
        epoch: 3,
        tokens,
        targets: vec![target],
        deadline: Duration::from_secs(1),
    })
}
