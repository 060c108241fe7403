//! The kernels of one GPU: compiled when the first one is wanted, then found by name.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;

use backend::BackendError;
use cudarc::driver::{result, sys};

use super::failed;
use crate::compile;
use crate::driver::{Launch, fault};

/// Dynamic shared memory that every GPU grants without being asked.
const SHARED_BYTES_PLAIN: u32 = 48 * 1024;

pub(super) struct Kernels {
    target: String,
    /// Compiled code is kept here.
    cache: Option<PathBuf>,
    shared_bytes_max: usize,
    by_name: RefCell<HashMap<&'static str, Kernel>>,
    modules: RefCell<Vec<sys::CUmodule>>,
}

/// A kernel and the dynamic shared memory it has been granted.
struct Kernel {
    function: sys::CUfunction,
    shared_bytes: Cell<u32>,
}

impl Kernels {
    pub(super) fn new(target: String, cache: Option<PathBuf>, shared_bytes_max: usize) -> Self {
        Kernels { target, cache, shared_bytes_max, by_name: RefCell::default(), modules: RefCell::default() }
    }

    /// Queues a kernel in `stream`; `args` are the words of its struct.
    pub(super) fn launch(
        &self,
        stream: sys::CUstream,
        launch: Launch,
        args: &[u64],
    ) -> Result<(), BackendError> {
        let Launch { kernel: name, grid: [x, y, z], threads, shared_bytes } = launch;
        if shared_bytes as usize > self.shared_bytes_max {
            let most = self.shared_bytes_max;
            return Err(fault(name, format!("{shared_bytes} bytes of shared memory, a block has {most}")));
        }
        let mut params = [args.as_ptr().cast_mut().cast::<c_void>()];
        self.with(name, |kernel| {
            // SAFETY: the struct is the kernel's own and is copied by the call; addresses in it are of live memory.
            unsafe {
                if shared_bytes > kernel.shared_bytes.get() {
                    let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    result::function::set_function_attribute(kernel.function, most, shared_bytes as i32)
                        .map_err(failed(name))?;
                    kernel.shared_bytes.set(shared_bytes);
                }
                let (grid, block) = ((x, y, z), (threads, 1, 1));
                result::launch_kernel(kernel.function, grid, block, shared_bytes, stream, &mut params)
            }
            .map_err(failed(name))
        })
    }

    /// Compiles and loads them.
    pub(super) fn prepare(&self) -> Result<(), BackendError> {
        self.with("norm_f32", |_| Ok(()))
    }

    /// Gives the code back.
    ///
    /// # Safety
    /// The context is current, and nothing is queued any more.
    pub(super) unsafe fn close(&mut self) {
        self.by_name.get_mut().clear();
        for module in self.modules.get_mut().drain(..) {
            // SAFETY: loaded once. What cannot be given back goes with the process.
            let _ = unsafe { result::module::unload(module) };
        }
    }

    /// The kernel `name`; the first call compiles all of them, side by side.
    fn with<T>(
        &self,
        name: &'static str,
        call: impl FnOnce(&Kernel) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        if self.by_name.borrow().is_empty() {
            let (cache, target) = (self.cache.as_deref(), self.target.as_str());
            let compiled: Vec<_> = std::thread::scope(|scope| {
                let compile =
                    |(file, source)| scope.spawn(move || compile::cached(cache, file, source, target));
                let threads: Vec<_> = compile::FILES.into_iter().map(compile).collect();
                let joined = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<u8>, String>>| {
                    thread.join().unwrap_or_else(|_| Err("the compiler's thread died".to_owned()))
                };
                threads.into_iter().map(joined).collect()
            });
            for ((file, source), code) in compile::FILES.into_iter().zip(compiled) {
                let code = code.map_err(|reason| fault("kernels", format_args!("{reason}")))?;
                // SAFETY: `code` is an image for this GPU and outlives the call.
                let module = unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(|error| {
                    let (major, minor) = compile::version();
                    let what = format!("loading {file} as libnvrtc {major}.{minor} made it for {target}");
                    failed(&what)(error)
                })?;
                self.modules.borrow_mut().push(module);
                for kernel in compile::kernels(source) {
                    let symbol = CString::new(kernel).map_err(|error| fault(kernel, error))?;
                    // SAFETY: the module is loaded.
                    let function = unsafe { result::module::get_function(module, symbol) }
                        .map_err(failed("finding a kernel"))?;
                    let shared_bytes = Cell::new(SHARED_BYTES_PLAIN);
                    self.by_name.borrow_mut().insert(kernel, Kernel { function, shared_bytes });
                }
            }
        }
        let kernels = self.by_name.borrow();
        call(kernels.get(name).ok_or_else(|| fault(name, "no such kernel"))?)
    }
}
