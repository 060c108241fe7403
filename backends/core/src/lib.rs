//! The seam between models and devices. `models` is written once over [`Backend`] and [`Step`]; `engine` owns
//! sequences through [`KvStore`]; `kvtransfer` moves bytes through [`KvExport`] and [`KvLanding`].
//! What every backend needs and none should write twice (dtypes, the cache's shape, block accounting) is here too.
//!
//! # Arithmetic contract
//! A backend whose [`Caps::exact`] is true promises, per instruction level: a row's bits depend on its own inputs only,
//! not on the batch, the chunking, the threads, or whether it was prefilled or decoded. See [`seam`] for the sums.

pub mod affine;
pub mod batch;
pub mod checksum;
pub mod conformance;
pub mod cpu_options;
pub mod cuda_options;
pub mod draw;
pub mod dtype;
pub mod error;
pub mod extents;
pub mod group;
pub mod lease;
pub mod paged;
pub mod peers;
pub mod quant;
pub mod region;
pub mod seam;
pub mod spec;
pub mod weight;

pub use affine::{AffineForm, SuperScales};
pub use batch::{Batch, Input, Run, SeqId};
pub use cpu_options::{Activations, CpuOptions};
pub use cuda_options::{CudaOptions, Fp8Activations, PromptAttention};
pub use draw::{Draw, Drawn, Noise, Rule};
pub use dtype::DType;
pub use error::{BackendError, KvError};
pub use group::{Group, Links, RankLink};
pub use lease::{Cut, KvExport, KvLanding, Piece};
pub use peers::Peers;
pub use quant::{CodeTable, GgufBlock, MatrixView, Quant, QuantView, e8m0};
pub use region::{Place, Region, Within};
pub use seam::{
    Attend, Backend, Caps, DeviceOptions, Fork, Glu, KvStore, KvUsage, Mla, Moe, NormSpan, Out, Output,
    Pending, QkNorm, Rope, RopeStyle, Routing, Score, Step,
};
pub use spec::{KvSpec, Plane, Sharding};
pub use weight::{ExpertSource, Heads, KSum, Linear, TakeExpert, TensorView, WeightSource};
