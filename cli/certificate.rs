//! The gateway's own certificate: self-signed, made once and kept, so that clients can trust the one they have seen.
//! Called by `router` with `--tls-self-signed`, and by clients on the same machine.

use std::fs::{self, File};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use router::TlsFiles;

use crate::system;

/// The certificate's name in the user's data directory.
pub const FILE: &str = "gateway-cert.pem";

/// The certificate and key in `dir` for a server at `host`, made if they are not there.
pub fn own(dir: &Path, host: IpAddr) -> Result<TlsFiles> {
    let files = TlsFiles { cert: dir.join(FILE), key: dir.join("gateway-key.pem") };
    if files.cert.exists() && files.key.exists() {
        return Ok(files);
    }
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".into(), "::1".into(), system::host_name()];
    if !host.is_unspecified() {
        names.push(host.to_string());
    }
    let made = rcgen::generate_simple_self_signed(names).context("cannot make a certificate")?;
    write(&files.key, made.signing_key.serialize_pem().as_bytes(), 0o600)?;
    write(&files.cert, made.cert.pem().as_bytes(), 0o644)?;
    tracing::info!("made a certificate for HTTPS: clients can trust {}", files.cert.display());
    Ok(files)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let write = || {
        let _ = fs::remove_file(path);
        File::options().write(true).create_new(true).mode(mode).open(path)?.write_all(content)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made once; the key is for its owner alone.
    #[test]
    fn made_once_and_private() {
        let dir = std::env::temp_dir().join(format!("baton-certificate-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        let files = own(&dir, IpAddr::from([10, 1, 2, 3])).expect("makes");
        let (cert, key) = (fs::read(&files.cert).expect("reads"), fs::metadata(&files.key).expect("a key"));
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777, 0o600);
        assert_eq!(own(&dir, IpAddr::from([10, 1, 2, 3])).expect("finds"), files);
        assert_eq!(fs::read(&files.cert).expect("reads"), cert);
        fs::remove_dir_all(dir).expect("cleans up");
    }
}
