//! The kernels as a library of the host: built by g++ once a process.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use backend::BackendError;

use crate::driver::{Launch, fault};

/// Room for what a kernel did wrong.
const REPORT_BYTES: usize = 512;
type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    u32,
    u32,
    *const c_void,
    u32,
    u32,
    *mut c_char,
    u32,
) -> c_int;
type MemoryFn = unsafe extern "C" fn(u64, u64, c_int);

/// The compiled kernels. One block runs at a time in the whole process.
pub(super) struct Library {
    launch: LaunchFn,
    memory: MemoryFn,
}

impl Library {
    /// Runs a kernel to its end; errors with what it did wrong. `loses`: which arrival at a barrier never comes, or 0.
    pub(super) fn run(&self, launch: &Launch, args: &[u64], loses: u32) -> Result<(), BackendError> {
        let name = CString::new(launch.kernel).map_err(|error| fault(launch.kernel, error))?;
        let mut report = [0u8; REPORT_BYTES];
        // SAFETY: the struct is the kernel's own; every address in it is checked where it is used.
        let status = unsafe {
            (self.launch)(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared_bytes,
                args.as_ptr().cast(),
                size_of_val(args) as u32,
                loses,
                report.as_mut_ptr().cast(),
                REPORT_BYTES as u32,
            )
        };
        let said = CStr::from_bytes_until_nul(&report).unwrap_or_default().to_string_lossy();
        if status == 0 { Ok(()) } else { Err(fault(launch.kernel, said)) }
    }
}

/// Who has it may run kernels.
pub(super) fn library() -> Result<MutexGuard<'static, Library>, BackendError> {
    static LIBRARY: OnceLock<Result<Mutex<Library>, String>> = OnceLock::new();
    match LIBRARY.get_or_init(|| build().map(Mutex::new)) {
        Ok(library) => Ok(library.lock().unwrap_or_else(PoisonError::into_inner)),
        Err(reason) => Err(BackendError::Unavailable { backend: "cuda", reason: reason.clone() }),
    }
}

fn build() -> Result<Library, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = std::env::temp_dir().join(format!("baton-emulated-kernels-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let built = compiled(root, &dir).and_then(|path| open(&path));
    // The mapping needs no file any more.
    let _ = std::fs::remove_dir_all(&dir);
    built
}

/// Kernels with a call before every load and store, then the device without.
fn compiled(root: &Path, dir: &Path) -> Result<PathBuf, String> {
    let mut sources: Vec<(PathBuf, bool)> = std::fs::read_dir(root.join("kernels"))
        .map_err(|error| format!("kernels: {error}"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .map(|path| (path, true))
        .collect();
    sources.push((root.join("emulator/faults.cu"), true));
    sources.sort();
    sources.extend(
        ["emulator.cpp", "tensor.cpp", "checks.cpp"].map(|name| (root.join("emulator").join(name), false)),
    );
    let mut compilers = Vec::new();
    let mut objects = Vec::new();
    for (source, is_kernel) in &sources {
        let object = dir.join(source.file_name().unwrap_or_default()).with_extension("o");
        let mut command = Command::new("g++");
        command.args(["-std=c++17", "-O2", "-fPIC", "-DBATON_EMULATED", "-ffp-contract=off", "-w"]);
        if *is_kernel {
            command.args(["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]);
            // Accesses stay as they are written: bytes are not put together to words.
            command.args(["-fno-expensive-optimizations", "-fno-store-merging", "-fno-tree-vectorize"]);
            command.arg("-fno-tree-slp-vectorize");
        }
        command
            .args(["-x", "c++", "-c"])
            .arg("-I")
            .arg(root.join("emulator"))
            .arg("-I")
            .arg(root.join("kernels"));
        command.arg(source).arg("-o").arg(&object).stderr(std::process::Stdio::piped());
        compilers.push(command.spawn().map_err(|error| format!("g++: {error}"))?);
        objects.push(object);
    }
    for compiler in compilers {
        let out = compiler.wait_with_output().map_err(|error| format!("g++: {error}"))?;
        if !out.status.success() {
            return Err(format!("g++: {}", String::from_utf8_lossy(&out.stderr)));
        }
    }
    let library = dir.join("kernels.so");
    let out = Command::new("g++").arg("-shared").args(&objects).arg("-o").arg(&library).output();
    let out = out.map_err(|error| format!("g++: {error}"))?;
    match out.status.success() {
        true => Ok(library),
        false => Err(format!("g++: {}", String::from_utf8_lossy(&out.stderr))),
    }
}

fn open(path: &Path) -> Result<Library, String> {
    let name = CString::new(path.display().to_string()).map_err(|error| error.to_string())?;
    // SAFETY: a library that was just built here; its initialisers only register kernels.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    if handle.is_null() {
        // SAFETY: dlopen has just failed, so there is a message.
        return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
    }
    let symbol = |name: &CStr| {
        // SAFETY: the handle is open, the name a C string.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        if symbol.is_null() {
            Err(format!("no {} in the kernels", name.to_string_lossy()))
        } else {
            Ok(symbol)
        }
    };
    let (launch, memory) = (symbol(c"emulator_launch")?, symbol(c"emulator_memory")?);
    // SAFETY: emulator.cpp and checks.cpp define them with these signatures.
    Ok(unsafe {
        Library {
            launch: std::mem::transmute::<*mut c_void, LaunchFn>(launch),
            memory: std::mem::transmute::<*mut c_void, MemoryFn>(memory),
        }
    })
}

/// Tells the checks that kernels may touch this memory, or no more.
pub(super) fn reachable(at: u64, bytes: usize, there: bool) {
    if let Ok(library) = library() {
        // SAFETY: only notes the range.
        unsafe { (library.memory)(at, bytes as u64, c_int::from(there)) };
    }
}
