//! The kernels keep the meaning of the seam: the whole suite on the emulated device. (On a GPU: `benches/h200.sh`.)

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{Backend, DType, DeviceOptions, Group};
use backend_cuda::EmulatedBackend;

#[test]
fn conforms() {
    let open = |options: &DeviceOptions, group: Group| EmulatedBackend::open(options, group);
    let tolerance = Tolerance { f32: 3e-6, bf16: 2e-2 };
    let dtypes = &[DType::F32, DType::BF16];
    Suite { open: &open, tolerance, dtypes, group: None, quants: QUANTS, plain_experts: dtypes }.run();
}
