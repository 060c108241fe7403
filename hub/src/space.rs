//! How much a disk has left.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bytes that this user may still write to the file system of `path`.
pub(crate) fn free(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is a C string that outlives the call, and the buffer is of the type that the call fills.
    let ok = unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } == 0;
    if !ok {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the buffer is filled.
    let stat = unsafe { stat.assume_init() };
    // The fields' widths differ between systems.
    #[allow(clippy::unnecessary_cast)]
    Ok((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_disk_has_some() {
        assert!(super::free(&std::env::temp_dir()).expect("a file system") > 0);
        assert!(super::free(std::path::Path::new("/no/such/place")).is_err());
    }
}
