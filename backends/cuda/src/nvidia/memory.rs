//! What a GPU lends: memory of its own, pinned memory of the host, events. Each gives itself back.

use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::Gpu;

/// Free memory of a machine whose GPU has the host's: what the kernel would give back counts.
pub(super) fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
}

/// Device memory.
pub struct Memory {
    pub(super) gpu: Rc<Gpu>,
    pub(super) address: sys::CUdeviceptr,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, and freeing waits for work that uses it. A failure loses memory of a device that has failed.
        let _ = unsafe {
            let _ = result::ctx::set_current(self.gpu.context);
            result::free_sync(self.address)
        };
    }
}

/// Device memory that any thread may hold.
pub struct Lasting {
    pub(super) address: sys::CUdeviceptr,
    pub(super) context: sys::CUcontext,
}

// SAFETY: an address and a handle, which any thread may use.
unsafe impl Send for Lasting {}
// SAFETY: as above.
unsafe impl Sync for Lasting {}

impl Drop for Lasting {
    fn drop(&mut self) {
        // SAFETY: ours, and freeing waits for work that uses it. The thread that drops it may never have seen the context; a failure
        // loses memory of a device that has failed, or is gone.
        let _ = unsafe {
            let _ = result::ctx::set_current(self.context);
            result::free_sync(self.address)
        };
    }
}

/// Pinned host memory.
pub struct Host {
    pub(super) start: *mut u8,
    pub(super) bytes: usize,
    pub(super) context: sys::CUcontext,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Host {}
// SAFETY: shared references only read.
unsafe impl Sync for Host {}

impl AsRef<[u8]> for Host {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: allocated with this size and zeroed.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl AsMut<[u8]> for Host {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: ours. The thread that drops it may never have seen the context; a failure loses memory of a device that
        // has failed.
        let _ = unsafe {
            let _ = result::ctx::set_current(self.context);
            result::free_host(self.start.cast())
        };
    }
}

/// A place in a lane.
pub struct Event {
    pub(super) event: sys::CUevent,
    pub(super) context: sys::CUcontext,
}

// SAFETY: the driver's handles may be used on any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; as for `Host`.
        let _ = unsafe {
            let _ = result::ctx::set_current(self.context);
            result::event::destroy(self.event)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_of_a_machine_is_known() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
