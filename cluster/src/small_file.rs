//! Files that are small by what they are for: read whole, and no further than that may reach. Called for settings, tokens, keys
//! and certificates.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// A token, and perhaps a line end.
pub const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// Settings, or all the authorities that a system trusts.
pub const TEXT_BYTES_MAX: u64 = 4 << 20;

/// All keys or tokens that were ever made: one takes some 200 bytes.
pub const LIST_BYTES_MAX: u64 = 16 << 20;

/// The text of `path`. Errors as [`bytes`], or it is no UTF-8.
pub fn text(path: &Path, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(bytes(path, bytes_max)?).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// What `path` holds. Errors when it cannot be read, or has more than `bytes_max` bytes: as it is read, for a device tells no
/// length.
pub fn bytes(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > bytes_max {
        true => Err(io::Error::new(ErrorKind::FileTooLarge, format!("more than {bytes_max} bytes"))),
        false => Ok(bytes),
    }
}
