//! Queued work of the emulated device, done in order when somebody waits; and what a capture has taken.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use backend::{BackendError, DType};
use half::bf16;

use super::kernels::library;
use super::stream::Call;
use crate::driver::{Dense, Lane, Launch, fault};

/// Device memory, unless less is asked for.
const DEVICE_BYTES: u64 = 1 << 32;

/// Work that nobody has waited for yet.
pub(super) struct Machine {
    pub(super) lanes: [VecDeque<Work>; 2],
    /// How much of each lane is done.
    pub(super) done: [u64; 2],
    pub(super) fault: Option<String>,
    /// Device memory that is there: addresses and bytes.
    pub(super) memory: BTreeMap<u64, u64>,
    /// How much of it there may be.
    pub(super) bytes_max: u64,
    /// Kernels that have been queued: a capture loads none.
    pub(super) loaded: BTreeSet<&'static str>,
    /// What has been captured so far, or why it cannot be.
    pub(super) capture: Option<Result<Vec<Op>, String>>,
    /// Graphs that were captured.
    pub(super) graphs: Vec<Weak<Vec<Op>>>,
    /// Whether captures fail, and whether the next replay does.
    pub(super) refuses: [bool; 2],
    /// Whether nothing is done any more.
    pub(super) killed: bool,
    /// The next kernel with this beginning of its name loses that arrival at a barrier.
    pub(super) loses: Option<(&'static str, u32)>,
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
            graphs: Vec::new(),
            refuses: [false; 2],
            killed: false,
            loses: None,
        }
    }
}

/// What can be captured.
#[derive(Clone)]
pub(super) enum Op {
    Kernel {
        launch: Launch,
        args: Vec<u64>,
    },
    Dense(Dense),
    Forget {
        at: u64,
        bytes: usize,
    },
    Clear {
        at: u64,
        bytes: usize,
    },
    /// What a library queued, over this memory.
    Call {
        call: Arc<Call>,
        at: u64,
        bytes: usize,
    },
}

/// Work that was captured.
pub struct Graph(pub(super) Arc<Vec<Op>>);

pub(super) enum Work {
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
}

pub(super) fn of(machine: &Mutex<Machine>) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    pub(super) fn queue(&mut self, lane: Lane, work: Work) {
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
    pub(super) fn run(&mut self, lane: usize, to: u64) {
        while self.done[lane] < to {
            let Some(work) = self.lanes[lane].pop_front() else { return };
            if self.fault.is_none()
                && !self.killed
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
                let loses = self.loses.take_if(|(name, _)| launch.kernel.starts_with(*name));
                library()?.run(launch, args, loses.map_or(0, |(_, arrival)| arrival))
            }
            Op::Dense(product) => self.dense(product),
            Op::Forget { at, bytes } => {
                self.there(*at, *bytes)?;
                // SAFETY: memory that is there.
                unsafe { std::ptr::write_bytes(*at as *mut u8, 0xff, *bytes) };
                Ok(())
            }
            Op::Clear { at, bytes } => {
                self.there(*at, *bytes)?;
                // SAFETY: memory that is there.
                unsafe { std::ptr::write_bytes(*at as *mut u8, 0, *bytes) };
                Ok(())
            }
            Op::Call { call, at, bytes } => {
                self.there(*at, *bytes)?;
                call.run()
            }
        }
    }

    /// Memory is given back. A library may have registered what its calls in a graph use, for as long as there is the graph.
    pub(super) fn freed(&mut self, at: u64, bytes: usize) {
        self.graphs.retain(|graph| graph.strong_count() > 0);
        let uses = |op: &Op| {
            matches!(op, Op::Call { at: from, bytes: len, .. }
                if *from < at + bytes as u64 && at < *from + *len as u64)
        };
        if self.graphs.iter().filter_map(Weak::upgrade).any(|graph| graph.iter().any(uses)) {
            self.fault
                .get_or_insert(format!("{bytes} bytes that a graph sums over ranks are freed before it"));
        }
    }

    fn dense(&self, product: &Dense) -> Result<(), BackendError> {
        let Dense { dtype, x, w, bias, out, out_f32, m, n, k, out_stride } = *product;
        let item = dtype.bytes();
        self.there(x, m * k * item)?;
        self.there(w, n * k * item)?;
        if bias != 0 {
            if out_f32 != (dtype == DType::F32) || !bias.is_multiple_of(16) {
                return Err(fault("dense product", "a bias that no library takes"));
            }
            self.there(bias, n * item)?;
        }
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
            let mut sum = (0..k).fold(0.0, |sum, i| sum + load(x, row * k + i) * load(w, column * k + i));
            if bias != 0 {
                sum += load(bias, column);
            }
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

    /// Does all that is queued.
    pub(super) fn all(&mut self) {
        for lane in 0..2 {
            self.run(lane, u64::MAX);
        }
    }
}
