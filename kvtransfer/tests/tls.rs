//! Whole sessions over TLS on loopback: right bytes, and only between those that one authority knows.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backend::{DType, KvSpec};
use common::net::{LOCAL, expect_all, open, push_all, session};
use common::{CLOSE, Cache, Case, MemExport};
use kvtransfer::transport::Dialer;
use kvtransfer::transport::tls::{CertificateDer, Peers, Tls, TlsDialer};
use kvtransfer::transport::ucx::{Way, Ways, available};
use kvtransfer::wire::Incoming;
use kvtransfer::{Limits, OnTurned, Receiver, Sender, SessionError, Turned};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

const NAME: &str = "node.test";

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A process with a certificate of `own`, which trusts those of `trusted`.
fn tls(own: &Authority, trusted: &Authority) -> Tls {
    let key = KeyPair::generate().unwrap();
    let cert = CertificateParams::new([NAME.to_owned()]).unwrap().signed_by(&key, own).unwrap();
    let chain = vec![cert.der().clone()];
    let private = || PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(trusted.der().clone()).unwrap();
    let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), private())
        .unwrap();
    server.send_tls13_tickets = 0;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, private())
        .unwrap();
    let name = ServerName::try_from(NAME).unwrap();
    Tls { server: Arc::new(server), client: Arc::new(client), name, peers: None }
}

fn case(tokens: u32) -> Case {
    let spec = || vec![KvSpec::gqa(4, 8, 0..8, 64, DType::BF16)];
    Case::new(spec(), spec(), 0..tokens)
}

/// Sessions one after another, over connections that are kept, land the right bytes; nothing of them is on the wire in clear
/// (a peer that speaks no TLS hears nothing), and the next session is as good as the first.
#[test]
fn sessions_land_over_tls() {
    let ours = authority();
    let limits = Limits { frame_bytes: 100_000, ..Limits::default() };
    let receiver = Receiver::bind_with(LOCAL, limits.clone(), Some(tls(&ours, &ours))).unwrap();
    let address = receiver.local_addr().to_string();
    let sender = Sender::with_dialer(limits, Box::new(TlsDialer(tls(&ours, &ours))));
    for tokens in [0, 1, 700, 700] {
        let case = case(tokens);
        let (pushed, landed) = session(&case, &sender, &receiver, &address);
        let summary = landed.result.unwrap();
        assert_eq!((summary.bytes, summary.close), (pushed.unwrap().bytes, CLOSE));
        assert!(landed.landing.cache.is_right());
        let mut plain = TcpStream::connect(&address).unwrap();
        plain.write_all(&[0x42; 64]).unwrap();
        let mut heard = Vec::new();
        let _ = plain.read_to_end(&mut heard);
        assert!(heard.len() < 64, "{heard:?}");
    }
}

/// Neither end talks to one that another authority has certified.
#[test]
fn strangers_are_refused_both_ways() {
    let (ours, theirs) = (authority(), authority());
    let (tell, told) = std::sync::mpsc::channel();
    let turned = OnTurned::new(move |turned| {
        if let Turned::Handshake(error) = turned {
            // A test that has ended does not listen.
            let _ = tell.send(error.to_string());
        }
    });
    let own = Some(tls(&ours, &ours));
    let receiver = Receiver::bind_counted(LOCAL, Limits::default(), own, turned).unwrap();
    let address = receiver.local_addr().to_string();
    let within = Duration::from_secs(10);
    // A receiver that the sender does not know.
    assert!(TlsDialer(tls(&ours, &theirs)).dial(&address, within).is_err());
    // A sender that the receiver does not know: it hears so as soon as it listens.
    let mut wire = TlsDialer(tls(&theirs, &ours)).dial(&address, within).unwrap();
    assert!(wire.source.head(None).is_err());
    let mut told = std::iter::from_fn(|| told.recv_timeout(within).ok());
    assert!(told.any(|reason: String| reason.contains("invalid peer certificate")), "nobody was told");
    // One that says nothing is given up on.
    let silent = std::net::TcpListener::bind(LOCAL).unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    assert!(TlsDialer(tls(&ours, &ours)).dial(&silent, Duration::from_millis(50)).is_err());
}

/// Certificates that were revoked, as one process has heard.
#[derive(Default)]
struct Revoked(Mutex<Vec<CertificateDer<'static>>>, AtomicU64);

impl Revoked {
    fn add(&self, cert: &CertificateDer<'static>) {
        self.0.lock().unwrap().push(cert.clone());
        self.1.fetch_add(1, Ordering::Release);
    }
}

impl Peers for Revoked {
    fn version(&self) -> u64 {
        self.1.load(Ordering::Acquire)
    }

    fn stands(&self, certs: &[CertificateDer<'_>]) -> bool {
        certs.first().is_some_and(|cert| !self.0.lock().unwrap().contains(cert))
    }
}

/// The certificate that `tls` shows.
fn cert(tls: &Tls) -> CertificateDer<'static> {
    tls.client
        .client_auth_cert_resolver
        .resolve(&[], &[rustls::SignatureScheme::ECDSA_NISTP256_SHA256])
        .unwrap()
        .cert[0]
        .clone()
}

/// Tells `tls` who was revoked.
fn told(tls: Tls) -> (Tls, Arc<Revoked>) {
    let revoked = Arc::<Revoked>::default();
    (Tls { peers: Some(revoked.clone()), ..tls }, revoked)
}

/// Slow enough that a session is under way for a while.
fn slow(ways: Ways) -> Limits {
    Limits { rate_bytes_per_s: Some(1 << 20), frame_bytes: 16 << 10, ways, ..Limits::default() }
}

/// What payloads can go by: the connection itself, and shared memory where there is UCX.
fn ways() -> Vec<(Ways, Way)> {
    let ucx = available();
    if let Err(why) = &ucx {
        println!("skipped: shared memory, {why}");
        assert!(std::env::var_os("BATON_NEEDS_UCX").is_none(), "{why}");
    }
    let shm = ucx.is_ok().then_some((Ways { shm: true, ..Ways::NONE }, Way::Shm));
    [(Ways::NONE, Way::Stream)].into_iter().chain(shm).collect()
}

/// Sends until payloads go by `way`, on which both ends agree while the first ones go by the connection.
fn settle(sender: &Sender, receiver: &Receiver, way: Way) {
    let begun = Instant::now();
    while sender.links().first().is_none_or(|link| link.way != way) {
        assert!(begun.elapsed() < Duration::from_secs(10), "nothing goes by {way:?}");
        let (pushed, landed) = session(&case(1), sender, receiver, &receiver.local_addr().to_string());
        assert!(pushed.is_ok() && landed.result.is_ok());
    }
}

fn sent(sender: &Sender) -> u64 {
    sender.links().iter().map(|link| link.bytes).sum()
}

/// Waits until more has been sent than `before`.
fn under_way(sender: &Sender, before: u64) {
    let begun = Instant::now();
    while sent(sender) == before {
        assert!(begun.elapsed() < Duration::from_secs(10), "nothing is sent");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A sender that was revoked is cut off in the middle of a session, which fails at once and says why; it gets no other
/// connection, and who sends to the same receiver does not notice. The sender here has not heard that it was revoked.
#[test]
fn a_revoked_sender_is_cut_off() {
    ways().into_iter().for_each(|(ways, way)| cut_off_sender(ways, way));
}

fn cut_off_sender(ways: Ways, way: Way) {
    let ours = authority();
    let (counts, counted) = std::sync::mpsc::channel();
    let turned = OnTurned::new(move |turned| {
        if let Turned::Because(reason) = turned {
            // A test that has ended does not listen.
            let _ = counts.send(reason);
        }
    });
    let (own, revoked) = told(tls(&ours, &ours));
    let limits = Limits { ways, ..Limits::default() };
    let receiver = Receiver::bind_counted(LOCAL, limits, Some(own), turned).unwrap();
    let address = receiver.local_addr().to_string();
    let [bad, good] = [tls(&ours, &ours), tls(&ours, &ours)];
    let senders = [&bad, &good].map(|tls| Sender::with_dialer(slow(ways), Box::new(TlsDialer(tls.clone()))));
    senders.iter().for_each(|sender| settle(sender, &receiver, way));
    let before = senders.each_ref().map(sent);
    // 4 layers x 2 planes x 8 heads x 64 x 2 B = 8 KiB per token: 1.6 MB, a second and a half.
    let ends: Vec<_> = senders
        .iter()
        .map(|sender| {
            let case = case(200);
            let landed = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
            let (push, pushed) = open(&case, 0, sender, &[vec![address.clone()]]);
            push_all(&case, 0, &push, 32, 16, true);
            push.close(CLOSE);
            (pushed, landed)
        })
        .collect();
    senders.iter().zip(before).for_each(|(sender, before)| under_way(sender, before));
    assert!(senders.iter().all(|sender| sender.links()[0].way == way));
    revoked.add(&cert(&bad));
    let (_, cut) = ends[0].1.recv().unwrap();
    assert!(matches!(cut.result, Err(SessionError::Revoked { .. })), "{:?}", cut.result);
    assert!(ends[0].0.recv().unwrap().is_err());
    let mut wire = TlsDialer(bad).dial(&address, Duration::from_secs(10)).unwrap();
    assert!(!matches!(wire.source.head(None), Ok(Incoming::Head(_))));
    assert_eq!(counted.recv_timeout(Duration::from_secs(10)), Ok("join token revoked"));
    let (_, whole) = ends[1].1.recv().unwrap();
    assert!(whole.result.is_ok() && ends[1].0.recv().unwrap().is_ok());
    assert!(whole.landing.cache.is_right());
}

/// A receiver that was revoked gets nothing more of a session under way, and no further connection. It has not heard that it was
/// revoked.
#[test]
fn a_revoked_receiver_is_cut_off() {
    ways().into_iter().for_each(|(ways, way)| cut_off_receiver(ways, way));
}

fn cut_off_receiver(ways: Ways, way: Way) {
    let ours = authority();
    let theirs = tls(&ours, &ours);
    let limits = Limits { ways, ..Limits::default() };
    let receiver = Receiver::bind_with(LOCAL, limits, Some(theirs.clone())).unwrap();
    let address = receiver.local_addr().to_string();
    let (own, revoked) = told(tls(&ours, &ours));
    let sender = Sender::with_dialer(slow(ways), Box::new(TlsDialer(own.clone())));
    settle(&sender, &receiver, way);
    let (before, case) = (sent(&sender), case(200));
    let landed = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, pushed) = open(&case, 0, &sender, &[vec![address.clone()]]);
    push_all(&case, 0, &push, 32, 16, true);
    push.close(CLOSE);
    under_way(&sender, before);
    assert_eq!(sender.links()[0].way, way);
    revoked.add(&cert(&theirs));
    assert_eq!(pushed.recv().unwrap(), Err(SessionError::Revoked { peer: address.clone() }));
    assert!(landed.recv().unwrap().1.result.is_err());
    let refused = TlsDialer(own).dial(&address, Duration::from_secs(10)).err().expect("refused");
    assert_eq!(refused.to_string(), "its join token was revoked");
}

/// What encryption costs on loopback: sessions of 64 MiB by turns in clear and over TLS, between the same two ends. Run by hand:
/// `cargo test --release -p kvtransfer --test tls -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn cost() {
    const RUNS: usize = 15;
    let ours = authority();
    let limits = || Limits { frame_bytes: 1 << 20, ..Limits::default() };
    // 16 layers x 2 planes x 8 heads x 128 x 2 B = 64 KiB per token, 1024 tokens.
    let spec = || vec![KvSpec::gqa(16, 8, 0..8, 128, DType::BF16)];
    let cache = Arc::new(Cache::full(&spec()[0], 0..1024, 64));
    let ends = [None, Some(tls(&ours, &ours))].map(|tls| {
        let receiver = Receiver::bind_with(LOCAL, limits(), tls.clone()).unwrap();
        let sender = match tls {
            None => Sender::new(limits()),
            Some(tls) => Sender::with_dialer(limits(), Box::new(TlsDialer(tls))),
        };
        (receiver, sender)
    });
    let mut rates = [const { Vec::new() }; 2];
    for _ in 0..RUNS {
        for ((receiver, sender), rates) in ends.iter().zip(&mut rates) {
            let case = Case::new(spec(), spec(), 0..1024);
            let landed = expect_all(&case, std::slice::from_ref(receiver), 64, true);
            let begun = Instant::now();
            let (push, end) = open(&case, 0, sender, &[vec![receiver.local_addr().to_string()]]);
            for layer in 0..16 {
                let cache = cache.clone();
                push.layer(MemExport { cache, layers: layer..layer + 1, tokens: 0..1024, direct: true });
            }
            push.close(CLOSE);
            let pushed = end.recv().unwrap().unwrap();
            rates.push(pushed.bytes as f64 / (pushed.acknowledged - begun).as_secs_f64() / 1e9);
            assert!(landed.iter().all(|(_, end)| end.result.is_ok()));
        }
    }
    let mut ratios: Vec<f64> = rates[0].iter().zip(&rates[1]).map(|(clear, tls)| tls / clear).collect();
    ratios.sort_by(f64::total_cmp);
    rates.iter_mut().for_each(|rates| rates.sort_by(f64::total_cmp));
    let median = |rates: &[f64]| rates[RUNS / 2];
    println!(
        "in clear {:.2} GB/s, over TLS 1.3 {:.2} GB/s (medians of {RUNS}); of neighbouring runs {:.2} of the rate",
        median(&rates[0]),
        median(&rates[1]),
        median(&ratios)
    );
}
