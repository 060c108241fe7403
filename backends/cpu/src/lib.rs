//! The CPU backend: every machine has it, every test runs on it, and it keeps the arithmetic contract of
//! [`backend`] to the bit.
//!
//! [`CpuBackend`] is opened by node start-up. Inside: `kernel` holds the inner loops, written once over `lanes` and
//! compiled for each instruction [`Level`]; `packed` (of panels: `plain` and `coded`) and `product` are linear layers, `moe`
//! and `route` mixtures of experts, `attend` is attention, `kv` and
//! `lease` the paged cache, `collect` the collectives, `pool` the threads, `cores` where they may stay.

mod act;
mod attend;
mod coded;
mod collect;
pub mod cores;
mod device;
mod heads;
mod kernel;
mod kv;
mod lanes;
mod lease;
mod level;
mod lists;
mod memory;
mod moe;
mod operand;
mod packed;
mod pair_row;
mod plain;
mod pool;
mod product;
mod rope;
mod route;
mod step;

pub use act::CpuAct;
pub use device::CpuBackend;
pub use kv::CpuKv;
pub use lease::{CpuExport, CpuLanding};
pub use level::Level;
pub use packed::CpuWeight;
pub use step::CpuStep;
