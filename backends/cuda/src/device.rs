//! The device of one rank: what is opened once, and the queueing of single operations.

use std::path::Path;
use std::rc::Rc;

use backend::{Backend, BackendError, Batch, Caps, DType, DeviceOptions, Group, KvSpec, Links, WeightSource};

use crate::act::CudaAct;
use crate::args::Args;
use crate::driver::{Driver, Launch};
use crate::kv::CudaKv;
use crate::memory::{Buffer, Pool};
use crate::step::CudaStep;
use crate::weight::CudaWeight;

/// Threads of a block of the simple kernels.
pub(crate) const THREADS: u32 = 256;

/// A device and its memory.
pub struct Device<D: Driver> {
    pub(crate) pool: Rc<Pool<D>>,
    pub(crate) dtype: DType,
    pub(crate) block_tokens: u32,
    /// What the step before drew: which rows did, and the choices on the device.
    pub(crate) drawn: Option<(Vec<bool>, Rc<Buffer<D>>)>,
}

impl<D: Driver> Device<D> {
    /// Over an open driver. Errors when the options ask for what this backend cannot do.
    pub(crate) fn over(driver: D, options: &DeviceOptions, group: &Group) -> Result<Self, BackendError> {
        let refused = |reason: String| Err(BackendError::Unavailable { backend: "cuda", reason });
        if options.dtype == DType::F16 {
            return refused("activations are f32 or bf16, not f16".to_owned());
        }
        if group.world != 1 || !matches!(group.links, Links::Alone) {
            return refused(format!("a group of {} ranks: one GPU only for now", group.world));
        }
        if !options.block_tokens.is_power_of_two() {
            return refused(format!("{} tokens per KV block is not a power of two", options.block_tokens));
        }
        Ok(Device {
            pool: Pool::new(driver),
            dtype: options.dtype,
            block_tokens: options.block_tokens,
            drawn: None,
        })
    }

    pub(crate) fn driver(&self) -> &D {
        &self.pool.driver
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
        self.driver().launch(Launch { kernel, grid, threads, shared_bytes: shared_bytes as u32 }, args)
    }
}

impl<D: Driver + Open> Backend for Device<D> {
    type Weight = CudaWeight<D>;
    type Act = CudaAct<D>;
    type Hidden = CudaAct<D>;
    type Kv = CudaKv<D>;
    type Step<'a> = CudaStep<'a, D>;

    fn open(options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        Self::over(D::open(options.device, options.cache.as_deref())?, options, &group)
    }

    fn caps(&self) -> Caps {
        Caps { name: "cuda", device: self.driver().describe(), exact: false }
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
}

/// A driver that finds its device by number.
pub trait Open: Sized {
    fn open(device: usize, cache: Option<&Path>) -> Result<Self, BackendError>;
}
