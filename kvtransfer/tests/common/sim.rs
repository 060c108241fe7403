//! The session machines of all ranks on an imagined network: frames as bytes in queues, one event at a time in an order
//! drawn from a seed, and faults at moments of the test's choice. No threads, no sockets, no clock.

mod fault;
mod flow;
mod link;
mod node;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtransfer::layout::{plan, relay};
use kvtransfer::limits::PEER_BASE;
use kvtransfer::message::Message;
use kvtransfer::sender::watch::Verdict;
use kvtransfer::session::{Outcome, PairSpec, Receiving};
use kvtransfer::{Limits, SessionError, Summary};

use super::{CLOSE, Cache, Case, MemExport, MemLanding, Rng};

pub use fault::Fault;

use flow::{Flow, Source, pair_spec, shuffled};
use link::Link;
use node::Node;

/// Everything that a run depends on.
pub struct Setup {
    pub case: Case,
    pub seed: u64,
    /// With the number of events before each.
    pub faults: Vec<(usize, Fault)>,
    pub window_bytes: u64,
    pub frame_bytes: usize,
    /// Tokens of an export.
    pub chunk: u32,
    pub block_tokens: [u32; 2],
    /// Connections of each sender to each receiver.
    pub lanes: usize,
    /// Changes what one sender believes.
    pub lie: fn(&mut PairSpec),
}

/// How it went.
pub struct Report {
    pub receivers: Vec<Result<Summary, SessionError>>,
    /// Of prefill ranks and of ranks that pass planes on, as far as they began.
    pub senders: Vec<Outcome>,
    pub steps: usize,
    /// From the first moment at which a connection fell silent to the end.
    pub after_silence: Option<Duration>,
}

struct Sim<'s> {
    setup: &'s Setup,
    flows: Vec<Flow>,
    links: Vec<Link>,
    nodes: Vec<Node>,
    now: Instant,
    rng: Rng,
    /// When a connection first fell silent.
    hung: Option<Instant>,
}

const STEPS_MAX: usize = 400_000;

/// Limits of a simulated sender and receiver.
fn limits(setup: &Setup) -> Limits {
    Limits { window_bytes: setup.window_bytes, resume: setup.case.deadline / 4, ..Limits::default() }
}

/// Plays a session to its end. Panics when it does not end or a wrong byte is reported as landed.
pub fn run(setup: &Setup) -> Report {
    let mut sim = Sim::new(setup);
    let step = setup.case.deadline / 64;
    for steps in 0..STEPS_MAX {
        if sim.over() {
            return sim.report(steps);
        }
        for (_, fault) in setup.faults.iter().filter(|(at, _)| *at == steps) {
            sim.break_something(*fault);
        }
        if !sim.event() {
            // Nothing can happen but time passing.
            sim.now += step;
            sim.tick();
        } else if sim.rng.chance(64) {
            sim.now += step / 16;
            sim.tick();
        }
    }
    let flows: Vec<_> = sim.flows.iter().map(|flow| (&flow.spec.sender, flow.receiver, &flow.end)).collect();
    let nodes: Vec<_> = sim.nodes.iter().map(|node| &node.end).collect();
    panic!("no end, seed {} faults {:?}: {flows:?} {nodes:?}", setup.seed, setup.faults);
}

impl<'s> Sim<'s> {
    fn new(setup: &'s Setup) -> Self {
        let case = &setup.case;
        let plan = plan(&case.from, &case.to).expect("a plan");
        let now = Instant::now();
        let nowhere = vec![Vec::new(); case.to.len()];
        let idle = kvtransfer::Sender::new(Limits::default());
        let nodes = (0..case.to.len())
            .map(|rank| Node {
                receiving: Receiving::new(case.expect_in(rank, &nowhere, &idle), &limits(setup), now),
                landing: MemLanding::new(&case.to[rank], case.tokens.clone(), setup.block_tokens[1], true),
                end: None,
                restarted: false,
            })
            .collect();
        let mut rng = Rng::new(setup.seed);
        let mut flows = Vec::new();
        for sender in 0..case.from.len() {
            let cache = Arc::new(Cache::full(&case.from[sender], case.tokens.clone(), setup.block_tokens[0]));
            for receiver in plan.receivers_of(sender) {
                let senders = plan.senders_of(receiver).into_iter().map(|sender| sender as u32).collect();
                let parts = plan.between(sender, receiver);
                let mut spec = pair_spec(setup, sender as u32, senders, receiver, &parts);
                (setup.lie)(&mut spec);
                let queue = shuffled(setup, &parts, &mut rng);
                let tokens = case.tokens.clone();
                let export =
                    MemExport { layers: 0..plan.layers, tokens, direct: false, cache: cache.clone() };
                flows.push(Flow::new(
                    spec,
                    receiver,
                    Source::Export(export),
                    queue,
                    Some(CLOSE),
                    setup.lanes,
                ));
            }
        }
        for rank in 0..case.to.len() {
            let parts = relay(&case.to, rank);
            for receiver in (0..case.to.len()).filter(|other| *other != rank && !parts.is_empty()) {
                let parts: Vec<_> = parts.iter().filter(|part| part.receiver == receiver).cloned().collect();
                let sender = PEER_BASE + rank as u32;
                let spec = pair_spec(setup, sender, vec![sender], receiver, &parts);
                flows.push(Flow::new(
                    spec,
                    receiver,
                    Source::Landed(rank),
                    VecDeque::new(),
                    None,
                    setup.lanes,
                ));
            }
        }
        Sim { setup, flows, links: Vec::new(), nodes, now, rng, hung: None }
    }

    /// Whether a flow may begin: a rank passes nothing on before its own senders have come.
    fn begun(&self, flow: &Flow) -> bool {
        match flow.source {
            Source::Landed(rank) => self.nodes[rank].receiving.begun(),
            _ => true,
        }
    }

    fn over(&self) -> bool {
        let ended = |flow: &Flow| {
            let never = match flow.source {
                Source::Landed(rank) => !self.begun(flow) && self.nodes[rank].end.is_some(),
                _ => false,
            };
            flow.end.is_some() || never
        };
        self.flows.iter().all(ended) && self.nodes.iter().all(|node| node.end.is_some())
    }

    fn report(self, steps: usize) -> Report {
        for node in &self.nodes {
            if matches!(node.end, Some(Ok(_))) {
                assert!(node.landing.cache.is_right(), "wrong bytes were reported as landed");
            }
        }
        for flow in &self.flows {
            if matches!(flow.end, Some(Outcome::Acknowledged(_))) {
                let node = &self.nodes[flow.receiver];
                assert!(matches!(node.end, Some(Ok(_))), "acknowledged, but not landed");
            }
        }
        let real = |flow: Flow| if let Source::Nothing = flow.source { None } else { flow.end };
        Report {
            receivers: self.nodes.into_iter().map(|node| node.end.expect("ended")).collect(),
            senders: self.flows.into_iter().filter_map(real).collect(),
            steps,
            after_silence: self.hung.map(|since| self.now - since),
        }
    }

    /// One event; `false` when none can happen.
    fn event(&mut self) -> bool {
        let lanes: usize = self.flows.iter().map(|flow| flow.lanes.len()).sum();
        let count = lanes + 3 * self.links.len();
        let start = self.rng.below(count.max(1));
        (0..count).map(|turn| (start + turn) % count).any(|at| match at.checked_sub(lanes) {
            None => self.connect_nth(at),
            Some(at) => match (at % 3, at / 3) {
                (0, link) => self.send(link),
                (1, link) => self.deliver_up(link),
                (_, link) => self.deliver_down(link),
            },
        })
    }

    fn connect_nth(&mut self, mut at: usize) -> bool {
        for flow in 0..self.flows.len() {
            let lanes = self.flows[flow].lanes.len();
            if at < lanes {
                return self.connect(flow, at);
            }
            at -= lanes;
        }
        false
    }

    fn tick(&mut self) {
        for at in 0..self.links.len() {
            if self.links[at].owned {
                let message = self.links[at].sending.tick(self.now);
                self.links[at].reply(message);
                // Lanes stand for paths: one that is alone has nowhere to go.
                let several = self.flows[self.links[at].flow].lanes.len() > 1;
                let link = &mut self.links[at];
                if several && link.sending.accepted() {
                    match link.look(self.now) {
                        Verdict::Fine => {}
                        Verdict::Ask => link.say(&Message::Ping),
                        Verdict::Silent => link.sending.lost("silent"),
                    }
                }
                if !link.sending.accepted() && self.now >= link.began + self.setup.case.deadline / 8 {
                    link.sending.lost("no answer to the handshake");
                }
                self.look(at);
            }
        }
        for receiver in 0..self.nodes.len() {
            let actions = self.nodes[receiver].receiving.tick(self.now);
            self.act(receiver, actions);
        }
    }
}

/// A deadline that no event alone exceeds.
pub const DEADLINE: Duration = Duration::from_secs(8);
