//! The KV store: [`Pages`] keeps the books (in blocks, as every store does), [`Slots`] says where a sequence lies, this file
//! owns the arrays.
//!
//! Arrays are `[slots, heads, capacity, dim]`, the order in which MLX's attention reads without a copy; the wire's order is
//! made at the edges (export, commit). Every array has one owner, this store: an update recorded on it replaces the old
//! handle, so MLX writes in place. Sequences do not share memory: a fork copies ([`KvStore::shares`] is false).
//!
//! The books bound tokens; slots are classes above them. Memory is up to twice the tokens of the sequences, 256 tokens (the
//! smallest slot) for each shorter one, and a bank partly filled per class; a sequence that was cut keeps its slot.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use backend::paged::{Access, LeaseId, Pages};
use backend::{BackendError, Fork, KvError, KvSpec, KvStore, KvUsage, SeqId};
use mlx_rs::{Array, Dtype, ops, transforms};

use crate::graph::{Failure, Recorded, int, mlx_type, put_run, window};
use crate::lease::{MlxExport, MlxLanding, Regions};
use crate::line::{Line, Part, Ticket, Touches};
use crate::slots::{Place, Shape, Slots};

/// The KV cache of one rank in MLX arrays.
#[derive(Debug)]
pub struct MlxKv {
    spec: Arc<KvSpec>,
    pages: Pages,
    slots: Slots,
    /// Per bank (empty: none), layer and plane.
    banks: Vec<Vec<Vec<Array>>>,
    /// Banks and layers with recorded updates that nobody has evaluated yet.
    recorded: Vec<(usize, usize)>,
    /// Everything that is evaluated, in its order.
    line: Rc<RefCell<Line>>,
    /// Landings that were dropped since the store looked last.
    ended: Arc<Mutex<Vec<LeaseId>>>,
    /// Bytes copied from slot to slot.
    copied: Arc<AtomicU64>,
}

impl MlxKv {
    /// `copied` counts the bytes that are copied from slot to slot.
    pub(crate) fn new(
        spec: &KvSpec,
        bytes: u64,
        block_tokens: u32,
        copied: Arc<AtomicU64>,
    ) -> Result<Self, BackendError> {
        let refused = |reason| Err(BackendError::Unavailable { backend: "mlx", reason });
        if !block_tokens.is_power_of_two() {
            return refused(format!("{block_tokens} tokens per KV block is not a power of two"));
        }
        let block_bytes = spec.token_bytes() as u64 * u64::from(block_tokens);
        let blocks = bytes.checked_div(block_bytes).unwrap_or(0);
        if blocks == 0 {
            return Err(BackendError::OutOfMemory { wanted_bytes: block_bytes, free_bytes: bytes });
        }
        // Tokens are indices of MLX.
        let tokens =
            u32::try_from(blocks * u64::from(block_tokens)).ok().filter(|t| *t <= i32::MAX as u32 / 2);
        let (Some(tokens), Ok(blocks)) = (tokens, u32::try_from(blocks)) else {
            return refused(format!(
                "{blocks} KV blocks of {block_tokens} tokens are more than an index holds"
            ));
        };
        Ok(MlxKv {
            spec: Arc::new(spec.clone()),
            pages: Pages::new(spec.layers, blocks, block_tokens),
            slots: Slots::new(tokens),
            banks: Vec::new(),
            recorded: Vec::new(),
            line: Rc::default(),
            ended: Arc::default(),
            copied,
        })
    }

    /// Where a sequence lies.
    pub(crate) fn place(&self, seq: SeqId) -> Result<Place, KvError> {
        self.slots.place(seq).ok_or(KvError::Unknown(seq))
    }

    /// The array of a plane: `[slots, heads, capacity, dim]`.
    pub(crate) fn array(&self, bank: usize, layer: usize, plane: usize) -> &Array {
        &self.banks[bank][layer][plane]
    }

    /// Puts the array with a recorded update in place of the one that it was recorded on.
    pub(crate) fn replace(&mut self, bank: usize, layer: usize, plane: usize, array: Array) {
        self.banks[bank][layer][plane] = array;
        if !self.recorded.contains(&(bank, layer)) {
            self.recorded.push((bank, layer));
        }
    }

    /// Waits for everything that was submitted: what runs holds its inputs, so only then are updates written in place that
    /// begin at once.
    pub(crate) fn calm(&mut self) -> Result<(), Failure> {
        self.line.borrow_mut().drain()
    }

    /// Where steps are on their way.
    pub(crate) fn line(&self) -> Rc<RefCell<Line>> {
        self.line.clone()
    }

    /// Submits the recorded updates, and `others`. The second value is there when they are done. `half`: a layer, and what all that
    /// reads or writes the caches up to it comes before.
    pub(crate) fn submit(
        &mut self,
        others: &[Array],
        half: Option<(usize, Array)>,
    ) -> Result<(Ticket, Vec<Array>), Failure> {
        let mut parts = Vec::with_capacity(2);
        let mut touches = Touches::All;
        if let Some((last, end)) = half {
            let (first, second) = std::mem::take(&mut self.recorded).into_iter().partition(|at| at.1 <= last);
            self.recorded = second;
            let mut arrays = self.arrays(first);
            arrays.push(end.clone());
            parts.push(Part { arrays, ends: vec![end], touches: Touches::First });
            touches = Touches::Second;
        }
        let (arrays, ends) = self.recorded(others)?;
        parts.push(Part { arrays, ends: ends.clone(), touches });
        Ok((self.line.borrow_mut().submit(parts), ends))
    }

    /// The caches of these banks and layers.
    fn arrays(&self, recorded: Vec<(usize, usize)>) -> Vec<Array> {
        recorded.into_iter().flat_map(|(bank, layer)| self.banks[bank][layer].clone()).collect()
    }

    /// What is to be evaluated; and what tells its end: not a cache array itself, that has one owner.
    fn recorded(&mut self, others: &[Array]) -> Result<(Vec<Array>, Vec<Array>), Failure> {
        let recorded = std::mem::take(&mut self.recorded);
        let mut arrays = self.arrays(recorded);
        let ends = match arrays.last() {
            Some(cache) if others.is_empty() => vec![part(cache)?],
            _ => others.to_vec(),
        };
        arrays.extend_from_slice(&ends);
        Ok((arrays, ends))
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

    /// Gives `seq`, which the books have room for, a slot for its capacity, with the first `kept` tokens of `from`.
    fn settle(&mut self, seq: SeqId, from: Option<Place>, kept: u32) -> Result<(), KvError> {
        let capacity = self.pages.capacity(seq)?;
        if self.slots.capacity(seq) >= capacity.max(1) {
            return Ok(());
        }
        let (place, shape) = self.slots.take(capacity);
        if let Some(shape) = shape
            && self.make(place.bank, shape).is_err()
        {
            self.slots.unmake(place.bank);
            return Err(self.full(capacity));
        }
        if let Some(from) = from.filter(|_| kept > 0)
            && self.copy(from, place, kept as usize).is_err()
        {
            self.give(place);
            return Err(self.full(capacity));
        }
        if let Some(before) = self.slots.assign(seq, place) {
            self.give(before);
        }
        Ok(())
    }

    /// The device has no memory where the books have room.
    fn full(&self, tokens: u32) -> KvError {
        let wanted_blocks = tokens.div_ceil(self.pages.block_tokens());
        KvError::Full { wanted_blocks, free_blocks: self.pages.usage().free }
    }

    fn make(&mut self, bank: usize, shape: Shape) -> Result<(), Failure> {
        let plane = |plane: &backend::Plane| -> Recorded {
            let sizes = [shape.slots, plane.heads().len(), shape.capacity as usize, plane.dim].map(int);
            Ok(ops::zeros_dtype(&sizes, mlx_type(plane.dtype))?)
        };
        let layer = || self.spec.planes.iter().map(plane).collect::<Result<Vec<_>, _>>();
        let arrays = (0..self.spec.layers).map(|_| layer()).collect::<Result<Vec<_>, _>>()?;
        transforms::eval(arrays.iter().flatten())?;
        if self.banks.len() <= bank {
            self.banks.resize_with(bank + 1, Vec::new);
        }
        self.banks[bank] = arrays;
        Ok(())
    }

    /// Layer by layer, so that little more memory is taken than before.
    fn copy(&mut self, from: Place, to: Place, tokens: usize) -> Result<(), Failure> {
        self.calm()?;
        for layer in 0..self.spec.layers {
            let kept = |plane| -> Recorded {
                let array = self.array(from.bank, layer, plane);
                Ok(window(array, from.slot..from.slot + 1, 0..tokens)?.contiguous()?)
            };
            let kept = (0..self.spec.planes.len()).map(kept).collect::<Result<Vec<_>, _>>()?;
            // Arrays of their own before the update begins: beside a view of it, MLX would copy the whole bank.
            transforms::eval(&kept)?;
            for (plane, kept) in kept.iter().enumerate() {
                let array = put_run(self.array(to.bank, layer, plane), to.slot, 0..tokens, kept)?;
                self.replace(to.bank, layer, plane, array);
            }
            self.begin()?;
        }
        self.copied.fetch_add((tokens * self.spec.token_bytes()) as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Submits the recorded updates, which begin at once: everything before has ended.
    fn begin(&mut self) -> Result<(), Failure> {
        let (ticket, _) = self.submit(&[], None)?;
        self.line.borrow_mut().reach(ticket)
    }

    fn planes(&self) -> Vec<(usize, usize)> {
        let planes = self.spec.planes.len();
        (0..self.spec.layers).flat_map(|layer| (0..planes).map(move |plane| (layer, plane))).collect()
    }

    fn give(&mut self, place: Place) {
        if let Some(bank) = self.slots.give(place) {
            self.banks[bank].clear();
            self.recorded.retain(|(recorded, _)| *recorded != bank);
        }
    }

    fn reclaim(&mut self) {
        let mut ended = self.ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for lease in ended.drain(..) {
            self.pages.release(lease);
        }
    }
}

/// Something that needs all of `cache` to be there, and is none of it.
fn part(cache: &Array) -> Recorded {
    Ok(window(cache, 0..1, 0..1)?.sum(None)?)
}

impl KvStore for MlxKv {
    type Export = MlxExport;
    type Landing = MlxLanding;

    fn spec(&self) -> &KvSpec {
        &self.spec
    }

    fn block_tokens(&self) -> u32 {
        self.pages.block_tokens()
    }

    fn shares(&self) -> bool {
        false
    }

    fn usage(&mut self) -> KvUsage {
        self.reclaim();
        self.pages.usage()
    }

    fn open(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.reclaim();
        self.pages.open(seq, tokens)?;
        self.settle(seq, None, 0).inspect_err(|_| {
            let _ = self.pages.close(seq);
        })
    }

    fn grow(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.reclaim();
        let before = self.pages.capacity(seq)?;
        self.pages.grow(seq, tokens)?;
        let place = self.slots.place(seq);
        self.settle(seq, place, before).inspect_err(|_| {
            let _ = self.pages.truncate(seq, before);
        })
    }

    fn fork(&mut self, from: SeqId, to: SeqId, tokens: u32, mode: Fork) -> Result<(), KvError> {
        self.reclaim();
        let place = self.slots.place(from);
        match mode {
            Fork::Share => {
                self.pages.copy(from, to, tokens)?;
                self.settle(to, place, tokens).inspect_err(|_| {
                    let _ = self.pages.close(to);
                })
            }
            Fork::Move => {
                self.pages.fork(from, to, tokens, Fork::Move)?;
                if let Some(place) = self.slots.remove(from) {
                    self.slots.assign(to, place);
                }
                Ok(())
            }
        }
    }

    fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.reclaim();
        // The slot stays: a shorter sequence mostly grows again, or is closed.
        self.pages.truncate(seq, tokens)
    }

    fn close(&mut self, seq: SeqId) -> Result<(), KvError> {
        self.reclaim();
        self.pages.close(seq)?;
        if let Some(place) = self.slots.remove(seq) {
            self.give(place);
        }
        Ok(())
    }

    /// Copies: the lease has the bytes as they are now, whatever becomes of the sequence.
    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<MlxExport, KvError> {
        self.reclaim();
        self.pages.filled(seq, layer..layer + 1, tokens.clone())?;
        self.pages.readable(seq, layer..layer + 1, tokens.clone())?;
        let Place { bank, slot } = self.place(seq)?;
        let range = tokens.start as usize..tokens.end as usize;
        // In wire order, `[tokens, bytes of a token]`.
        let plane = |plane: usize| -> Recorded {
            let held = window(self.array(bank, layer, plane), slot..slot + 1, range.clone())?;
            let wire = held.transpose_axes(&[0, 2, 1, 3])?.contiguous()?;
            Ok(wire.view_dtype(Dtype::Uint8)?.reshape(&[int(range.len()), -1])?)
        };
        let planes = if range.is_empty() { 0 } else { self.spec.planes.len() };
        let begun = (0..planes).map(plane).collect::<Result<Vec<_>, _>>().and_then(|planes| {
            // Another thread waits for them: they begin now.
            self.line.borrow_mut().settle()?;
            let (arrays, ends) = self.recorded(&planes)?;
            self.line.borrow_mut().join(arrays, ends)?;
            Ok(planes)
        });
        Ok(MlxExport::new(self.spec.clone(), layer, tokens, begun))
    }

    fn land(&mut self, seq: SeqId, tokens: Range<u32>) -> Result<MlxLanding, KvError> {
        self.reclaim();
        let lease = self.pages.lease(seq, 0..self.spec.layers, tokens.clone(), Access::Write)?;
        let landing =
            MlxLanding::new(seq, Regions::new(self.spec.clone(), tokens), lease, self.ended.clone());
        // Without memory the lease ends as a dropped one does.
        if landing.is_err() {
            self.pages.release(lease);
        }
        landing
    }

    fn commit(&mut self, landing: MlxLanding) -> Result<(), KvError> {
        self.reclaim();
        let unknown = KvError::Unknown(landing.seq);
        if !landing.is_of(&self.ended) {
            return Err(unknown);
        }
        let (lease, filled) = landing.into_filled();
        let Some(seq) = self.pages.holder(lease) else {
            self.pages.release(lease);
            return Err(unknown);
        };
        let Place { bank, slot } = self.place(seq)?;
        let tokens = filled.tokens();
        let range = tokens.start as usize..tokens.end as usize;
        let all = self.planes();
        let mut put = |(layer, plane)| -> Result<(), Failure> {
            let values = filled.array(layer, plane)?;
            let array = put_run(self.array(bank, layer, plane), slot, range.clone(), &values)?;
            self.replace(bank, layer, plane, array);
            Ok(())
        };
        let planes = if range.is_empty() { Vec::new() } else { all };
        let put = planes.into_iter().try_for_each(&mut put);
        if put.and_then(|()| self.calm()).and_then(|()| self.begin()).is_err() {
            self.pages.release(lease);
            return Err(self.full(tokens.end - tokens.start));
        }
        self.pages.commit(lease, seq)
    }
}

#[cfg(test)]
pub(crate) mod tests;
