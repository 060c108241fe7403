//! What differs between Apple Silicon and MLX's CPU library on Linux, and nothing else of the backend does.

/// Whether quantised products sum in f32 when activations are 16 bits wide. Metal's kernels do; the CPU library adds up in
/// the type of the activations.
pub(crate) const SUMS_ARE_WIDE: bool = cfg!(target_vendor = "apple");

/// Whether products with gathered matrices take 16-bit numbers. The CPU library's take f32 only.
pub(crate) const GATHERS_NARROW: bool = cfg!(target_vendor = "apple");

/// The device in words.
pub(crate) const DEVICE: &str = if cfg!(target_vendor = "apple") { "metal" } else { "mlx's cpu library" };
