//! The device of tests: kernels compiled as C++ for the host by g++, memory of the host. Work is queued and done as late as
//! somebody waits for it, so that a wait which is missing shows; every access is checked, of graphs at every replay. See
//! `emulator/`.

mod kernels;
mod machine;
mod stream;

use std::path::Path;
use std::sync::{Arc, Mutex};

use backend::{BackendError, Place};

use self::kernels::{library, reachable};
use self::machine::{Graph, Machine, Op, Work, of};
use crate::device::Open;
use crate::driver::{Attach, Dense, Driver, Lane, Launch, Wide, fault};
use crate::nccl::Sum;

/// Shared memory of a block on the smallest GPUs that are supported (sm_86, sm_120), and on large ones (sm_90, sm_100).
const SHARED_BYTES: [usize; 2] = [99 * 1024, 227 * 1024];
/// Work that is done while somebody asks whether it is done.
const PROGRESS: usize = 4;

/// Kernels on the host. Device 0 is small and has memory of its own, device 1 is large, multiplies FP8 and shares the host's; devices 2 and
/// 3 are such with a library of dense products; 4 to 7 are as 0 to 3, and their warps multiply in groups; 8 to 11 are, and have tensor memory.
#[derive(Clone)]
pub struct Emulated {
    machine: Arc<Mutex<Machine>>,
    large: bool,
    library: bool,
    wide: Option<Wide>,
    identity: [u8; 16],
}

/// Host memory as the device's: 256-byte aligned, filled with not-a-number.
pub struct Memory {
    machine: Arc<Mutex<Machine>>,
    words: Vec<u128>,
    bytes: usize,
}

impl Memory {
    fn address(&self) -> u64 {
        (self.words.as_ptr() as u64).next_multiple_of(256)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // As cuMemFree does.
        let mut machine = of(&self.machine);
        machine.all();
        machine.freed(self.address(), self.bytes);
        machine.memory.remove(&self.address());
        drop(machine);
        reachable(self.address(), self.bytes, false);
    }
}

/// Memory as the pinned: whoever touches it while a copy is on its way, or gives it back, is wrong.
pub struct Host {
    words: Vec<u128>,
    bytes: usize,
    /// As often as copies use it, and once.
    uses: Arc<()>,
    unified: bool,
}

impl Host {
    fn idle(&self, what: &str) {
        if Arc::strong_count(&self.uses) > 1 && !std::thread::panicking() {
            panic!("pinned memory is {what} while a copy uses it");
        }
    }
}

impl AsRef<[u8]> for Host {
    fn as_ref(&self) -> &[u8] {
        self.idle("read");
        // SAFETY: so many bytes are there.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.bytes) }
    }
}

impl AsMut<[u8]> for Host {
    fn as_mut(&mut self) -> &mut [u8] {
        self.idle("written");
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.bytes) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.idle("freed");
        if self.unified {
            reachable(self.words.as_ptr() as u64, self.words.len() * 16, false);
        }
    }
}

/// A place in a lane.
pub struct Event {
    machine: Arc<Mutex<Machine>>,
    lane: usize,
    at: u64,
}

impl Open for Emulated {
    fn open(device: usize, _: Option<&Path>) -> Result<Self, BackendError> {
        drop(library()?);
        static OPENED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let mut identity = [0; 16];
        let number = OPENED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        identity[..8].copy_from_slice(&number.to_le_bytes());
        Ok(Emulated {
            machine: Arc::default(),
            large: device % 2 == 1,
            library: device / 2 % 2 == 1,
            wide: [None, Some(Wide::Groups), Some(Wide::Memory), None][device / 4 % 4],
            identity,
        })
    }
}

impl Emulated {
    fn queue(&self, lane: Lane, work: Work) {
        of(&self.machine).queue(lane, work);
    }

    /// With so much memory.
    #[cfg(test)]
    pub(crate) fn limited(self, bytes: u64) -> Self {
        of(&self.machine).bytes_max = bytes;
        self
    }

    /// Kernels that were queued so far.
    #[cfg(test)]
    pub(crate) fn launched(&self) -> impl Iterator<Item = &'static str> {
        of(&self.machine).loaded.clone().into_iter()
    }

    /// With no more memory than it has given out.
    #[cfg(test)]
    pub(crate) fn exhaust(&self) {
        let mut machine = of(&self.machine);
        machine.bytes_max = machine.memory.values().sum();
    }

    /// Does nothing any more of what is queued, like the device of a process that was killed.
    #[cfg(test)]
    pub(crate) fn kill(&self) {
        of(&self.machine).killed = true;
    }

    /// The next kernel with this beginning of its name loses an arrival at a barrier in shared memory, counted from 1.
    #[cfg(test)]
    pub(crate) fn lose(&self, kernel: &'static str, arrival: u32) {
        of(&self.machine).loses = Some((kernel, arrival));
    }

    /// Whether captures are refused, and whether the next replay is.
    #[cfg(test)]
    pub(crate) fn refuse(&self, captures: bool, replay: bool) {
        of(&self.machine).refuses = [captures, replay];
    }
}

impl Driver for Emulated {
    type Memory = Memory;
    type Host = Host;
    type Lasting = Memory;
    type Event = Event;
    type Graph = Graph;

    fn describe(&self) -> String {
        "emulated on the host".to_owned()
    }

    fn free_bytes(&self) -> u64 {
        let machine = of(&self.machine);
        machine.bytes_max.saturating_sub(machine.memory.values().sum())
    }

    fn blocks_busy(&self) -> u32 {
        if self.large { 32 } else { 8 }
    }

    fn shared_bytes_max(&self) -> usize {
        SHARED_BYTES[usize::from(self.large)]
    }

    fn multiplies_fp8(&self) -> bool {
        self.large
    }

    fn wide(&self) -> Option<Wide> {
        self.wide
    }

    fn unified(&self) -> bool {
        self.large
    }

    fn identity(&self) -> [u8; 16] {
        self.identity
    }

    fn attach(&self) -> Attach {
        Box::new(|| Ok(()))
    }

    fn nccl_library(&self) -> String {
        crate::nccl::named_for_tests().unwrap_or_default()
    }

    /// Memory of this process.
    fn place(&self) -> Place {
        Place::Host
    }

    fn alloc(&self, bytes: usize) -> Result<Memory, BackendError> {
        let (wanted_bytes, free_bytes) = (bytes.max(1) as u64, self.free_bytes());
        if wanted_bytes > free_bytes {
            return Err(BackendError::OutOfMemory { wanted_bytes, free_bytes });
        }
        let machine = self.machine.clone();
        let memory = Memory { machine, words: vec![u128::MAX; bytes.div_ceil(16) + 16], bytes: bytes.max(1) };
        of(&self.machine).memory.insert(memory.address(), wanted_bytes);
        reachable(memory.address(), memory.bytes, true);
        Ok(memory)
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.address()
    }

    fn lasting(&self, bytes: usize) -> Result<Memory, BackendError> {
        self.alloc(bytes)
    }

    fn lasting_address(&self, memory: &Memory) -> u64 {
        memory.address()
    }

    fn forget(&self, at: u64, bytes: usize) {
        self.queue(Lane::Compute, Work::Op(Op::Forget { at, bytes }));
    }

    fn host(&self, bytes: usize) -> Result<Host, BackendError> {
        let host =
            Host { words: vec![0; bytes.div_ceil(16)], bytes, uses: Arc::default(), unified: self.large };
        if self.large {
            reachable(host.words.as_ptr() as u64, host.words.len() * 16, true);
        }
        Ok(host)
    }

    fn host_address(&self, host: &Host) -> u64 {
        host.words.as_ptr() as u64
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), BackendError> {
        self.queue(Lane::Compute, Work::Bytes { to, bytes: bytes.to_vec() });
        Ok(())
    }

    fn clear(&self, at: u64, bytes: usize) -> Result<(), BackendError> {
        self.queue(Lane::Compute, Work::Op(Op::Clear { at, bytes }));
        Ok(())
    }

    fn to_host(
        &self,
        lane: Lane,
        host: &mut Host,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), BackendError> {
        assert!(at + bytes <= host.bytes, "{at} + {bytes} of {} bytes", host.bytes);
        let to = host.words.as_ptr() as u64 + at as u64;
        self.queue(lane, Work::Copy { to, from, bytes, _use_of: host.uses.clone() });
        Ok(())
    }

    fn to_device(
        &self,
        lane: Lane,
        to: u64,
        host: &Host,
        at: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        assert!(at + bytes <= host.bytes, "{at} + {bytes} of {} bytes", host.bytes);
        let from = host.words.as_ptr() as u64 + at as u64;
        self.queue(lane, Work::Copy { to, from, bytes, _use_of: host.uses.clone() });
        Ok(())
    }

    fn launch(&self, launch: Launch, args: &[u64]) -> Result<(), BackendError> {
        if launch.shared_bytes as usize > self.shared_bytes_max() {
            return Err(fault(launch.kernel, format!("{} bytes of shared memory", launch.shared_bytes)));
        }
        let mut machine = of(&self.machine);
        if machine.loaded.insert(launch.kernel)
            && let Some(capture) = &mut machine.capture
        {
            *capture = Err(format!("{} is not loaded", launch.kernel));
        }
        machine.queue(Lane::Compute, Work::Op(Op::Kernel { launch, args: args.to_vec() }));
        Ok(())
    }

    fn takes(&self, product: &Dense) -> bool {
        self.library && product.m > 0
    }

    fn dense(&self, product: &Dense) -> Result<(), BackendError> {
        self.queue(Lane::Compute, Work::Op(Op::Dense(*product)));
        Ok(())
    }

    fn capture(&self, queue: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<Graph, BackendError> {
        if of(&self.machine).refuses[0] {
            return Err(fault("capture", "refused"));
        }
        of(&self.machine).capture = Some(Ok(Vec::new()));
        let queued = queue();
        let captured = of(&self.machine).capture.take();
        queued?;
        match captured {
            Some(Ok(ops)) => {
                let graph = Arc::new(ops);
                of(&self.machine).graphs.push(Arc::downgrade(&graph));
                Ok(Graph(graph))
            }
            Some(Err(reason)) => Err(fault("capture", reason)),
            None => Err(fault("capture", "ended twice")),
        }
    }

    fn replay(&self, graph: &Graph) -> Result<(), BackendError> {
        if std::mem::take(&mut of(&self.machine).refuses[1]) {
            return Err(fault("replaying a step", "refused"));
        }
        self.queue(Lane::Compute, Work::Graph(graph.0.clone()));
        Ok(())
    }

    fn sum(&self, sum: &Sum) -> Result<(), BackendError> {
        stream::queue(&self.machine, sum)
    }

    fn go_on(&self) {
        let machine = self.machine.clone();
        std::thread::spawn(move || of(&machine).all());
    }

    fn record(&self, lane: Lane) -> Result<Event, BackendError> {
        let mut machine = of(&self.machine);
        if lane == Lane::Compute
            && let Some(capture) = &mut machine.capture
        {
            *capture = Err("an event in a capture".to_owned());
        }
        let lane = usize::from(lane == Lane::Copy);
        let at = machine.done[lane] + machine.lanes[lane].len() as u64;
        Ok(Event { machine: self.machine.clone(), lane, at })
    }

    fn after(&self, lane: Lane, event: &Event) -> Result<(), BackendError> {
        self.queue(lane, Work::After { lane: event.lane, at: event.at });
        Ok(())
    }

    fn passed(&self, event: &Event) -> bool {
        let mut machine = of(&self.machine);
        let to = event.at.min(machine.done[event.lane] + PROGRESS as u64);
        machine.run(event.lane, to);
        machine.done[event.lane] >= event.at
    }

    fn wait(event: &Event) -> Result<(), BackendError> {
        let mut machine = of(&event.machine);
        machine.run(event.lane, event.at);
        match &machine.fault {
            Some(reason) => Err(fault("device", reason)),
            None => Ok(()),
        }
    }

    fn fetch(event: &Event, from: u64, to: &mut [u8]) -> Result<(), BackendError> {
        Self::wait(event)?;
        let machine = of(&event.machine);
        let (at, bytes) = machine.memory.range(..=from).next_back().unwrap_or((&0, &0));
        if from + to.len() as u64 > at + bytes {
            return Err(fault("copy to the host", "no such memory"));
        }
        // SAFETY: memory that is there, and stays there under the machine's lock.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
