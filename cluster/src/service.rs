//! The router's end of membership: [`crate::membership`] behind a lock, a clock, a watch and gRPC.
//!
//! Callers: the router's start-up serves [`ClusterService`]; its dispatch reads [`Members`] and reports failed calls.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::v1::cluster_server::Cluster;
use proto::v1::{
    HeartbeatReply, JoinReply, JoinRequest, KvPeer, NodeReport, RevocationsReply, RevocationsRequest, Role,
    StatusReply, StatusRequest,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::admission::Refusal;
use crate::membership::{Member, Membership, MembershipConfig};
use crate::trust::{Caller, Identity, REVOKED, TOKENS_AGE_MAX};

/// Replies that wait for a slow node; it sends no report without reading the reply to an earlier one for long.
const REPLIES_WAITING_MAX: usize = 4;

/// The members at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// In order of joining.
    pub members: Vec<Arc<Member>>,
    /// Node ids of those whose join token was revoked while they were in.
    pub expelled: Arc<BTreeSet<String>>,
}

impl Snapshot {
    /// The member of this node id.
    pub fn find(&self, node_id: &str) -> Option<&Arc<Member>> {
        self.members.iter().find(|member| member.join.node_id == node_id)
    }

    /// Members of one role.
    pub fn of(&self, role: Role) -> impl Iterator<Item = &Arc<Member>> {
        self.members.iter().filter(move |member| member.role() == role)
    }

    /// Tokens of the longest sequence that every present node takes; none without a decode group.
    pub fn context_tokens(&self) -> Option<u32> {
        self.of(Role::Decode).next()?;
        self.members.iter().map(|member| member.join.context_tokens).min()
    }

    /// The served model's name, as the first member says.
    pub fn model(&self) -> Option<&str> {
        self.members.first().map(|member| member.join.model.as_str())
    }
}

/// The members, shared: cheap to clone.
#[derive(Clone)]
pub struct Members {
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<Membership>,
    changes: watch::Sender<Arc<Snapshot>>,
    /// Ids of join tokens, as in the table.
    revoked: watch::Sender<Arc<BTreeSet<String>>>,
}

impl Members {
    /// Nobody yet.
    pub fn new(config: MembershipConfig) -> Members {
        let (changes, _) = watch::channel(Arc::default());
        let (revoked, _) = watch::channel(Arc::default());
        Members { shared: Arc::new(Shared { table: Mutex::new(Membership::new(config)), changes, revoked }) }
    }

    /// Who is in now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.changes.borrow().clone()
    }

    /// Hears of every join, report, departure.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.changes.subscribe()
    }

    /// A call to the node failed: no new work until its next report.
    pub fn suspect(&self, node_id: &str) {
        self.change(|table| table.suspect(node_id));
    }

    /// No new work for the node, and it is told to finish and leave. False: no such node.
    pub fn drain(&self, node_id: &str) -> bool {
        self.change(|table| table.drain(node_id))
    }

    /// Without a report for this long a node is out.
    pub fn lease(&self) -> Duration {
        self.lock().config().lease
    }

    /// Lets a node in that has no certificate, as the gRPC service does.
    pub fn join(&self, request: JoinRequest) -> Result<JoinReply, Refusal> {
        self.join_by(request, None)
    }

    fn join_by(&self, request: JoinRequest, token: Option<String>) -> Result<JoinReply, Refusal> {
        let member_id = random_id();
        let (name, role, backend) = (request.name.clone(), request.role(), request.backend.clone());
        let result = self.change(|table| table.join(request, token, member_id, now()));
        match &result {
            Ok(reply) => {
                tracing::info!(
                    node = name,
                    role = role.as_str_name().trim_start_matches("ROLE_").to_lowercase(),
                    backend,
                    member = reply.member_id,
                    "joined"
                );
            }
            Err(refusal) => tracing::warn!(node = name, %refusal, "join refused"),
        }
        result
    }

    /// Takes a report, as the gRPC service does; returns whether the node is to drain.
    pub fn report(&self, report: NodeReport) -> Result<bool, crate::membership::NotAMember> {
        self.change(|table| table.report(report, now()))
    }

    /// Takes a member out, as the gRPC service does when its stream ends.
    pub fn leave(&self, member_id: &str) {
        if let Some(member) = self.change(|table| table.leave(member_id)) {
            tracing::info!(node = member.join.name, member = member_id, "left");
        }
    }

    /// Where a prefill node may push KV to: the KV port of every decode group. Nothing for other members.
    pub fn kv_peers(&self, member_id: &str) -> Vec<KvPeer> {
        let snapshot = self.snapshot();
        let prefill = snapshot.members.iter().any(|m| m.id == member_id && m.join.role() == Role::Prefill);
        let groups = snapshot.members.iter().filter(|m| prefill && m.join.role() == Role::Decode);
        groups.map(|m| KvPeer { addresses: m.join.kv_addresses.clone() }).collect()
    }

    /// Takes out those whose lease runs out, until `shutdown`. The router runs one such task.
    pub async fn expire_leases(&self, shutdown: CancellationToken) {
        let period = self.lock().config().heartbeat.max(Duration::from_millis(10));
        let mut ticks = tokio::time::interval(period);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            let due = {
                let lease = self.lease();
                self.snapshot().members.iter().any(|m| now().saturating_duration_since(m.reported) >= lease)
            };
            if due {
                for member in self.change(|table| table.expire(now())) {
                    tracing::warn!(node = member.join.name, member = member.id, "lease expired: no report");
                }
            }
        }
    }

    /// Looks every second which join tokens are revoked, takes out who came in by them, and tells the other nodes, until
    /// `shutdown`. The router runs one such task where it has certificates.
    pub async fn follow_tokens(&self, identity: Arc<Identity>, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(TOKENS_AGE_MAX);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            let revoked: BTreeSet<String> = identity.revoked().into_iter().collect();
            if revoked != **self.shared.revoked.borrow() {
                self.revoke(revoked);
            }
        }
    }

    fn revoke(&self, revoked: BTreeSet<String>) {
        let out = self.change(|table| table.revoke(revoked.clone()));
        self.shared.revoked.send_replace(Arc::new(revoked));
        for member in out {
            tracing::warn!(
                node = member.join.name,
                token = member.token,
                "taken out: its join token was revoked"
            );
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Membership) -> T) -> T {
        let mut table = self.lock();
        let result = change(&mut table);
        // Sent under the lock, so that watchers see changes in their order.
        let (members, expelled) = (table.members().to_vec(), table.expelled().clone());
        self.shared.changes.send_replace(Arc::new(Snapshot { members, expelled }));
        result
    }

    fn lock(&self) -> MutexGuard<'_, Membership> {
        // The table is changed by whole operations that do not panic half-way.
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Requests of the router at this moment, for the status reply: running, queued.
pub type RequestCounts = Arc<dyn Fn() -> (u32, u32) + Send + Sync>;

/// The gRPC service `Cluster`. Serve it through [`crate::server::cluster`].
pub struct ClusterService {
    members: Members,
    requests: RequestCounts,
    shutdown: CancellationToken,
}

impl ClusterService {
    /// A service over these members; `requests` is asked at every status call. At `shutdown` every heartbeat stream
    /// ends, so that a server which waits for its calls can stop.
    pub fn new(members: Members, requests: RequestCounts, shutdown: CancellationToken) -> ClusterService {
        ClusterService { members, requests, shutdown }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let peer = request.remote_addr();
        let token = caller(&request);
        let mut join = request.into_inner();
        if let Some(address) = peer.and_then(|peer| reachable(&join.grpc_address, peer)) {
            join.grpc_address = address;
        }
        let refused = |refusal: Refusal| match refusal {
            Refusal::Invalid { .. } => Status::invalid_argument(refusal.to_string()),
            Refusal::Differs(_) => Status::failed_precondition(refusal.to_string()),
            Refusal::Full { .. } => Status::resource_exhausted(refusal.to_string()),
            Refusal::Revoked => Status::unauthenticated(refusal.to_string()),
        };
        self.members.join_by(join, token).map(Response::new).map_err(refused)
    }

    type HeartbeatStream = ReceiverStream<Result<HeartbeatReply, Status>>;

    async fn heartbeat(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let (replies, stream) = mpsc::channel(REPLIES_WAITING_MAX);
        let members = self.members.clone();
        let mut reports = request.into_inner();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let mut member_id: Option<String> = None;
            // Ends with the node's stream, broken or closed, when the node reads no more replies, or at shutdown.
            while let Some(Ok(Some(report))) = shutdown.run_until_cancelled(reports.message()).await {
                let id = report.member_id.clone();
                let reply = match members.report(report) {
                    Ok(drain) => {
                        let peers = members.kv_peers(&id);
                        member_id = Some(id);
                        Ok(HeartbeatReply { drain, peers })
                    }
                    Err(gone) => Err(Status::not_found(gone.to_string())),
                };
                let last = reply.is_err();
                if replies.send(reply).await.is_err() || last {
                    break;
                }
            }
            if let Some(id) = member_id {
                members.leave(&id);
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type RevocationsStream = ReceiverStream<Result<RevocationsReply, Status>>;

    async fn revocations(
        &self,
        request: Request<RevocationsRequest>,
    ) -> Result<Response<Self::RevocationsStream>, Status> {
        let own = caller(&request);
        let mut revoked = self.members.shared.revoked.subscribe();
        let (replies, stream) = mpsc::channel(1);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let mut told = BTreeSet::new();
            loop {
                let now = revoked.borrow_and_update().clone();
                let is_out = own.as_ref().is_some_and(|own| now.contains(own));
                let reply = match is_out {
                    true => Err(Status::unauthenticated(REVOKED)),
                    false => Ok(RevocationsReply { tokens: now.difference(&told).cloned().collect() }),
                };
                told.extend(now.iter().cloned());
                if replies.send(reply).await.is_err() || is_out {
                    return;
                }
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = replies.closed() => return,
                    changed = revoked.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let (running, queued) = (self.requests)();
        let table = self.members.lock();
        let config = table.config();
        let served = table.members().first().map(|member| member.join.model.clone());
        Ok(Response::new(StatusReply {
            members: table.status(now()),
            requests_running: running,
            requests_queued: queued,
            model: served.or_else(|| config.model.clone()).unwrap_or_default(),
            version: config.version.clone(),
        }))
    }
}

/// The join token of who calls, where there are certificates.
fn caller<T>(request: &Request<T>) -> Option<String> {
    request.extensions().get::<Caller>().map(|caller| caller.token.clone())
}

/// A node that listens on every interface does not know under which address the router sees it; the router does.
fn reachable(address: &str, peer: SocketAddr) -> Option<String> {
    let address: SocketAddr = address.parse().ok()?;
    address
        .ip()
        .is_unspecified()
        .then(|| SocketAddr::new(peer.ip().to_canonical(), address.port()).to_string())
}

fn now() -> Instant {
    // tokio's clock, so that a test can hold it.
    tokio::time::Instant::now().into_std()
}

fn random_id() -> String {
    let mut bytes = [0u8; 8];
    // Ids need only differ; a machine without randomness still counts nanoseconds.
    if getrandom::fill(&mut bytes).is_err() {
        let nanos = std::time::UNIX_EPOCH.elapsed().map(|since| since.as_nanos()).unwrap_or_default();
        bytes.copy_from_slice(&nanos.to_le_bytes()[..8]);
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::tests::node;

    /// Protects: a node that listens on every interface is called back where it came from, any other where it says.
    #[test]
    fn unspecified_addresses_are_filled_in() {
        let peer: SocketAddr = "10.0.0.7:55555".parse().unwrap();
        assert_eq!(reachable("0.0.0.0:7001", peer).as_deref(), Some("10.0.0.7:7001"));
        assert_eq!(reachable("10.0.0.9:7001", peer), None);
        assert_eq!(reachable("mac.local:7001", peer), None);
    }

    /// Protects: a silent node is taken out when its lease ends, not before, and watchers hear of it.
    #[tokio::test(start_paused = true)]
    async fn leases_expire() {
        let members = Members::new(MembershipConfig::default());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let (members, shutdown) = (members.clone(), shutdown.clone());
            async move { members.expire_leases(shutdown).await }
        });
        members.join(node("d0", Role::Decode)).unwrap();
        assert_eq!(members.snapshot().context_tokens(), Some(4096));
        let mut changes = members.subscribe();
        changes.mark_unchanged();
        tokio::time::sleep(Duration::from_millis(4900)).await;
        assert!(!changes.has_changed().unwrap());
        changes.changed().await.unwrap();
        assert!(members.snapshot().members.is_empty());
        shutdown.cancel();
        task.await.unwrap();
    }
}
