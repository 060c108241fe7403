//! The device of tests: kernels compiled as C++ for the host by g++, memory of the host. See `emulator/emulated.h`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

use backend::BackendError;

use crate::args::Args;
use crate::device::Open;
use crate::driver::{Dense, Driver, Lane, Launch, fault};

/// Shared memory of a block on the smallest GPU that is supported (sm_120).
const SHARED_BYTES_MAX: u32 = 99 * 1024;

type LaunchFn = unsafe extern "C" fn(*const c_char, *const u32, u32, u32, *const c_void) -> c_int;

/// Kernels on the host.
#[derive(Clone)]
pub struct Emulated;

/// The compiled kernels. The emulator runs one block at a time.
fn library() -> Result<MutexGuard<'static, LaunchFn>, BackendError> {
    static LIBRARY: OnceLock<Result<Mutex<LaunchFn>, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| build().and_then(|path| open(&path)).map(Mutex::new));
    match library {
        Ok(launch) => Ok(launch.lock().unwrap_or_else(|poisoned| poisoned.into_inner())),
        Err(reason) => Err(BackendError::Unavailable { backend: "cuda", reason: reason.clone() }),
    }
}

fn build() -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = std::env::temp_dir().join(format!("baton-emulated-kernels-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut sources: Vec<PathBuf> = std::fs::read_dir(root.join("kernels"))
        .map_err(|error| format!("kernels: {error}"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    sources.push(root.join("emulator/emulator.cpp"));
    let library = dir.join("kernels.so");
    let out = Command::new("g++")
        .args([
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-DBATON_EMULATED",
            "-ffp-contract=off",
            "-w",
            "-x",
            "c++",
        ])
        .arg("-I")
        .arg(root.join("emulator"))
        .arg("-I")
        .arg(root.join("kernels"))
        .args(&sources)
        .arg("-o")
        .arg(&library)
        .output()
        .map_err(|error| format!("g++: {error}"))?;
    match out.status.success() {
        true => Ok(library),
        false => Err(format!("g++: {}", String::from_utf8_lossy(&out.stderr))),
    }
}

fn open(path: &Path) -> Result<LaunchFn, String> {
    let name = CString::new(path.display().to_string()).map_err(|error| error.to_string())?;
    // SAFETY: a library that was just built here; its initialisers only register kernels.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    // The mapping needs no file any more.
    let _ = path.parent().map(std::fs::remove_dir_all);
    if handle.is_null() {
        // SAFETY: dlopen has just failed, so there is a message.
        return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
    }
    // SAFETY: the handle is open, the name a C string.
    let symbol = unsafe { libc::dlsym(handle, c"emulator_launch".as_ptr()) };
    if symbol.is_null() {
        return Err("no emulator_launch in the kernels".to_owned());
    }
    // SAFETY: emulator.cpp defines it with this signature.
    Ok(unsafe { std::mem::transmute::<*mut c_void, LaunchFn>(symbol) })
}

/// Host memory as the device's: 256-byte aligned, filled with not-a-number.
pub struct Memory(Vec<u128>);

impl Open for Emulated {
    fn open(_: usize, _: Option<&Path>) -> Result<Self, BackendError> {
        library().map(|_| Emulated)
    }
}

impl Driver for Emulated {
    type Memory = Memory;
    type Host = Vec<u8>;
    type Event = ();

    fn describe(&self) -> String {
        "emulated on the host".to_owned()
    }

    fn free_bytes(&self) -> u64 {
        1 << 32
    }

    fn blocks_busy(&self) -> u32 {
        8
    }

    fn alloc(&self, bytes: usize) -> Result<Memory, BackendError> {
        Ok(Memory(vec![u128::MAX; bytes.div_ceil(16) + 16]))
    }

    fn address(&self, memory: &Memory) -> u64 {
        (memory.0.as_ptr() as u64).next_multiple_of(256)
    }

    fn host(&self, bytes: usize) -> Result<Vec<u8>, BackendError> {
        Ok(vec![0; bytes])
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), BackendError> {
        // SAFETY: `to` is of a Memory with room for these bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn clear(&self, at: u64, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    fn to_host(
        &self,
        _: Lane,
        host: &mut Vec<u8>,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), BackendError> {
        // SAFETY: `from` is of a Memory with so many bytes.
        let from = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
        host[at..at + bytes].copy_from_slice(from);
        Ok(())
    }

    fn to_device(
        &self,
        _: Lane,
        to: u64,
        host: &Vec<u8>,
        at: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.upload(to, &host[at..at + bytes])
    }

    fn launch<A: Args>(&self, launch: Launch, args: &A) -> Result<(), BackendError> {
        if launch.shared_bytes > SHARED_BYTES_MAX {
            return Err(fault(launch.kernel, format!("{} bytes of shared memory", launch.shared_bytes)));
        }
        let name = CString::new(launch.kernel).map_err(|error| fault(launch.kernel, error))?;
        let run = library()?;
        let args = std::ptr::from_ref(args).cast();
        // SAFETY: the struct is the kernel's own; addresses in it are of live memory.
        match unsafe { run(name.as_ptr(), launch.grid.as_ptr(), launch.threads, launch.shared_bytes, args) } {
            0 => Ok(()),
            _ => Err(fault(launch.kernel, "no such kernel")),
        }
    }

    fn dense(&self, _: &Dense) -> Result<bool, BackendError> {
        Ok(false)
    }

    fn record(&self, _: Lane) -> Result<(), BackendError> {
        Ok(())
    }

    fn after(&self, _: Lane, (): &()) -> Result<(), BackendError> {
        Ok(())
    }

    fn passed(&self, (): &()) -> bool {
        true
    }

    fn wait((): &()) -> Result<(), BackendError> {
        Ok(())
    }
}
