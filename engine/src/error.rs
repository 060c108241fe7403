//! Why an engine cannot begin or go on.

use backend::{BackendError, KvError};
use kvtransfer::SessionError;

use crate::tp::TpError;

/// The end of an engine, or of an epoch of its group. Jobs hear of it as [`crate::JobError::Engine`].
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Settings that do not go together.
    #[error("{0}")]
    Options(String),
    /// The KV port cannot be opened.
    #[error("kv port {addr}: {reason}")]
    Port {
        /// Address asked for.
        addr: String,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The KV store cannot be made of the memory it was given.
    #[error("kv memory of {bytes} bytes: {reason}")]
    KvMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What the backend said.
        reason: BackendError,
    },
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The store refused what the leader's book allowed.
    #[error("step {step}, {op}: {reason}")]
    Store {
        /// Step of the epoch.
        step: u64,
        /// The operation.
        op: String,
        /// What the store said.
        reason: KvError,
    },
    /// A push was told something that it cannot do.
    #[error("push: {0}")]
    Push(#[from] SessionError),
    /// The group of ranks.
    #[error(transparent)]
    Group(#[from] TpError),
    /// The plan of a step was not what the ranks agreed on.
    #[error("plan: {0}")]
    Plan(String),
}
