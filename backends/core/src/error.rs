//! What can go wrong below the seam.

use crate::SeqId;

/// A device, memory or weight failure. Errors of a step come out at its end, see [`crate::Pending`].
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device cannot be used.
    #[error("{backend}: {reason}")]
    Unavailable {
        /// Backend name, e.g. `cuda`.
        backend: &'static str,
        /// One line for the user.
        reason: String,
    },
    /// A weight does not have the shape or format that the call needs.
    #[error("weight {name}: {reason}")]
    Weight {
        /// Tensor name as in the checkpoint.
        name: String,
        /// What disagreed.
        reason: String,
    },
    /// The bytes of a weight could not be read; the error is of whoever gives them.
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
    /// Not enough device memory.
    #[error("out of memory: {wanted_bytes} bytes wanted, {free_bytes} free")]
    OutOfMemory {
        /// Bytes asked for.
        wanted_bytes: u64,
        /// Bytes that were free.
        free_bytes: u64,
    },
    /// Another rank of the tensor-parallel group failed or left.
    #[error("tensor-parallel group lost: rank {rank}: {reason}")]
    Group {
        /// The rank that could not be reached.
        rank: usize,
        /// What happened.
        reason: String,
    },
    /// The device reported an error.
    #[error("device: {0}")]
    Device(String),
    /// A cache operation failed.
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// A failure of the KV store. Nothing changes when one is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// No room; the caller evicts or preempts.
    #[error("kv store full: {wanted_blocks} blocks wanted, {free_blocks} free")]
    Full {
        /// Blocks asked for.
        wanted_blocks: u32,
        /// Blocks free now.
        free_blocks: u32,
    },
    /// The sequence is not in the store.
    #[error("kv store: unknown sequence {0}")]
    Unknown(SeqId),
    /// The sequence is there already.
    #[error("kv store: sequence {0} exists")]
    Exists(SeqId),
    /// A token, layer, plane or head range lies outside what the lease or sequence holds.
    #[error("kv store: {what} {start}..{end} outside {limit_start}..{limit_end}")]
    Range {
        /// `tokens`, `layer`, `plane` or `heads`.
        what: &'static str,
        /// First index asked for.
        start: u64,
        /// One past the last index asked for.
        end: u64,
        /// First index held.
        limit_start: u64,
        /// One past the last index held.
        limit_end: u64,
    },
    /// Positions that were to be written or read are under a lease.
    #[error("kv store: tokens {start}..{end} of sequence {seq} are under a lease")]
    Leased {
        /// The sequence.
        seq: SeqId,
        /// First position asked for.
        start: u32,
        /// One past the last position asked for.
        end: u32,
    },
    /// Positions that were to be written belong to several sequences.
    #[error("kv store: tokens {start}..{end} of sequence {seq} are shared with another sequence")]
    Shared {
        /// The sequence.
        seq: SeqId,
        /// First position asked for.
        start: u32,
        /// One past the last position asked for.
        end: u32,
    },
    /// A payload has the wrong length.
    #[error("kv store: payload of {got} bytes, expected {want}")]
    Length {
        /// Bytes given.
        got: usize,
        /// Bytes that the range takes.
        want: usize,
    },
}
