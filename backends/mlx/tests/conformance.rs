//! MLX keeps the meaning of the seam, within its tolerance.
#![cfg(feature = "mlx")]

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{Backend, DType, DeviceOptions, Group};
use backend_mlx::MlxBackend;

#[test]
fn conforms() {
    let open = |options: &DeviceOptions, group: Group| MlxBackend::open(options, group);
    let tolerance = Tolerance { f32: 1e-5, bf16: 2e-2 };
    let dtypes = &[DType::F32, DType::BF16];
    Suite { open: &open, tolerance, dtypes, group: None, quants: QUANTS, plain_experts: dtypes }.run();
}
