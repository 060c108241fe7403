//! The device of one rank: what is opened once, and the queueing of single operations.

use std::path::Path;
use std::rc::Rc;

use backend::{
    Backend, BackendError, Batch, Caps, DType, DeviceOptions, Fp8Activations, Group, KvSpec, Links,
    PromptAttention, WeightSource,
};

use crate::act::CudaAct;
use crate::args::Args;
use crate::driver::{Driver, Lane, Launch, Wide};
use crate::kv::CudaKv;
use crate::memory::{Buffer, Pool};
use crate::queue::Queue;
use crate::ranks::Ranks;
use crate::step::CudaStep;
use crate::trial;
use crate::weight::CudaWeight;

/// Threads of a block of the simple kernels.
pub(crate) const THREADS: u32 = 256;

/// Rows that meet one reading of the weights. By their makers' figures GPUs multiply some hundreds of times per byte that they read, a DGX
/// Spark most often: with a few hundred rows of bf16 they would wait for weights. Not measured.
const CHUNK_TOKENS: usize = 2048;

/// A device and its memory.
pub struct Device<D: Driver> {
    pub(crate) pool: Rc<Pool<D>>,
    pub(crate) dtype: DType,
    pub(crate) block_tokens: u32,
    /// Whether activations are rounded to FP8 for products with FP8 weights.
    pub(crate) rounds: bool,
    /// The products of the GPU's generation that attend prompts, if they do.
    pub(crate) attends: Option<Wide>,
    /// Whether warp groups multiply many rows with weights that are not the library's.
    pub(crate) group_products: bool,
    /// Whether the products of its generation have been tried.
    tried: bool,
    /// The other ranks, where there are others.
    pub(crate) ranks: Option<Ranks>,
    /// What the step before drew: which rows did, and the choices on the device.
    pub(crate) drawn: Option<(Vec<bool>, Rc<Buffer<D>>)>,
    /// Where steps draw to: one place, so that they are alike. The lane's order lets the next step read it first.
    pub(crate) choices: Option<Rc<Buffer<D>>>,
}

impl<D: Driver> Device<D> {
    /// Over an open driver. Errors when the options ask for what this backend cannot do.
    pub(crate) fn over(driver: D, options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        let mut device = Self::untried(driver, options, group)?;
        // Now, where what cannot be compiled is said at once, and not while somebody waits for an answer.
        device.driver().prepare()?;
        device.try_wide(options)?;
        Ok(device)
    }

    fn untried(driver: D, options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        let refused = |reason: String| Err(BackendError::Unavailable { backend: "cuda", reason });
        if options.dtype == DType::F16 {
            return refused("activations are f32 or bf16, not f16".to_owned());
        }
        if !options.block_tokens.is_power_of_two() {
            return refused(format!("{} tokens per KV block is not a power of two", options.block_tokens));
        }
        let rounds = options.cuda.activations == Fp8Activations::Fp8;
        if rounds && options.dtype != DType::BF16 {
            return refused(format!("fp8 activations are of bf16 steps, not of {}", options.dtype.name()));
        }
        if rounds && !driver.multiplies_fp8() {
            return refused(format!(
                "fp8 activations need a GPU of the Ada generation or later: {}",
                driver.describe()
            ));
        }
        let pool = Pool::new(driver);
        pool.queue.write_down(!options.cuda.eager);
        Ok(Device {
            pool,
            dtype: options.dtype,
            block_tokens: options.block_tokens,
            rounds,
            attends: None,
            group_products: false,
            tried: false,
            ranks: match group.links {
                Links::Alone if group.world == 1 => None,
                _ => Some(Ranks::new(group)?),
            },
            drawn: None,
            choices: None,
        })
    }

    /// Uses the products of the GPU's generation where it is to, and they pass their trials.
    fn try_wide(&mut self, options: &DeviceOptions) -> Result<(), BackendError> {
        let asked = options.cuda.attention == PromptAttention::Auto && self.bf16();
        if let Some(wide) = self.driver().wide().filter(|_| asked) {
            self.attends = trial::attends(self, wide).then_some(wide);
            self.group_products = wide == Wide::Groups && trial::multiplies(self);
            self.tried = true;
            self.works(wide)?;
        }
        Ok(())
    }

    /// Whether it still does anything after the trials of `wide`: a kernel that faults ends its process's use of a device.
    pub(crate) fn works(&self, wide: Wide) -> Result<(), BackendError> {
        let ended = self.driver().record(Lane::Compute).and_then(|event| D::wait(&event));
        ended.map_err(|error| BackendError::Unavailable {
            backend: "cuda",
            reason: format!(
                "{} faulted in kernels of {wide} ({error}): go without by --cuda-attention mma",
                self.driver().describe()
            ),
        })
    }

    pub(crate) fn driver(&self) -> &D {
        &self.pool.queue.driver
    }

    pub(crate) fn queue(&self) -> &Queue<D> {
        &self.pool.queue
    }

    /// Whether equal steps that generate are replayed as one graph; they are unless told otherwise.
    pub fn replay_steps(&mut self, on: bool) {
        self.queue().write_down(on);
    }

    /// Steps that were replayed so far.
    pub fn replayed_steps(&self) -> u64 {
        self.queue().replayed()
    }

    pub(crate) fn bf16(&self) -> bool {
        self.dtype == DType::BF16
    }

    /// Of two kernels the one for the step's dtype.
    pub(crate) fn of_type(&self, f32: &'static str, bf16: &'static str) -> &'static str {
        if self.bf16() { bf16 } else { f32 }
    }

    /// A buffer of `count` elements of the step's dtype.
    pub(crate) fn elements(&self, count: usize) -> Result<Buffer<D>, BackendError> {
        self.pool.take(count * self.dtype.bytes())
    }

    /// A kernel with a block of [`THREADS`] for each of `blocks`.
    pub(crate) fn each<A: Args>(
        &self,
        kernel: &'static str,
        blocks: usize,
        args: &A,
    ) -> Result<(), BackendError> {
        self.launch(kernel, [blocks as u32, 1, 1], THREADS, 0, args)
    }

    /// A kernel whose threads take 8 columns each of every row.
    pub(crate) fn by_columns<A: Args>(
        &self,
        kernel: &'static str,
        rows: usize,
        width: usize,
        args: &A,
    ) -> Result<(), BackendError> {
        let pieces = width.div_ceil(8 * THREADS as usize);
        self.launch(kernel, [rows as u32, pieces as u32, 1], THREADS, 0, args)
    }

    /// A kernel over `count` elements, any number of blocks.
    pub(crate) fn over_all<A: Args>(
        &self,
        kernel: &'static str,
        count: usize,
        args: &A,
    ) -> Result<(), BackendError> {
        let blocks = count.div_ceil(THREADS as usize).min(self.driver().blocks_busy() as usize * 8);
        self.each(kernel, blocks.max(1), args)
    }

    pub(crate) fn launch<A: Args>(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: usize,
        args: &A,
    ) -> Result<(), BackendError> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.queue().launch(Launch { kernel, grid, threads, shared_bytes: shared_bytes as u32 }, args)
    }
}

impl<D: Driver> Drop for Device<D> {
    fn drop(&mut self) {
        // Before the group: NCCL waits for graphs with its sums.
        self.queue().discard();
    }
}

impl<D: Driver + Open> Backend for Device<D> {
    type Weight = CudaWeight<D>;
    type Act = CudaAct<D>;
    type Hidden = CudaAct<D>;
    type Kv = CudaKv<D>;
    type Step<'a> = CudaStep<'a, D>;

    fn open(options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        Self::over(D::open(options.device, options.cache.as_deref())?, options, group)
    }

    fn beside(&self, options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        let mut device = Self::untried(self.driver().clone(), options, group)?;
        match self.tried && options.cuda.attention == PromptAttention::Auto && device.bf16() {
            true => {
                (device.attends, device.group_products, device.tried) =
                    (self.attends, self.group_products, true)
            }
            false => device.try_wide(options)?,
        }
        Ok(device)
    }

    fn caps(&self) -> Caps {
        let mut device = self.driver().describe();
        match (self.attends, self.group_products) {
            (Some(Wide::Groups), false) => device += ", wgmma for attention",
            (Some(wide), _) => device += &format!(", {wide}"),
            (None, true) => device += ", wgmma for products",
            (None, false) => {}
        }
        if let Some(ranks) = &self.ranks {
            device += &format!(", {}", ranks.describe());
        }
        Caps { name: "cuda", device, exact: false, chunk_tokens: CHUNK_TOKENS }
    }

    fn free_bytes(&self) -> Option<u64> {
        Some(self.driver().free_bytes())
    }

    fn load(&mut self, source: &WeightSource<'_>) -> Result<CudaWeight<D>, BackendError> {
        CudaWeight::load(self.driver(), source, self.dtype)
    }

    fn kv(&mut self, spec: &KvSpec, bytes: u64) -> Result<CudaKv<D>, BackendError> {
        CudaKv::new(&self.pool, spec, bytes, self.block_tokens, self.dtype)
    }

    fn step<'a>(&'a mut self, kv: &'a mut CudaKv<D>, batch: &'a Batch) -> CudaStep<'a, D> {
        CudaStep::new(self, kv, batch)
    }

    fn regroup(&mut self, group: Group) -> Result<(), BackendError> {
        let was = self.ranks.as_ref().map_or((0, 1), |ranks| (ranks.rank(), ranks.world()));
        if (group.rank, group.world) != was {
            let reason =
                format!("rank {} of {} cannot become {} of {}", was.0, was.1, group.rank, group.world);
            return Err(BackendError::Unavailable { backend: "cuda", reason });
        }
        self.drawn = None;
        if self.ranks.is_some() {
            // The old group goes first: graphs with its sums, its links, and NCCL's hold on the device.
            self.queue().discard();
            self.ranks = None;
            self.ranks = Some(Ranks::new(group)?);
        }
        Ok(())
    }
}

/// A driver that finds its device by number.
pub trait Open: Sized {
    fn open(device: usize, cache: Option<&Path>) -> Result<Self, BackendError>;
}
