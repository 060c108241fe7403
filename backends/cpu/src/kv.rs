//! The paged KV store of one rank: [`Pages`] says which block is whose, this file owns the bytes.
//!
//! Memory is `[layer][plane][block][token][head][dim]`: a token's row is in wire order already, and neighbouring blocks
//! are neighbours in memory, so whole-head pieces travel without a copy.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use backend::paged::{Access, LeaseId, Pages};
use backend::{BackendError, DType, Fork, KvError, KvSpec, KvStore, KvUsage, SeqId};

use crate::lease::{CpuExport, CpuLanding, Hold};
use crate::memory::Memory;

/// KV blocks of one rank in main memory.
#[derive(Debug)]
pub struct CpuKv {
    pages: Pages,
    slab: Arc<Slab>,
    /// Leases that were dropped since the store looked last.
    ended: Arc<Mutex<Vec<LeaseId>>>,
}

/// The bytes of a store and where each piece lies.
#[derive(Debug)]
pub(crate) struct Slab {
    pub(crate) spec: KvSpec,
    pub(crate) block_tokens: u32,
    memory: Memory,
    /// Per plane: bytes before it within a layer.
    plane_offsets: Vec<usize>,
    layer_bytes: usize,
}

impl Slab {
    /// The address of token `offset` of `block` in a plane of a layer; its heads follow.
    pub(crate) fn token(&self, layer: usize, plane: usize, block: u32, offset: u32) -> *mut u8 {
        let row = self.spec.planes[plane].token_bytes();
        let token = block as usize * self.block_tokens as usize + offset as usize;
        self.memory.at(layer * self.layer_bytes + self.plane_offsets[plane] + token * row)
    }
}

impl CpuKv {
    pub(crate) fn new(spec: &KvSpec, bytes: u64, block_tokens: u32) -> Result<Self, BackendError> {
        let refused = |reason| Err(BackendError::Unavailable { backend: "cpu", reason });
        if !block_tokens.is_power_of_two() {
            return refused(format!("{block_tokens} tokens per KV block is not a power of two"));
        }
        if let Some(plane) = spec.planes.iter().find(|plane| plane.dtype == DType::F16) {
            return refused(format!("a cache of {} is not supported (plane {})", plane.dtype, plane.name));
        }
        let block_bytes = spec.token_bytes() as u64 * u64::from(block_tokens);
        let blocks = bytes.checked_div(block_bytes).unwrap_or(0);
        let Ok(blocks) = u32::try_from(blocks) else {
            return refused(format!("{blocks} KV blocks are more than fit a block number"));
        };
        if blocks == 0 {
            return Err(BackendError::OutOfMemory { wanted_bytes: block_bytes, free_bytes: bytes });
        }
        let tokens = blocks as usize * block_tokens as usize;
        let mut layer_bytes = 0;
        let plane_offsets = spec
            .planes
            .iter()
            .map(|plane| {
                let offset = layer_bytes;
                // Planes begin at cache lines.
                layer_bytes += (tokens * plane.token_bytes()).next_multiple_of(64);
                offset
            })
            .collect();
        let memory = Memory::zeroed(layer_bytes * spec.layers)?;
        let slab = Slab { spec: spec.clone(), block_tokens, memory, plane_offsets, layer_bytes };
        let pages = Pages::new(spec.layers, blocks, block_tokens);
        Ok(CpuKv { pages, slab: Arc::new(slab), ended: Arc::default() })
    }

    pub(crate) fn slab(&self) -> &Slab {
        &self.slab
    }

    pub(crate) fn table(&self, seq: SeqId) -> Result<&[u32], KvError> {
        self.pages.table(seq)
    }

    /// Asks for writing `tokens` of `layer` and reading `[from, tokens.end)`: neither may be under somebody's lease,
    /// and what is read and not written must be finished.
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

    /// A read lease on some layers.
    pub(crate) fn export_layers(
        &mut self,
        seq: SeqId,
        layers: Range<usize>,
        tokens: Range<u32>,
    ) -> Result<CpuExport, KvError> {
        self.reclaim();
        let lease = self.pages.lease(seq, layers.clone(), tokens.clone(), Access::Read)?;
        Ok(CpuExport { hold: self.hold(lease, layers, tokens) })
    }

    fn hold(&self, lease: LeaseId, layers: Range<usize>, tokens: Range<u32>) -> Hold {
        let blocks = self.pages.leased_blocks(lease).to_vec();
        Hold { slab: self.slab.clone(), lease, ended: Some(self.ended.clone()), blocks, layers, tokens }
    }

    fn reclaim(&mut self) {
        let mut ended = self.ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for lease in ended.drain(..) {
            self.pages.release(lease);
        }
    }
}

impl KvStore for CpuKv {
    type Export = CpuExport;
    type Landing = CpuLanding;

    fn spec(&self) -> &KvSpec {
        &self.slab.spec
    }

    fn block_tokens(&self) -> u32 {
        self.slab.block_tokens
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

    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<CpuExport, KvError> {
        self.export_layers(seq, layer..layer + 1, tokens)
    }

    fn land(&mut self, seq: SeqId, tokens: Range<u32>) -> Result<CpuLanding, KvError> {
        self.reclaim();
        let layers = 0..self.slab.spec.layers;
        let lease = self.pages.lease(seq, layers.clone(), tokens.clone(), Access::Write)?;
        Ok(CpuLanding { seq, hold: self.hold(lease, layers, tokens) })
    }

    fn commit(&mut self, mut landing: CpuLanding) -> Result<(), KvError> {
        self.reclaim();
        let ours = landing.hold.ended.as_ref().is_some_and(|ended| Arc::ptr_eq(ended, &self.ended));
        if !ours {
            return Err(KvError::Unknown(landing.seq));
        }
        // The lease ends here, not when the landing is dropped.
        landing.hold.ended = None;
        self.pages.commit(landing.hold.lease, landing.seq)
    }
}
