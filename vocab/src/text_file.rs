//! The texts that lie beside a model's weights (config.json, tokenizer.json, an index): read whole, and no further than one may reach.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// Bytes of one at most; the largest known, tokenizers and indices of experts by the ten thousand, have some 30 MB.
pub const TEXT_BYTES_MAX: u64 = 256 << 20;

/// What `path` holds. Errors when it cannot be read, or has more than [`TEXT_BYTES_MAX`] bytes: as it is read, for a device tells
/// no length.
pub fn text_file(path: &Path) -> io::Result<Vec<u8>> {
    at_most(path, TEXT_BYTES_MAX)
}

fn at_most(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > bytes_max {
        true => Err(io::Error::new(ErrorKind::FileTooLarge, format!("more than {bytes_max} bytes"))),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device has no end, and is no reason to take all memory.
    #[test]
    fn what_has_no_end_is_refused() {
        let error = at_most(Path::new("/dev/zero"), 4096).unwrap_err();
        assert_eq!(error.to_string(), "more than 4096 bytes");
    }

    #[test]
    fn what_is_as_long_as_it_may_be_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, [b' '; 4096]).unwrap();
        assert_eq!(at_most(&path, 4096).unwrap().len(), 4096);
        assert!(at_most(&path, 4095).is_err());
    }
}
