//! NVRTC and cuBLASLt: where they are looked for, and whether they go with the driver.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cudarc::cublaslt::sys as lt;
use cudarc::nvrtc::sys as nvrtc;

use super::version;
use crate::compile;

/// Where toolkits lie that the loader was not told of.
const FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/opt/cuda/lib64"];
/// The oldest whose calls are those that are used here.
const MAJOR_MIN: i32 = 12;
/// The oldest NVRTC that knows every instruction of the kernels, those of FP8 last.
const NVRTC_MIN: i32 = 12_040;

/// Whether both are there and go with a driver that knows CUDA `driver`, or one line on what is missing.
pub(super) fn check(driver: i32) -> Result<(), String> {
    let missing = |library: &str, package: &str| {
        format!(
            "{library} was not found (it comes with the CUDA toolkit; of pip's {package} the folder must be in LD_LIBRARY_PATH)"
        )
    };
    // SAFETY: only looks for the library.
    if !there("nvrtc", driver, || unsafe { nvrtc::is_culib_present() }) {
        return Err(missing("libnvrtc", "nvidia-cuda-nvrtc"));
    }
    // SAFETY: only looks for the library.
    if !there("cublasLt", driver, || unsafe { lt::is_culib_present() }) {
        return Err(missing("libcublasLt", "nvidia-cublas"));
    }
    let (major, minor) = compile::version();
    let have = major * 1000 + minor * 10;
    if have < NVRTC_MIN {
        return Err(format!("libnvrtc is of CUDA {}, this needs {}", version(have), version(NVRTC_MIN)));
    }
    goes("libnvrtc", have, driver)?;
    // SAFETY: the library is there; every version of it has this function. It says 130102 for 13.1.2.
    let said = unsafe { lt::cublasLtGetVersion() } as i32;
    goes("libcublasLt", said / 10_000 * 1000 + said / 100 % 100 * 10, driver)
}

/// A driver runs what is of its own major version or older.
fn goes(library: &str, have: i32, driver: i32) -> Result<(), String> {
    if have / 1000 <= driver / 1000 {
        return Ok(());
    }
    let (have, driver) = (version(have), version(driver));
    Err(format!("{library} is of CUDA {have}, the NVIDIA driver knows {driver}: one of them must change"))
}

/// Whether the loader finds it, by now.
fn there(name: &str, driver: i32, present: impl Fn() -> bool) -> bool {
    if present() {
        return true;
    }
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    let folders = beside.into_iter().chain(FOLDERS.map(PathBuf::from));
    folders.into_iter().any(|folder| bring(&folder, name, driver)) && present()
}

/// Opens `lib<name>.so.<major>` of a folder; what is open the loader finds by its name, wherever it lies.
fn bring(folder: &Path, name: &str, driver: i32) -> bool {
    (MAJOR_MIN..=driver / 1000).rev().any(|major| {
        let library = folder.join(format!("lib{name}.so.{major}"));
        if !library.exists() {
            return false;
        }
        // NVRTC opens these by name, and has no path of its own either.
        let builtins = format!("lib{name}-builtins.so.{major}.");
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().as_bytes().starts_with(builtins.as_bytes())) {
            open(&entry.path());
        }
        open(&library)
    })
}

fn open(library: &Path) -> bool {
    let Ok(name) = CString::new(library.as_os_str().as_bytes()) else { return false };
    // SAFETY: a library of NVIDIA's, whose initialisers run; it stays open.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }.is_null()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_go_with_drivers_of_their_major_version_or_a_later_one() {
        for (library, driver) in [(13_010, 13_000), (12_040, 12_080), (12_090, 13_000)] {
            assert_eq!(goes("libnvrtc", library, driver), Ok(()));
        }
        let said = goes("libcublasLt", 13_000, 12_080).unwrap_err();
        assert_eq!(
            said,
            "libcublasLt is of CUDA 13.0, the NVIDIA driver knows 12.8: one of them must change"
        );
    }
}
