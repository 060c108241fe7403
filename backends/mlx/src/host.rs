//! Host memory on its way into MLX: bytes of a checkpoint become arrays by copy, and a buffer that was filled from a
//! socket is handed over as it is (adopted where the device can, which Metal does for whole pages).

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use backend::{DType, KvError};
use mlx_rs::{Array, Dtype};

use crate::graph::{Failure, Recorded, int, mlx_type};

/// Pages of Apple Silicon. Regions that MLX may adopt begin and end at them.
pub(crate) const PAGE_BYTES: usize = 16 * 1024;

/// Row-major `[rows, cols]` of `dtype` from its bytes, which need no alignment.
pub(crate) fn matrix(bytes: &[u8], dtype: DType, rows: usize, cols: usize) -> Recorded {
    let raw = Array::from_slice(bytes, &[int(rows), int(cols * dtype.bytes())]);
    Ok(raw.view_dtype(mlx_type(dtype))?)
}

/// Zeroed memory of whole pages.
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
    bytes: usize,
}

// SAFETY: plain bytes owned by this value; nothing depends on a thread.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads; writing needs `&mut self`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `bytes` zeros, committed by the system as they are first written. Errors when there is no memory.
    pub(crate) fn zeroed(bytes: usize) -> Result<Self, KvError> {
        let full = KvError::Full { wanted_blocks: 0, free_blocks: 0 };
        let size = bytes.max(1).next_multiple_of(PAGE_BYTES);
        let layout = Layout::from_size_align(size, PAGE_BYTES).map_err(|_| full.clone())?;
        // SAFETY: the layout's size is above zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(full)?;
        Ok(Buffer { start, layout, bytes })
    }

    /// The bytes, to be written.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `bytes` initialised bytes owned by self, borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// The region at `offset` (whole pages) as an array of `shape`. MLX keeps the buffer alive, or copies it.
    pub(crate) fn array(
        self: &Arc<Self>,
        offset: usize,
        shape: &[i32],
        dtype: Dtype,
        size: usize,
    ) -> Recorded {
        unsafe extern "C" fn let_go(payload: *mut c_void) {
            // SAFETY: the pointer that `Arc::into_raw` gave below, returned once.
            drop(unsafe { Arc::from_raw(payload.cast::<Buffer>().cast_const()) });
        }
        assert!(offset + size <= self.bytes, "{size} bytes at {offset} of {}", self.bytes);
        let payload = Arc::into_raw(self.clone()).cast_mut().cast::<c_void>();
        // SAFETY: `size` bytes at `offset` lie in the buffer and hold elements of `dtype`, which the caller's shape
        // counts; they are only read from now on and live until MLX calls `let_go`.
        let handle = unsafe {
            mlx_sys::mlx_array_new_data_managed_payload(
                self.start.as_ptr().add(offset).cast(),
                shape.as_ptr(),
                int(shape.len()),
                u32::from(dtype),
                payload,
                Some(let_go),
            )
        };
        if handle.ctx.is_null() {
            return Err(Failure(format!("no array over {size} bytes of host memory")));
        }
        // SAFETY: a fresh handle, owned from here on.
        Ok(unsafe { Array::from_ptr(handle) })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
