//! How much of the disk one owner may take, and for how long.

/// What owners may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Of all files of one owner.
    pub owner_bytes: u64,
    /// Files of one owner, and batches of one owner.
    pub owner_records: usize,
    /// Batches of one owner that have not ended.
    pub owner_unfinished: usize,
    /// Seconds after which files and ended batches are deleted, where the client does not say; `None`: never.
    pub lifetime: Option<u64>,
}

impl Default for Space {
    fn default() -> Space {
        Space {
            owner_bytes: 256 << 30,
            owner_records: 100_000,
            owner_unfinished: 1_000,
            lifetime: Some(30 * 24 * 3600),
        }
    }
}
