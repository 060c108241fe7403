//! Model architectures over a backend: a model's numbers ([`Config`]), its weights ([`Checkpoint`]), which part a rank
//! holds ([`Shard`]), and the decoder ([`Model`]), written once over the seam. Called by `engine`'s runner; the router
//! never sees it. No sockets, no scheduling.

mod ahead;
mod arch;
mod attention;
mod checkpoint;
mod config;
mod data_file;
mod decoder;
mod dummy;
mod error;
mod experts;
mod fields;
mod file;
mod generation;
mod gguf_file;
pub mod golden;
mod huggingface;
pub mod identity;
mod load;
mod packed;
mod quantisation;
mod recode;
mod regroup;
pub mod replay;
mod rope;
mod scales;
mod shard;
mod tensors;
mod weights;

pub use attention::{Attention, Grouped, HeadNorm, Latent};
pub use checkpoint::Checkpoint;
pub use config::{Config, Group, Groups, Parameters};
pub use decoder::{AfterAttend, Model};
pub use error::ModelError;
pub use experts::{ExpertNames, Experts};
pub use file::{Entry, table as safetensors_table};
pub use generation::Generation;
pub use huggingface::weights as safetensors_weights;
pub use identity::Identity;
pub use load::Progress;
pub use quantisation::{Ints, Mlx, Quantisation};
pub use rope::{RopeConfig, Scaling};
pub use shard::{Shard, kv_specs, shards};
pub use tensors::{Cut, Role, Span, TensorSpec, tensors};
