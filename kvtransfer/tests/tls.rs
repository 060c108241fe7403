//! Whole sessions over TLS on loopback: right bytes, and only between those that one authority knows.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use backend::{DType, KvSpec};
use common::net::{LOCAL, session};
use common::{CLOSE, Case};
use kvtransfer::transport::Dialer;
use kvtransfer::transport::tls::{Tls, TlsDialer};
use kvtransfer::{Limits, Receiver, Sender};
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
    Tls { server: Arc::new(server), client: Arc::new(client), name: ServerName::try_from(NAME).unwrap() }
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
    let receiver = Receiver::bind_with(LOCAL, Limits::default(), Some(tls(&ours, &ours))).unwrap();
    let address = receiver.local_addr().to_string();
    let within = Duration::from_secs(10);
    // A receiver that the sender does not know.
    assert!(TlsDialer(tls(&ours, &theirs)).dial(&address, within).is_err());
    // A sender that the receiver does not know: it hears so as soon as it listens.
    let mut wire = TlsDialer(tls(&theirs, &ours)).dial(&address, within).unwrap();
    assert!(wire.source.head(None).is_err());
    // One that says nothing is given up on.
    let silent = std::net::TcpListener::bind(LOCAL).unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    assert!(TlsDialer(tls(&ours, &ours)).dial(&silent, Duration::from_millis(50)).is_err());
}
