//! A cluster whose connections are TLS: how a node comes in, and who does not.

mod common;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::channel::{cluster_client, decode_client};
use cluster::{
    Authority, ClusterService, ClusterToken, Door, EnrollError, Enrolment, JoinToken, Members,
    MembershipConfig, Refusals, Tokens, connect_lazy, enroll, follow_revocations, join, server,
};
use common::node;
use proto::v1::decode_server::Decode;
use proto::v1::{
    DrainReply, DrainRequest, GenerateEvent, GenerateRequest, NodeReport, ProbeReply, ProbeRequest, Role,
    StatusRequest,
};
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Response, Status};

const PATIENCE: Duration = Duration::from_secs(30);

/// A router's port, and the authority behind it.
struct Router {
    folder: PathBuf,
    authority: Arc<Authority>,
    refusals: Arc<Refusals>,
    members: Members,
    address: SocketAddr,
    stop: CancellationToken,
}

impl Router {
    async fn start(name: &str) -> Router {
        let folder = std::env::temp_dir().join(format!("baton-trust-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        let authority = Arc::new(Authority::open(&folder).unwrap());
        let stop = CancellationToken::new();
        let members = Members::new(MembershipConfig::default());
        let service = ClusterService::new(members.clone(), Arc::new(|| (0, 0)), stop.clone());
        let service = server::cluster(service);
        let listener = server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (token, ends) = (authority.router().unwrap(), stop.clone());
        let refusals = Arc::clone(token.refusals());
        let (identity, follows, until) = (token.identity().unwrap().clone(), members.clone(), stop.clone());
        tokio::spawn(async move { follows.follow_tokens(identity, until).await });
        let open = Routes::new(Enrolment::service(Arc::clone(&authority), Arc::clone(&refusals)));
        tokio::spawn(async move {
            server::serve_open(listener, &token, Routes::new(service), open, ends, Duration::ZERO)
                .await
                .unwrap();
        });
        Router { folder, authority, refusals, members, address, stop }
    }

    fn token(&self, name: &str) -> JoinToken {
        let fingerprint = self.authority.fingerprint();
        Tokens::change(&self.folder, |tokens| tokens.create(name, fingerprint, 0, None)).unwrap()
    }

    async fn enroll(&self, token: &JoinToken) -> Result<ClusterToken, EnrollError> {
        enroll(&self.address.to_string(), token).await
    }

    async fn status(&self, token: &ClusterToken) -> Result<(), Status> {
        let channel = connect_lazy(&self.address.to_string(), token).unwrap();
        cluster_client(channel).status(StatusRequest {}).await.map(drop)
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A node's service that answers probes.
struct Node;

#[tonic::async_trait]
impl Decode for Node {
    type GenerateStream = tokio_stream::Empty<Result<GenerateEvent, Status>>;

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("only probes"))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeReply>, Status> {
        Ok(Response::new(ProbeReply { step_us: 7 }))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Err(Status::unimplemented("only probes"))
    }
}

/// What a cache travels through between nodes is the cipher that takes a core least.
#[tokio::test]
async fn nodes_agree_on_the_cheaper_cipher() {
    let router = Router::start("cipher").await;
    let [gpu, mac] = [router.enroll(&router.token("gpu")).await, router.enroll(&router.token("mac")).await];
    let (caller, called) = handshake(&gpu.unwrap(), &mac.unwrap());
    assert!(!caller.is_handshaking() && !called.is_handshaking());
    let suite = caller.negotiated_cipher_suite().map(|suite| suite.suite());
    assert_eq!(suite, Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
}

/// Two nodes as far as TLS takes them.
fn handshake(
    caller: &ClusterToken,
    called: &ClusterToken,
) -> (rustls::ClientConnection, rustls::ServerConnection) {
    let nodes = |token: &ClusterToken| token.identity().unwrap().nodes().unwrap();
    let ((_, client, name), (server, ..)) = (nodes(caller), nodes(called));
    let mut caller = rustls::ClientConnection::new(client, name).unwrap();
    let mut called = rustls::ServerConnection::new(server).unwrap();
    for _ in 0..4 {
        let mut flight = Vec::new();
        while caller.wants_write() {
            caller.write_tls(&mut flight).unwrap();
        }
        let mut sent = &flight[..];
        while !sent.is_empty() {
            called.read_tls(&mut sent).unwrap();
            called.process_new_packets().unwrap();
        }
        let mut flight = Vec::new();
        while called.wants_write() {
            called.write_tls(&mut flight).unwrap();
        }
        let mut sent = &flight[..];
        while !sent.is_empty() {
            caller.read_tls(&mut sent).unwrap();
            caller.process_new_packets().unwrap();
        }
    }
    (caller, called)
}

/// A node comes in by its token, calls the router, and is called by it; not by another node, though that one has a
/// certificate and the secret.
#[tokio::test]
async fn both_directions_are_mutual() {
    let router = Router::start("mutual").await;
    let mac = router.enroll(&router.token("mac")).await.unwrap();
    router.status(&mac).await.unwrap();

    let listener = server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (serving, stop) = (mac.clone(), router.stop.clone());
    tokio::spawn(async move {
        server::serve(listener, &serving, Routes::new(server::decode(Node)), stop, Duration::ZERO)
            .await
            .unwrap();
    });
    let probe = async |token: &ClusterToken| {
        let mut client = decode_client(connect_lazy(&address, token).unwrap());
        client.probe(ProbeRequest {}).await.map(|reply| reply.into_inner().step_us)
    };
    assert_eq!(probe(&router.authority.router().unwrap()).await.unwrap(), 7);
    let other = router.enroll(&router.token("other")).await.unwrap();
    // It takes who answers for the router and finds a node.
    assert_eq!(probe(&other).await.unwrap_err().code(), Code::Unavailable);
    // In clear, with the secret.
    assert!(probe(&ClusterToken::parse(other.expose()).unwrap()).await.is_err());
    counted(&mac, "not TLS").await;

    // Whoever trusts the cluster but has no certificate of it.
    let authority = Certificate::from_pem(fs::read(router.folder.join("ca-cert.pem")).unwrap());
    let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name("node.baton.internal");
    let stranger = async |tls: ClientTlsConfig| {
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
        let channel = InterceptedService::new(endpoint.connect_lazy(), mac.client());
        assert!(decode_client(channel).probe(ProbeRequest {}).await.is_err());
    };
    stranger(tls.clone()).await;
    counted(&mac, "no certificate").await;
    let forged = rcgen::generate_simple_self_signed(["router.baton.internal".to_owned()]).unwrap();
    let forged = tonic::transport::Identity::from_pem(forged.cert.pem(), forged.signing_key.serialize_pem());
    stranger(tls.identity(forged)).await;
    counted(&mac, "certificate of another cluster").await;
    // One that says nothing, and one that leaves, keep nobody out.
    let _silent = tokio::net::TcpStream::connect(&address).await.unwrap();
    drop(tokio::net::TcpStream::connect(&address).await.unwrap());
    assert_eq!(probe(&router.authority.router().unwrap()).await.unwrap(), 7);
}

/// Waits until somebody was turned away at a process's gRPC port for this reason: it counts when its peer has heard already.
async fn counted(token: &ClusterToken, reason: &str) {
    let begun = Instant::now();
    while !token.refusals().all().iter().any(|(door, why, _)| *door == Door::Grpc && *why == reason) {
        assert!(begun.elapsed() < PATIENCE, "no {reason:?} in {:?}", token.refusals().all());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whoever lacks the token, the certificate, the secret, or the right cluster stays out, and learns no more than that.
#[tokio::test]
async fn strangers_stay_out() {
    let (router, elsewhere) = (Router::start("ours").await, Router::start("elsewhere").await);
    let token = router.token("mac");
    let text = token.expose();

    // Another cluster's token: this router is not the one that it names.
    let error = router.enroll(&elsewhere.token("x")).await.unwrap_err();
    assert!(matches!(error, EnrollError::Stranger { .. }), "{error}");
    // A guess at the secret, with the right fingerprint.
    let (head, tail) = (&text[..text.len() - 129], &text[text.len() - 65..]);
    let forged = format!("{head}{}{tail}", "0".repeat(64));
    let error = router.enroll(&forged.parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, EnrollError::Refused { .. }), "{error}");
    assert!(
        error.to_string().ends_with("wrong join token, or one that has expired or was revoked"),
        "{error}"
    );
    // Expired.
    let fingerprint = router.authority.fingerprint();
    let expired =
        Tokens::change(&router.folder, |tokens| tokens.create("old", fingerprint, 0, Some(1))).unwrap();
    assert!(matches!(router.enroll(&expired).await.unwrap_err(), EnrollError::Refused { .. }));
    // Nobody there.
    let nobody = enroll("127.0.0.1:1", &token).await.unwrap_err();
    assert!(matches!(nobody, EnrollError::Away { .. }), "{nobody}");

    // The secret without a certificate: in clear, and over TLS.
    let mac = router.enroll(&token).await.unwrap();
    let secret = ClusterToken::parse(mac.expose()).unwrap();
    assert!(router.status(&secret).await.is_err());
    let authority = Certificate::from_pem(fs::read(router.folder.join("ca-cert.pem")).unwrap());
    let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name("router.baton.internal");
    let endpoint =
        Endpoint::from_shared(format!("https://{}", router.address)).unwrap().tls_config(tls).unwrap();
    let channel = InterceptedService::new(endpoint.connect_lazy(), secret.client());
    let refused = cluster_client(channel).status(StatusRequest {}).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "no certificate"));
    let all = router.refusals.all();
    for counted in [(Door::Join, "join token", 2), (Door::Grpc, "no certificate", 1)] {
        assert!(all.contains(&counted), "{all:?}");
    }
    // A certificate of another cluster.
    let theirs = elsewhere.enroll(&elsewhere.token("x")).await.unwrap();
    assert!(router.status(&theirs).await.is_err());
}

/// A revoked token lets nobody in, and what came in by it is refused from its next call on, and is a member no more; other nodes
/// hear of it and know its certificate, and go on as they were.
#[tokio::test]
async fn revoked_is_out() {
    let router = Router::start("revoked").await;
    let (gone, stays) = (router.token("gone"), router.token("stays"));
    let (out, inside) = (router.enroll(&gone).await.unwrap(), router.enroll(&stays).await.unwrap());
    router.status(&out).await.unwrap();
    let address = router.address.to_string();
    let mut follows = Vec::new();
    let mut joins = Vec::new();
    for (id, token) in [("out", &out), ("inside", &inside)] {
        let (address, token, stop) = (address.clone(), token.clone(), router.stop.clone());
        follows.push(tokio::spawn({
            let (address, token) = (address.clone(), token.clone());
            async move { follow_revocations(vec![address], &token).await }
        }));
        joins.push(tokio::spawn(async move {
            let report = || NodeReport { ready: true, ..NodeReport::default() };
            join(&address, node(id, Role::Decode), &token, report, |_| {}, stop).await
        }));
    }
    let mut changes = router.members.subscribe();
    let both = changes.wait_for(|now| now.find("out").is_some() && now.find("inside").is_some());
    drop(tokio::time::timeout(PATIENCE, both).await.expect("both are in"));
    let (of_inside, of_out) = handshake(&inside, &out);
    let certs = |certs: Option<&[CertificateDer<'static>]>| certs.unwrap().to_vec();
    let (cert_of_out, cert_of_inside) =
        (certs(of_inside.peer_certificates()), certs(of_out.peer_certificates()));
    let revocations = inside.identity().unwrap().revocations().unwrap().clone();
    let stands = |certs: &[CertificateDer<'_>]| revocations.stands(certs);
    assert!(stands(&cert_of_out) && stands(&cert_of_inside));

    Tokens::change(&router.folder, |tokens| tokens.revoke("gone", 1)).unwrap();
    assert!(matches!(router.enroll(&gone).await.unwrap_err(), EnrollError::Refused { .. }));
    let expelled = changes.wait_for(|now| now.find("out").is_none() && now.expelled.contains("out"));
    drop(tokio::time::timeout(PATIENCE, expelled).await.expect("it is out"));
    // Its process hears why, whichever of its calls is first.
    let wanted = format!("router {address} refused this node: the join token of this node was revoked");
    let (heard, joined) = (follows.remove(0), joins.remove(0));
    assert_eq!(tokio::time::timeout(PATIENCE, heard).await.unwrap().unwrap().to_string(), wanted);
    assert_eq!(
        tokio::time::timeout(PATIENCE, joined).await.unwrap().unwrap().unwrap_err().to_string(),
        wanted
    );
    let refused = router.status(&out).await.unwrap_err();
    assert_eq!(refused.message(), "the join token of this node was revoked");

    let begun = Instant::now();
    while stands(&cert_of_out) {
        assert!(begun.elapsed() < PATIENCE, "the other node does not hear of it");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(stands(&cert_of_inside) && revocations.version() == 1);
    // A token that was made a moment ago, and its nodes, are known at once.
    let young = router.enroll(&router.token("young")).await.unwrap();
    router.status(&young).await.unwrap();
    router.status(&inside).await.unwrap();
    assert!(router.members.snapshot().find("inside").is_some());
    assert!(!follows[0].is_finished() && !joins[0].is_finished());
}

/// The router does not call whoever answers with the certificate of a revoked token, at whatever address.
#[tokio::test]
async fn revoked_is_not_called() {
    let router = Router::start("called").await;
    let gone = router.token("gone");
    let node = router.enroll(&gone).await.unwrap();
    let listener = server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let stop = router.stop.clone();
    tokio::spawn(async move {
        server::serve(listener, &node, Routes::new(server::decode(Node)), stop, Duration::ZERO)
            .await
            .unwrap();
    });
    let token = router.authority.router().unwrap();
    let probe = async || {
        let mut client = decode_client(connect_lazy(&address, &token).unwrap());
        client.probe(ProbeRequest {}).await
    };
    assert_eq!(probe().await.unwrap().into_inner().step_us, 7);
    Tokens::change(&router.folder, |tokens| tokens.revoke("gone", 1)).unwrap();
    let begun = Instant::now();
    while probe().await.is_ok() {
        assert!(begun.elapsed() < PATIENCE, "still called");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
