//! An NVIDIA GPU through the driver API, NVRTC and cuBLASLt, all opened at run time. A machine without them gets one line that
//! says what is missing; nothing panics.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use backend::{BackendError, DType};
use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{DriverError, result, sys};

use crate::args::Args;
use crate::compile;
use crate::device::Open;
use crate::driver::{Dense, Driver, Lane, Launch, fault};

/// CUDA 13.0: what this build speaks.
const DRIVER_MIN: i32 = 13_000;
/// Scratch memory of a dense product; what NVIDIA advises for Hopper and later.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Dynamic shared memory that every GPU grants without being asked.
const SHARED_BYTES_PLAIN: u32 = 48 * 1024;
/// Blocks a processor that keep it busy.
const BLOCKS_PER_PROCESSOR: u32 = 4;

/// An open GPU.
#[derive(Clone)]
pub struct Nvidia(Rc<Gpu>);

struct Gpu {
    context: sys::CUcontext,
    device: sys::CUdevice,
    lanes: [sys::CUstream; 2],
    kernels: RefCell<HashMap<&'static str, sys::CUfunction>>,
    modules: RefCell<Vec<sys::CUmodule>>,
    target: String,
    lt: lt_sys::cublasLtHandle_t,
    workspace: sys::CUdeviceptr,
    /// By shape: what the library proposed.
    plans: RefCell<HashMap<Shape, Plan>>,
    cache: Option<PathBuf>,
    description: String,
    processors: u32,
}

/// What a dense product's plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    bf16: bool,
    out_f32: bool,
    m: usize,
    n: usize,
    k: usize,
    out_stride: usize,
}

/// A dense product as the library wants it.
struct Plan {
    desc: lt_sys::cublasLtMatmulDesc_t,
    w: lt_sys::cublasLtMatrixLayout_t,
    x: lt_sys::cublasLtMatrixLayout_t,
    out: lt_sys::cublasLtMatrixLayout_t,
    algorithm: lt_sys::cublasLtMatmulAlgo_t,
}

fn refused(reason: String) -> BackendError {
    BackendError::Unavailable { backend: "cuda", reason }
}

fn failed(what: &str) -> impl Fn(DriverError) -> BackendError {
    move |error| match error.error_name() {
        Ok(name) => fault(what, name),
        Err(_) => fault(what, error),
    }
}

/// Whether CUDA can be used here: the number of GPUs, or one line on what is missing. Touches no function of the driver
/// before it is known to be there: the bindings panic on a missing one.
pub fn probe() -> Result<i32, String> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver: libcuda.so.1 was not found".to_owned());
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err("no usable GPU".to_owned()),
        Err(error) => return Err(format!("the NVIDIA driver failed: {error:?}")),
    }
    let mut have = 0;
    // SAFETY: writes one number; every driver has this function.
    unsafe { sys::cuDriverGetVersion(&mut have) }
        .result()
        .map_err(|error| format!("driver version: {error:?}"))?;
    if have < DRIVER_MIN {
        let show = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(format!("the NVIDIA driver knows CUDA {}, this needs {}", show(have), show(DRIVER_MIN)));
    }
    let count = result::device::get_count().map_err(|error| format!("counting GPUs: {error:?}"))?;
    if count == 0 {
        return Err("no usable GPU".to_owned());
    }
    // SAFETY: only looks for the library.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(
            "libnvrtc was not found (it comes with the CUDA toolkit, or pip's nvidia-cuda-nvrtc)".to_owned()
        );
    }
    // SAFETY: only looks for the library.
    if !unsafe { lt_sys::is_culib_present() } {
        return Err(
            "libcublasLt was not found (it comes with the CUDA toolkit, or pip's nvidia-cublas)".to_owned()
        );
    }
    Ok(count)
}

impl Open for Nvidia {
    fn open(index: usize, cache: Option<&Path>) -> Result<Self, BackendError> {
        let count = probe().map_err(refused)?;
        if index >= count as usize {
            return Err(refused(format!("GPU {index} of {count}")));
        }
        let device = result::device::get(index as i32).map_err(failed("device"))?;
        // SAFETY: the device is there; handles are used while the context lives, which is to the end.
        unsafe {
            let attribute =
                |attribute| result::device::get_attribute(device, attribute).map_err(failed("attributes"));
            use sys::CUdevice_attribute as Of;
            let major = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let processors = attribute(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
            let name = result::device::get_name(device).map_err(failed("name"))?;
            let Some(target) = compile::target(major, minor) else {
                return Err(refused(format!(
                    "{name} is older than Ampere (compute capability {major}.{minor})"
                )));
            };
            let context = result::primary_ctx::retain(device).map_err(failed("context"))?;
            result::ctx::set_current(context).map_err(failed("context"))?;
            let lane =
                || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("stream"));
            let lanes = [lane()?, lane()?];
            let lt = lt::create_handle().map_err(|error| fault("cublasLt", error))?;
            let workspace = result::malloc_sync(WORKSPACE_BYTES).map_err(failed("workspace"))?;
            let description = format!("{name}, {target}, {processors} processors");
            Ok(Nvidia(Rc::new(Gpu {
                context,
                device,
                lanes,
                kernels: RefCell::default(),
                modules: RefCell::default(),
                target,
                lt,
                workspace,
                plans: RefCell::default(),
                cache: cache.map(Path::to_path_buf),
                description,
                processors,
            })))
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: everything was made in `open` or later, and nothing of it is used afterwards. What cannot be given back
        // goes with the process.
        unsafe {
            let _ = result::ctx::synchronize();
            for plan in self.plans.get_mut().values() {
                let _ = lt::destroy_matmul_desc(plan.desc);
                for layout in [plan.w, plan.x, plan.out] {
                    let _ = lt::destroy_matrix_layout(layout);
                }
            }
            let _ = lt::destroy_handle(self.lt);
            let _ = result::free_sync(self.workspace);
            for module in self.modules.get_mut().drain(..) {
                let _ = result::module::unload(module);
            }
            for lane in self.lanes {
                let _ = result::stream::destroy(lane);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Gpu {
    fn lane(&self, lane: Lane) -> sys::CUstream {
        self.lanes[usize::from(lane == Lane::Copy)]
    }

    /// The kernel `name`; the first call compiles all of them.
    fn kernel(&self, name: &'static str) -> Result<sys::CUfunction, BackendError> {
        if self.kernels.borrow().is_empty() {
            for (file, source) in compile::FILES {
                let code = compile::cached(self.cache.as_deref(), file, source, &self.target)
                    .map_err(|reason| fault(file, reason))?;
                // SAFETY: `code` is an image for this GPU and outlives the call.
                let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
                    .map_err(failed("loading kernels"))?;
                self.modules.borrow_mut().push(module);
                for kernel in compile::kernels(source) {
                    let symbol = CString::new(kernel).map_err(|error| fault(kernel, error))?;
                    // SAFETY: the module is loaded.
                    let function = unsafe { result::module::get_function(module, symbol) }
                        .map_err(failed("finding a kernel"))?;
                    self.kernels.borrow_mut().insert(kernel, function);
                }
            }
        }
        self.kernels.borrow().get(name).copied().ok_or_else(|| fault(name, "no such kernel"))
    }

    fn plan(&self, shape: Shape) -> Result<Plan, lt::CublasError> {
        use lt_sys::{
            cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as Of, cudaDataType as Type,
        };
        let element = if shape.bf16 { Type::CUDA_R_16BF } else { Type::CUDA_R_32F };
        let result = if shape.out_f32 { Type::CUDA_R_32F } else { element };
        let (m, n, k) = (shape.m as u64, shape.n as u64, shape.k as u64);
        // Row-major out [m, n] is column-major [n, m] = W^T (of [k, n]) times x [k, m].
        let desc = lt::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F)?;
        // CUBLAS_OP_T
        let transposed = 1i32;
        let w = lt::create_matrix_layout(element, k, n, k as i64)?;
        let x = lt::create_matrix_layout(element, k, m, k as i64)?;
        let out = lt::create_matrix_layout(result, n, m, shape.out_stride as i64)?;
        let preference = lt::create_matmul_pref()?;
        // SAFETY: handles were just made; attributes are given with their sizes.
        let algorithm = unsafe {
            lt::set_matmul_desc_attribute(
                desc,
                Of::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )?;
            lt::set_matmul_pref_attribute(
                preference,
                lt_sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of_val(&WORKSPACE_BYTES),
            )?;
            let found = lt::get_matmul_algo_heuristic(self.lt, desc, w, x, out, out, preference);
            let _ = lt::destroy_matmul_pref(preference);
            found?.algo
        };
        Ok(Plan { desc, w, x, out, algorithm })
    }
}

/// Device memory.
pub struct Memory {
    gpu: Rc<Gpu>,
    address: sys::CUdeviceptr,
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

/// Pinned host memory.
pub struct Host {
    start: *mut u8,
    bytes: usize,
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
        // SAFETY: ours; no context is needed to free pinned memory.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}

/// A place in a lane.
pub struct Event {
    event: sys::CUevent,
    context: sys::CUcontext,
}

// SAFETY: the driver's handles may be used on any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

impl Driver for Nvidia {
    type Memory = Memory;
    type Host = Host;
    type Event = Event;

    fn describe(&self) -> String {
        self.0.description.clone()
    }

    fn free_bytes(&self) -> u64 {
        result::mem_get_info().map_or(0, |(free, _)| free as u64)
    }

    fn blocks_busy(&self) -> u32 {
        self.0.processors * BLOCKS_PER_PROCESSOR
    }

    fn alloc(&self, bytes: usize) -> Result<Memory, BackendError> {
        // SAFETY: the context is current on the owner thread.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(Memory { gpu: self.0.clone(), address }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(BackendError::OutOfMemory { wanted_bytes: bytes as u64, free_bytes: self.free_bytes() })
            }
            Err(error) => Err(failed("memory")(error)),
        }
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.address
    }

    fn host(&self, bytes: usize) -> Result<Host, BackendError> {
        let bytes = bytes.max(1);
        // SAFETY: the context is current on the owner thread; the memory is zeroed before anybody reads it.
        unsafe {
            let start = result::malloc_host(bytes, 0).map_err(failed("pinned memory"))?.cast::<u8>();
            std::ptr::write_bytes(start, 0, bytes);
            Ok(Host { start, bytes })
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), BackendError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is of device memory with room for these bytes; the call returns when they are there.
        unsafe { result::memcpy_htod_sync(to, bytes) }.map_err(failed("copy to the device"))
    }

    fn clear(&self, at: u64, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: device memory of so many bytes.
        unsafe { result::memset_d8_sync(at, 0, bytes) }.map_err(failed("clearing memory"))
    }

    fn to_host(
        &self,
        lane: Lane,
        host: &mut Host,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), BackendError> {
        // SAFETY: the caller keeps `host` until the copy is over.
        unsafe { result::memcpy_dtoh_async(&mut host.as_mut()[at..at + bytes], from, self.0.lane(lane)) }
            .map_err(failed("copy to the host"))
    }

    fn to_device(
        &self,
        lane: Lane,
        to: u64,
        host: &Host,
        at: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        // SAFETY: the caller keeps `host` until the copy is over.
        unsafe { result::memcpy_htod_async(to, &host.as_ref()[at..at + bytes], self.0.lane(lane)) }
            .map_err(failed("copy to the device"))
    }

    fn launch<A: Args>(&self, launch: Launch, args: &A) -> Result<(), BackendError> {
        let kernel = self.0.kernel(launch.kernel)?;
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let [x, y, z] = launch.grid;
        // SAFETY: the struct is the kernel's own and is copied by the call; addresses in it are of live memory.
        unsafe {
            if launch.shared_bytes > SHARED_BYTES_PLAIN {
                let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(kernel, most, launch.shared_bytes as i32)
                    .map_err(failed(launch.kernel))?;
            }
            result::launch_kernel(
                kernel,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                self.0.lane(Lane::Compute),
                &mut params,
            )
        }
        .map_err(failed(launch.kernel))
    }

    fn dense(&self, product: &Dense) -> Result<bool, BackendError> {
        let shape = Shape {
            bf16: product.dtype == DType::BF16,
            out_f32: product.out_f32,
            m: product.m,
            n: product.n,
            k: product.k,
            out_stride: product.out_stride,
        };
        let mut plans = self.0.plans.borrow_mut();
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => match self.0.plan(shape) {
                Ok(plan) => entry.insert(plan),
                // Odd widths: own kernels take them.
                Err(_) => return Ok(false),
            },
        };
        let (alpha, beta) = (1f32, 0f32);
        // SAFETY: handles live as long as the GPU; addresses are of live memory of the plan's shapes.
        unsafe {
            lt::matmul(
                self.0.lt,
                plan.desc,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                product.w as *const c_void,
                plan.w,
                product.x as *const c_void,
                plan.x,
                product.out as *const c_void,
                plan.out,
                product.out as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.0.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.0.lane(Lane::Compute).cast(),
            )
        }
        .map_err(|error| fault("dense product", error))?;
        Ok(true)
    }

    fn record(&self, lane: Lane) -> Result<Event, BackendError> {
        // Without timing events are cheap; waiting threads sleep.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(failed("event"))?;
        let event = Event { event, context: self.0.context };
        // SAFETY: both are alive.
        unsafe { result::event::record(event.event, self.0.lane(lane)) }.map_err(failed("event"))?;
        Ok(event)
    }

    fn after(&self, lane: Lane, event: &Event) -> Result<(), BackendError> {
        let plain = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        unsafe { result::stream::wait_event(self.0.lane(lane), event.event, plain) }.map_err(failed("event"))
    }

    fn passed(&self, event: &Event) -> bool {
        // SAFETY: the event is alive.
        !matches!(
            unsafe { result::event::query(event.event) },
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY))
        )
    }

    fn wait(event: &Event) -> Result<(), BackendError> {
        // SAFETY: the context outlives its events, and a thread may make it current at any time.
        unsafe {
            result::ctx::set_current(event.context).map_err(failed("context"))?;
            result::event::synchronize(event.event).map_err(failed("device"))
        }
    }
}
