//! The CPU backend keeps the meaning and the arithmetic contract of the seam at every instruction level of this machine.

use backend::conformance::{Suite, TIGHT};
use backend::{DType, DeviceOptions, Group};
use backend_cpu::{CpuBackend, Level};

fn conforms(level: Level) {
    if !level.available() {
        println!("this machine has no {level}: not tested");
        return;
    }
    let open = |options: &DeviceOptions, group: Group| CpuBackend::with_level(options, group, level);
    let dtypes = &[DType::F32, DType::BF16];
    Suite { open: &open, tolerance: TIGHT, dtypes, group: Some(Group::local) }.run();
}

#[test]
fn portable() {
    conforms(Level::Portable);
}

#[test]
fn avx2() {
    conforms(Level::Avx2);
}

#[test]
fn avx512() {
    conforms(Level::Avx512);
}
