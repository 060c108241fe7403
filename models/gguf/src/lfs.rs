//! What `git clone` leaves in place of a large file where Git LFS is not installed. Asked by every reader of a model's files,
//! so that its user learns what is missing. Source: <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>

/// What to say of one.
pub const LFS_POINTER: &str = "a pointer of Git LFS in place of the file: fetch it by `git lfs pull`";

/// Whether a file that begins with `bytes`, 8 at the least, is one. No file of weights or of a vocabulary begins so.
pub fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fault, Header};

    #[test]
    fn a_pointer_is_no_gguf_file_and_says_so() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
        let fault = Header::parse("f", pointer, pointer.len() as u64).unwrap_err();
        assert!(matches!(&fault, Fault::Wrong { reason, .. } if reason == LFS_POINTER), "{fault:?}");
        assert!(!is_lfs_pointer(b"GGUF\x03\0\0\0"));
    }
}
