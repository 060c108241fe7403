//! A machine without a usable GPU says in one line what is missing, and nothing panics. Each driver here is a library that
//! answers as such a machine's does; a process of its own finds it in its loader's path.

use std::path::Path;
use std::process::Command;

/// What the child prints before its answer.
const MARK: &str = "probe: ";

/// Not a test of its own: the process that looks for a GPU.
#[test]
#[ignore = "run by the other test, in a process of its own"]
fn child() {
    let answer = match backend_cuda::probe() {
        Ok(count) => format!("{count} GPUs"),
        Err(reason) => reason,
    };
    println!("{MARK}{answer}");
}

fn answer(libraries: &Path) -> String {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", libraries)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let found = text.lines().find_map(|line| Some(line.split_once(MARK)?.1.to_owned()));
    found.unwrap_or_else(|| panic!("no answer: {text}{}", String::from_utf8_lossy(&out.stderr)))
}

fn build(dir: &Path, name: &str, source: &str) {
    let file = dir.join("source.c");
    std::fs::write(&file, source).unwrap();
    let out = dir.join(name);
    let status = Command::new("g++")
        .args(["-x", "c", "-shared", "-fPIC", "-w"])
        .arg(&file)
        .arg("-o")
        .arg(out)
        .status();
    assert!(status.unwrap().success());
}

/// A driver whose answers are these.
fn driver(init: u32, version: u32, count: u32) -> String {
    format!(
        "int cuInit(unsigned f) {{ return {init}; }}
         int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}
         int cuDeviceGetCount(int *n) {{ *n = {count}; return 0; }}"
    )
}

#[test]
fn what_is_missing_is_said_in_one_line() {
    let root = std::env::temp_dir().join(format!("baton-missing-{}", std::process::id()));
    let cases = [
        ("nothing", None, "no NVIDIA driver: libcuda.so.1 was not found"),
        ("no-device", Some(driver(100, 13000, 0)), "no usable GPU"),
        ("broken", Some(driver(999, 13000, 0)), "the NVIDIA driver failed: CUDA_ERROR_UNKNOWN"),
        ("old", Some(driver(0, 12040, 1)), "the NVIDIA driver knows CUDA 12.4, this needs 13.0"),
        ("none", Some(driver(0, 13000, 0)), "no usable GPU"),
        ("no-nvrtc", Some(driver(0, 13000, 1)), "libnvrtc was not found"),
    ];
    for (name, source, want) in cases {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        if let Some(source) = source {
            build(&dir, "libcuda.so.1", &source);
        }
        let said = answer(&dir);
        assert!(said.starts_with(want), "{name}: {said}");
    }
    // NVRTC is there, cuBLASLt is not.
    let dir = root.join("no-cublas");
    std::fs::create_dir_all(&dir).unwrap();
    build(&dir, "libcuda.so.1", &driver(0, 13000, 1));
    build(&dir, "libnvrtc.so.13", "int nvrtcVersion(int *a, int *b) { return 0; }");
    let said = answer(&dir);
    assert!(said.starts_with("libcublasLt was not found"), "{said}");
    let _ = std::fs::remove_dir_all(&root);
}
