//! A process's certificate, and whom it lets call: nodes are called by the router, the router by nodes whose join token still
//! stands.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig};
use webpki::EndEntityCert;

use super::{NODE, ROUTER, TOKEN_SUFFIX, Tokens};

/// A peer that is not through its handshake by then is not heard.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The file of tokens is read again this often, when somebody calls.
const TOKENS_AGE_MAX: Duration = Duration::from_secs(1);

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
    /// The router: this is a node.
    Router,
    /// Nodes whose token stands: this is the router.
    Nodes(Standing),
}

/// Which tokens stand, by their file.
struct Standing {
    folder: PathBuf,
    read: Mutex<Option<(Instant, Tokens)>>,
}

impl Identity {
    /// Of the router with the authority in `folder`.
    pub(super) fn router(cert_pem: &str, authority_pem: &str, key_pem: &str, folder: &Path) -> Identity {
        let peers = Peers::Nodes(Standing { folder: folder.into(), read: Mutex::default() });
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
        Identity { cert_pem, key_pem, authority_pem, peers: Peers::Router }
    }

    /// How to serve gRPC. Everybody shows a certificate, except who comes to the router for one.
    pub(crate) fn server(&self) -> Result<ServerConfig, rustls::Error> {
        let mut server = self.serving(matches!(self.peers, Peers::Nodes(_)))?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        Ok(server)
    }

    /// How to call: the router calls nodes, nodes call the router.
    pub(crate) fn client(&self) -> ClientTlsConfig {
        let name = match self.peers {
            Peers::Router => ROUTER,
            Peers::Nodes(_) => NODE,
        };
        ClientTlsConfig::new()
            .identity(tonic::transport::Identity::from_pem(&self.cert_pem, &self.key_pem))
            .ca_certificate(Certificate::from_pem(&self.authority_pem))
            .domain_name(name)
            .timeout(HANDSHAKE)
    }

    /// TLS 1.3 between nodes, certificates of both ends: to serve with, to call with, and the name of who is called.
    pub fn nodes(
        &self,
    ) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>, ServerName<'static>), rustls::Error> {
        let mut server = self.serving(false)?;
        // An idle connection on which something has come is not used again: nothing comes unasked.
        server.send_tls13_tickets = 0;
        let client = ClientConfig::builder_with_provider(Arc::new(bulk_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain()?, self.key()?)?;
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

    /// Whether who shows this certificate, which the authority has signed, may call. The error says why not.
    pub(crate) fn admits(&self, certs: &[CertificateDer<'_>]) -> Result<(), &'static str> {
        let cert = certs.first().ok_or("no certificate")?;
        let cert = EndEntityCert::try_from(cert).map_err(|_| "a certificate that cannot be read")?;
        let names: Vec<&str> = cert.valid_dns_names().collect();
        match &self.peers {
            Peers::Router if names.contains(&ROUTER) => Ok(()),
            Peers::Router => Err("not the router's certificate"),
            Peers::Nodes(standing) => {
                let token = names.iter().find_map(|name| name.strip_suffix(TOKEN_SUFFIX));
                match token.filter(|_| names.contains(&NODE)) {
                    Some(token) if standing.holds(token) => Ok(()),
                    Some(_) => Err("the join token of this node was revoked"),
                    None => Err("not a node's certificate"),
                }
            }
        }
    }
}

fn wrong(error: &dyn fmt::Display) -> rustls::Error {
    rustls::Error::General(error.to_string())
}

impl Standing {
    fn holds(&self, token: &str) -> bool {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.as_ref().is_none_or(|(at, _)| at.elapsed() > TOKENS_AGE_MAX) {
            match Tokens::read(&self.folder) {
                Ok(tokens) => *read = Some((Instant::now(), tokens)),
                Err(error) => tracing::warn!("{error}; join tokens stay as they were"),
            }
        }
        read.as_ref().is_some_and(|(_, tokens)| tokens.stands(token))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(certificate, key)")
    }
}
