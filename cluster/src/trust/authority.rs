//! The cluster's certificate authority: made at the first start, kept in a directory that only its owner may read. The router
//! has it; nobody else needs it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};

use super::{Identity, NODE, ROUTER, TOKEN_SUFFIX, private_file};
use crate::auth::{ClusterToken, TokenError};
use crate::small_file::{self, TEXT_BYTES_MAX};

const CERT: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const SECRET: &str = "cluster-secret";

/// A P-256 point, uncompressed.
const POINT_BYTES: usize = 65;

/// A cluster's authority, in its directory.
pub struct Authority {
    folder: PathBuf,
    cert_pem: String,
    fingerprint: [u8; 32],
    issuer: Issuer<'static, KeyPair>,
    secret: ClusterToken,
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A file holds something else, or a certificate cannot be made.
    #[error("{}: {reason}", path.display())]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The secret of the cluster.
    #[error(transparent)]
    Secret(#[from] TokenError),
}

impl Authority {
    /// The authority in `folder`, made if there is none.
    pub fn open(folder: &Path) -> Result<Authority, AuthorityError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |error| AuthorityError::Io { path, error }
        };
        private_file::folder(folder).map_err(io(folder))?;
        let _lock = private_file::lock(folder).map_err(io(folder))?;
        let (cert, key, secret) = (folder.join(CERT), folder.join(KEY), folder.join(SECRET));
        let wrong = |path: &Path, reason: String| AuthorityError::Certificate { path: path.into(), reason };
        if !cert.exists() {
            // The certificate last: where it is, the rest is.
            let pair = KeyPair::generate().map_err(|error| wrong(&key, error.to_string()))?;
            let made = params().self_signed(&pair);
            let made = made.map_err(|error| wrong(&cert, error.to_string()))?;
            private_file::write(&key, pair.serialize_pem().as_bytes()).map_err(io(&key))?;
            let token = ClusterToken::generate()?;
            private_file::write(&secret, token.expose().as_bytes()).map_err(io(&secret))?;
            private_file::write(&cert, made.pem().as_bytes()).map_err(io(&cert))?;
        }
        let cert_pem = small_file::text(&cert, TEXT_BYTES_MAX).map_err(io(&cert))?;
        let der = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|error| wrong(&cert, error.to_string()))?;
        let pair = small_file::text(&key, TEXT_BYTES_MAX).map_err(io(&key))?;
        let pair = KeyPair::from_pem(&pair).map_err(|error| wrong(&key, error.to_string()))?;
        Ok(Authority {
            folder: folder.into(),
            fingerprint: Sha256::digest(&der).into(),
            cert_pem,
            // What it signs with: its name.
            issuer: Issuer::new(params(), pair),
            secret: ClusterToken::read(&secret)?,
        })
    }

    /// The directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// SHA-256 of the authority's certificate, which join tokens carry.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// What the router serves and calls with: the cluster's secret and a certificate as the router, new at every start.
    pub fn router(&self) -> Result<ClusterToken, AuthorityError> {
        let failed = |error: rcgen::Error| self.failed(&error);
        let key = KeyPair::generate().map_err(failed)?;
        let cert = leaf(vec![ROUTER.into()]).and_then(|params| params.signed_by(&key, &self.issuer));
        let identity = Identity::router(
            &cert.map_err(failed)?.pem(),
            &self.cert_pem,
            &key.serialize_pem(),
            self.folder(),
        );
        Ok(self.secret.clone().with_identity(Arc::new(identity)))
    }

    /// A certificate for the node that came in by the token `id` and has the P-256 key whose point is `public_key`.
    pub(super) fn certify(&self, id: &str, public_key: &[u8]) -> Result<String, AuthorityError> {
        let failed = |error: rcgen::Error| self.failed(&error);
        if public_key.len() != POINT_BYTES {
            let reason = format!("a public key of {} bytes: expected {POINT_BYTES}", public_key.len());
            return Err(AuthorityError::Certificate { path: self.folder.clone(), reason });
        }
        let params = leaf(vec![NODE.into(), format!("{id}{TOKEN_SUFFIX}")]).map_err(failed)?;
        Ok(params.signed_by(&Point(public_key), &self.issuer).map_err(failed)?.pem())
    }

    pub(super) fn certificate(&self) -> &str {
        &self.cert_pem
    }

    pub(super) fn secret(&self) -> &ClusterToken {
        &self.secret
    }

    fn failed(&self, error: &rcgen::Error) -> AuthorityError {
        AuthorityError::Certificate { path: self.folder.clone(), reason: error.to_string() }
    }
}

fn params() -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "baton cluster");
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    undated(&mut params);
    params
}

fn leaf(names: Vec<String>) -> Result<CertificateParams, rcgen::Error> {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, names[0].clone());
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = name;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Routers call nodes and nodes call routers.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    undated(&mut params);
    Ok(params)
}

/// Certificates say who somebody is, and not until when: a node's key ends with its process, and trust in it with its join token,
/// whatever the clocks of the machines say.
fn undated(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(1970, 1, 1);
    params.not_after = date_time_ymd(9999, 12, 31);
}

/// A node's public key. That it has the private one shows at the first connection with the certificate.
struct Point<'a>(&'a [u8]);

impl PublicKeyData for Point<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;
    use crate::Tokens;
    use crate::trust::pinned::Pinned;

    /// Protects: a machine whose clock stands at 1970, or a process that runs for years, is still known.
    #[test]
    fn certificates_hold_whatever_the_clock_says() {
        let folder = std::env::temp_dir().join(format!("baton-undated-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        let authority = Authority::open(&folder).unwrap();
        let key = KeyPair::generate().unwrap();
        let cert = authority.certify("ab", key.public_key_raw()).unwrap();
        let [cert, ca] = [&cert, authority.certificate()]
            .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap());
        let name = ServerName::try_from(NODE).unwrap();
        for seconds in [0, 4_000_000_000, 250_000_000_000] {
            let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            let pinned = Pinned::new(authority.fingerprint());
            let verified = pinned.verify_server_cert(&cert, std::slice::from_ref(&ca), &name, &[], now);
            assert!(verified.is_ok(), "{seconds} s after 1970: {verified:?}");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    /// Made once, private, and the same when it is opened again.
    #[test]
    fn made_once() {
        let folder = std::env::temp_dir().join(format!("baton-authority-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        let first = Authority::open(&folder).unwrap();
        let again = Authority::open(&folder).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(first.secret().expose(), again.secret().expose());
        for file in [KEY, SECRET] {
            let found = fs::metadata(folder.join(file)).unwrap();
            assert_eq!(
                std::os::unix::fs::PermissionsExt::mode(&found.permissions()) & 0o777,
                0o600,
                "{file}"
            );
        }
        assert!(first.certify("ab", &[4; 64]).is_err());
        // No file of the directory is read without end.
        for file in [CERT, KEY, SECRET, "join-tokens.json"] {
            let (path, aside) = (folder.join(file), folder.join("aside"));
            let was_there = fs::rename(&path, &aside).is_ok();
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            let open = || Authority::open(&folder).err().map(|error| error.to_string());
            let list = || Tokens::read(&folder).err().map(|error| error.to_string());
            let refused = if was_there { open() } else { list() }.unwrap();
            assert!(refused.contains(file) && refused.contains("more than"), "{refused}");
            fs::remove_file(&path).unwrap();
            let _ = fs::rename(&aside, &path);
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
