//! A node and a router's membership service over real sockets: joining, refusals, loss and return, drain, leaving.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster::{ClusterService, ClusterToken, JoinError, JoinEvent, Members, MembershipConfig, Snapshot};
use common::node;
use proto::v1::{JoinRequest, NodeReport, Role, StatusRequest};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// Nothing here takes this long; it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(30);

struct Router {
    address: SocketAddr,
    members: Members,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Router {
    async fn start(address: SocketAddr, token: &ClusterToken) -> Router {
        let config = MembershipConfig { heartbeat: Duration::from_millis(20), ..MembershipConfig::default() };
        let listener = cluster::server::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let members = Members::new(config);
        let shutdown = CancellationToken::new();
        let service = ClusterService::new(members.clone(), Arc::new(|| (3, 4)), shutdown.clone());
        let routes = Routes::new(cluster::server::cluster(service));
        let (token, stop) = (token.clone(), shutdown.clone());
        let task = tokio::spawn(async move {
            cluster::server::serve(listener, &token, routes, stop, PATIENCE).await.unwrap();
        });
        Router { address, members, shutdown, task }
    }

    async fn until(&self, what: &str, wanted: impl FnMut(&Arc<Snapshot>) -> bool) {
        let mut changes = self.members.subscribe();
        tokio::time::timeout(PATIENCE, changes.wait_for(wanted)).await.expect(what).unwrap();
    }
}

type Node = (JoinHandle<Result<(), JoinError>>, mpsc::UnboundedReceiver<JoinEvent>, CancellationToken);

fn start(router: SocketAddr, request: JoinRequest, token: &ClusterToken) -> Node {
    start_at(&[router], request, token)
}

fn start_at(routers: &[SocketAddr], request: JoinRequest, token: &ClusterToken) -> Node {
    let routers: Vec<String> = routers.iter().map(SocketAddr::to_string).collect();
    let (events, heard) = mpsc::unbounded_channel();
    let shutdown = CancellationToken::new();
    let (token, stop) = (token.clone(), shutdown.clone());
    let task = tokio::spawn(async move {
        let report = || NodeReport { ready: true, running: 2, ..NodeReport::default() };
        let event = move |event| drop(events.send(event));
        cluster::join_all(routers, request, &token, report, event, stop).await
    });
    (task, heard, shutdown)
}

async fn refusal(node: Node) -> String {
    tokio::time::timeout(PATIENCE, node.0).await.expect("a refusal").unwrap().unwrap_err().to_string()
}

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// Protects: a node is usable after its first report, under an address that the router can call; leaving takes it out
/// at once; a drain reaches it.
#[tokio::test]
async fn join_report_drain_leave() {
    let token = ClusterToken::generate().unwrap();
    let router = Router::start(any_port(), &token).await;
    let (task, mut events, shutdown) = start(router.address, node("d0", Role::Decode), &token);
    router.until("ready", |now| now.find("d0").is_some_and(|member| member.ready())).await;
    let member = router.members.snapshot().find("d0").unwrap().clone();
    assert_eq!(member.join.grpc_address, "127.0.0.1:7001");
    assert_eq!(member.report.running, 2);
    assert_eq!(events.recv().await.unwrap(), JoinEvent::Joined { member_id: member.id.clone() });

    let channel = cluster::connect_lazy(&router.address.to_string(), &token).unwrap();
    let status =
        cluster::channel::cluster_client(channel).status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.requests_running, status.requests_queued, status.model.as_str()), (3, 4, "tiny"));
    assert_eq!(status.members.len(), 1);

    assert!(router.members.drain("d0"));
    assert_eq!(tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap(), JoinEvent::Drain);
    shutdown.cancel();
    assert_eq!(task.await.unwrap(), Ok(()));
    router.until("gone", |now| now.members.is_empty()).await;
}

/// Protects: who must not be in ends with a message that names what differs, and is not let in.
#[tokio::test]
async fn refusals_end_the_node() {
    let token = ClusterToken::generate().unwrap();
    let router = Router::start(any_port(), &token).await;
    let at = router.address;
    let wrong = start(at, node("d0", Role::Decode), &ClusterToken::generate().unwrap());
    assert_eq!(refusal(wrong).await, format!("router {at} refused this node: wrong cluster token"));

    let (_task, _events, _shutdown) = start(at, node("d0", Role::Decode), &token);
    router.until("joined", |now| !now.members.is_empty()).await;
    let mut other = node("p0", Role::Prefill);
    other.identity.as_mut().unwrap().weights = "fp8".into();
    assert_eq!(
        refusal(start(at, other, &token)).await,
        format!(
            "router {at} refused this node: weights identity of node p0 is fp8, the cluster's is w \
             (--allow-mixed-weights permits it)"
        )
    );
    let mut other = node("p0", Role::Prefill);
    let ours = proto::PROTOCOL;
    other.protocol = ours + 1;
    assert_eq!(
        refusal(start(at, other, &token)).await,
        format!(
            "router {at} refused this node: protocol of node p0 is {}, the router's is {ours} \
             (run the same baton everywhere)",
            ours + 1
        )
    );
    assert_eq!(router.members.snapshot().members.len(), 1);
}

/// Protects: each of several routers has a node by itself; what one does, be it to refuse the node or to end, costs it no other,
/// and only when all refuse it does it end.
#[tokio::test]
async fn several_routers_have_a_node_each_by_itself() {
    let (token, other) = (ClusterToken::generate().unwrap(), ClusterToken::generate().unwrap());
    let [first, second] = [Router::start(any_port(), &token).await, Router::start(any_port(), &token).await];
    let [stranger, another] =
        [Router::start(any_port(), &other).await, Router::start(any_port(), &other).await];
    let routers = [first.address, stranger.address, second.address];
    let (task, mut events, shutdown) = start_at(&routers, node("d0", Role::Decode), &token);
    for router in [&first, &second] {
        router.until("ready", |now| now.find("d0").is_some_and(|member| member.ready())).await;
    }
    let refused = async {
        while other.refusals().all().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("a refusal");
    first.shutdown.cancel();
    first.task.await.unwrap();
    while !matches!(events.recv().await, Some(JoinEvent::Lost { .. })) {}
    assert!(second.members.drain("d0"));
    while events.recv().await != Some(JoinEvent::Drain) {}
    shutdown.cancel();
    assert_eq!(task.await.unwrap(), Ok(()));

    let strangers = start_at(&[stranger.address, another.address], node("d0", Role::Decode), &token);
    assert!(refusal(strangers).await.ends_with("refused this node: wrong cluster token"));
}

/// Protects: a node outlives its router and is in again when one is back, and a node may start before its router.
#[tokio::test]
async fn a_node_comes_back() {
    let token = ClusterToken::generate().unwrap();
    let first = Router::start(any_port(), &token).await;
    let address = first.address;
    let (task, mut events, shutdown) = start(address, node("d0", Role::Decode), &token);
    first.until("ready", |now| now.find("d0").is_some_and(|member| member.ready())).await;
    // The server ends by itself: no heartbeat keeps it.
    first.shutdown.cancel();
    first.task.await.unwrap();
    let second = Router::start(address, &token).await;
    second.until("back", |now| now.find("d0").is_some_and(|member| member.ready())).await;
    assert!(matches!(events.recv().await, Some(JoinEvent::Joined { .. })));
    assert!(matches!(events.recv().await, Some(JoinEvent::Lost { .. })));
    assert!(matches!(events.recv().await, Some(JoinEvent::Joined { .. })));
    shutdown.cancel();
    assert_eq!(task.await.unwrap(), Ok(()));
}
