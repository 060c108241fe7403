//! An NVIDIA GPU through the driver API, NVRTC and cuBLASLt, all opened at run time. A machine without them gets one line that
//! says what is missing; nothing panics.

mod graph;
mod kernels;
mod libraries;
mod memory;
mod products;

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use backend::{BackendError, Place};
use cudarc::driver::{DriverError, result, sys};

use self::graph::Graph;
use self::kernels::Kernels;
use self::memory::{Event, Host, Lasting, Memory, available_bytes};
use self::products::Products;
use crate::compile;
use crate::device::Open;
use crate::driver::{Attach, Dense, Driver, Lane, Launch, Wide, fault};
use crate::nccl::Sum;

/// CUDA 12.0: the oldest driver that has every call that is used here.
const DRIVER_MIN: i32 = 12_000;
/// Blocks a processor that keep it busy.
const BLOCKS_PER_PROCESSOR: u32 = 4;
/// Uploads pass through two pieces of pinned memory of this size.
const STAGE_BYTES: usize = 16 << 20;

/// An open GPU.
#[derive(Clone)]
pub struct Nvidia(Rc<Gpu>);

struct Gpu {
    context: sys::CUcontext,
    device: sys::CUdevice,
    lanes: [sys::CUstream; 2],
    kernels: Kernels,
    products: Products,
    description: String,
    processors: u32,
    shared_bytes_max: usize,
    multiplies_fp8: bool,
    wide: Option<Wide>,
    unified: bool,
    identity: [u8; 16],
    /// Pinned memory that uploads pass through, and the copy that reads it.
    stages: RefCell<[Option<(Host, Event)>; 2]>,
}

fn refused(reason: String) -> BackendError {
    BackendError::Unavailable { backend: "cuda", reason }
}

fn failed(what: &str) -> impl Fn(DriverError) -> BackendError {
    move |error| match error.error_name() {
        Ok(name) => fault(what, format_args!("{}", name.to_string_lossy())),
        Err(_) => fault(what, error),
    }
}

/// As CUDA counts: 12080 is 12.8.
fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// What usually is behind a driver that does not start.
fn hint(error: sys::CUresult) -> &'static str {
    match error {
        sys::CUresult::CUDA_ERROR_UNKNOWN => " (are its kernel modules loaded? nvidia-smi tells)",
        sys::CUresult::CUDA_ERROR_SYSTEM_NOT_READY => " (does nvidia-fabricmanager run?)",
        sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            " (its library and its kernel module are of different versions: restart the machine)"
        }
        sys::CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            " (a compatibility library comes first in the loader's path)"
        }
        sys::CUresult::CUDA_ERROR_STUB_LIBRARY => " (the toolkit's stub comes first in the loader's path)",
        _ => "",
    }
}

/// A GPU that has code.
struct Found {
    device: sys::CUdevice,
    name: String,
    capability: (i32, i32),
    target: String,
}

/// Whether CUDA can be used here: the number of GPUs that can, or one line on what is missing.
pub fn probe() -> Result<i32, String> {
    found().map(|gpus| gpus.len() as i32)
}

/// The GPUs that can be used, in the driver's order: those that are too old do not count. Touches no function of the driver
/// before it is known to be there: the bindings panic on a missing one.
fn found() -> Result<Vec<Found>, String> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver: libcuda.so.1 was not found".to_owned());
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err("no usable GPU".to_owned()),
        // Without the driver's own words, which a broken one may lack.
        Err(error) => return Err(format!("the NVIDIA driver failed: {:?}{}", error.0, hint(error.0))),
    }
    let mut have = 0;
    // SAFETY: writes one number; every driver has this function.
    unsafe { sys::cuDriverGetVersion(&mut have) }
        .result()
        .map_err(|error| format!("driver version: {:?}", error.0))?;
    if have < DRIVER_MIN {
        let (have, need) = (version(have), version(DRIVER_MIN));
        return Err(format!("the NVIDIA driver knows CUDA {have}, this needs {need}"));
    }
    let counting = |error: DriverError| format!("counting GPUs: {:?}", error.0);
    let (mut usable, mut old) = (Vec::new(), None);
    for index in 0..result::device::get_count().map_err(counting)? {
        let device = result::device::get(index).map_err(counting)?;
        let name = result::device::get_name(device).map_err(counting)?;
        use sys::CUdevice_attribute as Of;
        // SAFETY: the device is there.
        let attribute = |of| unsafe { result::device::get_attribute(device, of) }.map_err(counting);
        let major = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        match compile::target(major, minor) {
            Some(target) => usable.push(Found { device, name, capability: (major, minor), target }),
            None => old = Some(format!("{name} is older than Ampere (compute capability {major}.{minor})")),
        }
    }
    if usable.is_empty() {
        return Err(old.unwrap_or_else(|| "no usable GPU".to_owned()));
    }
    libraries::check(have)?;
    Ok(usable)
}

impl Open for Nvidia {
    fn open(index: usize, cache: Option<&Path>) -> Result<Self, BackendError> {
        let mut gpus = found().map_err(refused)?;
        if index >= gpus.len() {
            return Err(refused(format!("GPU {index} of {}", gpus.len())));
        }
        let Found { device, name, capability, target } = gpus.swap_remove(index);
        // SAFETY: the device is there; handles are used while the context lives, which is to the end.
        unsafe {
            let attribute =
                |attribute| result::device::get_attribute(device, attribute).map_err(failed("attributes"));
            use sys::CUdevice_attribute as Of;
            let processors = attribute(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
            let shared = attribute(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
            let integrated = attribute(Of::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
            let uuid = result::device::get_uuid(device).map_err(failed("uuid"))?;
            let context = result::primary_ctx::retain(device).map_err(|error| match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    refused(format!("{name} has no memory left: other processes hold it"))
                }
                sys::CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => {
                    refused(format!("{name} is another process's alone (its compute mode says so)"))
                }
                _ => failed("context")(error),
            })?;
            result::ctx::set_current(context).map_err(failed("context"))?;
            let lane =
                || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("stream"));
            let lanes = [lane()?, lane()?];
            let products = Products::open()?;
            let memory = if integrated { ", one memory with the host" } else { "" };
            let description = format!("{name}, {target}, {processors} processors{memory}");
            Ok(Nvidia(Rc::new(Gpu {
                context,
                device,
                lanes,
                kernels: Kernels::new(target, cache.map(Path::to_path_buf), shared as usize),
                products,
                description,
                processors,
                shared_bytes_max: shared as usize,
                // Ada and later.
                multiplies_fp8: capability >= (8, 9),
                wide: match capability.0 {
                    9 => Some(Wide::Groups),
                    10 => Some(Wide::Memory),
                    _ => None,
                },
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
            *self.stages.get_mut() = [None, None];
            self.products.close();
            self.kernels.close();
            for lane in self.lanes {
                let _ = result::stream::destroy(lane);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Nvidia {
    fn malloc(&self, bytes: usize) -> Result<sys::CUdeviceptr, BackendError> {
        // SAFETY: the context is current on the owner thread.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(BackendError::OutOfMemory { wanted_bytes: bytes as u64, free_bytes: self.free_bytes() })
            }
            other => other.map_err(failed("memory")),
        }
    }
}

impl Gpu {
    fn lane(&self, lane: Lane) -> sys::CUstream {
        self.lanes[usize::from(lane == Lane::Copy)]
    }
}

impl Driver for Nvidia {
    type Memory = Memory;
    type Host = Host;
    type Lasting = Lasting;
    type Event = Event;
    type Graph = Graph;

    fn describe(&self) -> String {
        self.0.description.clone()
    }

    fn prepare(&self) -> Result<(), BackendError> {
        self.0.kernels.prepare()
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

    fn multiplies_fp8(&self) -> bool {
        self.0.multiplies_fp8
    }

    fn wide(&self) -> Option<Wide> {
        self.0.wide
    }

    fn unified(&self) -> bool {
        self.0.unified
    }

    fn identity(&self) -> [u8; 16] {
        self.0.identity
    }

    fn attach(&self) -> Attach {
        // The context is that of the device, which lives as long as the process: a number that any thread may have.
        let context = self.0.context.expose_provenance();
        Box::new(move || {
            let context = std::ptr::with_exposed_provenance_mut(context);
            // SAFETY: as above.
            unsafe { result::ctx::set_current(context) }.map_err(failed("context"))
        })
    }

    fn nccl_library(&self) -> String {
        "libnccl.so.2".to_owned()
    }

    fn place(&self) -> Place {
        Place::Cuda
    }

    fn alloc(&self, bytes: usize) -> Result<Memory, BackendError> {
        Ok(Memory { gpu: self.0.clone(), address: self.malloc(bytes)? })
    }

    fn lasting(&self, bytes: usize) -> Result<Lasting, BackendError> {
        Ok(Lasting { address: self.malloc(bytes)?, context: self.0.context })
    }

    fn lasting_address(&self, memory: &Lasting) -> u64 {
        memory.address
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

    fn launch(&self, launch: Launch, args: &[u64]) -> Result<(), BackendError> {
        self.0.kernels.launch(self.0.lane(Lane::Compute), launch, args)
    }

    fn takes(&self, product: &Dense) -> bool {
        self.0.products.takes(product)
    }

    fn dense(&self, product: &Dense) -> Result<(), BackendError> {
        self.0.products.queue(self.0.lane(Lane::Compute), product)
    }

    fn capture(&self, queue: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<Graph, BackendError> {
        Graph::capture(&self.0, queue)
    }

    fn replay(&self, graph: &Graph) -> Result<(), BackendError> {
        graph.replay()
    }

    fn sum(&self, sum: &Sum) -> Result<(), BackendError> {
        sum.queue(self.0.lane(Lane::Compute).cast())
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

    fn fetch(event: &Event, from: u64, to: &mut [u8]) -> Result<(), BackendError> {
        Self::wait(event)?;
        // SAFETY: the context is this thread's since the wait, and the caller holds memory of so many bytes.
        unsafe { result::memcpy_dtoh_sync(to, from) }.map_err(failed("copy to the host"))
    }
}
