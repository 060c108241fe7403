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
#[path = "../../../models/tests/golden/ranks.rs"]
#[allow(dead_code)]
mod ranks;

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::DType;
use backend_cpu::CpuBackend;
use backend_cuda::EmulatedBackend;

use crate::compare::{Limits, check};
use crate::device::{every_case, handed_over, is_reference_on};
use crate::fixture::Fixture;
use crate::ranks::Run;

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

/// Two GPUs share a model, computing the prompt themselves or given its cache by one that has it whole.
#[test]
fn ranks_compute_the_reference() {
    let _alone = alone();
    for (case, handoff) in [
        ("llama-base-s1", false),
        ("qwen3_moe-mixed", false),
        ("minimax_m2-base", false),
        ("deepseek_v3-mscale", false),
        ("deepseek_v3-fp8", true),
        ("qwen3-base-s1", true),
    ] {
        let fixture = Fixture::open(case);
        for (i, prompt) in fixture.prompts.iter().enumerate().take(2) {
            let run = Run { world: 2, handoff, ..Run::new(DType::F32) };
            let got = run.logits_on::<EmulatedBackend>(&fixture.checkpoint, prompt);
            check(&format!("{case} p{i}"), &fixture.logits(i), &got, fixture.vocab(), &Limits::f32());
        }
    }
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
