//! What this router gave to each node and has not had back: reports are half a second old, this is not. Pure.
//!
//! Caller: [`super::book`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cluster::Member;

use super::prefix::Holder;

/// A report shows an admission that came at least this long before it.
const REPORT_AGE: Duration = Duration::from_millis(100);

/// After a failed call a node gets no work for this long; doubles with every failure in a row, up to the second.
const SHUN_MIN: Duration = Duration::from_millis(100);
const SHUN_MAX: Duration = Duration::from_secs(5);

/// Names one grant.
pub type GrantId = u64;

#[derive(Debug, Default)]
struct Node {
    /// Lease and epoch: a change means that the node's cache is gone.
    incarnation: (String, u64),
    holder: Holder,
    /// Prompts given to it, without a first token yet: their uncached tokens.
    prompts: HashMap<GrantId, u32>,
    /// Sequences given to it: blocks, and since when the node knows.
    sequences: HashMap<GrantId, (u32, Option<Instant>)>,
    /// When it refused for want of room.
    full: Option<Instant>,
    /// Calls that failed in a row, and until when it gets no work. Reports alone do not make it well: a node may report
    /// and yet not be callable.
    failures: u32,
    shunned: Option<Instant>,
}

/// Accounts by node id.
#[derive(Debug, Default)]
pub struct Ledger {
    nodes: HashMap<String, Node>,
    holders: Holder,
}

/// What is known of one node beyond its report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// Its name in the prefix map.
    pub holder: Holder,
    /// Prompt tokens given and not yet computed.
    pub prompt_tokens: u64,
    /// Their prompts.
    pub prompts: u32,
    /// Sequences given and not yet ended.
    pub sequences: u32,
    /// Blocks promised since the report.
    pub blocks_unreported: u32,
    /// It refused for want of room since the report, and nothing was given back.
    pub full: bool,
    /// Calls to it failed a moment ago.
    pub shunned: bool,
}

impl Ledger {
    /// The account of a member; notices a restart, after which nothing is held against it.
    pub fn account(&mut self, member: &Member, now: Instant) -> Account {
        let node = self.nodes.entry(member.join.node_id.clone()).or_default();
        let (lease, epoch) = &node.incarnation;
        if *lease != member.id || *epoch != member.report.epoch {
            node.incarnation = (member.id.clone(), member.report.epoch);
            self.holders += 1;
            node.holder = self.holders;
            node.full = None;
            node.failures = 0;
            node.shunned = None;
        }
        // A node that answered its report after the refusal may have room again.
        node.full = node.full.filter(|&at| member.reported <= at);
        let unreported = |(_, known): &&(u32, Option<Instant>)| {
            known.is_none_or(|known| known + REPORT_AGE > member.reported)
        };
        Account {
            holder: node.holder,
            prompt_tokens: node.prompts.values().map(|&tokens| u64::from(tokens)).sum(),
            prompts: node.prompts.len() as u32,
            sequences: node.sequences.len() as u32,
            blocks_unreported: node.sequences.values().filter(unreported).map(|(blocks, _)| blocks).sum(),
            full: node.full.is_some(),
            shunned: node.shunned.is_some_and(|until| now < until),
        }
    }

    /// A call to the node failed. Failures while it is shunned are the same trouble, seen by other requests.
    pub fn failed(&mut self, node_id: &str, now: Instant) {
        let node = self.nodes.entry(node_id.to_string()).or_default();
        if node.shunned.is_none_or(|until| until <= now) {
            let pause = SHUN_MIN.saturating_mul(1 << node.failures.min(16)).min(SHUN_MAX);
            node.failures = node.failures.saturating_add(1);
            node.shunned = Some(now + pause);
        }
    }

    /// A call to the node did what it should.
    pub fn worked(&mut self, node_id: &str) {
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.failures = 0;
            node.shunned = None;
        }
    }

    /// `tokens` of a prompt are given to the node to compute.
    pub fn prompt_given(&mut self, node_id: &str, grant: GrantId, tokens: u32) {
        self.nodes.entry(node_id.to_string()).or_default().prompts.insert(grant, tokens);
    }

    /// Its first token is there.
    pub fn prompt_done(&mut self, node_id: &str, grant: GrantId) {
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.prompts.remove(&grant);
        }
    }

    /// A sequence of `blocks` is given to the group.
    pub fn sequence_given(&mut self, node_id: &str, grant: GrantId, blocks: u32) {
        self.nodes.entry(node_id.to_string()).or_default().sequences.insert(grant, (blocks, None));
    }

    /// The group has reserved its room.
    pub fn sequence_admitted(&mut self, node_id: &str, grant: GrantId, now: Instant) {
        let sequence = self.nodes.get_mut(node_id).and_then(|node| node.sequences.get_mut(&grant));
        if let Some((_, known)) = sequence {
            *known = Some(now);
        }
    }

    /// The node refused for want of room.
    pub fn refused(&mut self, node_id: &str, now: Instant) {
        self.nodes.entry(node_id.to_string()).or_default().full = Some(now);
    }

    /// The grant has ended; what it held may make room.
    pub fn returned(&mut self, node_id: &str, grant: GrantId) {
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.prompts.remove(&grant);
            if node.sequences.remove(&grant).is_some_and(|(_, known)| known.is_some()) {
                node.full = None;
            }
        }
    }

    /// Forgets nodes that are no members and hold nothing of ours.
    pub fn keep(&mut self, present: impl Fn(&str) -> bool) {
        self.nodes.retain(|id, node| present(id) || !node.prompts.is_empty() || !node.sequences.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::{JoinRequest, NodeReport};

    use super::*;

    fn member(id: &str, reported: Instant) -> Member {
        Member {
            id: id.into(),
            join: JoinRequest { node_id: "d0".into(), ..JoinRequest::default() },
            token: None,
            report: NodeReport { epoch: 1, ..NodeReport::default() },
            joined: reported,
            reported,
            suspect: false,
            drain: false,
        }
    }

    /// Protects: promises count until a report can show them, prompts until their first token, all until returned.
    #[test]
    fn promises_count_until_reported() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut ledger = Ledger::default();
        ledger.prompt_given("d0", 1, 500);
        ledger.sequence_given("d0", 1, 40);
        let account = ledger.account(&member("m", at(1000)), start);
        assert_eq!((account.prompt_tokens, account.prompts, account.sequences), (500, 1, 1));
        assert_eq!(account.blocks_unreported, 40);
        ledger.sequence_admitted("d0", 1, at(1000));
        assert_eq!(ledger.account(&member("m", at(1050)), start).blocks_unreported, 40);
        assert_eq!(ledger.account(&member("m", at(1100)), start).blocks_unreported, 0);
        ledger.prompt_done("d0", 1);
        assert_eq!(ledger.account(&member("m", at(1100)), start).prompts, 0);
        ledger.returned("d0", 1);
        assert_eq!(ledger.account(&member("m", at(1100)), start).sequences, 0);
    }

    /// Protects: a refusal holds until something changes: a report, or room given back by us.
    #[test]
    fn a_refusal_holds_until_something_changes() {
        let start = Instant::now();
        let mut ledger = Ledger::default();
        let full = |ledger: &mut Ledger, ms| {
            ledger.account(&member("m", start + Duration::from_millis(ms)), start).full
        };
        assert!(!full(&mut ledger, 0));
        ledger.refused("d0", start + Duration::from_millis(10));
        assert!(full(&mut ledger, 0));
        assert!(full(&mut ledger, 10));
        assert!(!full(&mut ledger, 11));

        ledger.sequence_given("d0", 1, 1);
        ledger.sequence_given("d0", 2, 1);
        ledger.sequence_admitted("d0", 1, start);
        ledger.refused("d0", start + Duration::from_millis(20));
        ledger.returned("d0", 2);
        assert!(full(&mut ledger, 11), "what was never admitted gives no room back");
        ledger.returned("d0", 1);
        assert!(!full(&mut ledger, 11));
    }

    /// Protects: after a restart or regrouping a node is a new holder: what its cache held is gone.
    #[test]
    fn a_restart_is_another_holder() {
        let now = Instant::now();
        let mut ledger = Ledger::default();
        let first = ledger.account(&member("m1", now), now).holder;
        assert_eq!(ledger.account(&member("m1", now), now).holder, first);
        let second = ledger.account(&member("m2", now), now).holder;
        assert_ne!(second, first);
        let mut regrouped = member("m2", now);
        regrouped.report.epoch = 2;
        assert_ne!(ledger.account(&regrouped, now).holder, second);
        ledger.keep(|_| false);
        assert!(ledger.nodes.is_empty());
    }

    /// Protects: a node that reports but cannot be called is tried ever more rarely, until it works or restarts; many
    /// requests that see one failure count once.
    #[test]
    fn failing_nodes_are_shunned() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut ledger = Ledger::default();
        let shunned = |ledger: &mut Ledger, lease, ms| ledger.account(&member(lease, at(ms)), at(ms)).shunned;
        assert!(!shunned(&mut ledger, "m1", 0));
        ledger.failed("d0", at(0));
        ledger.failed("d0", at(1));
        assert!(shunned(&mut ledger, "m1", 99) && !shunned(&mut ledger, "m1", 100));
        ledger.failed("d0", at(100));
        assert!(shunned(&mut ledger, "m1", 299) && !shunned(&mut ledger, "m1", 300));
        ledger.worked("d0");
        ledger.failed("d0", at(300));
        assert!(shunned(&mut ledger, "m1", 399) && !shunned(&mut ledger, "m1", 400));
        ledger.failed("d0", at(400));
        assert!(!shunned(&mut ledger, "m2", 401));
    }
}
