//! An NVIDIA GPU through the driver API, NVRTC and cuBLASLt, all opened at run time. A machine without them gets one line that
//! says what is missing; nothing panics.

use std::cell::{Cell, RefCell};
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
use crate::driver::{Collective, Dense, Driver, Lane, Launch, fault};

/// CUDA 13.0: what this build speaks.
const DRIVER_MIN: i32 = 13_000;
/// Scratch memory of a dense product; what NVIDIA advises for Hopper and later.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Dynamic shared memory that every GPU grants without being asked.
const SHARED_BYTES_PLAIN: u32 = 48 * 1024;
/// Blocks a processor that keep it busy.
const BLOCKS_PER_PROCESSOR: u32 = 4;
/// Uploads pass through two pieces of pinned memory of this size.
const STAGE_BYTES: usize = 16 << 20;
/// Shapes of dense products whose plans are kept; ragged batches have ever new ones.
const PLANS_MAX: usize = 4096;
/// The alignment that the library assumes unless told otherwise.
const ALIGNMENT_MAX: u64 = 256;

/// An open GPU.
#[derive(Clone)]
pub struct Nvidia(Rc<Gpu>);

struct Gpu {
    context: sys::CUcontext,
    device: sys::CUdevice,
    lanes: [sys::CUstream; 2],
    kernels: RefCell<HashMap<&'static str, Kernel>>,
    modules: RefCell<Vec<sys::CUmodule>>,
    target: String,
    lt: lt_sys::cublasLtHandle_t,
    workspace: sys::CUdeviceptr,
    /// By shape: what the library proposed.
    plans: RefCell<HashMap<Shape, Plan>>,
    cache: Option<PathBuf>,
    description: String,
    processors: u32,
    shared_bytes_max: usize,
    unified: bool,
    identity: [u8; 16],
    /// Pinned memory that uploads pass through, and the copy that reads it.
    stages: RefCell<[Option<(Host, Event)>; 2]>,
}

/// A kernel and the dynamic shared memory it has been granted.
struct Kernel {
    function: sys::CUfunction,
    shared_bytes: Cell<u32>,
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
    /// Alignments of w, x and out in bytes.
    aligned: [u32; 3],
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
        // Without the driver's own words, which a broken one may lack.
        Err(error) => return Err(format!("the NVIDIA driver failed: {:?}", error.0)),
    }
    let mut have = 0;
    // SAFETY: writes one number; every driver has this function.
    unsafe { sys::cuDriverGetVersion(&mut have) }
        .result()
        .map_err(|error| format!("driver version: {:?}", error.0))?;
    if have < DRIVER_MIN {
        let show = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(format!("the NVIDIA driver knows CUDA {}, this needs {}", show(have), show(DRIVER_MIN)));
    }
    let count = result::device::get_count().map_err(|error| format!("counting GPUs: {:?}", error.0))?;
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
            let shared = attribute(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
            let integrated = attribute(Of::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
            let name = result::device::get_name(device).map_err(failed("name"))?;
            let uuid = result::device::get_uuid(device).map_err(failed("uuid"))?;
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
            let memory = if integrated { ", one memory with the host" } else { "" };
            let description = format!("{name}, {target}, {processors} processors{memory}");
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
                shared_bytes_max: shared as usize,
                unified: integrated,
                identity: uuid.bytes.map(|byte| byte as u8),
                stages: RefCell::default(),
            })))
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: everything was made in `open` or later, and nothing of it is used afterwards. What cannot be given back
        // goes with the process.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::ctx::synchronize();
            self.plans.get_mut().clear();
            *self.stages.get_mut() = [None, None];
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

    /// The kernel `name`; the first call compiles all of them, side by side.
    fn with_kernel<T>(
        &self,
        name: &'static str,
        call: impl FnOnce(&Kernel) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        if self.kernels.borrow().is_empty() {
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
                let code = code.map_err(|reason| fault(file, reason))?;
                // SAFETY: `code` is an image for this GPU and outlives the call.
                let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
                    .map_err(failed("loading kernels"))?;
                self.modules.borrow_mut().push(module);
                for kernel in compile::kernels(source) {
                    let symbol = CString::new(kernel).map_err(|error| fault(kernel, error))?;
                    // SAFETY: the module is loaded.
                    let function = unsafe { result::module::get_function(module, symbol) }
                        .map_err(failed("finding a kernel"))?;
                    let shared_bytes = Cell::new(SHARED_BYTES_PLAIN);
                    self.kernels.borrow_mut().insert(kernel, Kernel { function, shared_bytes });
                }
            }
        }
        let kernels = self.kernels.borrow();
        call(kernels.get(name).ok_or_else(|| fault(name, "no such kernel"))?)
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
            use lt_sys::cublasLtMatmulPreferenceAttributes_t as Preference;
            let [w_bytes, x_bytes, out_bytes] = shape.aligned;
            for (attribute, bytes) in [
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w_bytes),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x_bytes),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_bytes),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_bytes),
            ] {
                let value = std::ptr::from_ref(&bytes).cast();
                lt::set_matmul_pref_attribute(preference, attribute, value, size_of_val(&bytes))?;
            }
            let found = lt::get_matmul_algo_heuristic(self.lt, desc, w, x, out, out, preference);
            let _ = lt::destroy_matmul_pref(preference);
            found?.algo
        };
        Ok(Plan { desc, w, x, out, algorithm })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `plan`, destroyed once; queued products have copied what they need.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.desc);
            for layout in [self.w, self.x, self.out] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The largest power of two that divides `address`, as far as the library cares.
fn alignment(address: u64) -> u32 {
    (1 << (address | ALIGNMENT_MAX).trailing_zeros()) as u32
}

/// Free memory of a machine whose GPU has the host's: what the kernel would give back counts.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
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
    context: sys::CUcontext,
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
    event: sys::CUevent,
    context: sys::CUcontext,
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

impl Driver for Nvidia {
    type Memory = Memory;
    type Host = Host;
    type Event = Event;

    fn describe(&self) -> String {
        self.0.description.clone()
    }

    fn free_bytes(&self) -> u64 {
        let free = result::mem_get_info().map_or(0, |(free, _)| free as u64);
        if self.0.unified { available_bytes().map_or(free, |available| available.max(free)) } else { free }
    }

    fn blocks_busy(&self) -> u32 {
        self.0.processors * BLOCKS_PER_PROCESSOR
    }

    fn shared_bytes_max(&self) -> usize {
        self.0.shared_bytes_max
    }

    fn unified(&self) -> bool {
        self.0.unified
    }

    fn identity(&self) -> [u8; 16] {
        self.0.identity
    }

    fn nccl_library(&self) -> String {
        "libnccl.so.2".to_owned()
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
            Ok(Host { start, bytes, context: self.0.context })
        }
    }

    /// With unified addresses pinned memory has one.
    fn host_address(&self, host: &Host) -> u64 {
        host.start as u64
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), BackendError> {
        let mut stages = self.0.stages.borrow_mut();
        for (at, piece) in bytes.chunks(STAGE_BYTES).enumerate() {
            let stage = &mut stages[at % 2];
            let mut host = match stage.take() {
                Some((host, read)) => {
                    Self::wait(&read)?;
                    host
                }
                None => self.host(STAGE_BYTES)?,
            };
            host.as_mut()[..piece.len()].copy_from_slice(piece);
            self.to_device(Lane::Compute, to + (at * STAGE_BYTES) as u64, &host, 0, piece.len())?;
            *stage = Some((host, self.record(Lane::Compute)?));
        }
        Ok(())
    }

    fn clear(&self, at: u64, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: device memory of so many bytes.
        unsafe { result::memset_d8_async(at, 0, bytes, self.0.lane(Lane::Compute)) }
            .map_err(failed("clearing memory"))
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
        let Launch { kernel: name, grid: [x, y, z], threads, shared_bytes } = launch;
        if shared_bytes as usize > self.0.shared_bytes_max {
            let most = self.0.shared_bytes_max;
            return Err(fault(name, format!("{shared_bytes} bytes of shared memory, a block has {most}")));
        }
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        self.0.with_kernel(name, |kernel| {
            // SAFETY: the struct is the kernel's own and is copied by the call; addresses in it are of live memory.
            unsafe {
                if shared_bytes > kernel.shared_bytes.get() {
                    let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    result::function::set_function_attribute(kernel.function, most, shared_bytes as i32)
                        .map_err(failed(name))?;
                    kernel.shared_bytes.set(shared_bytes);
                }
                result::launch_kernel(
                    kernel.function,
                    (x, y, z),
                    (threads, 1, 1),
                    shared_bytes,
                    self.0.lane(Lane::Compute),
                    &mut params,
                )
            }
            .map_err(failed(name))
        })
    }

    fn collective(&self, call: Collective) -> Result<(), BackendError> {
        call(self.0.lane(Lane::Compute).cast())
    }

    fn dense(&self, product: &Dense) -> Result<bool, BackendError> {
        let shape = Shape {
            bf16: product.dtype == DType::BF16,
            out_f32: product.out_f32,
            m: product.m,
            n: product.n,
            k: product.k,
            out_stride: product.out_stride,
            aligned: [product.w, product.x, product.out].map(alignment),
        };
        let mut plans = self.0.plans.borrow_mut();
        if plans.len() >= PLANS_MAX && !plans.contains_key(&shape) {
            plans.clear();
        }
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
        // Without timing events are cheap; threads that wait for one sleep.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes a handle.
        unsafe { sys::cuEventCreate(&mut event, flags) }.result().map_err(failed("event"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignments_are_powers_of_two_up_to_what_the_library_assumes() {
        assert_eq!([0, 4096, 16, 2, 6, 1 << 40].map(alignment), [256, 256, 16, 2, 2, 256]);
    }

    #[test]
    fn free_memory_of_a_machine_is_known() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
