//! What this backend asks of a device: memory, two ordered lanes of work, kernels by name, dense products. Implemented by
//! [`crate::nvidia`] and, for tests without a GPU, by the emulator.

use backend::{BackendError, DType, Place};

use crate::nccl::Sum;

/// An ordered queue of work; the two run beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Steps.
    Compute,
    /// Cache on its way to the host.
    Copy,
}

/// Products of a generation's own: wider than those of a warp, which every generation has, and done beside other work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wide {
    /// Of warp groups: Hopper's wgmma.
    Groups,
    /// Of tensor memory: tcgen05 of Blackwell in data centres.
    Memory,
}

impl std::fmt::Display for Wide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Wide::Groups => "wgmma",
            Wide::Memory => "tcgen05",
        })
    }
}

/// How a kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// As in `kernels/*.cu`.
    pub(crate) kernel: &'static str,
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    /// Dynamic shared memory.
    pub(crate) shared_bytes: u32,
}

/// A dense product `out = x W^T + bias` of elements of `dtype`: x `[m, k]`, W `[n, k]`, bias `[n]` or 0 for none, out `[m, n]` with
/// rows `out_stride` elements apart, of `dtype` or f32. Sums are f32, the bias within them; it is of out's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dense {
    pub(crate) dtype: DType,
    pub(crate) x: u64,
    pub(crate) w: u64,
    pub(crate) bias: u64,
    pub(crate) out: u64,
    pub(crate) out_f32: bool,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) out_stride: usize,
}

/// What a thread other than the owner calls before a library that uses the device.
pub type Attach = Box<dyn FnOnce() -> Result<(), BackendError> + Send>;

/// A device on its owner thread. Work is queued; failures of queued work come out of a later call.
pub trait Driver: Clone + 'static {
    /// Device memory, freed when dropped.
    type Memory: 'static;
    /// Pinned host memory.
    type Host: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static;
    /// Device memory that other threads hold, freed when dropped.
    type Lasting: Send + Sync + 'static;
    /// A place in a lane.
    type Event: Send + Sync + 'static;
    /// Work that one call queues again, with the addresses that it had.
    type Graph: 'static;

    /// The device in words.
    fn describe(&self) -> String;
    /// Has its kernels compiled, so that no later call waits for a compiler.
    fn prepare(&self) -> Result<(), BackendError> {
        Ok(())
    }
    /// Free device memory in bytes.
    fn free_bytes(&self) -> u64;
    /// Blocks that keep the device busy.
    fn blocks_busy(&self) -> u32;
    /// Dynamic shared memory that a block may have, in bytes.
    fn shared_bytes_max(&self) -> usize;
    /// Whether its tensor cores multiply FP8.
    fn multiplies_fp8(&self) -> bool;
    /// What its tensor cores have beside the products of a warp.
    fn wide(&self) -> Option<Wide>;
    /// Whether device and host have one memory, so that nothing needs to be staged.
    fn unified(&self) -> bool;
    /// Which of all devices this is.
    fn identity(&self) -> [u8; 16];
    /// Lets another thread use the device through a library.
    fn attach(&self) -> Attach;
    /// Where NCCL is looked for.
    fn nccl_library(&self) -> String;
    /// Where transports find [`Driver::Lasting`] memory.
    fn place(&self) -> Place;
    fn alloc(&self, bytes: usize) -> Result<Self::Memory, BackendError>;
    fn address(&self, memory: &Self::Memory) -> u64;
    fn lasting(&self, bytes: usize) -> Result<Self::Lasting, BackendError>;
    fn lasting_address(&self, memory: &Self::Lasting) -> u64;
    /// Contents of this memory are arbitrary from now on; the emulator makes sure of it.
    fn forget(&self, _at: u64, _bytes: usize) {}
    fn host(&self, bytes: usize) -> Result<Self::Host, BackendError>;
    /// Where the device sees this memory, when it is [`Driver::unified`].
    fn host_address(&self, host: &Self::Host) -> u64;
    /// Queues a copy to the device in [`Lane::Compute`]; `bytes` have been read on return.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), BackendError>;
    /// Queues the zeroing of device memory in [`Lane::Compute`].
    fn clear(&self, at: u64, bytes: usize) -> Result<(), BackendError>;
    /// Queues a copy of `bytes` to `host[at..]`, which must live until an event behind it.
    fn to_host(
        &self,
        lane: Lane,
        host: &mut Self::Host,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), BackendError>;
    /// Queues a copy of `bytes` from `host[at..]`, which must live until an event behind it.
    fn to_device(
        &self,
        lane: Lane,
        to: u64,
        host: &Self::Host,
        at: usize,
        bytes: usize,
    ) -> Result<(), BackendError>;
    /// Queues a kernel in [`Lane::Compute`]; `args` are the words of its struct.
    fn launch(&self, launch: Launch, args: &[u64]) -> Result<(), BackendError>;
    /// Whether this device has a library that takes this dense product.
    fn takes(&self, product: &Dense) -> bool;
    /// Queues a dense product that the device takes in [`Lane::Compute`].
    fn dense(&self, product: &Dense) -> Result<(), BackendError>;
    /// What `queue` queues in [`Lane::Compute`]: kernels, dense products, zeroing and sums over ranks, which have all been
    /// queued before. None of it is done. With sums all ranks capture, and replay what they captured together.
    fn capture(
        &self,
        queue: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<Self::Graph, BackendError>;
    /// Queues the work of `graph` in [`Lane::Compute`]; a graph may be dropped while it is done.
    fn replay(&self, graph: &Self::Graph) -> Result<(), BackendError>;
    /// Queues a sum over ranks in [`Lane::Compute`].
    fn sum(&self, sum: &Sum) -> Result<(), BackendError>;
    /// The host is about to wait for something other than the device, which goes on by itself; the emulator, too.
    fn go_on(&self) {}
    fn record(&self, lane: Lane) -> Result<Self::Event, BackendError>;
    /// Work queued in `lane` from now on waits for `event`.
    fn after(&self, lane: Lane, event: &Self::Event) -> Result<(), BackendError>;
    /// Whether `event` has come.
    fn passed(&self, event: &Self::Event) -> bool;
    /// Blocks until `event` has come; on any thread.
    fn wait(event: &Self::Event) -> Result<(), BackendError>;
    /// Copies device memory to the host once `event` has come; on any thread.
    fn fetch(event: &Self::Event, from: u64, to: &mut [u8]) -> Result<(), BackendError>;
}

/// A failure of the device.
pub(crate) fn fault(what: &str, reason: impl std::fmt::Debug) -> BackendError {
    BackendError::Device(format!("cuda: {what}: {reason:?}"))
}
