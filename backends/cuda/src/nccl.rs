//! NCCL, opened at run time: sums over the GPUs of a group, queued like kernels. [`crate::ranks`] brings the ranks together
//! and watches over them.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use backend::BackendError;

use crate::driver::Attach;

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

/// How often whoever waits for the other ranks looks whether they are there.
const JOIN_LOOK: Duration = Duration::from_millis(50);
/// `ncclSum`.
const SUM: c_int = 0;
/// From here on sums of graphs and queued ones may be under way together (`NCCL_GRAPH_MIXING_SUPPORT`).
const CAPTURES_MIN: c_int = 21_300;
/// Longest wait for the library to give a group up: it goes on by itself.
const ABORT_MAX: Duration = Duration::from_secs(5);
/// `ncclInProgress`: not an error.
const IN_PROGRESS: c_int = 7;

type UniqueIdFn = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type InitRankFn = unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int;
/// From, to, elements, their type, operation, communicator, stream.
type AllReduceFn =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
type VersionFn = unsafe extern "C" fn(*mut c_int) -> c_int;
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
    /// As `ncclGetVersion` says, e.g. 22907.
    version: c_int,
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
        let mut version = 0;
        // SAFETY: the signatures are those of nccl.h, unchanged since NCCL 2.4; the version is written.
        let library = unsafe {
            let said =
                std::mem::transmute::<*mut c_void, VersionFn>(symbol(c"ncclGetVersion")?)(&mut version);
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
                version: if said == 0 { version } else { 0 },
            }
        };
        Some(Nccl(Box::leak(Box::new(library))))
    }

    /// Whether its sums may be captured beside others that are queued.
    pub(crate) fn captures(&self) -> bool {
        self.0.version >= CAPTURES_MIN
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

    /// Meets the other ranks within `most`, or until `gone` says which of them is lost. The library waits for them for as long
    /// as they take, so it does on a thread of its own: one that is given up waits on, and gives back what it comes to.
    pub(crate) fn join(
        self,
        id: [u8; ID_BYTES],
        (rank, world): (usize, usize),
        attach: Attach,
        most: Duration,
        mut gone: impl FnMut() -> Option<BackendError>,
    ) -> Result<Communicator, BackendError> {
        let (met, joined) = mpsc::channel();
        let meet = move || {
            // Dropped, and so aborted, where nobody waits for it any more.
            let _ = met.send(attach().and_then(|()| self.meet(id, rank, world)));
        };
        let thread = std::thread::Builder::new().name("nccl join".into()).spawn(meet);
        thread.map_err(|error| BackendError::Device(format!("nccl: joining the group: {error}")))?;
        let begun = Instant::now();
        loop {
            match joined.recv_timeout(JOIN_LOOK.min(most)) {
                Ok(met) => return met,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(BackendError::Device("nccl: joining the group: its thread died".to_owned()));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if let Some(error) = gone() {
                return Err(error);
            }
            if begun.elapsed() >= most {
                // Which of several, the library does not say.
                let reason = format!("nccl: {world} ranks have not met within {most:?}");
                return Err(BackendError::Group { rank: usize::from(rank == 0), reason });
            }
        }
    }

    /// Waits for all ranks. The device's context is current.
    fn meet(self, id: [u8; ID_BYTES], rank: usize, world: usize) -> Result<Communicator, BackendError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle.
        let status = unsafe { (self.0.init_rank)(&mut handle, world as c_int, UniqueId(id), rank as c_int) };
        self.said("joining the group", status)?;
        Ok(Communicator { nccl: self, handle: AtomicPtr::new(handle), using: Mutex::new(()) })
    }
}

impl Communicator {
    fn all_reduce(
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

    /// Ends what is queued and gives the group up, also while a call of another thread waits inside. The library first ends
    /// what runs, then waits until no graph holds its sums any more: their owner may be another thread, so that wait is the
    /// library's own.
    pub(crate) fn abort(&self) {
        let handle = self.handle.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if handle.is_null() {
            return;
        }
        let (abort, handle) = (self.nccl.0.abort, handle.expose_provenance());
        let (ended, end) = mpsc::channel();
        let give_up = move || {
            // SAFETY: taken out above, so aborted once; abort frees it.
            let _ = unsafe { abort(std::ptr::with_exposed_provenance_mut(handle)) };
            // Nobody may wait any more.
            let _ = ended.send(());
        };
        // Without a thread the handle is lost, and the process with it if work is under way.
        if std::thread::Builder::new().name("nccl abort".into()).spawn(give_up).is_ok() {
            let _ = end.recv_timeout(ABORT_MAX);
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

/// A sum over all ranks of `count` elements at `at`, in place.
#[derive(Clone)]
pub struct Sum {
    pub(crate) group: Shared,
    pub(crate) at: u64,
    pub(crate) count: usize,
    pub(crate) element: Element,
}

impl PartialEq for Sum {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.group, &other.group) && self.at == other.at && self.shape() == other.shape()
    }
}

impl Sum {
    /// What is the same on all ranks.
    pub(crate) fn shape(&self) -> [u64; 2] {
        [self.count as u64, self.element as u64]
    }

    /// Queues it in `stream`, a `cudaStream_t`, or makes it part of what is captured there.
    pub(crate) fn queue(&self, stream: *mut c_void) -> Result<(), BackendError> {
        self.group.all_reduce(self.at, self.count, self.element, stream)
    }
}

/// The stand-in for the library, built once a process.
#[cfg(all(test, feature = "emulator"))]
pub(crate) fn built_for_tests() -> &'static str {
    static PATH: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    PATH.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("baton-mock-nccl-unit-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("libnccl.so.2");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nccl.cpp");
        let options = ["-std=c++17", "-O1", "-shared", "-fPIC", source, "-o"];
        assert!(std::process::Command::new("g++").args(options).arg(&path).status().unwrap().success());
        path.display().to_string()
    })
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;

    /// A rank that is still there but never joins, and one that is known to be gone: nobody waits for them for ever.
    #[test]
    fn a_rank_that_does_not_join_is_not_waited_for() {
        let nccl = Nccl::open(built_for_tests()).unwrap();
        let join = |id: [u8; ID_BYTES], rank: usize, most: Duration, gone: Option<&str>| {
            let gone = || gone.map(|reason| BackendError::Group { rank: 1, reason: reason.to_owned() });
            nccl.join(id, (rank, 2), Box::new(|| Ok(())), most, gone)
        };
        let said = |joined: Result<Communicator, BackendError>| joined.map(|_| ()).unwrap_err().to_string();
        let short = Duration::from_millis(120);
        let frozen = nccl.unique_id().unwrap();
        assert_eq!(
            said(join(frozen, 0, short, None)),
            "tensor-parallel group lost: rank 1: nccl: 2 ranks have not met within 120ms"
        );
        // The thread that was given up still waits: the other rank may come, and this one is not there any more.
        let other = join(frozen, 1, Duration::from_secs(60), None).unwrap();
        drop(other);
        let long = Duration::from_secs(3600);
        assert_eq!(
            said(join(nccl.unique_id().unwrap(), 0, long, Some("closed its link"))),
            "tensor-parallel group lost: rank 1: closed its link"
        );
    }
}
