//! The device of tests: kernels compiled as C++ for the host by g++, memory of the host. Work is queued and done as late as
//! somebody waits for it, so that a wait which is missing shows; every access is checked, of graphs at every replay. See
//! `emulator/`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use backend::{BackendError, DType};
use half::bf16;

use crate::device::Open;
use crate::driver::{Attach, Collective, Dense, Driver, Lane, Launch, fault};

/// Shared memory of a block on the smallest GPUs that are supported (sm_86, sm_120), and on large ones (sm_90, sm_100).
const SHARED_BYTES: [usize; 2] = [99 * 1024, 227 * 1024];
/// Room for what a kernel did wrong.
const REPORT_BYTES: usize = 512;
/// Work that is done while somebody asks whether it is done.
const PROGRESS: usize = 4;
/// Device memory, unless less is asked for.
const DEVICE_BYTES: u64 = 1 << 32;

type LaunchFn =
    unsafe extern "C" fn(*const c_char, *const u32, u32, u32, *const c_void, u32, *mut c_char, u32) -> c_int;
type MemoryFn = unsafe extern "C" fn(u64, u64, c_int);

/// Kernels on the host. Device 0 is small and has memory of its own, device 1 is large and shares the host's; devices 2 and
/// 3 are such with a library of dense products.
#[derive(Clone)]
pub struct Emulated {
    machine: Arc<Mutex<Machine>>,
    large: bool,
    library: bool,
    identity: [u8; 16],
}

/// The compiled kernels. One block runs at a time in the whole process.
struct Library {
    launch: LaunchFn,
    memory: MemoryFn,
}

/// Work that nobody has waited for yet.
struct Machine {
    lanes: [VecDeque<Work>; 2],
    /// How much of each lane is done.
    done: [u64; 2],
    fault: Option<String>,
    /// Device memory that is there: addresses and bytes.
    memory: BTreeMap<u64, u64>,
    /// How much of it there may be.
    bytes_max: u64,
    /// Kernels that have been queued: a capture loads none.
    loaded: BTreeSet<&'static str>,
    /// What has been captured so far, or why it cannot be.
    capture: Option<Result<Vec<Op>, String>>,
    /// Whether captures fail, and whether the next replay does.
    refuses: [bool; 2],
}

impl Default for Machine {
    fn default() -> Self {
        Machine {
            lanes: Default::default(),
            done: [0; 2],
            fault: None,
            memory: BTreeMap::new(),
            bytes_max: DEVICE_BYTES,
            loaded: BTreeSet::new(),
            capture: None,
            refuses: [false; 2],
        }
    }
}

/// What can be captured.
#[derive(Clone)]
enum Op {
    Kernel { launch: Launch, args: Vec<u64> },
    Dense(Dense),
    Forget { at: u64, bytes: usize },
}

/// Work that was captured.
pub struct Graph(Arc<Vec<Op>>);

enum Work {
    Op(Op),
    Graph(Arc<Vec<Op>>),
    /// `use_of` is the pinned memory's, until this is done.
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
        _use_of: Arc<()>,
    },
    Bytes {
        to: u64,
        bytes: Vec<u8>,
    },
    After {
        lane: usize,
        at: u64,
    },
    Call(Collective),
}

fn library() -> Result<MutexGuard<'static, Library>, BackendError> {
    static LIBRARY: OnceLock<Result<Mutex<Library>, String>> = OnceLock::new();
    match LIBRARY.get_or_init(|| build().map(Mutex::new)) {
        Ok(library) => Ok(library.lock().unwrap_or_else(PoisonError::into_inner)),
        Err(reason) => Err(BackendError::Unavailable { backend: "cuda", reason: reason.clone() }),
    }
}

fn build() -> Result<Library, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = std::env::temp_dir().join(format!("baton-emulated-kernels-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let built = compiled(root, &dir).and_then(|path| open(&path));
    // The mapping needs no file any more.
    let _ = std::fs::remove_dir_all(&dir);
    built
}

/// Kernels with a call before every load and store, then the device without.
fn compiled(root: &Path, dir: &Path) -> Result<PathBuf, String> {
    let mut sources: Vec<(PathBuf, bool)> = std::fs::read_dir(root.join("kernels"))
        .map_err(|error| format!("kernels: {error}"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .map(|path| (path, true))
        .collect();
    sources.push((root.join("emulator/faults.cu"), true));
    sources.sort();
    sources.extend(["emulator.cpp", "checks.cpp"].map(|name| (root.join("emulator").join(name), false)));
    let mut compilers = Vec::new();
    let mut objects = Vec::new();
    for (source, is_kernel) in &sources {
        let object = dir.join(source.file_name().unwrap_or_default()).with_extension("o");
        let mut command = Command::new("g++");
        command.args(["-std=c++17", "-O2", "-fPIC", "-DBATON_EMULATED", "-ffp-contract=off", "-w"]);
        if *is_kernel {
            command.args(["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]);
            // Accesses stay as they are written: bytes are not put together to words.
            command.args(["-fno-expensive-optimizations", "-fno-store-merging", "-fno-tree-vectorize"]);
            command.arg("-fno-tree-slp-vectorize");
        }
        command
            .args(["-x", "c++", "-c"])
            .arg("-I")
            .arg(root.join("emulator"))
            .arg("-I")
            .arg(root.join("kernels"));
        command.arg(source).arg("-o").arg(&object).stderr(std::process::Stdio::piped());
        compilers.push(command.spawn().map_err(|error| format!("g++: {error}"))?);
        objects.push(object);
    }
    for compiler in compilers {
        let out = compiler.wait_with_output().map_err(|error| format!("g++: {error}"))?;
        if !out.status.success() {
            return Err(format!("g++: {}", String::from_utf8_lossy(&out.stderr)));
        }
    }
    let library = dir.join("kernels.so");
    let out = Command::new("g++").arg("-shared").args(&objects).arg("-o").arg(&library).output();
    let out = out.map_err(|error| format!("g++: {error}"))?;
    match out.status.success() {
        true => Ok(library),
        false => Err(format!("g++: {}", String::from_utf8_lossy(&out.stderr))),
    }
}

fn open(path: &Path) -> Result<Library, String> {
    let name = CString::new(path.display().to_string()).map_err(|error| error.to_string())?;
    // SAFETY: a library that was just built here; its initialisers only register kernels.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    if handle.is_null() {
        // SAFETY: dlopen has just failed, so there is a message.
        return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
    }
    let symbol = |name: &CStr| {
        // SAFETY: the handle is open, the name a C string.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        if symbol.is_null() {
            Err(format!("no {} in the kernels", name.to_string_lossy()))
        } else {
            Ok(symbol)
        }
    };
    let (launch, memory) = (symbol(c"emulator_launch")?, symbol(c"emulator_memory")?);
    // SAFETY: emulator.cpp and checks.cpp define them with these signatures.
    Ok(unsafe {
        Library {
            launch: std::mem::transmute::<*mut c_void, LaunchFn>(launch),
            memory: std::mem::transmute::<*mut c_void, MemoryFn>(memory),
        }
    })
}

/// Tells the checks that kernels may touch this memory, or no more.
fn reachable(at: u64, bytes: usize, there: bool) {
    if let Ok(library) = library() {
        // SAFETY: only notes the range.
        unsafe { (library.memory)(at, bytes as u64, c_int::from(there)) };
    }
}

fn of(machine: &Mutex<Machine>) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    fn queue(&mut self, lane: Lane, work: Work) {
        if lane == Lane::Compute
            && let Some(capture) = &mut self.capture
        {
            match (capture, work) {
                (Ok(ops), Work::Op(op)) => ops.push(op),
                (Err(_), Work::Op(_)) => {}
                (capture, _) => *capture = Err("work that cannot be captured".to_owned()),
            }
            return;
        }
        self.lanes[usize::from(lane == Lane::Copy)].push_back(work);
    }

    /// Does the work of a lane up to a place; after a failure nothing is done any more.
    fn run(&mut self, lane: usize, to: u64) {
        while self.done[lane] < to {
            let Some(work) = self.lanes[lane].pop_front() else { return };
            if self.fault.is_none()
                && let Err(error) = self.work(work)
            {
                self.fault = Some(error.to_string());
            }
            self.done[lane] += 1;
        }
    }

    fn work(&mut self, work: Work) -> Result<(), BackendError> {
        match work {
            Work::Op(op) => self.op(&op),
            Work::Graph(ops) => ops.iter().try_for_each(|op| self.op(op)),
            Work::Copy { to, from, bytes, .. } => {
                // SAFETY: both ends live: pinned memory until its users are gone, device memory until the lanes are empty.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
                Ok(())
            }
            Work::Bytes { to, bytes } => {
                // SAFETY: `to` is of a Memory with room for these bytes.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
                Ok(())
            }
            Work::After { lane, at } => {
                self.run(lane, at);
                Ok(())
            }
            Work::Call(call) => {
                // Sums of a group that was given up end somehow; the device is well.
                let _ = call(std::ptr::null_mut());
                Ok(())
            }
        }
    }

    /// Whether there is device memory for all of these bytes.
    fn there(&self, at: u64, bytes: usize) -> Result<(), BackendError> {
        let below = self.memory.range(..=at).next_back();
        match below.filter(|(first, have)| at + bytes as u64 <= *first + *have) {
            Some(_) => Ok(()),
            None => Err(fault("memory", format!("{bytes} bytes outside of all memory, at {at:x}"))),
        }
    }

    fn op(&mut self, op: &Op) -> Result<(), BackendError> {
        match op {
            Op::Kernel { launch, args } => {
                let name = CString::new(launch.kernel).map_err(|error| fault(launch.kernel, error))?;
                let mut report = [0u8; REPORT_BYTES];
                let library = library()?;
                // SAFETY: the struct is the kernel's own; every address in it is checked where it is used.
                let status = unsafe {
                    (library.launch)(
                        name.as_ptr(),
                        launch.grid.as_ptr(),
                        launch.threads,
                        launch.shared_bytes,
                        args.as_ptr().cast(),
                        size_of_val(&args[..]) as u32,
                        report.as_mut_ptr().cast(),
                        REPORT_BYTES as u32,
                    )
                };
                let said = CStr::from_bytes_until_nul(&report).unwrap_or_default().to_string_lossy();
                if status == 0 { Ok(()) } else { Err(fault(launch.kernel, said)) }
            }
            Op::Dense(product) => self.dense(product),
            Op::Forget { at, bytes } => {
                self.there(*at, *bytes)?;
                // SAFETY: memory that is there.
                unsafe { std::ptr::write_bytes(*at as *mut u8, 0xff, *bytes) };
                Ok(())
            }
        }
    }

    fn dense(&self, product: &Dense) -> Result<(), BackendError> {
        let Dense { dtype, x, w, out, out_f32, m, n, k, out_stride } = *product;
        let item = dtype.bytes();
        self.there(x, m * k * item)?;
        self.there(w, n * k * item)?;
        self.there(out, ((m - 1) * out_stride + n) * if out_f32 { 4 } else { item })?;
        let load = |at: u64, index: usize| {
            // SAFETY: within the matrices, which are there.
            unsafe {
                match dtype {
                    DType::BF16 => bf16::from_bits((at as *const u16).add(index).read()).to_f32(),
                    _ => (at as *const f32).add(index).read(),
                }
            }
        };
        for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let sum = (0..k).fold(0.0, |sum, i| sum + load(x, row * k + i) * load(w, column * k + i));
            let at = row * out_stride + column;
            // SAFETY: as above.
            unsafe {
                match out_f32 || dtype != DType::BF16 {
                    true => (out as *mut f32).add(at).write(sum),
                    false => (out as *mut u16).add(at).write(bf16::from_f32(sum).to_bits()),
                }
            }
        }
        Ok(())
    }

    fn all(&mut self) {
        for lane in 0..2 {
            self.run(lane, u64::MAX);
        }
    }
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

    /// Whether captures are refused, and whether the next replay is.
    #[cfg(test)]
    pub(crate) fn refuse(&self, captures: bool, replay: bool) {
        of(&self.machine).refuses = [captures, replay];
    }
}

impl Driver for Emulated {
    type Memory = Memory;
    type Host = Host;
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
        8
    }

    fn shared_bytes_max(&self) -> usize {
        SHARED_BYTES[usize::from(self.large)]
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
        self.upload(at, &vec![0; bytes])
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
            Some(Ok(ops)) => Ok(Graph(Arc::new(ops))),
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

    fn collective(&self, call: Collective) -> Result<(), BackendError> {
        self.queue(Lane::Compute, Work::Call(call));
        Ok(())
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arguments as in `emulator/faults.cu`.
    fn fault_args(at: u64, wrong: u32) -> [u64; 2] {
        [at, u64::from(wrong)]
    }

    fn said(kernel: &'static str, blocks: u32, wrong: u32) -> Result<(), String> {
        let device = Emulated::open(0, None).unwrap();
        let memory = device.alloc(256).unwrap();
        device.clear(device.address(&memory), 256).unwrap();
        let threads = if kernel == "fault_blocks" { 1 } else { 64 };
        let launch = Launch { kernel, grid: [blocks, 1, 1], threads, shared_bytes: 256 };
        device.launch(launch, &fault_args(device.address(&memory), wrong)).unwrap();
        Emulated::wait(&device.record(Lane::Compute).unwrap()).map_err(|error| error.to_string())
    }

    /// Every kind of fault is seen, and only the fault: the same kernels without it pass.
    #[test]
    fn faults_of_kernels_are_seen() {
        for (kernel, blocks, want) in [
            ("fault_race", 1, "race with a"),
            ("fault_race_back", 1, "race with a"),
            ("fault_warp", 1, "race with a"),
            ("fault_outside", 1, "outside of all memory"),
            ("fault_misaligned", 1, "misaligned"),
            ("fault_unwritten", 1, "read before anybody wrote"),
            ("fault_copy", 1, "while a copy fills it"),
            ("fault_blocks", 2, "another block has written"),
            ("fault_barrier", 1, "wait for each other for ever"),
        ] {
            assert_eq!(said(kernel, blocks, 0), Ok(()), "{kernel}");
            let got = said(kernel, blocks, 1);
            assert!(got.as_ref().is_err_and(|said| said.contains(want)), "{kernel}: {got:?}");
        }
    }

    /// A copy is under way until somebody has waited for it.
    #[test]
    fn pinned_memory_is_not_read_too_early() {
        let device = Emulated::open(0, None).unwrap();
        let memory = device.alloc(16).unwrap();
        let mut host = device.host(16).unwrap();
        device.to_host(Lane::Copy, &mut host, 0, device.address(&memory), 16).unwrap();
        let arrived = device.record(Lane::Copy).unwrap();
        let read = || host.as_ref()[0];
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err());
        Emulated::wait(&arrived).unwrap();
        assert_eq!(read(), 0xff);
    }

    /// Lanes order nothing between them but by events.
    #[test]
    fn a_lane_waits_for_another_where_it_is_told() {
        let device = Emulated::open(0, None).unwrap();
        let memory = device.alloc(16).unwrap();
        let at = device.address(&memory);
        let fetched = |ordered: bool| {
            device.upload(at, &[7; 16]).unwrap();
            let uploaded = device.record(Lane::Compute).unwrap();
            if ordered {
                device.after(Lane::Copy, &uploaded).unwrap();
            }
            let mut host = device.host(16).unwrap();
            device.to_host(Lane::Copy, &mut host, 0, at, 16).unwrap();
            Emulated::wait(&device.record(Lane::Copy).unwrap()).unwrap();
            host.as_ref()[0]
        };
        assert_eq!(fetched(false), 0xff, "fresh memory is not a number");
        assert_eq!(fetched(true), 7);
    }

    /// A graph has the addresses that it was captured with: memory that was freed since is seen, at every replay.
    #[test]
    fn a_replay_on_freed_memory_is_seen() {
        let device = Emulated::open(0, None).unwrap();
        let memory = device.alloc(256).unwrap();
        let launch = Launch { kernel: "fault_outside", grid: [1, 1, 1], threads: 64, shared_bytes: 0 };
        let args = fault_args(device.address(&memory), 0);
        let mut queue = || device.launch(launch, &args);
        queue().unwrap();
        let graph = device.capture(&mut queue).unwrap();
        device.replay(&graph).unwrap();
        Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
        drop(memory);
        device.replay(&graph).unwrap();
        let error = Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap_err().to_string();
        assert!(error.contains("outside of all memory"), "{error}");
    }

    /// A capture does nothing, and takes kernels only that are loaded: no copies, no events.
    #[test]
    fn a_capture_takes_what_a_device_can_do_again() {
        let device = Emulated::open(0, None).unwrap();
        let memory = device.alloc(256).unwrap();
        let at = device.address(&memory);
        let launch = Launch { kernel: "fault_outside", grid: [1, 1, 1], threads: 64, shared_bytes: 0 };
        let said = |queue: &mut dyn FnMut() -> Result<(), BackendError>| {
            device.capture(queue).map(|_| ()).map_err(|error| error.to_string())
        };
        let error = said(&mut || device.launch(launch, &fault_args(at, 0))).unwrap_err();
        assert!(error.contains("fault_outside is not loaded"), "{error}");
        device.launch(launch, &fault_args(at, 0)).unwrap();
        Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
        // Wrong work that is captured is not done.
        assert_eq!(said(&mut || device.launch(launch, &fault_args(at, 1))), Ok(()));
        Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
        assert!(said(&mut || device.upload(at, &[0])).is_err_and(|error| error.contains("captured")));
        assert!(said(&mut || device.record(Lane::Compute).map(|_| ())).is_err());
        assert_eq!(said(&mut || Err(fault("x", "y"))), Err("device: cuda: x: \"y\"".to_owned()));
        // And the lane goes on.
        device.upload(at, &[7]).unwrap();
        Emulated::wait(&device.record(Lane::Compute).unwrap()).unwrap();
    }
}
