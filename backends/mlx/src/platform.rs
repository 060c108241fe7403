//! What differs between Apple Silicon and MLX's CPU library on Linux, and nothing else of the backend does. What is compiled
//! for Apple only has not been run yet.

use std::process::{Command, Stdio};

use backend::BackendError;
use mlx_rs::ops;

use crate::graph::Failure;

/// Whether quantised products sum in f32 when activations are 16 bits wide. Metal's kernels do; the CPU library adds up in
/// the type of the activations.
pub(crate) const SUMS_ARE_WIDE: bool = cfg!(target_vendor = "apple");

/// Whether products with gathered matrices take 16-bit numbers. The CPU library's take f32 only.
pub(crate) const GATHERS_NARROW: bool = cfg!(target_vendor = "apple");

/// The device in words.
pub(crate) const DEVICE: &str = if cfg!(target_vendor = "apple") { "metal" } else { "mlx's cpu library" };

/// Whether the device computes at all. Errors name `mlx.metallib` where that is missing: MLX's kernels for Metal, which lie
/// where it was built, and beside the executable on other machines.
pub(crate) fn check() -> Result<(), BackendError> {
    let tried = ops::ones::<f32>(&[2]).and_then(|x| x.sum(None)).and_then(|x| x.eval());
    tried.map_err(|error| no_device(&Failure::from(error).0))
}

fn no_device(reason: &str) -> BackendError {
    let remedy = match reason.contains("metallib") {
        true => "; copy mlx.metallib from the machine that built this, to where the executable lies",
        false => "",
    };
    BackendError::Unavailable { backend: "mlx", reason: format!("{reason}{remedy}") }
}

/// Lets the GPU keep as much memory as this machine gives it, and the machine awake while this process lives. Returns the
/// bytes; `None` where nothing but the system's memory bounds them.
pub(crate) fn claim() -> Option<u64> {
    let limit = limit()?;
    // Without it the machine may sleep, which is no reason not to serve.
    drop(awake(std::process::id()).spawn());
    // Refused before macOS 15: memory is then wired as it is used.
    let _ = mlx_rs::memory::set_wired_limit(usize::try_from(limit).ok()?);
    Some(limit)
}

/// Bytes that the GPU may use; `None` where nothing but the system's memory bounds them.
pub(crate) fn limit() -> Option<u64> {
    cfg!(target_vendor = "apple").then(working_set).flatten()
}

/// Keeps the machine from falling asleep until `process` ends.
fn awake(process: u32) -> Command {
    let mut command = Command::new("caffeinate");
    command.args(["-i", "-s", "-w", &process.to_string()]).stdin(Stdio::null());
    command
}

/// How much later than the end of an evaluation is seen Metal's handlers have run, where there is no other way to know. A handler that
/// takes longer costs one step a copy of some caches.
const HANDLERS: std::time::Duration = std::time::Duration::from_micros(200);

/// After the end of an evaluation was seen: waits until the device has let go of its inputs. Metal does that in a handler
/// that runs a moment later; the CPU library's threads have done it by then. `beside`: another evaluation runs, which is not waited for.
pub(crate) fn let_go(beside: bool) {
    if !cfg!(target_vendor = "apple") {
        return;
    }
    if beside {
        std::thread::sleep(HANDLERS);
    } else {
        // SAFETY: the handle of a stream that lives during the call. A failure is that of the evaluation, which says so.
        let _ = unsafe { mlx_sys::mlx_synchronize(mlx_rs::Stream::thread_local_or_default().as_ptr()) };
    }
}

/// Bytes that Metal recommends to use at most: three quarters of the memory or so, or what `iogpu.wired_limit_mb` says.
fn working_set() -> Option<u64> {
    // SAFETY: handles made and freed here; the key is a string that lives during the call, the size a place of ours.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let mut info = mlx_sys::mlx_device_info_new();
        let mut size = 0usize;
        let got = mlx_sys::mlx_device_info_get(&mut info, device) == 0
            && mlx_sys::mlx_device_info_get_size(
                &mut size,
                info,
                c"max_recommended_working_set_size".as_ptr(),
            ) == 0;
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        (got && size > 0).then_some(size as u64)
    }
}

/// Whether a cache of `kv` bytes fits beside `held` bytes of weights into what [`claim`] gave. Errors with the sums, and what
/// to change.
pub(crate) fn fits(held: u64, kv: u64, claimed: Option<u64>) -> Result<(), BackendError> {
    let Some(limit) = claimed.filter(|limit| held.saturating_add(kv) > *limit) else { return Ok(()) };
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let reason = format!(
        "{} MiB of weights and {} MiB of kv cache are {} MiB, the GPU may use {} MiB: take less kv memory, more ranks, or \
         `sudo sysctl iogpu.wired_limit_mb={}` if the machine has so much to spare",
        mib(held),
        mib(kv),
        mib(held.saturating_add(kv)),
        mib(limit),
        mib(held.saturating_add(kv)) + 1024,
    );
    Err(BackendError::Unavailable { backend: "mlx", reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As long as this process lives, and no longer: `-i` against idle sleep, `-s` on mains power, `-w` until it ends.
    #[test]
    fn the_machine_is_kept_awake_for_this_process() {
        let command = awake(4711);
        assert_eq!(command.get_program(), "caffeinate");
        assert!(command.get_args().eq(["-i", "-s", "-w", "4711"]));
    }

    /// A device that computes is passed; a copied executable without MLX's kernels says what to copy.
    #[test]
    fn a_missing_metallib_is_named() {
        check().unwrap();
        let error = no_device("Failed to load the default metallib. library not found").to_string();
        assert!(error.contains("copy mlx.metallib"), "{error}");
        assert!(!no_device("no GPU").to_string().contains("metallib"));
    }

    /// Only Apple's GPUs share memory that has to be claimed.
    #[test]
    #[cfg(not(target_vendor = "apple"))]
    fn nothing_is_claimed_elsewhere() {
        assert_eq!(claim(), None);
    }

    /// The refusal says its sums and names the setting.
    #[test]
    fn what_does_not_fit_is_refused_with_its_sums() {
        assert!(fits(6 << 30, 2 << 30, Some(8 << 30)).is_ok());
        assert!(fits(u64::MAX, 1, None).is_ok());
        let error = fits(6 << 30, 3 << 30, Some(8 << 30)).unwrap_err().to_string();
        for part in
            ["6144 MiB of weights", "3072 MiB of kv", "9216 MiB", "8192 MiB", "iogpu.wired_limit_mb=10240"]
        {
            assert!(error.contains(part), "{error}");
        }
    }
}
