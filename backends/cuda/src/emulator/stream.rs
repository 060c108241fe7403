//! The stream that the emulated device gives to a library, and what the library queues there: as on a GPU the library is called
//! when work is queued, and what it queued runs when its turn comes, of a graph again at every replay. `tests/nccl.cpp` is the
//! other side.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};

use backend::BackendError;

use super::machine::{Machine, Op, Work, of};
use crate::driver::{Lane, fault};
use crate::nccl::Sum;

/// Room for what went wrong.
const REPORT_BYTES: usize = 512;
/// A call that ended since its group was given up: the device is well.
const GIVEN_UP: c_int = 2;

type RunFn = unsafe extern "C" fn(*mut c_void, *mut c_char, u32) -> c_int;
type DropFn = unsafe extern "C" fn(*mut c_void);

/// What a library is given as a `cudaStream_t`.
#[repr(C)]
struct Stream {
    capturing: c_int,
    queue: unsafe extern "C" fn(*mut Stream, *mut c_void, RunFn, DropFn),
    machine: *const Mutex<Machine>,
    /// What the call is about.
    at: u64,
    bytes: usize,
}

/// What a library queued. It is dropped by the library once neither lane nor graph holds it.
pub(super) struct Call {
    what: *mut c_void,
    run: RunFn,
    drop: DropFn,
}

// SAFETY: the library's calls may be run on any thread, one at a time: the machine is locked.
unsafe impl Send for Call {}
// SAFETY: as above.
unsafe impl Sync for Call {}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: once, as the library asked.
        unsafe { (self.drop)(self.what) };
    }
}

impl Call {
    pub(super) fn run(&self) -> Result<(), BackendError> {
        let mut report = [0u8; REPORT_BYTES];
        // SAFETY: the library's own; the report has so much room.
        let status = unsafe { (self.run)(self.what, report.as_mut_ptr().cast(), REPORT_BYTES as u32) };
        if status == 0 || status == GIVEN_UP {
            return Ok(());
        }
        Err(fault("sum", CStr::from_bytes_until_nul(&report).unwrap_or_default()))
    }
}

/// Has the library queue `sum`, or capture it.
pub(super) fn queue(machine: &Arc<Mutex<Machine>>, sum: &Sum) -> Result<(), BackendError> {
    let capturing = c_int::from(of(machine).capture.is_some());
    let mut stream =
        Stream { capturing, queue: queued, machine: Arc::as_ptr(machine), at: sum.at, bytes: sum.count * 4 };
    sum.queue((&raw mut stream).cast())
}

unsafe extern "C" fn queued(stream: *mut Stream, what: *mut c_void, run: RunFn, drop: DropFn) {
    // SAFETY: the library was called with this stream and is still in that call.
    let (machine, at, bytes) = unsafe { (&*(*stream).machine, (*stream).at, (*stream).bytes) };
    let call = Arc::new(Call { what, run, drop });
    of(machine).queue(Lane::Compute, Work::Op(Op::Call { call, at, bytes }));
}
