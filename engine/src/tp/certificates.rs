//! Certificates for tests of the links between ranks, as a cluster's authority makes them.

use std::sync::Arc;

use kvtransfer::transport::tls::Tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

const NAME: &str = "node.test";

/// Of one cluster.
pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }
}

/// A process with a certificate of `own`, which trusts those of `trusted`.
pub(super) fn tls(own: &Authority, trusted: &Authority) -> Tls {
    let key = KeyPair::generate().unwrap();
    let cert = CertificateParams::new([NAME.to_owned()]).unwrap().signed_by(&key, &own.0).unwrap();
    let chain = vec![cert.der().clone()];
    let private = || PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Tls { client: client(trusted, Some((chain.clone(), private()))), ..server(trusted, chain, private()) }
}

/// As [`tls`], but it shows no certificate when it calls.
pub(super) fn nameless(own: &Authority) -> Tls {
    Tls { client: client(own, None), ..tls(own, own) }
}

type Chain = Vec<rustls::pki_types::CertificateDer<'static>>;

fn roots(trusted: &Authority) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.0.der().clone()).unwrap();
    Arc::new(roots)
}

fn client(trusted: &Authority, shown: Option<(Chain, PrivateKeyDer<'static>)>) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots(trusted));
    Arc::new(match shown {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
        None => config.with_no_client_auth(),
    })
}

fn server(trusted: &Authority, chain: Chain, key: PrivateKeyDer<'static>) -> Tls {
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(trusted), provider.clone());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    server.send_tls13_tickets = 0;
    let name = ServerName::try_from(NAME).unwrap();
    Tls { server: Arc::new(server), client: client(trusted, None), name, peers: None }
}
