//! What prefill and decode processes share: from settings to a joined node with a running engine. The role's crate
//! gives [`run`] its gRPC service; [`convert`] stands between messages and the engine's types.

pub mod config;
pub mod convert;
mod draft;
mod error;
mod grammars;
pub mod loading;
pub mod memory;
mod metrics;
mod rank;
#[cfg(feature = "mlx")]
mod renew;
mod report;
mod run;

pub use config::{BackendKind, GroupConfig, KvTransport, LoadFormat, NodeConfig, Sealing, StepBounds};
pub use error::NodeError;
pub use grammars::Grammars;
pub use rank::prepare;
pub use run::{drain, probe, run};
