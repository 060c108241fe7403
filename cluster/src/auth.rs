//! The cluster token: what every gRPC call in either direction carries, and who may be called in clear.
//!
//! Callers: [`crate::server`] wraps every service in [`ServerAuth`], [`crate::channel`] every channel in [`ClientAuth`].

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::refusals::{Door, Refusals};
use crate::small_file::{self, TOKEN_BYTES_MAX};
use crate::trust::Identity;

/// Random bytes in a token: 256 bits.
const TOKEN_BYTES: usize = 32;

/// Characters of a token as text, lowercase hex.
const TOKEN_CHARS: usize = 2 * TOKEN_BYTES;

/// The secret that makes a process part of a cluster. Its `Debug` form never shows it.
#[derive(Clone)]
pub struct ClusterToken {
    hex: Arc<str>,
    header: MetadataValue<Ascii>,
    /// Off loopback: who this process is, by certificate.
    identity: Option<Arc<Identity>>,
    /// Who was turned away by this process.
    refusals: Arc<Refusals>,
}

impl ClusterToken {
    /// A new random token. Errors when the machine has no randomness to give.
    pub fn generate() -> Result<ClusterToken, TokenError> {
        let mut bytes = [0u8; TOKEN_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| TokenError::Random(error.to_string()))?;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        ClusterToken::parse(&hex)
    }

    /// Reads a token from text: 64 hex digits, space around them is ignored.
    pub fn parse(text: &str) -> Result<ClusterToken, TokenError> {
        let text = text.trim();
        let chars = text.chars().count();
        if chars != TOKEN_CHARS {
            return Err(TokenError::Length { chars });
        }
        if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(TokenError::NotHex);
        }
        let hex = text.to_ascii_lowercase();
        let mut header: MetadataValue<Ascii> =
            format!("bearer {hex}").parse().map_err(|_| TokenError::NotHex)?;
        header.set_sensitive(true);
        Ok(ClusterToken { hex: hex.into(), header, identity: None, refusals: Arc::default() })
    }

    /// Reads a token from a file.
    pub fn read(path: &Path) -> Result<ClusterToken, TokenError> {
        let failed = |error| TokenError::File { path: path.into(), error };
        ClusterToken::parse(&small_file::text(path, TOKEN_BYTES_MAX).map_err(failed)?)
    }

    /// Writes the token to a new file that only its owner may read. Errors when the file is there already.
    pub fn write_new(&self, path: &Path) -> Result<(), TokenError> {
        let failed = |error| TokenError::File { path: path.into(), error };
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(failed)?;
        writeln!(file, "{}", self.hex).map_err(failed)
    }

    /// The token as text, to hand to a child process or to show once to the person who makes a cluster.
    pub fn expose(&self) -> &str {
        &self.hex
    }

    /// The same, of a process that has a certificate: all its connections are TLS.
    pub(crate) fn with_identity(self, identity: Arc<Identity>) -> ClusterToken {
        ClusterToken { identity: Some(identity), ..self }
    }

    /// The certificate of this process; `None`: it talks in clear.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.identity.as_ref()
    }

    /// Who was turned away by this process, at all its doors.
    pub fn refusals(&self) -> &Arc<Refusals> {
        &self.refusals
    }

    /// Puts the token into every call of a client.
    pub fn client(&self) -> ClientAuth {
        ClientAuth { header: self.header.clone() }
    }

    /// Refuses every call to a server that lacks the token.
    pub fn server(&self) -> ServerAuth {
        let refusals = Arc::clone(&self.refusals);
        ServerAuth { header: self.header.clone(), identity: self.identity.clone(), refusals }
    }
}

impl fmt::Debug for ClusterToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterToken(secret)")
    }
}

/// Client interceptor: adds the token.
#[derive(Clone)]
pub struct ClientAuth {
    header: MetadataValue<Ascii>,
}

impl Interceptor for ClientAuth {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(proto::AUTHORIZATION, self.header.clone());
        Ok(request)
    }
}

/// Server interceptor: compares the token in constant time, answers UNAUTHENTICATED to any other; and to whoever shows no
/// certificate that may call, where there are certificates.
#[derive(Clone)]
pub struct ServerAuth {
    header: MetadataValue<Ascii>,
    identity: Option<Arc<Identity>>,
    refusals: Arc<Refusals>,
}

impl Interceptor for ServerAuth {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(identity) = &self.identity {
            let certs = request.peer_certs().unwrap_or_default();
            match identity.admits(&certs) {
                Ok(caller) => _ = caller.map(|caller| request.extensions_mut().insert(caller)),
                Err(reason) => {
                    self.refusals.count(Door::Grpc, reason);
                    return Err(Status::unauthenticated(reason));
                }
            }
        }
        let Some(given) = request.metadata().get(proto::AUTHORIZATION) else {
            self.refusals.count(Door::Grpc, "no cluster token");
            return Err(Status::unauthenticated(
                "no cluster token: calls carry `authorization: bearer <token>`",
            ));
        };
        // Lengths are no secret; the bytes are compared in constant time.
        if bool::from(given.as_encoded_bytes().ct_eq(self.header.as_encoded_bytes())) {
            Ok(request)
        } else {
            self.refusals.count(Door::Grpc, "wrong cluster token");
            Err(Status::unauthenticated("wrong cluster token"))
        }
    }
}

/// Why there is no token. None of these shows one.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The text has another length.
    #[error(
        "a join token begins with baton-join-, a cluster's secret has 64 hex digits: this has {chars} characters"
    )]
    Length {
        /// What was given.
        chars: usize,
    },
    /// The text holds other characters.
    #[error("a cluster's secret has 64 hex digits, this one holds other characters")]
    NotHex,
    /// The file cannot be read or made.
    #[error("cluster token file {}: {error}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The system gives no random bytes.
    #[error("no random bytes for a cluster token: {0}")]
    Random(String),
}

/// An address would serve in clear to others.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "refusing to serve {address} in clear: bind a loopback address, or name the risk with --insecure on a trusted network"
)]
pub struct InsecureBind {
    /// The address asked for.
    pub address: SocketAddr,
}

/// gRPC travels in clear: an address that others can reach is served only when `insecure` says so.
pub fn require_loopback_or_insecure(address: SocketAddr, insecure: bool) -> Result<(), InsecureBind> {
    if insecure || address.ip().to_canonical().is_loopback() { Ok(()) } else { Err(InsecureBind { address }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    /// Protects: a call with the token passes, any other is refused, and no message shows a token.
    #[test]
    fn only_the_token_passes() {
        let token = ClusterToken::parse(HEX).unwrap();
        let mut server = token.server();
        let request = token.client().call(Request::new(())).unwrap();
        assert!(server.call(request).is_ok());

        let other = ClusterToken::generate().unwrap();
        let refused = server.call(other.client().call(Request::new(())).unwrap()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        assert_eq!(refused.message(), "wrong cluster token");

        let refused = server.call(Request::new(())).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        assert!(!refused.message().contains(token.expose()));
        assert!(!format!("{token:?}").contains(&HEX[..8]));
    }

    /// Protects: two generated tokens differ, and text that is no token is refused without being shown.
    #[test]
    fn text_is_checked() {
        assert_ne!(ClusterToken::generate().unwrap().expose(), ClusterToken::generate().unwrap().expose());
        assert_eq!(ClusterToken::parse(&format!(" {}\n", HEX.to_uppercase())).unwrap().expose(), HEX);
        assert_eq!(
            ClusterToken::parse("secret").unwrap_err().to_string(),
            "a join token begins with baton-join-, a cluster's secret has 64 hex digits: this has 6 characters"
        );
        assert!(matches!(ClusterToken::parse(&"g".repeat(64)), Err(TokenError::NotHex)));
    }

    /// Protects: a token survives its file, the file is private, and an existing one is never overwritten.
    #[test]
    fn a_file_holds_it() {
        let directory = std::env::temp_dir().join(format!("cluster-token-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("token");
        let _ = std::fs::remove_file(&path);
        let token = ClusterToken::generate().unwrap();
        token.write_new(&path).unwrap();
        assert_eq!(ClusterToken::read(&path).unwrap().expose(), token.expose());
        assert!(ClusterToken::generate().unwrap().write_new(&path).is_err());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        // What is longer is another file, also where it begins with a token.
        let mut long = token.expose().to_owned();
        long.push_str(&" ".repeat(TOKEN_BYTES_MAX as usize));
        std::fs::write(&path, long).unwrap();
        let refused = ClusterToken::read(&path).unwrap_err().to_string();
        assert_eq!(refused, format!("cluster token file {}: more than 65536 bytes", path.display()));
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(ClusterToken::read(&path).unwrap_err().to_string().contains("token"));
    }

    /// Protects: nothing listens in clear off loopback unless named.
    #[test]
    fn clear_text_stays_on_loopback() {
        let check = |address: &str, insecure| {
            require_loopback_or_insecure(address.parse().expect("an address"), insecure)
        };
        assert!(check("127.0.0.1:1", false).is_ok());
        assert!(check("[::1]:1", false).is_ok());
        assert!(check("[::ffff:127.0.0.1]:1", false).is_ok());
        assert!(check("0.0.0.0:1", true).is_ok());
        let refused = check("0.0.0.0:7000", false).unwrap_err().to_string();
        assert!(refused.contains("0.0.0.0:7000") && refused.contains("--insecure"), "{refused}");
    }
}
