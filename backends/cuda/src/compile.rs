//! Kernels from source to machine code: NVRTC, per GPU family, kept in a folder of the user's between runs. Needs no GPU:
//! `kernels_compile` in `tests/` does it for every family.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

/// What every kernel file begins with instead of its includes.
const SHARED: [&str; 6] = [
    include_str!("../kernels/device.cuh"),
    include_str!("../kernels/quant.cuh"),
    include_str!("../kernels/product.cuh"),
    include_str!("../kernels/attention.cuh"),
    include_str!("../kernels/groups.cuh"),
    include_str!("../kernels/tensor.cuh"),
];

/// The files that have kernels, by name.
pub const FILES: [(&str, &str); 13] = [
    ("attention.cu", include_str!("../kernels/attention.cu")),
    ("blackwell.cu", include_str!("../kernels/blackwell.cu")),
    ("cache.cu", include_str!("../kernels/cache.cu")),
    ("draw.cu", include_str!("../kernels/draw.cu")),
    ("fp8.cu", include_str!("../kernels/fp8.cu")),
    ("hopper.cu", include_str!("../kernels/hopper.cu")),
    ("latent.cu", include_str!("../kernels/latent.cu")),
    ("moe.cu", include_str!("../kernels/moe.cu")),
    ("prepare.cu", include_str!("../kernels/prepare.cu")),
    ("product.cu", include_str!("../kernels/product.cu")),
    ("product_group.cu", include_str!("../kernels/product_group.cu")),
    ("rows.cu", include_str!("../kernels/rows.cu")),
    ("sums.cu", include_str!("../kernels/sums.cu")),
];

/// One family's code runs on all its GPUs: Ampere, Hopper, Blackwell of data centres, Blackwell of desks (and DGX Spark).
pub const TARGETS: [&str; 4] = ["sm_80", "sm_90a", "sm_100f", "sm_120f"];

/// The target for a GPU of this compute capability.
pub fn target(major: i32, minor: i32) -> Option<String> {
    match (major, minor) {
        (8, 0) => Some("sm_80".to_owned()),
        // Ada and the small Amperes.
        (8, minor) => Some(format!("sm_8{minor}")),
        (9, _) => Some("sm_90a".to_owned()),
        (10, _) => Some("sm_100f".to_owned()),
        // Jetson Thor.
        (11, _) => Some("sm_110f".to_owned()),
        (12, _) => Some("sm_120f".to_owned()),
        (major, minor) if major > 12 => Some(format!("sm_{major}{minor}")),
        _ => None,
    }
}

/// The whole text of a file: one translation unit without includes.
fn whole(source: &str) -> String {
    let mut text = String::new();
    for part in SHARED.iter().chain([&source]) {
        let lines = part.lines().filter(|line| !line.starts_with("#include \"") && *line != "#pragma once");
        lines.for_each(|line| {
            text.push_str(line);
            text.push('\n');
        });
    }
    // What stands in the branch for the emulator is not compiled.
    text
}

/// Names of the kernels in a file.
pub fn kernels(source: &str) -> impl Iterator<Item = &str> {
    let names = source.lines().filter_map(|line| line.strip_prefix("KERNEL("));
    names.filter_map(|rest| rest.split_once(',').map(|(name, _)| name))
}

fn options(target: &str) -> Vec<String> {
    // No fast math: norms, softmax and angles keep their precision.
    vec![format!("--gpu-architecture={target}"), "--std=c++17".into(), "-default-device".into()]
}

/// Machine code of a file for `target`. Errors with the compiler's words.
pub fn compile(name: &str, source: &str, target: &str) -> Result<Vec<u8>, String> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err("libnvrtc was not found by the dynamic loader".to_owned());
    }
    let text = CString::new(whole(source)).map_err(|error| error.to_string())?;
    let file = CString::new(name).map_err(|error| error.to_string())?;
    let program = result::create_program(&text, Some(&file)).map_err(|error| format!("{name}: {error:?}"))?;
    let code = built(program, name, target);
    // SAFETY: made above, destroyed once; a program that is not freed harms nobody.
    let _ = unsafe { result::destroy_program(program) };
    code
}

fn built(program: sys::nvrtcProgram, name: &str, target: &str) -> Result<Vec<u8>, String> {
    // SAFETY: the program is alive, and buffers are as large as the library said.
    unsafe {
        if let Err(error) = result::compile_program(program, &options(target)) {
            if error.0 == sys::nvrtcResult::NVRTC_ERROR_INVALID_OPTION {
                let (major, minor) = version();
                return Err(format!(
                    "libnvrtc {major}.{minor} does not know {target}{}",
                    known_since(target)
                ));
            }
            let log = result::get_program_log(program).unwrap_or_default();
            let log = if log.is_empty() { c"" } else { CStr::from_ptr(log.as_ptr()) };
            return Err(format!("{name} for {target}: {error:?}: {}", log.to_string_lossy()));
        }
        let failed = |error| format!("{name} for {target}: {error:?}");
        let mut bytes = 0;
        sys::nvrtcGetCUBINSize(program, &mut bytes).result().map_err(failed)?;
        let mut code = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result().map_err(failed)?;
        Ok(code)
    }
}

/// Machine code of a file, from `cache` when it was compiled before.
pub(crate) fn cached(
    cache: Option<&Path>,
    name: &str,
    source: &str,
    target: &str,
) -> Result<Vec<u8>, String> {
    let Some(dir) = cache else { return compile(name, source, target) };
    let path = place(dir, name, source, target);
    if let Ok(code) = fs::read(&path) {
        // A file that was cut short is no machine code.
        if code.starts_with(b"\x7fELF") {
            return Ok(code);
        }
    }
    let code = compile(name, source, target)?;
    // A folder that cannot be written costs the next start some seconds, no more.
    if let Err(error) = keep(&path, &code) {
        eprintln!("cuda: compiled kernels are not kept: {}: {error}", path.display());
    }
    Ok(code)
}

/// Which NVRTC this is, e.g. (13, 0); zeros when it does not say. The library is there.
pub(crate) fn version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// Which later one knows a family, in words.
fn known_since(target: &str) -> &'static str {
    match target {
        "sm_90a" => ": 12.0 does",
        "sm_100f" | "sm_120f" => ": 12.9 does",
        "sm_110f" => ": 13.0 does",
        _ => "",
    }
}

/// By everything that the code depends on.
fn place(dir: &Path, name: &str, source: &str, target: &str) -> PathBuf {
    let (major, minor) = version();
    let mut hash = Sha256::new();
    hash.update(whole(source));
    hash.update(options(target).join(" "));
    hash.update(format!("{major}.{minor}"));
    let hash: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    dir.join(format!("{}-{target}-{hash}.cubin", name.trim_end_matches(".cu")))
}

/// Whole or not at all: written beside and renamed.
fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let beside = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = fs::File::create(&beside)?;
    file.write_all(code)?;
    file.sync_all()?;
    fs::rename(beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_a_name_of_its_own() {
        let mut names: Vec<&str> = FILES.iter().flat_map(|(_, source)| kernels(source)).collect();
        assert!(names.len() > 30, "{names:?}");
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn gpus_get_the_code_of_their_family() {
        for (capability, want) in
            [((9, 0), "sm_90a"), ((10, 3), "sm_100f"), ((12, 1), "sm_120f"), ((8, 9), "sm_89")]
        {
            assert_eq!(target(capability.0, capability.1).as_deref(), Some(want));
        }
        assert_eq!(target(7, 5), None, "no bf16 tensor cores before Ampere");
    }
}
