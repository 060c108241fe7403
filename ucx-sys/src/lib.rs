//! The calls of UCX's libucp that `kvtransfer` uses, from a library that is opened at run time: builds need neither UCX nor its
//! headers, and a machine without it hears so in one line. Declarations are in [`raw`]; `tests/layout.rs` compares them with
//! real headers.

pub mod raw;

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use libloading::Library;

use crate::raw::{
    ucp_address_t, ucp_config_t, ucp_context_attr_t, ucp_context_h, ucp_ep_h, ucp_ep_params_t, ucp_mem_h,
    ucp_mem_map_params_t, ucp_params_t, ucp_request_param_t, ucp_rkey_h, ucp_worker_h, ucp_worker_params_t,
    ucs_log_func_t, ucs_status_ptr_t, ucs_status_t,
};

/// Oldest release that has every call in the form declared here.
const OLDEST: (u32, u32) = (1, 11);

/// Why there is no UCX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// Not on this machine, or not to be opened: the loader's words.
    Absent(String),
    /// Another release than these declarations are of.
    Version {
        /// The library's.
        got: (u32, u32, u32),
    },
    /// A call is missing.
    Symbol(&'static str),
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LoadError::Absent(words) => write!(f, "UCX is not installed (Debian: libucx0): {words}"),
            LoadError::Version { got: (a, b, c) } => {
                write!(f, "UCX {a}.{b}.{c} found, from {}.{} on and below 2 is needed", OLDEST.0, OLDEST.1)
            }
            LoadError::Symbol(name) => write!(f, "libucp lacks {name}"),
        }
    }
}

impl std::error::Error for LoadError {}

macro_rules! calls {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)?;)*) => {
        /// libucp's calls, as its documentation describes them.
        pub struct Ucx {
            /// Release of the library.
            pub version: (u32, u32, u32),
            status_string: unsafe extern "C" fn(ucs_status_t) -> *const c_char,
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($arg: $type),*) $(-> $ret)?,)*
            _ucp: Library,
            _ucs: Library,
        }

        impl Ucx {
            fn bind(ucs: Library, ucp: Library, version: (u32, u32, u32)) -> Result<Self, LoadError> {
                // SAFETY: the types are those of the library's headers, see tests/layout.rs for what they are made of.
                unsafe {
                    Ok(Ucx {
                        version,
                        status_string: symbol(&ucs, "ucs_status_string")?,
                        $($name: symbol(&ucp, stringify!($name))?,)*
                        _ucp: ucp,
                        _ucs: ucs,
                    })
                }
            }
        }
    };
}

calls! {
    /// Reads the library's own settings.
    fn ucp_config_read(prefix: *const c_char, file: *const c_char, config: *mut *mut ucp_config_t) -> ucs_status_t;
    /// Changes one of them.
    fn ucp_config_modify(config: *mut ucp_config_t, name: *const c_char, value: *const c_char) -> ucs_status_t;
    /// Frees them.
    fn ucp_config_release(config: *mut ucp_config_t);
    /// Makes a context; what `ucp_init` of the headers calls.
    fn ucp_init_version(major: u32, minor: u32, params: *const ucp_params_t, config: *const ucp_config_t, context: *mut ucp_context_h) -> ucs_status_t;
    /// What a context says of itself.
    fn ucp_context_query(context: ucp_context_h, attr: *mut ucp_context_attr_t) -> ucs_status_t;
    /// Ends a context that nothing is registered with.
    fn ucp_cleanup(context: ucp_context_h);
    /// Makes a worker.
    fn ucp_worker_create(context: ucp_context_h, params: *const ucp_worker_params_t, worker: *mut ucp_worker_h) -> ucs_status_t;
    /// Ends a worker and its endpoints.
    fn ucp_worker_destroy(worker: ucp_worker_h);
    /// The worker's address, for its peers.
    fn ucp_worker_get_address(worker: ucp_worker_h, address: *mut *mut ucp_address_t, bytes: *mut usize) -> ucs_status_t;
    /// Frees it.
    fn ucp_worker_release_address(worker: ucp_worker_h, address: *mut ucp_address_t);
    /// Does what there is to do; how much that was.
    fn ucp_worker_progress(worker: ucp_worker_h) -> u32;
    /// A file that becomes readable when there is something to do, once armed.
    fn ucp_worker_get_efd(worker: ucp_worker_h, fd: *mut i32) -> ucs_status_t;
    /// Arms it; busy: there is something to do now.
    fn ucp_worker_arm(worker: ucp_worker_h) -> ucs_status_t;
    /// Makes it readable, from any thread.
    fn ucp_worker_signal(worker: ucp_worker_h) -> ucs_status_t;
    /// An endpoint to a worker's address.
    fn ucp_ep_create(worker: ucp_worker_h, params: *const ucp_ep_params_t, ep: *mut ucp_ep_h) -> ucs_status_t;
    /// Closes it.
    fn ucp_ep_close_nbx(ep: ucp_ep_h, param: *const ucp_request_param_t) -> ucs_status_ptr_t;
    /// Registers memory.
    fn ucp_mem_map(context: ucp_context_h, params: *const ucp_mem_map_params_t, memory: *mut ucp_mem_h) -> ucs_status_t;
    /// Takes that back.
    fn ucp_mem_unmap(context: ucp_context_h, memory: ucp_mem_h) -> ucs_status_t;
    /// The key of registered memory, for peers.
    fn ucp_rkey_pack(context: ucp_context_h, memory: ucp_mem_h, key: *mut *mut libc::c_void, bytes: *mut usize) -> ucs_status_t;
    /// Frees it.
    fn ucp_rkey_buffer_release(key: *mut libc::c_void);
    /// A peer's key, for use on its endpoint.
    fn ucp_ep_rkey_unpack(ep: ucp_ep_h, key: *const libc::c_void, rkey: *mut ucp_rkey_h) -> ucs_status_t;
    /// Frees it.
    fn ucp_rkey_destroy(rkey: ucp_rkey_h);
    /// Reads a peer's memory.
    fn ucp_get_nbx(ep: ucp_ep_h, into: *mut libc::c_void, bytes: usize, address: u64, rkey: ucp_rkey_h, param: *const ucp_request_param_t) -> ucs_status_ptr_t;
    /// How an operation stands.
    fn ucp_request_check_status(request: *mut libc::c_void) -> ucs_status_t;
    /// Frees an operation that has ended.
    fn ucp_request_free(request: *mut libc::c_void);
}

/// # Safety
/// `T` is the type of the library's function of that name.
unsafe fn symbol<T: Copy>(library: &Library, name: &'static str) -> Result<T, LoadError> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name) }.map(|symbol| *symbol).map_err(|_| LoadError::Symbol(name))
}

/// The library, opened once per process. Never panics where there is none.
pub fn load() -> Result<&'static Ucx, LoadError> {
    static UCX: OnceLock<Result<Ucx, LoadError>> = OnceLock::new();
    UCX.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Ucx, LoadError> {
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        return Err(LoadError::Absent("not for this system".into()));
    }
    // SAFETY: UCX's own initialisers, which are made to be run by a loader.
    let open =
        |name: &str| unsafe { Library::new(name) }.map_err(|error| LoadError::Absent(error.to_string()));
    let (ucs, ucp) = (open("libucs.so.0")?, open("libucp.so.0")?);
    let (mut a, mut b, mut c) = (0, 0, 0);
    // SAFETY: void ucp_get_version(unsigned*, unsigned*, unsigned*), and places for three numbers.
    unsafe {
        let version: unsafe extern "C" fn(*mut u32, *mut u32, *mut u32) = symbol(&ucp, "ucp_get_version")?;
        version(&mut a, &mut b, &mut c);
    }
    if a != OLDEST.0 || (a, b) < OLDEST {
        return Err(LoadError::Version { got: (a, b, c) });
    }
    // SAFETY: void ucs_log_push_handler(ucs_log_func_t); the handler looks at none of its arguments.
    unsafe {
        if let Ok(push) = symbol::<unsafe extern "C" fn(ucs_log_func_t)>(&ucs, "ucs_log_push_handler") {
            push(quiet);
        }
    }
    Ucx::bind(ucs, ucp, (a, b, c))
}

/// UCX writes its log to standard output, where it does not belong: what fails comes back as a status.
unsafe extern "C" fn quiet() -> i32 {
    const STOP: i32 = 0; // UCS_LOG_FUNC_RC_STOP: no other handler after this one
    STOP
}

impl Ucx {
    /// `status` in words.
    pub fn words(&self, status: ucs_status_t) -> String {
        // SAFETY: the library answers with a text of its own for every number.
        unsafe { CStr::from_ptr((self.status_string)(status)) }.to_string_lossy().into_owned()
    }

    /// An error in words, or nothing.
    pub fn check(&self, status: ucs_status_t) -> Result<(), String> {
        if status == raw::UCS_OK { Ok(()) } else { Err(self.words(status)) }
    }
}

/// What the answer to a non-blocking call means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// Done at once.
    Done,
    /// Under way.
    Pending(*mut libc::c_void),
    /// Refused.
    Failed(ucs_status_t),
}

impl Posted {
    /// As `UCS_PTR_STATUS` and its neighbours read it.
    pub fn of(answer: ucs_status_ptr_t) -> Self {
        const LAST_ERROR: isize = -100; // UCS_ERR_LAST
        match answer as isize {
            0 => Posted::Done,
            status if (LAST_ERROR..0).contains(&status) => Posted::Failed(status as ucs_status_t),
            _ => Posted::Pending(answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_the_headers_do() {
        let answer = |number: isize| number as ucs_status_ptr_t;
        assert_eq!(Posted::of(answer(0)), Posted::Done);
        assert_eq!(Posted::of(answer(-15)), Posted::Failed(-15));
        assert_eq!(Posted::of(answer(-101)), Posted::Pending(answer(-101)));
        assert_eq!(Posted::of(answer(0x7f00_0000_1000)), Posted::Pending(answer(0x7f00_0000_1000)));
    }

    #[test]
    fn a_machine_without_the_library_hears_so_in_one_line() {
        match load() {
            Ok(ucx) => assert!(ucx.version >= (1, 11, 0) && !ucx.words(-3).is_empty()),
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    }
}
