//! The hash that a file's tag announces: SHA-256 of its content for large files, the SHA-1 of a git blob for small ones.

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// A hash under way.
pub(crate) enum Digest {
    Sha256(Sha256),
    /// Of `blob <length>\0` and the content.
    Git(Sha1),
    /// The tag is no hash: only the length can be checked.
    None,
}

impl Digest {
    /// The hash that `tag` is, for a file of `len` bytes.
    pub(crate) fn of_tag(tag: &str, len: u64) -> Digest {
        let is_hex = tag.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match tag.len() {
            64 if is_hex => Digest::Sha256(Sha256::new()),
            40 if is_hex => {
                let mut hash = Sha1::new();
                hash.update(format!("blob {len}\0"));
                Digest::Git(hash)
            }
            _ => Digest::None,
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Digest::Sha256(hash) => hash.update(bytes),
            Digest::Git(hash) => hash.update(bytes),
            Digest::None => {}
        }
    }

    /// Name and value in hex; `None` when the tag was no hash.
    pub(crate) fn finish(self) -> Option<(&'static str, String)> {
        match self {
            Digest::Sha256(hash) => Some(("SHA-256", hex(&hash.finalize()))),
            Digest::Git(hash) => Some(("git hash", hex(&hash.finalize()))),
            Digest::None => None,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both as git and the hub compute them.
    #[test]
    fn known_hashes() {
        let of = |tag: &str| {
            let mut digest = Digest::of_tag(tag, 6);
            digest.update(b"hel");
            digest.update(b"lo\n");
            digest.finish().map(|(_, hash)| hash)
        };
        // `echo hello | git hash-object --stdin`, `echo hello | sha256sum`
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(of(git).as_deref(), Some(git));
        assert_eq!(of(sha256).as_deref(), Some(sha256));
        assert_eq!(of("some-mirror-tag"), None);
    }
}
