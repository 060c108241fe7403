//! Which join tokens stand, as the router knows it by their file: for who calls it, and for whom it calls ([`Called`]).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use super::Tokens;
use super::identity::token_of;

/// The file of tokens is read again this often.
pub(crate) const TOKENS_AGE_MAX: Duration = Duration::from_secs(1);

/// Which tokens stand, by their file.
#[derive(Debug)]
pub(super) struct Standing {
    folder: PathBuf,
    read: Mutex<Read>,
}

/// What the file said when it could be read last.
#[derive(Debug, Default)]
struct Read {
    at: Option<Instant>,
    tokens: Tokens,
    /// It cannot be read since, and that has been said.
    broken: bool,
}

impl Standing {
    /// Of the cluster in `folder`.
    pub fn of(folder: &Path) -> Standing {
        Standing { folder: folder.into(), read: Mutex::default() }
    }

    /// Whether nodes that came in by this token belong to the cluster.
    pub fn holds(&self, token: &str) -> bool {
        let read = self.read(TOKENS_AGE_MAX);
        if read.tokens.tokens.iter().any(|known| known.id == token) {
            return read.tokens.stands(token);
        }
        drop(read);
        // Its certificate is ours, so the token may be younger than what was read.
        self.read(Duration::ZERO).tokens.stands(token)
    }

    /// Ids of the tokens that are revoked, by the file as it is now.
    pub fn revoked(&self) -> Vec<String> {
        let read = self.read(Duration::ZERO);
        let revoked = read.tokens.tokens.iter().filter(|token| token.revoked.is_some());
        revoked.map(|token| token.id.clone()).collect()
    }

    /// What the file said, at the longest `age` ago.
    fn read(&self, age: Duration) -> MutexGuard<'_, Read> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.at.is_none_or(|at| at.elapsed() > age) {
            match Tokens::read(&self.folder) {
                Ok(tokens) => *read = Read { at: Some(Instant::now()), tokens, broken: false },
                Err(_) if read.broken => {}
                Err(error) => {
                    read.broken = true;
                    tracing::warn!("{error}; join tokens stay as they were");
                }
            }
        }
        read
    }
}

/// Whom the router calls: certified by the authority, by a token that stands.
#[derive(Debug)]
pub(super) struct Called {
    pub signed: Arc<WebPkiServerVerifier>,
    pub standing: Arc<Standing>,
}

impl ServerCertVerifier for Called {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.signed.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        match token_of(std::slice::from_ref(end_entity)) {
            Some(token) if self.standing.holds(&token) => Ok(verified),
            _ => Err(CertificateError::Revoked.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}
