//! The emulated device sees what a GPU would not say.

use super::*;

/// Arguments as in `emulator/faults.cu`.
fn fault_args(at: u64, wrong: u32) -> [u64; 2] {
    [at, u64::from(wrong)]
}

fn said(kernel: &'static str, blocks: u32, wrong: u32) -> Result<(), String> {
    let device = Emulated::open(0, None).unwrap();
    let memory = device.alloc(256).unwrap();
    device.clear(device.address(&memory), 256).unwrap();
    let (threads, shared_bytes) = match kernel {
        "fault_blocks" => (1, 256),
        "fault_unfenced" | "fault_registers" | "fault_operand" => (128, 64 * 64 * 2),
        "fault_tensor" => (128, 128 * 64 * 2),
        _ => (64, 256),
    };
    let launch = Launch { kernel, grid: [blocks, 1, 1], threads, shared_bytes };
    device.launch(launch, &fault_args(device.address(&memory), wrong)).unwrap();
    Emulated::wait(&device.record(Lane::Compute).unwrap()).map_err(|error| error.to_string())
}

/// Every kind of fault is seen, and only the fault: the same kernels without it pass.
#[test]
fn faults_of_kernels_are_seen() {
    for (kernel, blocks, want) in [
        ("fault_race", 1, "race with a"),
        ("fault_race_back", 1, "race with a"),
        ("fault_warp", 1, "race with a"),
        ("fault_warp_back", 1, "race with a"),
        ("fault_outside", 1, "outside of all memory"),
        ("fault_misaligned", 1, "misaligned"),
        ("fault_unwritten", 1, "read before anybody wrote"),
        ("fault_copy", 1, "while a copy fills it"),
        ("fault_blocks", 2, "another block has written"),
        ("fault_add", 1, "race"),
        ("fault_barrier", 1, "wait for each other for ever"),
        ("fault_unfenced", 1, "no fence has shown products"),
        ("fault_registers", 1, "products without a fence"),
        ("fault_operand", 1, "race with a write of thread 5"),
    ] {
        assert_eq!(said(kernel, blocks, 0), Ok(()), "{kernel}");
        let got = said(kernel, blocks, 1);
        assert!(got.as_ref().is_err_and(|said| said.contains(want)), "{kernel}: {got:?}");
    }
}

/// So is every wait, fence and descriptor that products of tensor memory lack.
#[test]
fn faults_of_tensor_memory_are_seen() {
    assert_eq!(said("fault_tensor", 1, 0), Ok(()));
    for (wrong, want) in (1..).zip([
        "no fence has shown this barrier",
        "no fence has shown products",
        "lanes that are not its own",
        "products of no such size",
        "of another version",
        "not of bf16 with sums in f32",
        "read before anybody wrote",
        "products have not been waited for",
        "registers that a load fills",
        "while a store fills it",
        "no fence behind an access",
        "race with an access",
        "race with an access",
        "ended with products on their way",
        "no fence behind an access",
        "race with an access",
        "ended with tensor memory",
        "wait for each other for ever",
    ]) {
        let got = said("fault_tensor", 1, wrong);
        assert!(got.as_ref().is_err_and(|said| said.contains(want)), "{wrong}: {got:?}");
    }
}

/// A copy is under way until somebody has waited for it.
#[test]
fn pinned_memory_is_not_read_too_early() {
    let device = Emulated::open(0, None).unwrap();
    let memory = device.alloc(16).unwrap();
    let mut host = device.host(16).unwrap();
    device.to_host(Lane::Copy, &mut host, 0, device.address(&memory), 16).unwrap();
    let arrived = device.record(Lane::Copy).unwrap();
    let read = || host.as_ref()[0];
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err());
    Emulated::wait(&arrived).unwrap();
    assert_eq!(read(), 0xff);
}

/// Lanes order nothing between them but by events.
#[test]
fn a_lane_waits_for_another_where_it_is_told() {
    let device = Emulated::open(0, None).unwrap();
    let memory = device.alloc(16).unwrap();
    let at = device.address(&memory);
    let fetched = |ordered: bool| {
        device.upload(at, &[7; 16]).unwrap();
        let uploaded = device.record(Lane::Compute).unwrap();
        if ordered {
            device.after(Lane::Copy, &uploaded).unwrap();
        }
        let mut host = device.host(16).unwrap();
        device.to_host(Lane::Copy, &mut host, 0, at, 16).unwrap();
        Emulated::wait(&device.record(Lane::Copy).unwrap()).unwrap();
        host.as_ref()[0]
    };
    assert_eq!(fetched(false), 0xff, "fresh memory is not a number");
    assert_eq!(fetched(true), 7);
}

/// A graph has the addresses that it was captured with: memory that was freed since is seen, at every replay.
#[test]
fn a_replay_on_freed_memory_is_seen() {
    let device = Emulated::open(0, None).unwrap();
    let memory = device.alloc(256).unwrap();
    let launch = Launch { kernel: "fault_outside", grid: [1, 1, 1], threads: 64, shared_bytes: 0 };
    let args = fault_args(device.address(&memory), 0);
    let mut queue = || device.launch(launch, &args);
    queue().unwrap();
    let graph = device.capture(&mut queue).unwrap();
    device.replay(&graph).unwrap();
    Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
    drop(memory);
    device.replay(&graph).unwrap();
    let error = Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap_err().to_string();
    assert!(error.contains("outside of all memory"), "{error}");
}

/// A capture does nothing, and takes kernels only that are loaded: no copies, no events.
#[test]
fn a_capture_takes_what_a_device_can_do_again() {
    let device = Emulated::open(0, None).unwrap();
    let memory = device.alloc(256).unwrap();
    let at = device.address(&memory);
    let launch = Launch { kernel: "fault_outside", grid: [1, 1, 1], threads: 64, shared_bytes: 0 };
    let said = |queue: &mut dyn FnMut() -> Result<(), BackendError>| {
        device.capture(queue).map(|_| ()).map_err(|error| error.to_string())
    };
    let error = said(&mut || device.launch(launch, &fault_args(at, 0))).unwrap_err();
    assert!(error.contains("fault_outside is not loaded"), "{error}");
    device.launch(launch, &fault_args(at, 0)).unwrap();
    Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
    // Wrong work that is captured is not done.
    assert_eq!(said(&mut || device.launch(launch, &fault_args(at, 1))), Ok(()));
    Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
    assert!(said(&mut || device.upload(at, &[0])).is_err_and(|error| error.contains("captured")));
    assert!(said(&mut || device.record(Lane::Compute).map(|_| ())).is_err());
    assert_eq!(said(&mut || Err(fault("x", "y"))), Err("device: cuda: x: \"y\"".to_owned()));
    // And the lane goes on.
    device.upload(at, &[7]).unwrap();
    Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
}
