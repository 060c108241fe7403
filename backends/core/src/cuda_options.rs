//! What a CUDA backend is asked beyond what every device is.

/// Settings of a CUDA backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// How activations meet FP8 weights.
    pub activations: Fp8Activations,
    /// Whether every step is queued kernel by kernel, without graphs.
    pub eager: bool,
    /// Which kernels attend prompts.
    pub attention: PromptAttention,
}

/// Which kernels attend prompts in bf16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptAttention {
    /// The fastest for the GPU: on Hopper those of warp groups (wgmma), on Blackwell of data centres those of tensor memory
    /// (tcgen05), once they have been compared with the others.
    #[default]
    Auto,
    /// Those of every generation (mma.sync).
    Mma,
}

/// How activations meet FP8 weights where rows are many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fp8Activations {
    /// In the step's dtype; weights are multiplied as numbers of it.
    #[default]
    Exact,
    /// Rounded to FP8 too, 128 inputs by 128: coarser, and tensor cores multiply FP8 at twice the rate. What vLLM does.
    Fp8,
}
