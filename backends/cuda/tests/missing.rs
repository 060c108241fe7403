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

/// What a process says whose loader looks for libraries here.
fn answer(executable: &Path, libraries: &Path) -> String {
    let out = Command::new(executable)
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
        .arg(format!("-Wl,-soname,{name}"))
        .arg(&file)
        .arg("-o")
        .arg(out)
        .status();
    assert!(status.unwrap().success());
}

/// A driver whose answers are these, with GPUs of these compute capabilities.
fn driver(init: u32, version: u32, gpus: &[[u32; 2]]) -> String {
    let both: Vec<String> = gpus.iter().map(|[major, minor]| format!("{{{major}, {minor}}},")).collect();
    format!(
        "static int of[][2] = {{{}{{0, 0}}}};
         int cuInit(unsigned f) {{ return {init}; }}
         int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}
         int cuDeviceGetCount(int *n) {{ *n = {}; return 0; }}
         int cuDeviceGet(int *device, int at) {{ *device = at; return 0; }}
         int cuDeviceGetName(char *name, int bytes, int device) {{
             const char *from = \"Some GPU\";
             while ((*name++ = *from++)) {{}}
             return 0;
         }}
         int cuDeviceGetAttribute(int *x, int what, int device) {{
             if (what != 75 && what != 76) return 1;
             *x = of[device][what - 75];
             return 0;
         }}",
        both.concat(),
        gpus.len()
    )
}

fn nvrtc(major: u32, minor: u32) -> String {
    format!("int nvrtcVersion(int *a, int *b) {{ *a = {major}; *b = {minor}; return 0; }}")
}

const CUBLAS_13: &str = "unsigned long cublasLtGetVersion() { return 130002; }";
const HOPPER: [u32; 2] = [9, 0];

#[test]
fn what_is_missing_is_said_in_one_line() {
    let root = std::env::temp_dir().join(format!("baton-missing-{}", std::process::id()));
    let own = std::env::current_exe().unwrap();
    let cases = [
        ("nothing", None, "no NVIDIA driver: libcuda.so.1 was not found"),
        ("no-device", Some(driver(100, 13000, &[])), "no usable GPU"),
        ("broken", Some(driver(999, 13000, &[])), "the NVIDIA driver failed: CUDA_ERROR_UNKNOWN (are its"),
        (
            "fabric",
            Some(driver(802, 13000, &[])),
            "the NVIDIA driver failed: CUDA_ERROR_SYSTEM_NOT_READY (does",
        ),
        ("old", Some(driver(0, 11080, &[HOPPER])), "the NVIDIA driver knows CUDA 11.8, this needs 12.0"),
        ("none", Some(driver(0, 13000, &[])), "no usable GPU"),
        (
            "old-gpus",
            Some(driver(0, 13000, &[[6, 1], [7, 5]])),
            "Some GPU is older than Ampere (compute capability 7.5)",
        ),
        ("no-nvrtc", Some(driver(0, 13000, &[HOPPER])), "libnvrtc was not found"),
    ];
    for (name, source, want) in cases {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        if let Some(source) = source {
            build(&dir, "libcuda.so.1", &source);
        }
        let said = answer(&own, &dir);
        assert!(said.starts_with(want), "{name}: {said}");
    }
    // NVRTC is there, cuBLASLt is not.
    let dir = root.join("no-cublas");
    std::fs::create_dir_all(&dir).unwrap();
    build(&dir, "libcuda.so.1", &driver(0, 13000, &[HOPPER]));
    build(&dir, "libnvrtc.so.13", &nvrtc(13, 0));
    let said = answer(&own, &dir);
    assert!(said.starts_with("libcublasLt was not found"), "{said}");
    // Both are; a GPU that is too old does not count.
    build(&dir, "libcublasLt.so.13", CUBLAS_13);
    build(&dir, "libcuda.so.1", &driver(0, 13000, &[[7, 5], HOPPER, [12, 1]]));
    assert_eq!(answer(&own, &dir), "2 GPUs");
    // A driver that is older than they are, and the same with one of them of its age.
    build(&dir, "libcuda.so.1", &driver(0, 12040, &[HOPPER]));
    let must = "the NVIDIA driver knows 12.4: one of them must change";
    assert_eq!(answer(&own, &dir), format!("libnvrtc is of CUDA 13.0, {must}"));
    build(&dir, "libnvrtc.so.13", &nvrtc(12, 9));
    assert_eq!(answer(&own, &dir), format!("libcublasLt is of CUDA 13.0, {must}"));
    build(&dir, "libnvrtc.so.13", &nvrtc(12, 0));
    assert_eq!(answer(&own, &dir), "libnvrtc is of CUDA 12.0, this needs 12.4");
    let _ = std::fs::remove_dir_all(&root);
}

/// Libraries beside the executable are found, whatever the loader knows.
#[test]
fn libraries_lie_beside_the_executable() {
    let root = std::env::temp_dir().join(format!("baton-beside-{}", std::process::id()));
    let dir = root.join("driver");
    std::fs::create_dir_all(&dir).unwrap();
    build(&dir, "libcuda.so.1", &driver(0, 13000, &[HOPPER]));
    build(&root, "libnvrtc.so.13", &nvrtc(13, 0));
    build(&root, "libcublasLt.so.13", CUBLAS_13);
    let copy = root.join("child");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    assert_eq!(answer(&copy, &dir), "1 GPUs");
    let _ = std::fs::remove_dir_all(&root);
}
