//! The MLX backend: Apple Silicon's GPU, and the same code on MLX's CPU library on Linux (`linux/setup.sh`). Compiled with
//! the feature `mlx`; without it the crate is empty.
//!
//! [`MlxBackend`] is opened by node start-up on the thread that owns all MLX state from then on. A step is one lazy graph:
//! its operations (`step`, `attend`) only record, [`backend::Step::submit`] puts it in line (`line`) to be evaluated, waiting
//! reads the result. The cache (`kv`) is slots of capacity classes (`slots`): MLX has no paged attention. Leases (`lease`) carry
//! evaluated arrays and host memory, nothing else leaves the thread. `draw` picks tokens on the device. `fused` holds what MLX
//! makes one kernel of, `graph` what its calls have in common, `calls` those that mlx-rs does not have.
//!
//! [`backend::Caps::exact`] is false: sums are MLX's, and its kernels differ by shape.
#![cfg(feature = "mlx")]

mod attend;
mod calls;
mod device;
mod draw;
mod fabric;
mod fused;
mod graph;
mod host;
mod kv;
mod latent;
mod lease;
mod line;
mod moe;
mod part;
mod plan;
mod platform;
mod rdma;
mod ready;
mod slots;
mod stack;
mod step;
mod weight;

pub use device::MlxBackend;
pub use fabric::{describe, prepare, specification};
pub use kv::MlxKv;
pub use lease::{MlxExport, MlxLanding};
pub use step::{MlxAct, MlxStep};
pub use weight::MlxWeight;

/// Whether the device works, and `weights` and a cache of `kv` bytes fit into the memory that it may use, before any of it is
/// read. Errors with the sums, and the setting that binds. Weights that grow as they are loaded are found out when the cache is
/// made.
pub fn fits(weights: u64, kv: u64) -> Result<(), backend::BackendError> {
    platform::check()?;
    platform::fits(weights, kv, platform::limit())
}
