//! The nodes as dispatch calls them: one channel each, statuses sorted by what they mean, departures noticed.
//!
//! Callers: [`super::attempt`], [`super::Dispatch`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster::channel::{decode_client, prefill_client};
use cluster::{ClusterToken, Member, Members, NodeChannel, Shutdown, Snapshot, connect_lazy};
use proto::v1::decode_client::DecodeClient;
use proto::v1::prefill_client::PrefillClient;
use tokio::time::Instant;
use tonic::{Code, Status};

/// Channels to the members, by address; whoever leaves for longer than a lease is forgotten.
pub struct Nodes {
    members: Members,
    token: ClusterToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    channels: HashMap<String, NodeChannel>,
    /// By node id: cancelled when the node has been away for a lease, and since when it is away.
    presence: HashMap<String, (Shutdown, Option<Instant>)>,
}

impl Nodes {
    /// None yet.
    pub fn new(members: Members, token: ClusterToken) -> Nodes {
        Nodes { members, token, state: Mutex::default() }
    }

    /// Client of a decode group's leader. Errors when the member's address is none.
    pub fn decode(&self, member: &Member) -> Result<DecodeClient<NodeChannel>, Status> {
        self.channel(member).map(decode_client)
    }

    /// Client of a prefill node. Errors when the member's address is none.
    pub fn prefill(&self, member: &Member) -> Result<PrefillClient<NodeChannel>, Status> {
        self.channel(member).map(prefill_client)
    }

    fn channel(&self, member: &Member) -> Result<NodeChannel, Status> {
        let address = &member.join.grpc_address;
        let mut state = self.lock();
        if let Some(channel) = state.channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = connect_lazy(address, &self.token)
            .map_err(|error| Status::unavailable(format!("node {}: {error}", member.join.name)))?;
        state.channels.insert(address.clone(), channel.clone());
        Ok(channel)
    }

    /// No new work for this node until its next report: a call to it failed.
    pub fn suspect(&self, member: &Member, why: &str) {
        tracing::warn!(node = member.join.name, why, "call failed, no new work until the next report");
        self.members.suspect(&member.join.node_id);
    }

    /// Cancelled when the node has sent no report for a lease and then has been away for another, or at once when its join token
    /// was revoked. A call that breaks says so sooner; this is for peers whose connection stays up.
    pub fn departure(&self, member: &Member) -> Shutdown {
        self.lock().presence.entry(member.join.node_id.clone()).or_default().0.clone()
    }

    /// Notices who is away; called at every change of membership and from time to time.
    pub fn watch(&self, snapshot: &Snapshot, now: Instant) {
        let lease = self.members.lease();
        let mut state = self.lock();
        for member in &snapshot.members {
            state.presence.entry(member.join.node_id.clone()).or_default().1 = None;
        }
        state.presence.retain(|node_id, (departed, away)| {
            if snapshot.find(node_id).is_some() {
                return true;
            }
            let gone =
                snapshot.expelled.contains(node_id) || now.duration_since(*away.get_or_insert(now)) >= lease;
            if gone {
                departed.cancel();
            }
            !gone
        });
        let present = |address: &str| snapshot.members.iter().any(|m| m.join.grpc_address == address);
        state.channels.retain(|address, _| present(address));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a node's status means for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// No room now.
    Full,
    /// Never possible, here or elsewhere.
    Invalid,
    /// The KV session failed; the node is well.
    Session,
    /// The node or the way to it is not well.
    Lost,
}

/// Sorts a status.
pub fn meaning(status: &Status) -> Meaning {
    match status.code() {
        Code::ResourceExhausted => Meaning::Full,
        Code::InvalidArgument | Code::OutOfRange => Meaning::Invalid,
        Code::Aborted => Meaning::Session,
        _ => Meaning::Lost,
    }
}

/// A status in one line, for logs and error events.
pub fn one_line(member: &Arc<Member>, status: &Status) -> String {
    let text = match status.message() {
        "" => status.code().description(),
        message => message.lines().next().unwrap_or_default(),
    };
    format!("node {}: {text}", member.join.name)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cluster::MembershipConfig;
    use proto::v1::JoinRequest;

    use super::*;

    fn snapshot(present: bool) -> (Arc<Member>, Snapshot) {
        let now = std::time::Instant::now();
        let member = Arc::new(Member {
            id: "m".into(),
            join: JoinRequest { node_id: "d0".into(), ..JoinRequest::default() },
            token: None,
            report: Default::default(),
            joined: now,
            reported: now,
            suspect: false,
            drain: false,
        });
        let members = if present { vec![member.clone()] } else { vec![] };
        (member, Snapshot { members, ..Snapshot::default() })
    }

    /// Protects: a node that comes back within a lease keeps its streams; one that stays away loses them.
    #[test]
    fn departures() {
        let nodes = Nodes::new(Members::new(MembershipConfig::default()), ClusterToken::generate().unwrap());
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let (member, here) = snapshot(true);
        let (_, away) = snapshot(false);
        let departed = nodes.departure(&member);
        nodes.watch(&here, at(0));
        nodes.watch(&away, at(1));
        nodes.watch(&away, at(5));
        nodes.watch(&here, at(6));
        nodes.watch(&away, at(7));
        nodes.watch(&away, at(11));
        assert!(!departed.is_cancelled());
        nodes.watch(&away, at(12));
        assert!(departed.is_cancelled());
        nodes.watch(&here, at(13));
        assert!(!nodes.departure(&member).is_cancelled());
    }

    /// Protects: calls to a node whose token was revoked end at once.
    #[test]
    fn expelled() {
        let nodes = Nodes::new(Members::new(MembershipConfig::default()), ClusterToken::generate().unwrap());
        let (member, here) = snapshot(true);
        let departed = nodes.departure(&member);
        nodes.watch(&here, Instant::now());
        assert!(!departed.is_cancelled());
        let out = Snapshot { expelled: Arc::new(["d0".into()].into()), ..Snapshot::default() };
        nodes.watch(&out, Instant::now());
        assert!(departed.is_cancelled());
    }
}
