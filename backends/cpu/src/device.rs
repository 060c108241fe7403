//! Opening the CPU as one rank of a group.

use backend::{
    Activations, Backend, BackendError, Batch, Caps, DType, DeviceOptions, Group, KvSpec, Peers, WeightSource,
};

use crate::act::CpuAct;
use crate::kernel::Kernels;
use crate::kv::CpuKv;
use crate::level::Level;
use crate::lists::Lists;
use crate::memory::Arena;
use crate::moe::Plan;
use crate::packed::CpuWeight;
use crate::pool::Pool;
use crate::rope::AngleTable;
use crate::step::CpuStep;

/// The CPU as one tensor-parallel rank.
#[derive(Debug)]
pub struct CpuBackend {
    level: Level,
    activations: Activations,
    dtype: DType,
    block_tokens: u32,
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: Pool,
    pub(crate) arena: Arena,
    pub(crate) peers: Peers,
    /// Memory of mixtures of experts.
    pub(crate) plan: Plan,
    /// Memory of a step's lists.
    pub(crate) lists: Lists,
    /// Angles of the step's rows.
    pub(crate) angles: AngleTable,
    /// What each row of the step before drew; on ranks but the first, as many places.
    pub(crate) drawn: Vec<Option<u32>>,
}

impl CpuBackend {
    /// As [`Backend::open`], at a level of the caller's choice. Errors when this machine lacks it, or when the options
    /// or the group's links are not for this backend.
    pub fn with_level(options: &DeviceOptions, group: Group, level: Level) -> Result<Self, BackendError> {
        let refused = |reason| Err(BackendError::Unavailable { backend: "cpu", reason });
        if !level.available() {
            return refused(format!("this machine has no {level} instructions"));
        }
        if options.dtype == DType::F16 {
            return refused("activations are f32 or bf16, not f16".to_owned());
        }
        Ok(CpuBackend {
            level,
            activations: options.cpu.activations,
            dtype: options.dtype,
            block_tokens: options.block_tokens,
            kernels: level.kernels(),
            pool: Pool::new(options.threads, options.cpu.pin),
            arena: Arena::default(),
            peers: Peers::new(group, "cpu")?,
            plan: Plan::default(),
            lists: Lists::default(),
            angles: AngleTable::default(),
            drawn: Vec::new(),
        })
    }

    /// The instruction level in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Whether activations are rounded to 8 bits where quantised weights allow.
    pub(crate) fn int8(&self) -> bool {
        self.activations == Activations::Int8
    }

    pub(crate) fn bf16(&self) -> bool {
        self.dtype == DType::BF16
    }
}

impl Backend for CpuBackend {
    type Weight = CpuWeight;
    type Act = CpuAct;
    type Hidden = CpuAct;
    type Kv = CpuKv;
    type Step<'a> = CpuStep<'a>;

    fn open(options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        let level = match &options.cpu.level {
            None => Level::best(),
            Some(name) => {
                let refused = |reason| BackendError::Unavailable { backend: "cpu", reason };
                name.parse().map_err(refused)?
            }
        };
        Self::with_level(options, group, level)
    }

    fn caps(&self) -> Caps {
        let activations = if self.int8() { ", activations in 8 bits" } else { "" };
        let threads = match self.pool.threads() {
            1 => "1 thread".to_owned(),
            threads => format!("{threads} threads"),
        };
        let device = format!("{}, {threads}{activations}", self.level);
        Caps { name: "cpu", device, exact: true, chunk_tokens: 512 }
    }

    fn load(&mut self, source: &WeightSource<'_>) -> Result<CpuWeight, BackendError> {
        CpuWeight::load(source, self.kernels, &self.pool, self.dtype)
    }

    fn kv(&mut self, spec: &KvSpec, bytes: u64) -> Result<CpuKv, BackendError> {
        CpuKv::new(spec, bytes, self.block_tokens)
    }

    fn step<'a>(&'a mut self, kv: &'a mut CpuKv, batch: &'a Batch) -> CpuStep<'a> {
        CpuStep::new(self, kv, batch)
    }

    fn regroup(&mut self, group: Group) -> Result<(), BackendError> {
        if (group.rank, group.world) != (self.peers.rank(), self.peers.world()) {
            let (rank, world) = (self.peers.rank(), self.peers.world());
            let reason =
                format!("rank {} of {} cannot become rank {rank} of {world}", group.rank, group.world);
            return Err(BackendError::Unavailable { backend: "cpu", reason });
        }
        self.peers = Peers::new(group, "cpu")?;
        self.drawn.clear();
        Ok(())
    }
}
