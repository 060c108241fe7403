//! A library that stands in for NCCL: it has its calls, and adds up on the host.

use std::ffi::CString;
use std::process::Command;
use std::sync::OnceLock;

/// Builds the library, and tells the emulated devices of it. Returns its counter of sums.
pub fn library() -> extern "C" fn() -> i32 {
    static SUMS: OnceLock<extern "C" fn() -> i32> = OnceLock::new();
    *SUMS.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("baton-mock-nccl-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("libnccl.so.2");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nccl.cpp");
        let options = ["-std=c++17", "-O1", "-shared", "-fPIC", source, "-o"];
        assert!(Command::new("g++").args(options).arg(&path).status().unwrap().success());
        let name = CString::new(path.display().to_string()).unwrap();
        // SAFETY: a library that was just built here.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null());
        // SAFETY: nccl.cpp defines it with this signature.
        let sums = unsafe {
            std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> i32>(libc::dlsym(
                handle,
                c"mock_sums".as_ptr(),
            ))
        };
        backend_cuda::name_for_tests(path.display().to_string());
        sums
    })
}
