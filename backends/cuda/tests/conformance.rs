//! The kernels keep the meaning of the seam: the whole suite on the emulated device, which checks every access of theirs and
//! delays all work as long as it may. (On a GPU: `benches/h200.sh`.)

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{Backend, BackendError, DType, DeviceOptions, Group};
use backend_cuda::EmulatedBackend;

const TOLERANCE: Tolerance = Tolerance { f32: 3e-6, bf16: 2e-2 };
const DTYPES: &[DType] = &[DType::F32, DType::BF16];

/// Kernels run one at a time in a process: tests do, too, so that no rank of a group is silent because of another test.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn suite<'a>(
    open: &'a (dyn Fn(&DeviceOptions, Group) -> Result<EmulatedBackend, BackendError> + Sync),
) -> Suite<'a, EmulatedBackend> {
    Suite { open, tolerance: TOLERANCE, dtypes: DTYPES, group: None, quants: QUANTS, plain_experts: DTYPES }
}

/// On one device, which every case opens once more.
#[test]
fn conforms() {
    thread_local! {
        static DEVICE: RefCell<Option<EmulatedBackend>> = const { RefCell::new(None) };
    }
    let _alone = alone();
    DEVICE.set(Some(EmulatedBackend::open(&DeviceOptions::default(), Group::alone()).unwrap()));
    let open = |options: &DeviceOptions, group: Group| {
        DEVICE.with_borrow(|device| match device {
            Some(device) => device.beside(options, group),
            None => EmulatedBackend::open(options, group),
        })
    };
    suite(&open).run();
}

/// A device with much shared memory takes larger tiles; one with many processors splits keys of few rows, and blocks without rows among
/// them; one that shares the host's memory stages nothing.
#[test]
fn a_large_device_with_the_hosts_memory_conforms() {
    let _alone = alone();
    let open = |options: &DeviceOptions, group: Group| {
        EmulatedBackend::open(&DeviceOptions { device: 1, ..options.clone() }, group)
    };
    let suite = suite(&open);
    for (name, case) in suite.cases() {
        if ["kv, ", "latent", "guessed wrong", "sinks"].iter().any(|part| name.contains(part)) {
            println!("conformance: {name}");
            case(&suite, DType::BF16);
        }
    }
}

/// Groups whose ranks are processes (here threads) of their own, joined by sockets: sums pass through the host.
#[test]
fn a_group_without_nccl_conforms() {
    let _alone = alone();
    let mut suite = suite(&EmulatedBackend::open);
    suite.group = Some(Group::local);
    for (name, case) in suite.cases() {
        if ["group", "ranks", "tensor parallel"].iter().any(|part| name.contains(part)) {
            println!("conformance: {name}");
            DTYPES.iter().for_each(|dtype| case(&suite, *dtype));
        }
    }
}
