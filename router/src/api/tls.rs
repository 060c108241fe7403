//! HTTPS: the certificate from its files, read again when they change, so that a renewed one needs no restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use cluster::small_file::{self, TEXT_BYTES_MAX};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// The files are looked at this often.
const LOOK: Duration = Duration::from_secs(1);

/// Where a certificate and its key are, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, the server's own certificate first.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why HTTPS cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct TlsError {
    /// The file at fault.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The certificate in use.
#[derive(Debug)]
pub struct Certificate {
    files: TlsFiles,
    current: RwLock<(Seen, Arc<CertifiedKey>)>,
}

/// What changes with every change of the files.
type Seen = [Option<(SystemTime, u64)>; 2];

impl Certificate {
    /// Reads the files. Errors when they hold no certificate, no key, or do not belong together.
    pub fn read(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let seen = look(&files);
        let key = read(&files)?;
        Ok(Arc::new(Certificate { files, current: RwLock::new((seen, Arc::new(key))) }))
    }

    /// Takes connections with whatever certificate is the current one.
    pub fn acceptor(self: &Arc<Self>) -> Result<TlsAcceptor, TlsError> {
        let failed = |error: rustls::Error| self.failed(&error.to_string());
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// Follows the files until `shutdown`. Files that cannot be used leave the certificate as it is.
    pub async fn watch(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let certificate = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || certificate.follow()).await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => tracing::info!("certificate {} read again", self.files.cert.display()),
                Ok(Err(error)) => tracing::warn!("{error}; the certificate stays as it was"),
                Err(error) => tracing::warn!("{error}"),
            }
        }
    }

    /// Reads changed files; whether they were.
    fn follow(&self) -> Result<bool, TlsError> {
        let seen = look(&self.files);
        let old = self.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        if seen == old.0 {
            return Ok(false);
        }
        let read = read(&self.files);
        let new = read.as_ref().map_or(old.1, |key| Arc::new(key.clone()));
        // What was looked at is not looked at again: a certificate that was replaced before its key is said once.
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = (seen, new);
        read.map(|_| true)
    }

    fn failed(&self, reason: &str) -> TlsError {
        TlsError { path: self.files.cert.clone(), reason: reason.into() }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).1))
    }
}

fn look(files: &TlsFiles) -> Seen {
    [&files.cert, &files.key].map(|path| {
        let found = fs::metadata(path).ok()?;
        Some((found.modified().ok()?, found.len()))
    })
}

fn no_pem(error: &pem::Error) -> String {
    match error {
        pem::Error::NoItemsFound => "no private key in PEM".into(),
        error => error.to_string(),
    }
}

fn read(files: &TlsFiles) -> Result<CertifiedKey, TlsError> {
    let failed = |path: &Path, reason: String| TlsError { path: path.into(), reason };
    let text = |path: &Path| {
        let cannot = |error| failed(path, format!("cannot be read: {error}"));
        small_file::bytes(path, TEXT_BYTES_MAX).map_err(cannot)
    };
    let cert = text(&files.cert)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&cert).collect();
    let chain = chain.map_err(|error| failed(&files.cert, no_pem(&error)))?;
    if chain.is_empty() {
        return Err(failed(&files.cert, "no certificate in PEM".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(&text(&files.key)?)
        .map_err(|error| failed(&files.key, no_pem(&error)))?;
    CertifiedKey::from_der(chain, key, &ring::default_provider())
        .map_err(|error| failed(&files.cert, format!("does not belong to {}: {error}", files.key.display())))
}
