//! CRC32C of payloads.

use std::sync::atomic::{AtomicBool, Ordering};

static OFF: AtomicBool = AtomicBool::new(false);

/// Payloads are neither summed nor compared any more, in this process: only for measuring what that costs, beside peers that do
/// not do it either. Both ends have to say so.
pub fn off() {
    OFF.store(true, Ordering::Relaxed);
}

/// Whether it was called.
pub(crate) fn is_off() -> bool {
    OFF.load(Ordering::Relaxed)
}

/// The checksum of what `crc` is of, followed by `bytes`.
pub(crate) fn append(crc: u32, bytes: &[u8]) -> u32 {
    if is_off() { 0 } else { crc32c::crc32c_append(crc, bytes) }
}
