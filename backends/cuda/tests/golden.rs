//! Whole models on the emulated device: the references of Hugging Face transformers in f32 and bf16, and caches that change
//! hands with the CPU.

#[path = "../../../models/tests/golden/compare.rs"]
#[allow(dead_code)]
mod compare;
#[path = "../../../models/tests/golden/device.rs"]
mod device;
#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::DType;
use backend_cpu::CpuBackend;
use backend_cuda::EmulatedBackend;

use crate::device::{every_case, handed_over, is_reference_on, none_is_left_out};

/// Kernels run one at a time in a process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_the_reference(case: &str, dtype: DType) {
    let _alone = alone();
    is_reference_on::<EmulatedBackend>(case, dtype, &[512]);
}

every_case!();

#[test]
fn no_case_is_left_out() {
    none_is_left_out(CASES);
}

/// The reason for all this: a GPU reads the prompt, another machine generates.
#[test]
fn prompts_go_on_elsewhere() {
    let _alone = alone();
    for case in ["llama-base-s1", "mistral-swa-s1", "deepseek_v3-mscale", "minimax_m2-base"] {
        handed_over::<EmulatedBackend, CpuBackend>(case);
    }
}

/// And back, as a migration would.
#[test]
fn prompts_of_the_cpu_go_on_here() {
    let _alone = alone();
    for case in ["qwen3-base-s1", "deepseek_v3-mlx"] {
        handed_over::<CpuBackend, EmulatedBackend>(case);
    }
}
