//! A process's certificate, and whom it talks to: nodes are called by the router, the router by nodes whose join token still
//! stands; and nodes exchange caches with nodes whose token was not revoked.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use webpki::EndEntityCert;

use super::revocations::Revocations;
use super::standing::{Called, Standing};
use super::{NODE, ROUTER, TOKEN_SUFFIX};

/// A peer that is not through its handshake by then is not heard.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// What a node hears whose join token was revoked.
pub(crate) const REVOKED: &str = "the join token of this node was revoked";

/// The cryptography of who calls a node to send it a cache: AES-128 first, whose 10 rounds of the 14 of AES-256 show in what
/// a core encrypts. The one who calls says what comes first.
pub fn bulk_provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// Certificate, key and authority of one process.
pub struct Identity {
    cert_pem: String,
    key_pem: String,
    authority_pem: String,
    peers: Peers,
}

/// Who may call this process.
enum Peers {
    /// The router: this is a node, which has heard of these.
    Router(Arc<Revocations>),
    /// Nodes whose token stands: this is the router.
    Nodes(Arc<Standing>),
}

/// Who calls the router.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Id of the join token that it came in by.
    pub token: String,
}

impl Identity {
    /// Of the router with the authority in `folder`.
    pub(super) fn router(cert_pem: &str, authority_pem: &str, key_pem: &str, folder: &Path) -> Identity {
        let peers = Peers::Nodes(Arc::new(Standing::of(folder)));
        Identity {
            // The authority goes along: those who have no certificate yet know it by its fingerprint.
            cert_pem: format!("{cert_pem}{authority_pem}"),
            key_pem: key_pem.into(),
            authority_pem: authority_pem.into(),
            peers,
        }
    }

    /// Of a node.
    pub(super) fn node(cert_pem: String, authority_pem: String, key_pem: String) -> Identity {
        Identity { cert_pem, key_pem, authority_pem, peers: Peers::Router(Arc::default()) }
    }

    /// How to serve gRPC. Everybody shows a certificate, except who comes to the router for one.
    pub(crate) fn server(&self) -> Result<ServerConfig, rustls::Error> {
        let mut server = self.serving(matches!(self.peers, Peers::Nodes(_)))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        Ok(server)
    }

    /// How to call: the router calls nodes whose token stands, nodes call the router.
    pub(crate) fn client(&self, endpoint: Endpoint) -> Result<Endpoint, Box<dyn Error>> {
        let tls = ClientTlsConfig::new()
            .identity(tonic::transport::Identity::from_pem(&self.cert_pem, &self.key_pem))
            .timeout(HANDSHAKE);
        Ok(match &self.peers {
            Peers::Router(_) => {
                let authority = Certificate::from_pem(&self.authority_pem);
                endpoint.tls_config(tls.ca_certificate(authority).domain_name(ROUTER))?
            }
            Peers::Nodes(standing) => {
                let provider = Arc::new(ring::default_provider());
                let signed = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider).build()?;
                let called = Arc::new(Called { signed, standing: standing.clone() });
                endpoint.tls_config_with_verifier(tls.domain_name(NODE), called)?
            }
        })
    }

    /// TLS 1.3 between nodes, certificates of both ends: to serve with, to call with, and the name of who is called.
    pub fn nodes(
        &self,
    ) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>, ServerName<'static>), rustls::Error> {
        let mut server = self.serving(false)?;
        // An idle connection on which something has come is not used again: nothing comes unasked.
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(Arc::new(bulk_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain()?, self.key()?)?;
        // Every connection shows certificates anew.
        client.resumption = Resumption::disabled();
        let name = ServerName::try_from(NODE).map_err(|error| wrong(&error))?;
        Ok((Arc::new(server), Arc::new(client), name))
    }

    fn serving(&self, nameless: bool) -> Result<ServerConfig, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider.clone());
        let verifier = if nameless { verifier.allow_unauthenticated() } else { verifier };
        ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier.build().map_err(|error| wrong(&error))?)
            .with_single_cert(self.chain()?, self.key()?)
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, rustls::Error> {
        let chain = CertificateDer::pem_slice_iter(self.cert_pem.as_bytes()).collect::<Result<_, _>>();
        chain.map_err(|error| wrong(&error))
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, rustls::Error> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|error| wrong(&error))
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, rustls::Error> {
        let authority = CertificateDer::from_pem_slice(self.authority_pem.as_bytes());
        let mut roots = RootCertStore::empty();
        roots.add(authority.map_err(|error| wrong(&error))?)?;
        Ok(Arc::new(roots))
    }

    /// Whether who shows this certificate, which the authority has signed, may call; the router learns who it is. The error
    /// says why not.
    pub(crate) fn admits(&self, certs: &[CertificateDer<'_>]) -> Result<Option<Caller>, &'static str> {
        let cert = certs.first().ok_or("no certificate")?;
        let cert = EndEntityCert::try_from(cert).map_err(|_| "a certificate that cannot be read")?;
        let names: Vec<&str> = cert.valid_dns_names().collect();
        match &self.peers {
            Peers::Router(_) if names.contains(&ROUTER) => Ok(None),
            Peers::Router(_) => Err("not the router's certificate"),
            Peers::Nodes(standing) => match token_of(certs).filter(|_| names.contains(&NODE)) {
                Some(token) if standing.holds(&token) => Ok(Some(Caller { token })),
                Some(_) => Err(REVOKED),
                None => Err("not a node's certificate"),
            },
        }
    }

    /// Which join tokens were revoked, as this node has heard; `None` of the router, which reads their file.
    pub fn revocations(&self) -> Option<&Arc<Revocations>> {
        match &self.peers {
            Peers::Router(revocations) => Some(revocations),
            Peers::Nodes(_) => None,
        }
    }

    /// Of the router: ids of the join tokens that are revoked, read anew.
    pub(crate) fn revoked(&self) -> Vec<String> {
        match &self.peers {
            Peers::Router(_) => Vec::new(),
            Peers::Nodes(standing) => standing.revoked(),
        }
    }
}

/// Id of the join token in a node's certificate.
pub(super) fn token_of(certs: &[CertificateDer<'_>]) -> Option<String> {
    let cert = EndEntityCert::try_from(certs.first()?).ok()?;
    cert.valid_dns_names().find_map(|name| name.strip_suffix(TOKEN_SUFFIX)).map(str::to_owned)
}

fn wrong(error: &dyn fmt::Display) -> rustls::Error {
    rustls::Error::General(error.to_string())
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(certificate, key)")
    }
}
