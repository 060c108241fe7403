//! Calls of mlx-c that mlx-rs has none for, with MLX's own words where they fail. Used by `fabric` and `draw`.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

use mlx_rs::{Array, Dtype, ops};

use crate::graph::{Failure, Recorded};

thread_local! {
    /// What MLX complained about last on this thread.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

unsafe extern "C" {
    /// The handler of mlx-rs, which it exports under this name.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

/// Keeps the message for [`raw`] and lets mlx-rs have it, too.
unsafe extern "C" fn listen(message: *const c_char, data: *mut c_void) {
    // SAFETY: MLX passes a string that lives during the call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    SAID.with_borrow_mut(|said| *said = Some(text));
    // SAFETY: the same string, for the handler that was there before.
    unsafe { default_mlx_error_handler(message, data) };
}

/// Has what MLX complains about kept for [`said`].
pub(crate) fn listening() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Makes mlx-rs register its own handler, which happens once, before ours replaces it.
        drop(ops::zeros_dtype(&[1], Dtype::Float32));
        // SAFETY: a function that lives as long as the process; no data goes with it.
        unsafe { mlx_sys::mlx_set_error_handler(Some(listen), std::ptr::null_mut(), None) };
    });
}

/// Why a call ended with `status`, in MLX's words.
pub(crate) fn said(status: i32) -> Failure {
    let said = SAID.with_borrow_mut(Option::take);
    Failure(
        said.unwrap_or_else(|| format!("status {status}")).split_whitespace().collect::<Vec<_>>().join(" "),
    )
}

/// A call of mlx-c that makes an array.
pub(crate) fn raw(call: impl FnOnce(*mut mlx_sys::mlx_array) -> i32) -> Recorded {
    listening();
    // SAFETY: a fresh handle, owned by the array or freed.
    unsafe {
        let mut handle = mlx_sys::mlx_array_new();
        match call(&mut handle) {
            0 => Ok(Array::from_ptr(handle)),
            status => {
                mlx_sys::mlx_array_free(handle);
                Err(said(status))
            }
        }
    }
}
