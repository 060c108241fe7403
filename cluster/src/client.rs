//! The node's end of membership: join, report, come back after every interruption, obey a drain; and hear which join tokens were
//! revoked.
//!
//! Callers: prefill and decode nodes, one [`join_all`] per node, beside its own server; one [`follow_revocations`] per process,
//! which is a rank, and router.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::v1::{JoinRequest, NodeReport, RevocationsRequest};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::auth::ClusterToken;
use crate::channel::{BadAddress, NodeChannel, behind, cluster_client, connect_lazy};

/// First pause after a failure; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);

/// Longest pause between two tries: a router that is back is found within it.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A join that is not answered within this is tried again.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A router that could not be joined for this long is said to be away, and again after as long.
const ABSENT_AFTER: Duration = Duration::from_secs(10);

/// A router that refused the node while others have it is asked again after this.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// The last report gets this long to arrive when the node leaves.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Bounds on what a router may ask for.
const HEARTBEAT_MIN: Duration = Duration::from_millis(10);
const HEARTBEAT_MAX: Duration = Duration::from_secs(60);

/// What happens to a membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinEvent {
    /// The router let the node in.
    Joined {
        /// Names the lease.
        member_id: String,
    },
    /// The membership ended; the node tries to come back.
    Lost {
        /// Why, in one line.
        reason: String,
    },
    /// Where KV may be pushed to has changed: every decode group's KV port by its addresses.
    Peers(Vec<Vec<String>>),
    /// The router asks the node to finish what it has and leave. Told once for each membership.
    Drain,
}

/// Why a node must not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The router does not want this node; it names both values.
    #[error("router {router} refused this node: {reason}")]
    Refused {
        /// Address of the router.
        router: String,
        /// What the router said.
        reason: String,
    },
    /// The address of the router is no address.
    #[error("router address: {0}")]
    Address(BadAddress),
}

impl From<BadAddress> for JoinError {
    fn from(address: BadAddress) -> JoinError {
        JoinError::Address(address)
    }
}

/// As [`join`] at each of `routers`, which know nothing of each other: what one of them says or does ends nothing at the others.
/// Where several are named, one that refuses the node is asked again as long as not all do.
pub async fn join_all(
    routers: Vec<String>,
    request: JoinRequest,
    token: &ClusterToken,
    report: impl Fn() -> NodeReport + Send + Sync + 'static,
    event: impl Fn(JoinEvent) + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Result<(), JoinError> {
    let (report, event) = (Arc::new(report), Arc::new(event));
    let refusing = Arc::new(Mutex::new(BTreeSet::new()));
    let (mut memberships, count) = (JoinSet::new(), routers.len());
    for router in routers {
        let (request, token) = (request.clone(), token.clone());
        let (report, event, refusing) = (report.clone(), event.clone(), refusing.clone());
        let shutdown = shutdown.clone();
        memberships.spawn(async move {
            let refusing = || refusing.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let told = |told: JoinEvent| {
                    if matches!(told, JoinEvent::Joined { .. }) {
                        refusing().remove(&router);
                    }
                    event(told);
                };
                let ended = join(&router, request.clone(), &token, &*report, told, shutdown.clone()).await;
                let Err(error @ JoinError::Refused { .. }) = ended else { return ended };
                let all_refuse = {
                    let mut refusing = refusing();
                    refusing.insert(router.clone());
                    refusing.len() == count
                };
                if all_refuse {
                    return Err(error);
                }
                tracing::error!("{error}; it is asked again, and the other routers go on");
                tokio::select! {
                    () = shutdown.cancelled() => return Ok(()),
                    () = tokio::time::sleep(REFUSED_PAUSE) => {}
                }
            }
        });
    }
    while let Some(ended) = memberships.join_next().await {
        ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    }
    Ok(())
}

/// Keeps the node a member of the router's cluster until `shutdown`, then leaves. `report` is asked at every heartbeat,
/// its `member_id` is filled in here; `event` hears what happens and must not block. Errors only where trying again
/// cannot help: the process then exits with the message.
pub async fn join(
    router: &str,
    request: JoinRequest,
    token: &ClusterToken,
    report: impl Fn() -> NodeReport + Send,
    mut event: impl FnMut(JoinEvent) + Send,
    shutdown: CancellationToken,
) -> Result<(), JoinError> {
    let channel = connect_lazy(router, token)?;
    let mut pause = Backoff::default();
    let mut begun = Instant::now();
    loop {
        let joined = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            joined = be_joined(&channel, &request) => joined,
        };
        let reason = match joined {
            Ok(lease) => {
                pause = Backoff::default();
                tracing::info!(router, member = lease.member_id, "joined");
                event(JoinEvent::Joined { member_id: lease.member_id.clone() });
                match be_member(&channel, &lease, &report, &mut event, &shutdown).await {
                    Ok(()) => return Ok(()),
                    Err(reason) => {
                        tracing::warn!(router, reason, "membership lost, joining again");
                        event(JoinEvent::Lost { reason: reason.clone() });
                        begun = Instant::now();
                        reason
                    }
                }
            }
            Err(status) if is_final(&status) => {
                return Err(JoinError::Refused { router: router.to_string(), reason: one_line(&status) });
            }
            Err(status) => one_line(&status),
        };
        let since = begun.elapsed();
        let wait = pause.next(random_u32());
        // A router that starts beside the node is there soon; one that stays away is worth a line, now and then.
        if since >= ABSENT_AFTER {
            tracing::warn!(router, reason, "no router yet, trying on");
            begun = Instant::now();
        }
        tracing::debug!(router, reason, ?wait, "joining again after a pause");
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Hears from each of `routers` which join tokens were revoked, and notes it in the
/// [`Revocations`](crate::trust::Revocations) of `token`, for ever: it returns when this process's own token was revoked, or when
/// trying again cannot help. Without certificates there is nothing to hear.
pub async fn follow_revocations(routers: Vec<String>, token: &ClusterToken) -> JoinError {
    let mut followed = JoinSet::new();
    for router in routers {
        let token = token.clone();
        followed.spawn(async move { follow_revocations_of(&router, &token).await });
    }
    match followed.join_next().await {
        Some(Ok(error)) => error,
        Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
        None => std::future::pending().await,
    }
}

async fn follow_revocations_of(router: &str, token: &ClusterToken) -> JoinError {
    let revocations = token.identity().and_then(|identity| identity.revocations());
    let Some(revocations) = revocations else { return std::future::pending().await };
    let channel = match connect_lazy(router, token) {
        Ok(channel) => channel,
        Err(error) => return error.into(),
    };
    let mut pause = Backoff::default();
    loop {
        let heard = async {
            let mut replies =
                cluster_client(channel.clone()).revocations(RevocationsRequest {}).await?.into_inner();
            while let Some(reply) = replies.message().await? {
                pause = Backoff::default();
                revocations.add(reply.tokens);
            }
            Err(Status::unavailable("the router ended the call"))
        };
        let Err::<(), _>(status) = heard.await else { continue };
        if is_final(&status) {
            return JoinError::Refused { router: router.to_string(), reason: one_line(&status) };
        }
        tracing::debug!(router, reason = one_line(&status), "not told of revoked tokens, trying again");
        tokio::time::sleep(pause.next(random_u32())).await;
    }
}

struct Lease {
    member_id: String,
    heartbeat: Duration,
    lease: Duration,
}

async fn be_joined(channel: &NodeChannel, request: &JoinRequest) -> Result<Lease, Status> {
    let mut client = cluster_client(channel.clone());
    let reply = tokio::time::timeout(JOIN_TIMEOUT, client.join(request.clone()))
        .await
        .map_err(|_| Status::deadline_exceeded("no answer to the join request"))??
        .into_inner();
    let heartbeat = Duration::from_millis(reply.heartbeat_ms.into()).clamp(HEARTBEAT_MIN, HEARTBEAT_MAX);
    let lease = Duration::from_millis(reply.lease_ms.into()).max(2 * heartbeat);
    Ok(Lease { member_id: reply.member_id, heartbeat, lease })
}

/// Reports until `shutdown` (Ok) or until the membership is lost (Err with the reason).
async fn be_member(
    channel: &NodeChannel,
    lease: &Lease,
    report: &(impl Fn() -> NodeReport + Send),
    event: &mut (impl FnMut(JoinEvent) + Send),
    shutdown: &CancellationToken,
) -> Result<(), String> {
    let next = || NodeReport { member_id: lease.member_id.clone(), ..report() };
    let (reports, outgoing) = mpsc::channel(1);
    // The first report goes out with the call: the node is usable at once.
    let _ = reports.try_send(next());
    let mut client = cluster_client(channel.clone());
    let call = client.heartbeat(ReceiverStream::new(outgoing));
    let mut replies = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        call = tokio::time::timeout(lease.lease, call) => match call {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err(one_line(&status)),
            Err(_) => return Err("the router does not answer reports".to_string()),
        },
    };
    let mut ticks = tokio::time::interval(lease.heartbeat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut drain_told = false;
    let mut peers = Vec::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => {
                // Said before the stream ends, so that the router gives no more work meanwhile.
                let farewell = NodeReport { draining: true, ready: false, ..next() };
                let _ = tokio::time::timeout(LEAVE_TIMEOUT, async {
                    let _ = reports.send(farewell).await;
                    drop(reports);
                    while let Ok(Some(_)) = replies.message().await {}
                }).await;
                return Ok(());
            }
            _ = ticks.tick() => {
                if heard.elapsed() >= lease.lease {
                    return Err(format!("no answer to reports for {} ms", lease.lease.as_millis()));
                }
                // A full channel holds a report that the connection has not taken: the next one replaces nothing.
                let _ = reports.try_send(next());
            }
            reply = replies.message() => match reply {
                Ok(Some(reply)) => {
                    heard = Instant::now();
                    if reply.peers != peers {
                        peers = reply.peers.clone();
                        event(JoinEvent::Peers(reply.peers.into_iter().map(|peer| peer.addresses).collect()));
                    }
                    if reply.drain && !drain_told {
                        drain_told = true;
                        event(JoinEvent::Drain);
                    }
                }
                Ok(None) => return Err("the router ended the membership".to_string()),
                Err(status) => return Err(one_line(&status)),
            },
        }
    }
}

/// Trying again cannot help: the router understood and said no, or it is no router.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::Unauthenticated
            | Code::PermissionDenied
            | Code::Unimplemented
    )
}

/// What a router said, or why it was not reached.
pub fn one_line(status: &Status) -> String {
    // Of a connection; what a router said has nothing behind it.
    if let Some(error) = status.source() {
        return behind(error);
    }
    match (status.code(), status.message()) {
        (Code::Unimplemented, _) => "it serves no membership, is this a router?".to_string(),
        (code, "") => code.description().to_string(),
        (_, message) => message.lines().next().unwrap_or_default().to_string(),
    }
}

/// Pauses between tries: doubling, with jitter, so that the nodes of a cluster do not come back in one instant.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    /// In [half, all] of the doubled pause, by `random`.
    fn next(&mut self, random: u32) -> Duration {
        let full = RETRY_MIN.saturating_mul(1 << self.failures.min(16)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        full / 2 + full.mul_f64(0.5 * f64::from(random) / f64::from(u32::MAX))
    }
}

fn random_u32() -> u32 {
    // Only jitter: a machine without randomness uses the middle.
    getrandom::u32().unwrap_or(u32::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: pauses grow to a bound and stay spread.
    #[test]
    fn pauses_grow_to_a_bound() {
        let mut low = Backoff::default();
        let lows: Vec<_> = (0..9).map(|_| low.next(0).as_millis()).collect();
        assert_eq!(lows, [50, 100, 200, 400, 800, 1600, 2500, 2500, 2500]);
        let mut high = Backoff::default();
        let highs: Vec<_> = (0..9).map(|_| high.next(u32::MAX).as_millis()).collect();
        assert_eq!(highs, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        let mut long = Backoff { failures: u32::MAX };
        assert_eq!(long.next(u32::MAX), RETRY_MAX);
    }
}
