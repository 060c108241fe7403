//! Why a node does not start, or ends.

use std::net::SocketAddr;

/// One line for the person who started the node.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The model cannot be loaded.
    #[error("model {model}: {reason}")]
    Model {
        /// Path as given.
        model: String,
        /// What is wrong with it.
        reason: Box<models::ModelError>,
    },
    /// Its tokens are not the model's.
    #[error("draft model {draft} cannot guess for model {model}: {reason}")]
    Draft {
        /// Path as given.
        draft: String,
        /// The model's.
        model: String,
        /// What does not agree.
        reason: String,
    },
    /// The machine is too small for it.
    #[error("model {model} does not fit: rank {rank} of {world}: {reason}")]
    Memory {
        /// Path as given.
        model: String,
        /// This rank.
        rank: usize,
        /// Ranks that share the model.
        world: usize,
        /// The arithmetic.
        reason: crate::memory::TooMuch,
    },
    /// A context longer than the model's.
    #[error("context of {asked} tokens: the model was made for {most}")]
    Context {
        /// Asked for.
        asked: u32,
        /// The model's.
        most: usize,
    },
    /// An address that others cannot dial.
    #[error("{bind} is every address of this machine: say with --advertise by which host others reach it")]
    Advertise {
        /// The address bound.
        bind: SocketAddr,
    },
    /// The ranks' meeting place cannot be used.
    #[error("leader address {address}: {reason}")]
    Leader {
        /// As given.
        address: String,
        /// What the system says.
        reason: std::io::Error,
    },
    /// A thread or socket that the system refuses.
    #[error("{what}: {reason}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What the system says.
        reason: std::io::Error,
    },
    /// Clear traffic to other machines.
    #[error(transparent)]
    Insecure(#[from] cluster::auth::InsecureBind),
    /// The gRPC port.
    #[error(transparent)]
    Serve(#[from] cluster::server::ServeError),
    /// The router does not want this node.
    #[error(transparent)]
    Join(#[from] cluster::JoinError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] backend::BackendError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] engine::EngineError),
    /// The thread that owns the device panicked; its message is in the log.
    #[error("the engine's thread panicked")]
    Panicked,
}
