//! Block accounting for paged stores (CPU, CUDA): tables, reference counts, leases, quarantine. Pure: no memory is
//! touched. A block stands for the same positions in every sequence that shares it, so "who may write where" is a
//! question about token ranges.

use std::collections::HashMap;
use std::ops::Range;

use crate::extents::Extents;
use crate::{Fork, KvError, KvUsage, SeqId};

/// A lease on some blocks, see [`Pages::lease`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(u64);

/// What a lease permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Finished positions stay as they are while the lease lives.
    Read,
    /// Only the holder touches these positions, in all layers.
    Write,
}

/// Blocks of one store: who holds each, and which positions are finished.
///
/// A block is *used* while a sequence holds it, *quarantined* while only leases do, else *free*.
#[derive(Debug)]
pub struct Pages {
    layers: usize,
    block_tokens: u32,
    blocks: Vec<Block>,
    free: Vec<u32>,
    used: u32,
    sequences: HashMap<SeqId, Sequence>,
    leases: HashMap<LeaseId, Lease>,
    lease_next: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    sequences: u32,
    readers: Vec<LeaseId>,
    writers: Vec<LeaseId>,
}

impl Block {
    fn leases(&mut self, access: Access) -> &mut Vec<LeaseId> {
        match access {
            Access::Read => &mut self.readers,
            Access::Write => &mut self.writers,
        }
    }

    fn is_leased(&self) -> bool {
        !self.readers.is_empty() || !self.writers.is_empty()
    }
}

#[derive(Debug, Default)]
struct Sequence {
    table: Vec<u32>,
    /// Finished positions per layer.
    filled: Vec<Extents>,
}

#[derive(Debug)]
struct Lease {
    /// `None` once the sequence has been closed or cut below the lease.
    seq: Option<SeqId>,
    layers: Range<usize>,
    tokens: Range<u32>,
    access: Access,
    blocks: Vec<u32>,
}

impl Pages {
    /// `blocks` free blocks of `block_tokens` (a power of two) for a cache of `layers` layers.
    pub fn new(layers: usize, blocks: u32, block_tokens: u32) -> Self {
        assert!(block_tokens.is_power_of_two(), "{block_tokens} tokens per block is not a power of two");
        Pages {
            layers,
            block_tokens,
            blocks: vec![Block::default(); blocks as usize],
            free: (0..blocks).rev().collect(),
            used: 0,
            sequences: HashMap::new(),
            leases: HashMap::new(),
            lease_next: 0,
        }
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Blocks by state.
    pub fn usage(&self) -> KvUsage {
        let (total, free) = (self.blocks.len() as u32, self.free.len() as u32);
        KvUsage { total, free, used: self.used, quarantined: total - free - self.used }
    }

    /// The blocks of `seq`: block `i` holds positions `[i * block_tokens, (i + 1) * block_tokens)`.
    pub fn table(&self, seq: SeqId) -> Result<&[u32], KvError> {
        Ok(&self.sequence(seq)?.table)
    }

    /// Adds an empty sequence with room for `tokens`.
    pub fn open(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        self.absent(seq)?;
        let table = self.take(tokens.div_ceil(self.block_tokens))?;
        self.sequences.insert(seq, Sequence { table, filled: vec![Extents::default(); self.layers] });
        Ok(())
    }

    /// Makes room for `tokens` in all; never shrinks.
    pub fn grow(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        let held = self.sequence(seq)?.table.len() as u32;
        let more = self.take(tokens.div_ceil(self.block_tokens).saturating_sub(held))?;
        self.sequence_mut(seq)?.table.extend(more);
        Ok(())
    }

    /// Adds `to` whose first `tokens` are those of `from`; the blocks are shared or moved, never copied.
    pub fn fork(&mut self, from: SeqId, to: SeqId, tokens: u32, mode: Fork) -> Result<(), KvError> {
        self.absent(to)?;
        let capacity = self.capacity(from)?;
        if tokens > capacity || !tokens.is_multiple_of(self.block_tokens) {
            let limit_end = u64::from(capacity);
            return Err(KvError::Range {
                what: "fork",
                start: 0,
                end: tokens.into(),
                limit_start: 0,
                limit_end,
            });
        }
        let count = (tokens / self.block_tokens) as usize;
        match mode {
            Fork::Share => {
                self.readable(from, 0..self.layers, 0..tokens)?;
                let source = self.sequence(from)?;
                let table = source.table[..count].to_vec();
                let mut filled = source.filled.clone();
                filled.iter_mut().for_each(|layer| layer.remove(tokens..u32::MAX));
                for block in &table {
                    self.blocks[*block as usize].sequences += 1;
                }
                self.sequences.insert(to, Sequence { table, filled });
            }
            Fork::Move => {
                self.truncate(from, tokens)?;
                for lease in self.leases.values_mut().filter(|lease| lease.seq == Some(from)) {
                    lease.seq = Some(to);
                }
                if let Some(sequence) = self.sequences.remove(&from) {
                    self.sequences.insert(to, sequence);
                }
            }
        }
        Ok(())
    }

    /// Adds `to` with blocks of its own for `tokens` (a multiple of the block), of which those are finished that are in
    /// `from`: for stores that copy where [`Fork::Share`] asks to share. The caller copies the bytes.
    pub fn copy(&mut self, from: SeqId, to: SeqId, tokens: u32) -> Result<(), KvError> {
        self.absent(to)?;
        if !tokens.is_multiple_of(self.block_tokens) {
            return Err(range_error("fork", &(0..tokens), &(0..self.capacity(from)?)));
        }
        self.readable(from, 0..self.layers, 0..tokens)?;
        let mut filled = self.sequence(from)?.filled.clone();
        filled.iter_mut().for_each(|layer| layer.remove(tokens..u32::MAX));
        let table = self.take(tokens / self.block_tokens)?;
        self.sequences.insert(to, Sequence { table, filled });
        Ok(())
    }

    /// Gives back blocks beyond `tokens` and forgets finished positions there.
    pub fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        let keep = tokens.div_ceil(self.block_tokens) as usize;
        let sequence = self.sequence_mut(seq)?;
        sequence.filled.iter_mut().for_each(|layer| layer.remove(tokens..u32::MAX));
        let cut = sequence.table.split_off(keep.min(sequence.table.len()));
        for lease in self.leases.values_mut() {
            if lease.seq == Some(seq) && lease.tokens.end > tokens {
                lease.seq = None;
            }
        }
        self.give_back(&cut);
        Ok(())
    }

    /// Removes the sequence. Its blocks are free, or quarantined while leased.
    pub fn close(&mut self, seq: SeqId) -> Result<(), KvError> {
        self.truncate(seq, 0)?;
        self.sequences.remove(&seq);
        // An empty lease of an empty sequence is not beyond 0, yet has no sequence any more.
        self.leases.values_mut().filter(|lease| lease.seq == Some(seq)).for_each(|lease| lease.seq = None);
        Ok(())
    }

    /// Positions `tokens` of `layers` are finished: computed or landed.
    pub fn fill(&mut self, seq: SeqId, layers: Range<usize>, tokens: Range<u32>) -> Result<(), KvError> {
        self.within(seq, &layers, &tokens)?;
        for layer in &mut self.sequence_mut(seq)?.filled[layers] {
            layer.insert(tokens.clone());
        }
        Ok(())
    }

    /// Errors unless all of `tokens` is finished in `layers`.
    pub fn filled(&self, seq: SeqId, layers: Range<usize>, tokens: Range<u32>) -> Result<(), KvError> {
        self.within(seq, &layers, &tokens)?;
        match self.sequence(seq)?.filled[layers].iter().find(|layer| !layer.contains(&tokens)) {
            Some(layer) => Err(range_error("tokens", &tokens, &layer.around(tokens.start))),
            None => Ok(()),
        }
    }

    /// Errors when `tokens` of `layers` may not be written by the owner: leased, or in blocks of several sequences.
    pub fn writable(&self, seq: SeqId, layers: Range<usize>, tokens: Range<u32>) -> Result<(), KvError> {
        self.unleased(seq, &layers, &tokens, |block| &block.readers)?;
        self.unleased(seq, &layers, &tokens, |block| &block.writers)?;
        let shared = |block: &u32| self.blocks[*block as usize].sequences > 1;
        match self.blocks_of(seq, &tokens)?.iter().any(shared) {
            true => Err(KvError::Shared { seq, start: tokens.start, end: tokens.end }),
            false => Ok(()),
        }
    }

    /// Errors when another holder may be writing `tokens` of `layers`.
    pub fn readable(&self, seq: SeqId, layers: Range<usize>, tokens: Range<u32>) -> Result<(), KvError> {
        self.unleased(seq, &layers, &tokens, |block| &block.writers)
    }

    /// Pins the blocks of `tokens`. A read lease needs finished positions; a write lease needs positions that nobody
    /// else leases or shares, and forgets that they were finished.
    pub fn lease(
        &mut self,
        seq: SeqId,
        layers: Range<usize>,
        tokens: Range<u32>,
        access: Access,
    ) -> Result<LeaseId, KvError> {
        match access {
            Access::Read => {
                self.filled(seq, layers.clone(), tokens.clone())?;
                self.readable(seq, layers.clone(), tokens.clone())?;
            }
            Access::Write => {
                self.writable(seq, layers.clone(), tokens.clone())?;
                for layer in &mut self.sequence_mut(seq)?.filled[layers.clone()] {
                    layer.remove(tokens.clone());
                }
            }
        }
        let blocks = self.blocks_of(seq, &tokens)?.to_vec();
        let id = LeaseId(self.lease_next);
        self.lease_next += 1;
        for block in &blocks {
            self.blocks[*block as usize].leases(access).push(id);
        }
        self.leases.insert(id, Lease { seq: Some(seq), layers, tokens, access, blocks });
        Ok(id)
    }

    /// The blocks under a lease; the first holds its first token.
    pub fn leased_blocks(&self, lease: LeaseId) -> &[u32] {
        self.leases.get(&lease).map_or(&[], |lease| &lease.blocks)
    }

    /// The sequence that a lease is of; `None` once it has been closed or cut below the lease.
    pub fn holder(&self, lease: LeaseId) -> Option<SeqId> {
        self.leases.get(&lease).and_then(|lease| lease.seq)
    }

    /// Ends a lease. Quarantined blocks that nobody holds any more become free.
    pub fn release(&mut self, lease: LeaseId) {
        if let Some(ended) = self.leases.remove(&lease) {
            self.let_go(lease, &ended);
        }
    }

    /// Ends a write lease whose positions are now finished. Errors when its sequence is gone; it is ended then too.
    pub fn commit(&mut self, lease: LeaseId, seq: SeqId) -> Result<(), KvError> {
        let Some(ended) = self.leases.remove(&lease) else { return Err(KvError::Unknown(seq)) };
        self.let_go(lease, &ended);
        match ended.seq {
            Some(seq) => self.fill(seq, ended.layers, ended.tokens),
            None => Err(KvError::Unknown(seq)),
        }
    }

    fn let_go(&mut self, lease: LeaseId, ended: &Lease) {
        for &index in &ended.blocks {
            let block = &mut self.blocks[index as usize];
            block.leases(ended.access).retain(|held| *held != lease);
            if block.sequences == 0 && !block.is_leased() {
                self.free.push(index);
            }
        }
    }

    fn give_back(&mut self, table: &[u32]) {
        for &index in table.iter().rev() {
            let block = &mut self.blocks[index as usize];
            block.sequences -= 1;
            if block.sequences == 0 {
                self.used -= 1;
                if !block.is_leased() {
                    self.free.push(index);
                }
            }
        }
    }

    fn take(&mut self, wanted: u32) -> Result<Vec<u32>, KvError> {
        let free_blocks = self.free.len() as u32;
        if wanted > free_blocks {
            return Err(KvError::Full { wanted_blocks: wanted, free_blocks });
        }
        self.used += wanted;
        let taken: Vec<u32> = self.free.drain((free_blocks - wanted) as usize..).rev().collect();
        for block in &taken {
            self.blocks[*block as usize].sequences = 1;
        }
        Ok(taken)
    }

    fn absent(&self, seq: SeqId) -> Result<(), KvError> {
        if self.sequences.contains_key(&seq) { Err(KvError::Exists(seq)) } else { Ok(()) }
    }

    fn sequence(&self, seq: SeqId) -> Result<&Sequence, KvError> {
        self.sequences.get(&seq).ok_or(KvError::Unknown(seq))
    }

    fn sequence_mut(&mut self, seq: SeqId) -> Result<&mut Sequence, KvError> {
        self.sequences.get_mut(&seq).ok_or(KvError::Unknown(seq))
    }

    /// Tokens that `seq` has room for.
    pub fn capacity(&self, seq: SeqId) -> Result<u32, KvError> {
        Ok(self.sequence(seq)?.table.len() as u32 * self.block_tokens)
    }

    fn within(&self, seq: SeqId, layers: &Range<usize>, tokens: &Range<u32>) -> Result<(), KvError> {
        let capacity = self.capacity(seq)?;
        if tokens.start > tokens.end || tokens.end > capacity {
            return Err(range_error("tokens", tokens, &(0..capacity)));
        }
        if layers.start > layers.end || layers.end > self.layers {
            let (start, end) = (layers.start as u64, layers.end as u64);
            let limit_end = self.layers as u64;
            return Err(KvError::Range { what: "layer", start, end, limit_start: 0, limit_end });
        }
        Ok(())
    }

    fn blocks_of(&self, seq: SeqId, tokens: &Range<u32>) -> Result<&[u32], KvError> {
        if tokens.is_empty() {
            return Ok(&[]);
        }
        let (first, last) = (tokens.start / self.block_tokens, tokens.end.div_ceil(self.block_tokens));
        Ok(&self.sequence(seq)?.table[first as usize..last as usize])
    }

    /// Errors when a lease of the given kind overlaps `tokens` of `layers`.
    fn unleased(
        &self,
        seq: SeqId,
        layers: &Range<usize>,
        tokens: &Range<u32>,
        kind: impl Fn(&Block) -> &Vec<LeaseId>,
    ) -> Result<(), KvError> {
        self.within(seq, layers, tokens)?;
        let blocks = self.blocks_of(seq, tokens)?;
        let meets = |lease: &LeaseId| {
            self.leases.get(lease).is_some_and(|lease| {
                let apart = lease.tokens.end <= tokens.start || tokens.end <= lease.tokens.start;
                let elsewhere = lease.layers.end <= layers.start || layers.end <= lease.layers.start;
                !apart && !elsewhere
            })
        };
        match blocks.iter().flat_map(|block| kind(&self.blocks[*block as usize])).any(meets) {
            true => Err(KvError::Leased { seq, start: tokens.start, end: tokens.end }),
            false => Ok(()),
        }
    }
}

fn range_error(what: &'static str, asked: &Range<u32>, held: &Range<u32>) -> KvError {
    KvError::Range {
        what,
        start: asked.start.into(),
        end: asked.end.into(),
        limit_start: held.start.into(),
        limit_end: held.end.into(),
    }
}

#[cfg(test)]
mod tests;
