//! The CUDA backend: the seam's operations as kernels that NVRTC compiles when first used, dense products through
//! cuBLASLt. Nothing of CUDA is linked: driver and libraries are found at run time.

mod act;
mod args;
mod attend;
mod ballot;
pub mod compile;
mod device;
mod driver;
mod fp8;
mod graphs;
mod kv;
mod latent;
mod lease;
mod memory;
mod moe;
mod nccl;
mod nvidia;
mod product;
mod queue;
mod ranks;
mod step;
mod trial;
mod unstaged;
mod weight;

#[cfg(feature = "emulator")]
mod emulator;

pub use act::CudaAct;
pub use device::Device;
pub use kv::CudaKv;
pub use lease::{CudaExport, CudaLanding};
pub use nvidia::{Nvidia, probe};
pub use step::CudaStep;
pub use unstaged::Unstaged;
pub use weight::CudaWeight;

/// The backend on an NVIDIA GPU.
pub type CudaBackend = Device<Nvidia>;

#[cfg(feature = "emulator")]
pub use nccl::name_for_tests;

/// The backend on the emulated device.
#[cfg(feature = "emulator")]
pub type EmulatedBackend = Device<emulator::Emulated>;
