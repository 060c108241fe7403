//! The router's table of nodes: who is in, what they reported last, whose lease ran out. Pure: `now` is an argument.
//!
//! Caller: [`crate::service`], which adds the lock, the clock and gRPC.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1::{JoinReply, JoinRequest, MemberStatus, NodeReport, Role};

use crate::admission::{self, Refusal};

/// Members at the most; bounds the table, its copies and the status reply.
pub const MEMBERS_MAX: usize = 1024;

/// What the router asks of those who join.
#[derive(Debug, Clone)]
pub struct MembershipConfig {
    /// Version of baton; nodes of another are refused.
    pub version: String,
    /// Version of the messages; nodes of another are refused.
    pub protocol: u32,
    /// Served model name, if the router fixes one; else the first node does.
    pub model: Option<String>,
    /// Vocabulary identity of the router's own tokenizer, if known.
    pub vocab: Option<String>,
    /// Nodes of other weights may join, whatever they say.
    pub allow_mixed_weights: bool,
    /// Nodes report this often.
    pub heartbeat: Duration,
    /// Without a report for this long a node is out.
    pub lease: Duration,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        MembershipConfig {
            version: env!("CARGO_PKG_VERSION").to_string(),
            protocol: proto::PROTOCOL,
            model: None,
            vocab: None,
            allow_mixed_weights: false,
            heartbeat: Duration::from_millis(500),
            // Ten missed reports: a machine busy with a prompt still gets one through.
            lease: Duration::from_secs(5),
        }
    }
}

/// One node that is in.
#[derive(Debug, Clone)]
pub struct Member {
    /// Names the lease; new with every join.
    pub id: String,
    /// What the node said when it joined.
    pub join: JoinRequest,
    /// Id of the join token that its certificate names; `None` in a cluster without certificates.
    pub token: Option<String>,
    /// What it reported last; empty, thus not ready, before the first report.
    pub report: NodeReport,
    /// When it joined.
    pub joined: Instant,
    /// When it reported last, or joined.
    pub reported: Instant,
    /// A call to it failed since its last report.
    pub suspect: bool,
    /// The router asks it to finish and leave.
    pub drain: bool,
}

impl Member {
    /// What the node serves.
    pub fn role(&self) -> Role {
        self.join.role()
    }

    /// New work may be given to it.
    pub fn ready(&self) -> bool {
        self.report.ready && !self.report.draining && !self.drain && !self.suspect
    }

    /// Blocks that new sequences can have: free ones, and cached ones that can be evicted. None: not reported.
    pub fn blocks_available(&self) -> Option<u32> {
        self.report.kv.as_ref().map(|kv| kv.free.saturating_add(kv.cached))
    }
}

/// A report of nobody: the lease ran out, or the router is another process than the one joined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("membership {member_id} has ended, join again")]
pub struct NotAMember {
    /// The id reported with.
    pub member_id: String,
}

/// The table. The first present member defines the cluster's identity.
#[derive(Debug, Clone)]
pub struct Membership {
    config: MembershipConfig,
    // In order of joining. Shared with the snapshots that readers hold.
    members: Vec<Arc<Member>>,
    // Ids of join tokens.
    revoked: BTreeSet<String>,
    // Node ids of members that were taken out for them.
    expelled: Arc<BTreeSet<String>>,
}

impl Membership {
    /// An empty table.
    pub fn new(config: MembershipConfig) -> Membership {
        Membership { config, members: Vec::new(), revoked: BTreeSet::new(), expelled: Arc::default() }
    }

    /// The settings.
    pub fn config(&self) -> &MembershipConfig {
        &self.config
    }

    /// The present members, in order of joining.
    pub fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    /// Lets a node in under `member_id`, or says why not. A node that is in already is replaced: it restarted. `token`: the join
    /// token that it came in by, where there are some.
    pub fn join(
        &mut self,
        request: JoinRequest,
        token: Option<String>,
        member_id: String,
        now: Instant,
    ) -> Result<JoinReply, Refusal> {
        // It may have passed the door before.
        if token.as_ref().is_some_and(|token| self.revoked.contains(token)) {
            return Err(Refusal::Revoked);
        }
        let others = || self.members.iter().filter(|member| member.join.node_id != request.node_id);
        admission::check(&request, &self.config, others().next().map(|member| &member.join))?;
        if others().count() >= MEMBERS_MAX {
            return Err(Refusal::Full { node: request.name, members: self.members.len() });
        }
        self.members.retain(|member| member.join.node_id != request.node_id);
        self.members.push(Arc::new(Member {
            id: member_id.clone(),
            join: request,
            token,
            report: NodeReport::default(),
            joined: now,
            reported: now,
            suspect: false,
            drain: false,
        }));
        Ok(JoinReply {
            member_id,
            heartbeat_ms: millis_u32(self.config.heartbeat),
            lease_ms: millis_u32(self.config.lease),
        })
    }

    /// Takes a report, renews the lease, and says whether the node is asked to drain.
    pub fn report(&mut self, report: NodeReport, now: Instant) -> Result<bool, NotAMember> {
        let Some(member) = self.members.iter_mut().find(|member| member.id == report.member_id) else {
            return Err(NotAMember { member_id: report.member_id });
        };
        let member = Arc::make_mut(member);
        member.report = report;
        member.reported = now;
        member.suspect = false;
        Ok(member.drain)
    }

    /// Takes a member out: its stream ended. A node that joined again since has another id and stays.
    pub fn leave(&mut self, member_id: &str) -> Option<Arc<Member>> {
        let index = self.members.iter().position(|member| member.id == member_id)?;
        Some(self.members.remove(index))
    }

    /// Takes out and returns those whose lease ran out.
    pub fn expire(&mut self, now: Instant) -> Vec<Arc<Member>> {
        let lease = self.config.lease;
        let (out, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.members)
            .into_iter()
            .partition(|member| now.saturating_duration_since(member.reported) >= lease);
        self.members = stay;
        out
    }

    /// These are the join tokens that are revoked: takes out and returns those who came in by them.
    pub fn revoke(&mut self, tokens: BTreeSet<String>) -> Vec<Arc<Member>> {
        self.revoked = tokens;
        let (out, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.members)
            .into_iter()
            .partition(|member| member.token.as_ref().is_some_and(|token| self.revoked.contains(token)));
        self.members = stay;
        Arc::make_mut(&mut self.expelled).extend(out.iter().map(|member| member.join.node_id.clone()));
        out
    }

    /// Node ids of those who were taken out because their token was revoked.
    pub fn expelled(&self) -> &Arc<BTreeSet<String>> {
        &self.expelled
    }

    /// A call to the node failed: no new work until its next report. False: no such node.
    pub fn suspect(&mut self, node_id: &str) -> bool {
        self.change(node_id, |member| member.suspect = true)
    }

    /// No new work, and the node is told to finish and leave. False: no such node.
    pub fn drain(&mut self, node_id: &str) -> bool {
        self.change(node_id, |member| member.drain = true)
    }

    fn change(&mut self, node_id: &str, change: impl Fn(&mut Member)) -> bool {
        match self.members.iter_mut().find(|member| member.join.node_id == node_id) {
            Some(member) => {
                change(Arc::make_mut(member));
                true
            }
            None => false,
        }
    }

    /// What `baton status` prints of the members.
    pub fn status(&self, now: Instant) -> Vec<MemberStatus> {
        let ago = |then| u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX);
        self.members
            .iter()
            .map(|member| MemberStatus {
                join: Some(member.join.clone()),
                report: Some(member.report.clone()),
                joined_ms_ago: ago(member.joined),
                reported_ms_ago: ago(member.reported),
            })
            .collect()
    }
}

fn millis_u32(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::admission::tests::node;

    fn report(member_id: &str, epoch: u64) -> NodeReport {
        NodeReport { member_id: member_id.into(), epoch, ready: true, ..NodeReport::default() }
    }

    /// Protects: a node takes work only from its first ready report on, and not while suspect, draining or expired.
    #[test]
    fn the_life_of_a_member() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut table = Membership::new(MembershipConfig::default());
        let reply = table.join(node("d0", Role::Decode), None, "m1".into(), start).unwrap();
        assert_eq!((reply.heartbeat_ms, reply.lease_ms), (500, 5000));
        assert!(!table.members()[0].ready());
        assert_eq!(table.report(report("m1", 7), at(100)), Ok(false));
        assert!(table.members()[0].ready());
        assert_eq!(table.members()[0].report.epoch, 7);

        assert!(table.suspect("d0"));
        assert!(!table.members()[0].ready());
        assert_eq!(table.report(report("m1", 8), at(200)), Ok(false));
        assert!(table.members()[0].ready());
        assert_eq!(table.members()[0].report.epoch, 8);

        assert!(table.drain("d0") && !table.drain("d1"));
        assert!(!table.members()[0].ready());
        assert_eq!(table.report(report("m1", 8), at(300)), Ok(true));

        assert!(table.expire(at(5299)).is_empty());
        assert_eq!(table.expire(at(5300)).len(), 1);
        assert_eq!(
            table.report(report("m1", 8), at(5301)).unwrap_err().to_string(),
            "membership m1 has ended, join again"
        );
    }

    /// Protects: a restarted node replaces itself, and the end of its old stream does not take the new one out.
    #[test]
    fn a_restart_replaces() {
        let now = Instant::now();
        let mut table = Membership::new(MembershipConfig::default());
        table.join(node("d0", Role::Decode), None, "m1".into(), now).unwrap();
        table.join(node("d0", Role::Decode), None, "m2".into(), now).unwrap();
        assert_eq!(table.members().len(), 1);
        assert!(table.leave("m1").is_none());
        assert!(table.leave("m2").is_some());
        assert!(table.members().is_empty());
    }

    /// Protects: whose token is revoked is out at once and does not come back; who came in by another does not notice.
    #[test]
    fn a_revoked_token_takes_its_members_out() {
        let now = Instant::now();
        let mut table = Membership::new(MembershipConfig::default());
        for (id, token) in [("d0", "a"), ("d1", "b"), ("d2", "a")] {
            table.join(node(id, Role::Decode), Some(token.into()), id.into(), now).unwrap();
        }
        table.join(node("d3", Role::Decode), None, "d3".into(), now).unwrap();
        let ids = |members: &[Arc<Member>]| -> Vec<String> {
            members.iter().map(|member| member.join.node_id.clone()).collect()
        };
        assert_eq!(ids(&table.revoke(["a".into()].into())), ["d0", "d2"]);
        assert_eq!(ids(table.members()), ["d1", "d3"]);
        assert!(table.report(report("d0", 1), now).is_err() && table.report(report("d1", 1), now).is_ok());
        let again = table.join(node("d0", Role::Decode), Some("a".into()), "m".into(), now).unwrap_err();
        assert_eq!(again.to_string(), "the join token of this node was revoked");
        assert!(table.expelled().contains("d2") && !table.expelled().contains("d1"));
    }

    /// Protects: the identity is that of present members; alone, a node may come back as another model.
    #[test]
    fn identity_ends_with_the_last_member() {
        let now = Instant::now();
        let mut table = Membership::new(MembershipConfig::default());
        let mut large = node("d0", Role::Decode);
        large.model = "large".into();
        table.join(node("d0", Role::Decode), None, "m1".into(), now).unwrap();
        table.join(large.clone(), None, "m2".into(), now).unwrap();
        assert!(table.join(node("p0", Role::Prefill), None, "m3".into(), now).is_err());
        table.leave("m2");
        table.join(node("p0", Role::Prefill), None, "m4".into(), now).unwrap();
        assert!(table.join(large, None, "m5".into(), now).is_err());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Join { node: u8, model: u8 },
        Report { member: u8 },
        Leave { member: u8 },
        Pass { ms: u16 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6u8, 0..2u8).prop_map(|(node, model)| Step::Join { node, model }),
            (0..40u8).prop_map(|member| Step::Report { member }),
            (0..40u8).prop_map(|member| Step::Leave { member }),
            (0..3000u16).prop_map(|ms| Step::Pass { ms }),
        ]
    }

    proptest! {
        /// Protects: whatever happens, node ids are unique, all members serve one model, and every one has a live lease.
        #[test]
        fn the_table_stays_sound(steps in proptest::collection::vec(step(), 1..60)) {
            let mut now = Instant::now();
            let mut table = Membership::new(MembershipConfig::default());
            for (count, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Join { node: id, model } => {
                        let mut request = node(&format!("n{id}"), Role::Decode);
                        request.model = format!("model{model}");
                        let _ = table.join(request, None, format!("m{count}"), now);
                    }
                    Step::Report { member } => {
                        let known = table.members().iter().any(|m| m.id == format!("m{member}"));
                        prop_assert_eq!(table.report(report(&format!("m{member}"), 0), now).is_ok(), known);
                    }
                    Step::Leave { member } => {
                        table.leave(&format!("m{member}"));
                    }
                    Step::Pass { ms } => now += Duration::from_millis(ms.into()),
                }
                table.expire(now);
                let mut ids: Vec<_> = table.members().iter().map(|m| m.join.node_id.clone()).collect();
                ids.sort();
                ids.dedup();
                prop_assert_eq!(ids.len(), table.members().len());
                prop_assert!(table.members().iter().all(|m| m.join.model == table.members()[0].join.model));
                prop_assert!(table.members().iter().all(|m| now - m.reported < table.config().lease));
            }
        }
    }
}
