//! The paged KV store of one rank in device memory, `[layer][plane][block][token][head][dim]`; [`Pages`] says which block is
//! whose. What leaves is gathered into host memory behind the attention that wrote it, beside later layers, or within the device's
//! where receivers read it there; what lands is collected in host memory and scattered at commit.

use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock};

use backend::paged::{Access, LeaseId, Pages};
use backend::{BackendError, Cut, DType, Fork, KvError, KvSpec, KvStore, KvUsage, Place, SeqId};

use crate::args::{MoveArgs, SumArgs};
use crate::device::THREADS;
use crate::driver::{Driver, Lane, Launch};
use crate::lease::{CudaExport, CudaLanding, Hold, Layout, Staged};
use crate::memory::{Buffer, Lasting, Pool};
use crate::step::PADDING_MAX;
use crate::unstaged::{Part, Unstaged, parts, tables};

/// KV blocks of one rank on the device.
pub struct CudaKv<D: Driver> {
    pool: Rc<Pool<D>>,
    pages: Pages,
    spec: KvSpec,
    block_tokens: u32,
    /// Blocks beyond those of sequences.
    spare: Vec<u32>,
    slab: D::Memory,
    /// Per plane: bytes before it within a layer.
    plane_offsets: Vec<u64>,
    layer_bytes: u64,
    ended: Arc<Mutex<Vec<LeaseId>>>,
    /// Device memory that copies to the host still read.
    leaving: Vec<(Arc<D::Event>, Buffer<D>)>,
    /// What sums of bytes that stay are made by, once there were any.
    tables: Option<D::Memory>,
}

impl<D: Driver> CudaKv<D> {
    pub(crate) fn new(
        pool: &Rc<Pool<D>>,
        spec: &KvSpec,
        bytes: u64,
        block_tokens: u32,
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let refused = |reason| Err(BackendError::Unavailable { backend: "cuda", reason });
        if let Some(plane) = spec.planes.iter().find(|plane| plane.dtype != dtype) {
            return refused(format!(
                "a cache of {} in a step of {dtype} (plane {})",
                plane.dtype, plane.name
            ));
        }
        let block_bytes = spec.token_bytes() as u64 * u64::from(block_tokens);
        let blocks = bytes.checked_div(block_bytes).unwrap_or(0);
        let Some(blocks) = u32::try_from(blocks).ok().filter(|blocks| *blocks <= u32::MAX / 2) else {
            return refused(format!("{blocks} KV blocks are more than fit a block number"));
        };
        if blocks == 0 {
            return Err(BackendError::OutOfMemory { wanted_bytes: block_bytes, free_bytes: bytes });
        }
        // Rows of padding have places of their own.
        let spare = (PADDING_MAX as u32).div_ceil(block_tokens);
        let tokens = (u64::from(blocks) + u64::from(spare)) * u64::from(block_tokens);
        let mut layer_bytes = 0;
        let plane_offsets = spec
            .planes
            .iter()
            .map(|plane| {
                let offset = layer_bytes;
                layer_bytes += (tokens * plane.token_bytes() as u64).next_multiple_of(256);
                offset
            })
            .collect();
        let all = layer_bytes * spec.layers as u64;
        if all > pool.queue.driver.free_bytes() {
            return Err(BackendError::OutOfMemory {
                wanted_bytes: all,
                free_bytes: pool.queue.driver.free_bytes(),
            });
        }
        let slab = pool.queue.driver.alloc(all as usize)?;
        // Padding of a tile is read, with weight zero: it must be numbers.
        pool.queue.clear(pool.queue.driver.address(&slab), all as usize)?;
        Ok(CudaKv {
            pool: pool.clone(),
            pages: Pages::new(spec.layers, blocks, block_tokens),
            spec: spec.clone(),
            block_tokens,
            spare: (blocks..blocks + spare).collect(),
            slab,
            plane_offsets,
            layer_bytes,
            ended: Arc::default(),
            leaving: Vec::new(),
            tables: None,
        })
    }

    /// Where a plane of a layer begins on the device.
    pub(crate) fn plane(&self, layer: usize, plane: usize) -> u64 {
        self.pool.queue.driver.address(&self.slab)
            + layer as u64 * self.layer_bytes
            + self.plane_offsets[plane]
    }

    /// The blocks of rows of padding, which nobody else uses.
    pub(crate) fn spare(&self) -> &[u32] {
        &self.spare
    }

    pub(crate) fn table(&self, seq: SeqId) -> Result<&[u32], KvError> {
        self.pages.table(seq)
    }

    /// As the CPU store: asks for writing `tokens` of `layer` and reading `[from, tokens.end)`.
    pub(crate) fn enter(
        &mut self,
        seq: SeqId,
        layer: usize,
        from: u32,
        tokens: Range<u32>,
    ) -> Result<(), KvError> {
        self.reclaim();
        self.pages.writable(seq, layer..layer + 1, tokens.clone())?;
        self.pages.readable(seq, layer..layer + 1, from..tokens.end)?;
        self.pages.filled(seq, layer..layer + 1, from..tokens.start)?;
        self.pages.fill(seq, layer..layer + 1, tokens)
    }

    fn reclaim(&mut self) {
        let mut ended = self.ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for lease in ended.drain(..) {
            self.pages.release(lease);
        }
        drop(ended);
        let driver = &self.pool.queue.driver;
        self.leaving.retain(|(event, _)| !driver.passed(event));
    }

    fn hold(&self, lease: LeaseId, layers: Range<usize>, tokens: Range<u32>) -> Hold {
        Hold { lease, ended: Some(self.ended.clone()), layout: Layout::new(&self.spec, layers, tokens) }
    }

    /// Rows of `tokens` between pages and dense memory of one plane.
    pub(crate) fn move_rows(
        &self,
        layer: usize,
        plane: usize,
        table: u64,
        tokens: Range<u32>,
        dense: u64,
        out: bool,
    ) -> Result<(), BackendError> {
        let row = self.spec.planes[plane].token_bytes();
        self.move_heads(layer, plane, (0, row), table, tokens, dense, out)
    }

    /// As [`CudaKv::move_rows`], of some bytes of each row: how many come before them, and how many they are.
    #[allow(clippy::too_many_arguments)] // one copy: from where, what, to where
    fn move_heads(
        &self,
        layer: usize,
        plane: usize,
        (skip, width): (usize, usize),
        table: u64,
        tokens: Range<u32>,
        dense: u64,
        out: bool,
    ) -> Result<(), BackendError> {
        let args = MoveArgs {
            pages: self.plane(layer, plane) + skip as u64,
            dense,
            table,
            pitch: self.spec.planes[plane].token_bytes() as u32,
            width: width as u32,
            first: tokens.start,
            count: tokens.len() as u32,
            block_shift: self.block_tokens.trailing_zeros(),
            out: u32::from(out),
        };
        if tokens.is_empty() || args.width == 0 {
            return Ok(());
        }
        let launch =
            Launch { kernel: "move_rows", grid: [args.count, 1, 1], threads: THREADS, shared_bytes: 0 };
        self.pool.queue.launch(launch, &args)
    }

    /// Gathers `tokens` of one layer and sends them to the host, in the second lane; where there is one memory they are
    /// gathered into the host's.
    fn gather(&mut self, seq: SeqId, layer: usize, hold: Hold) -> Result<CudaExport<D>, BackendError> {
        let pool = self.pool.clone();
        let (queue, driver) = (&pool.queue, &pool.queue.driver);
        let tokens = hold.layout.tokens.clone();
        let bytes = hold.layout.bytes();
        let table = self.pool.send(self.pages.table(seq)?)?;
        let mut host = self.pool.pinned(bytes)?;
        let staged = if driver.unified() { None } else { Some(self.pool.take(bytes)?) };
        let to = staged.as_ref().map_or_else(|| driver.host_address(&host), |staged| staged.address);
        for plane in 0..self.spec.planes.len() {
            let dense = to + hold.layout.plane(layer, plane) as u64;
            self.move_rows(layer, plane, table.address, tokens.clone(), dense, true)?;
        }
        let gathered = queue.record(Lane::Compute)?;
        let Some(staged) = staged else {
            return Ok(CudaExport::Staged(Staged { hold, host, arrived: Arc::new(gathered) }));
        };
        queue.after(Lane::Copy, &gathered)?;
        queue.to_host(Lane::Copy, &mut host, 0, staged.address, bytes)?;
        let arrived = Arc::new(queue.record(Lane::Copy)?);
        self.leaving.push((arrived.clone(), staged));
        Ok(CudaExport::Staged(Staged { hold, host, arrived }))
    }

    /// As [`KvStore::export`] of `cuts`, whose bytes stay in the device's memory where there is room for them.
    pub(crate) fn export_there(
        &mut self,
        seq: SeqId,
        layer: usize,
        tokens: Range<u32>,
        cuts: &[Cut],
    ) -> Result<CudaExport<D>, KvError> {
        let found = parts(&self.spec, cuts, tokens.len()).filter(|_| self.stays().is_some());
        let Some((parts, bytes, sums)) = found else { return self.export(seq, layer, tokens) };
        let Some(memory) = self.pool.lasting(bytes).map_err(device)? else {
            return self.export(seq, layer, tokens);
        };
        self.reclaim();
        let lease = self.pages.lease(seq, layer..layer + 1, tokens.clone(), Access::Read)?;
        let hold = self.hold(lease, layer..layer + 1, tokens);
        self.gather_there(seq, layer, hold, parts, memory, (bytes, sums)).map_err(device)
    }

    /// Gathers parts of one layer in the device's memory and sums their rows; the sums go to the host in the second lane.
    fn gather_there(
        &mut self,
        seq: SeqId,
        layer: usize,
        hold: Hold,
        parts: Vec<Part>,
        memory: Lasting<D>,
        (bytes, count): (usize, usize),
    ) -> Result<CudaExport<D>, BackendError> {
        let tables = self.tables()?;
        let pool = self.pool.clone();
        let queue = &pool.queue;
        let tokens = hold.layout.tokens.clone();
        let table = pool.send(self.pages.table(seq)?)?;
        let (mut host, summed) = (pool.pinned(count * 4)?, pool.take(count * 4)?);
        for part in &parts {
            let dense = memory.region().address() + part.at as u64;
            let (plane, tokens) = (part.cut.plane, tokens.clone());
            self.move_heads(layer, plane, (part.skip, part.row), table.address, tokens, dense, true)?;
            let rows = hold.layout.tokens.len() as u32;
            let sums = summed.address + 4 * part.sums_at as u64;
            let args = SumArgs { rows: dense, tables, sums, width: part.row as u32, count: rows };
            let blocks = rows.div_ceil(THREADS / 32).clamp(1, queue.driver.blocks_busy());
            let grid = [blocks, 1, 1];
            queue.launch(Launch { kernel: "sum_rows", grid, threads: THREADS, shared_bytes: 0 }, &args)?;
        }
        let gathered = queue.record(Lane::Compute)?;
        queue.after(Lane::Copy, &gathered)?;
        queue.to_host(Lane::Copy, &mut host, 0, summed.address, count * 4)?;
        let arrived = Arc::new(queue.record(Lane::Copy)?);
        self.leaving.push((arrived.clone(), summed));
        let (words, copy) = (OnceLock::new(), OnceLock::new());
        Ok(CudaExport::Unstaged(Unstaged {
            hold,
            layer,
            parts,
            memory,
            bytes,
            sums: host,
            arrived,
            words,
            copy,
        }))
    }

    /// Where the tables of `sum_rows` are.
    fn tables(&mut self) -> Result<u64, BackendError> {
        let queue = &self.pool.queue;
        if self.tables.is_none() {
            let bytes: Vec<u8> = tables().iter().flat_map(|word| word.to_ne_bytes()).collect();
            let memory = queue.driver.alloc(bytes.len())?;
            queue.upload(queue.driver.address(&memory), &bytes)?;
            self.tables = Some(memory);
        }
        Ok(self.tables.as_ref().map_or(0, |memory| queue.driver.address(memory)))
    }

    /// Puts a landing's bytes into the pages.
    fn scatter(&mut self, landing: CudaLanding<D>) -> Result<(), BackendError> {
        let CudaLanding { seq, hold, host } = landing;
        let pool = self.pool.clone();
        let (queue, driver) = (&pool.queue, &pool.queue.driver);
        let layout = &hold.layout;
        let table = self.pool.send(self.pages.table(seq)?)?;
        let layer_bytes = layout.layer_bytes();
        for layer in layout.layers.clone() {
            let at = layout.plane(layer, 0);
            let staged = if driver.unified() { None } else { Some(self.pool.take(layer_bytes)?) };
            let dense = match &staged {
                Some(staged) => {
                    queue.to_device(Lane::Compute, staged.address, &host, at, layer_bytes)?;
                    staged.address
                }
                None => driver.host_address(&host) + at as u64,
            };
            for plane in 0..self.spec.planes.len() {
                let from = dense + (layout.plane(layer, plane) - at) as u64;
                self.move_rows(layer, plane, table.address, layout.tokens.clone(), from, false)?;
            }
        }
        self.pool.keep(host)
    }
}

/// What a store reports when the device fails under it: nothing changed, and the next step says why.
fn device(error: BackendError) -> KvError {
    match error {
        BackendError::Kv(error) => error,
        _ => KvError::Length { got: 0, want: 0 },
    }
}

impl<D: Driver> KvStore for CudaKv<D> {
    type Export = CudaExport<D>;
    type Landing = CudaLanding<D>;

    fn spec(&self) -> &KvSpec {
        &self.spec
    }

    fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    fn usage(&mut self) -> KvUsage {
        self.reclaim();
        self.pages.usage()
    }

    fn open(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.reclaim();
        self.pages.open(seq, tokens)
    }

    fn grow(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.reclaim();
        self.pages.grow(seq, tokens)
    }

    fn fork(&mut self, from: SeqId, to: SeqId, tokens: u32, mode: Fork) -> Result<(), KvError> {
        self.reclaim();
        self.pages.fork(from, to, tokens, mode)
    }

    fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.reclaim();
        self.pages.truncate(seq, tokens)
    }

    fn close(&mut self, seq: SeqId) -> Result<(), KvError> {
        self.reclaim();
        self.pages.close(seq)
    }

    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<CudaExport<D>, KvError> {
        self.reclaim();
        let lease = self.pages.lease(seq, layer..layer + 1, tokens.clone(), Access::Read)?;
        let hold = self.hold(lease, layer..layer + 1, tokens);
        self.gather(seq, layer, hold).map_err(device)
    }

    /// A device that shares the host's memory stages nothing anyway.
    fn stays(&self) -> Option<Place> {
        let driver = &self.pool.queue.driver;
        (!driver.unified()).then(|| driver.place())
    }

    fn land(&mut self, seq: SeqId, tokens: Range<u32>) -> Result<CudaLanding<D>, KvError> {
        self.reclaim();
        let layers = 0..self.spec.layers;
        let lease = self.pages.lease(seq, layers.clone(), tokens.clone(), Access::Write)?;
        let hold = self.hold(lease, layers, tokens);
        let host = self.pool.pinned(hold.layout.bytes()).map_err(device)?;
        Ok(CudaLanding { seq, hold, host })
    }

    fn commit(&mut self, mut landing: CudaLanding<D>) -> Result<(), KvError> {
        self.reclaim();
        let ours = landing.hold.ended.as_ref().is_some_and(|ended| Arc::ptr_eq(ended, &self.ended));
        if !ours {
            return Err(KvError::Unknown(landing.seq));
        }
        // The lease ends here, not when the landing is dropped.
        landing.hold.ended = None;
        let (lease, seq) = (landing.hold.lease, landing.seq);
        if self.pages.holder(lease) != Some(seq) {
            return self.pages.commit(lease, seq);
        }
        if let Err(error) = self.scatter(landing) {
            self.pages.release(lease);
            return Err(device(error));
        }
        self.pages.commit(lease, seq)
    }
}

impl<D: Driver> Drop for CudaKv<D> {
    fn drop(&mut self) {
        for (event, _) in &self.leaving {
            // Copies end before their memory goes.
            let _ = D::wait(event);
        }
    }
}
