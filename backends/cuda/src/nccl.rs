//! NCCL, opened at run time: sums over the GPUs of a group, queued like kernels. [`crate::ranks`] brings the ranks together
//! and watches over them.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use backend::BackendError;

/// `ncclUniqueId`.
pub(crate) const ID_BYTES: usize = 128;

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; ID_BYTES]);

/// Elements that are summed, with their numbers in `ncclDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    U32 = 3,
    F32 = 7,
}

/// `ncclSum`.
const SUM: c_int = 0;
/// `ncclInProgress`: not an error.
const IN_PROGRESS: c_int = 7;

type UniqueIdFn = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type InitRankFn = unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int;
/// From, to, elements, their type, operation, communicator, stream.
type AllReduceFn =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
type AbortFn = unsafe extern "C" fn(*mut c_void) -> c_int;
type AsyncErrorFn = unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;
type ErrorStringFn = unsafe extern "C" fn(c_int) -> *const c_char;

/// The functions of the library that are used.
struct Library {
    unique_id: UniqueIdFn,
    init_rank: InitRankFn,
    all_reduce: AllReduceFn,
    abort: AbortFn,
    async_error: AsyncErrorFn,
    error_string: ErrorStringFn,
}

/// A library that is there. Stays loaded.
#[derive(Clone, Copy)]
pub(crate) struct Nccl(&'static Library);

/// One rank's end of a group.
pub(crate) struct Communicator {
    nccl: Nccl,
    /// Null once given up. NCCL lets another thread abort what a first one is waiting in.
    handle: AtomicPtr<c_void>,
    /// Held while a call uses the handle.
    using: Mutex<()>,
}

#[cfg(feature = "emulator")]
static NAMED: std::sync::OnceLock<String> = std::sync::OnceLock::new();

/// Where emulated devices look for the library, once said.
#[cfg(feature = "emulator")]
pub fn name_for_tests(path: String) {
    // The first one counts.
    let _ = NAMED.set(path);
}

#[cfg(feature = "emulator")]
pub(crate) fn named_for_tests() -> Option<String> {
    NAMED.get().cloned()
}

impl Nccl {
    /// The library by name or path. `None`: not there, or without a function that is needed.
    pub(crate) fn open(name: &str) -> Option<Self> {
        let name = CString::new(name).ok().filter(|name| !name.is_empty())?;
        // SAFETY: opens a library by name, whose initialisers are NVIDIA's.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return None;
        }
        let symbol = |name: &CStr| {
            // SAFETY: the handle is open, the name a C string.
            let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        // SAFETY: the signatures are those of nccl.h, unchanged since NCCL 2.4.
        let library = unsafe {
            Library {
                unique_id: std::mem::transmute::<*mut c_void, UniqueIdFn>(symbol(c"ncclGetUniqueId")?),
                init_rank: std::mem::transmute::<*mut c_void, InitRankFn>(symbol(c"ncclCommInitRank")?),
                all_reduce: std::mem::transmute::<*mut c_void, AllReduceFn>(symbol(c"ncclAllReduce")?),
                abort: std::mem::transmute::<*mut c_void, AbortFn>(symbol(c"ncclCommAbort")?),
                async_error: std::mem::transmute::<*mut c_void, AsyncErrorFn>(symbol(
                    c"ncclCommGetAsyncError",
                )?),
                error_string: std::mem::transmute::<*mut c_void, ErrorStringFn>(symbol(
                    c"ncclGetErrorString",
                )?),
            }
        };
        Some(Nccl(Box::leak(Box::new(library))))
    }

    fn said(&self, what: &str, status: c_int) -> Result<(), BackendError> {
        if status == 0 || status == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: NCCL answers with a constant string.
        let text = unsafe { CStr::from_ptr((self.0.error_string)(status)) }.to_string_lossy();
        Err(BackendError::Device(format!("nccl: {what}: {text}")))
    }

    /// What rank 0 tells the others.
    pub(crate) fn unique_id(&self) -> Result<[u8; ID_BYTES], BackendError> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: writes the id.
        let status = unsafe { (self.0.unique_id)(&mut id) };
        self.said("unique id", status).map(|()| id.0)
    }

    /// Meets the other ranks; waits for all of them. The device's context is current.
    pub(crate) fn join(
        self,
        id: [u8; ID_BYTES],
        rank: usize,
        world: usize,
    ) -> Result<Communicator, BackendError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle.
        let status = unsafe { (self.0.init_rank)(&mut handle, world as c_int, UniqueId(id), rank as c_int) };
        self.said("joining the group", status)?;
        Ok(Communicator { nccl: self, handle: AtomicPtr::new(handle), using: Mutex::new(()) })
    }
}

impl Communicator {
    /// Queues the sum over all ranks of `count` elements at `at`, in place.
    pub(crate) fn all_reduce(
        &self,
        at: u64,
        count: usize,
        element: Element,
        stream: *mut c_void,
    ) -> Result<(), BackendError> {
        let _using = self.using.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = self.handle.load(Ordering::Acquire);
        if handle.is_null() {
            return Err(BackendError::Device("nccl: the group was given up".to_owned()));
        }
        let place = at as *mut c_void;
        // SAFETY: a live handle; device memory of so many elements, which lives until the stream is past it.
        let status =
            unsafe { (self.nccl.0.all_reduce)(place, place, count, element as c_int, SUM, handle, stream) };
        self.nccl.said("sum", status)
    }

    /// What has gone wrong on the way, if anything.
    pub(crate) fn failure(&self) -> Option<String> {
        let _using = self.using.try_lock().ok()?;
        let handle = self.handle.load(Ordering::Acquire);
        if handle.is_null() {
            return None;
        }
        let mut status = 0;
        // SAFETY: a live handle; writes a number.
        let asked = unsafe { (self.nccl.0.async_error)(handle, &mut status) };
        let failed = self.nccl.said("group", asked).and_then(|()| self.nccl.said("group", status));
        failed.err().map(|error| error.to_string())
    }

    /// Ends what is queued and gives the group up, also while a call of another thread waits inside.
    pub(crate) fn abort(&self) {
        let handle = self.handle.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !handle.is_null() {
            // SAFETY: taken out above, so aborted once; abort frees it.
            let _ = unsafe { (self.nccl.0.abort)(handle) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Shared with queued work and with the thread that watches.
pub(crate) type Shared = Arc<Communicator>;
