//! Files that a user names: read no further than what they are for may take. Called for settings, tokens and certificates.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// A token, and perhaps a line end.
pub const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// Settings, or all the authorities that a system trusts.
pub const TEXT_BYTES_MAX: u64 = 4 << 20;

/// The text of `path`. Errors name it: as [`bytes`], or it is no UTF-8.
pub fn text(path: &Path, bytes_max: u64) -> Result<String> {
    String::from_utf8(bytes(path, bytes_max)?).with_context(|| format!("cannot read {}", path.display()))
}

/// What `path` holds. Errors name it: it cannot be read, or has more than `bytes_max` bytes.
pub fn bytes(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(cannot)?;
    file.take(bytes_max + 1).read_to_end(&mut bytes).with_context(cannot)?;
    ensure!(bytes.len() as u64 <= bytes_max, "{} has more than {bytes_max} bytes", path.display());
    Ok(bytes)
}
