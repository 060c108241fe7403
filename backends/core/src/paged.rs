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
    leases: Vec<LeaseId>,
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
        self.unleased(seq, layers, &tokens, |_| true)?;
        let shared = |block: &u32| self.blocks[*block as usize].sequences > 1;
        match self.blocks_of(seq, &tokens)?.iter().any(shared) {
            true => Err(KvError::Shared { seq, start: tokens.start, end: tokens.end }),
            false => Ok(()),
        }
    }

    /// Errors when another holder may be writing `tokens` of `layers`.
    pub fn readable(&self, seq: SeqId, layers: Range<usize>, tokens: Range<u32>) -> Result<(), KvError> {
        self.unleased(seq, layers, &tokens, |lease| lease.access == Access::Write)
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
            self.blocks[*block as usize].leases.push(id);
        }
        self.leases.insert(id, Lease { seq: Some(seq), layers, tokens, access, blocks });
        Ok(id)
    }

    /// The blocks under a lease; the first holds its first token.
    pub fn leased_blocks(&self, lease: LeaseId) -> &[u32] {
        self.leases.get(&lease).map_or(&[], |lease| &lease.blocks)
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
            block.leases.retain(|held| *held != lease);
            if block.sequences == 0 && block.leases.is_empty() {
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
                if block.leases.is_empty() {
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

    fn unleased(
        &self,
        seq: SeqId,
        layers: Range<usize>,
        tokens: &Range<u32>,
        counts: impl Fn(&Lease) -> bool,
    ) -> Result<(), KvError> {
        self.within(seq, &layers, tokens)?;
        for block in self.blocks_of(seq, tokens)? {
            for lease in &self.blocks[*block as usize].leases {
                let lease = &self.leases[lease];
                let apart = lease.tokens.end <= tokens.start || tokens.end <= lease.tokens.start;
                let elsewhere = lease.layers.end <= layers.start || layers.end <= lease.layers.start;
                if !apart && !elsewhere && counts(lease) {
                    return Err(KvError::Leased { seq, start: tokens.start, end: tokens.end });
                }
            }
        }
        Ok(())
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
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const A: SeqId = SeqId(1);
    const B: SeqId = SeqId(2);

    fn usage(free: u32, used: u32, quarantined: u32) -> KvUsage {
        KvUsage { total: free + used + quarantined, free, used, quarantined }
    }

    /// A block that a sender still reads is not handed out again until the lease ends.
    #[test]
    fn leased_blocks_of_a_closed_sequence_are_quarantined() {
        let mut pages = Pages::new(1, 2, 4);
        pages.open(A, 8).unwrap();
        pages.fill(A, 0..1, 0..8).unwrap();
        let lease = pages.lease(A, 0..1, 2..4, Access::Read).unwrap();
        pages.close(A).unwrap();
        assert_eq!(pages.usage(), usage(1, 0, 1));
        assert_eq!(pages.open(B, 8), Err(KvError::Full { wanted_blocks: 2, free_blocks: 1 }));
        pages.release(lease);
        assert_eq!(pages.usage(), usage(2, 0, 0));
        pages.open(B, 8).unwrap();
    }

    /// What a reader was promised is not rewritten; positions after it are.
    #[test]
    fn leased_positions_are_not_writable() {
        let mut pages = Pages::new(2, 2, 4);
        pages.open(A, 8).unwrap();
        pages.fill(A, 0..2, 0..3).unwrap();
        let lease = pages.lease(A, 0..1, 0..3, Access::Read).unwrap();
        assert_eq!(pages.writable(A, 0..1, 2..4), Err(KvError::Leased { seq: A, start: 2, end: 4 }));
        pages.writable(A, 1..2, 2..4).unwrap();
        pages.writable(A, 0..1, 3..8).unwrap();
        pages.release(lease);
        pages.writable(A, 0..1, 2..4).unwrap();
    }

    /// A landing is alone on its positions, is lost when its sequence closes, and finishes them when committed.
    #[test]
    fn write_leases_are_exclusive() {
        let mut pages = Pages::new(1, 2, 4);
        pages.open(A, 8).unwrap();
        let lease = pages.lease(A, 0..1, 1..6, Access::Write).unwrap();
        assert_eq!(pages.readable(A, 0..1, 0..2), Err(KvError::Leased { seq: A, start: 0, end: 2 }));
        pages.lease(A, 0..1, 5..8, Access::Write).unwrap_err();
        pages.fork(A, B, 4, Fork::Share).unwrap_err();
        pages.commit(lease, A).unwrap();
        pages.filled(A, 0..1, 1..6).unwrap();
        assert_eq!(
            pages.filled(A, 0..1, 1..7),
            Err(KvError::Range { what: "tokens", start: 1, end: 7, limit_start: 1, limit_end: 6 })
        );
        let lease = pages.lease(A, 0..1, 1..6, Access::Write).unwrap();
        pages.close(A).unwrap();
        pages.open(A, 0).unwrap();
        assert_eq!(pages.commit(lease, A), Err(KvError::Unknown(A)));
        assert_eq!(pages.usage(), usage(2, 0, 0));
    }

    /// Shared prefixes are counted once and are read-only for both.
    #[test]
    fn forks_share_whole_blocks() {
        let mut pages = Pages::new(1, 4, 4);
        pages.open(A, 12).unwrap();
        pages.fill(A, 0..1, 0..9).unwrap();
        pages.fork(A, B, 6, Fork::Share).unwrap_err();
        pages.fork(A, B, 8, Fork::Share).unwrap();
        assert_eq!(pages.usage(), usage(1, 3, 0));
        assert_eq!(pages.table(B).unwrap(), &pages.table(A).unwrap()[..2]);
        pages.filled(B, 0..1, 0..8).unwrap();
        assert_eq!(pages.writable(A, 0..1, 7..9), Err(KvError::Shared { seq: A, start: 7, end: 9 }));
        pages.writable(A, 0..1, 8..12).unwrap();
        pages.close(A).unwrap();
        assert_eq!(pages.usage(), usage(2, 2, 0));
        pages.writable(B, 0..1, 0..8).unwrap();
    }

    #[derive(Clone, Debug)]
    enum Op {
        Open(u64, u32),
        Grow(u64, u32),
        Fork(u64, u64, u32, bool),
        Truncate(u64, u32),
        Close(u64),
        Fill(u64, u32),
        Lease(u64, u32, u32, bool),
        Release(usize),
        Commit(usize, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let (seq, tokens) = (|| 0u64..4, || 0u32..40);
        prop_oneof![
            (seq(), tokens()).prop_map(|(s, t)| Op::Open(s, t)),
            (seq(), tokens()).prop_map(|(s, t)| Op::Grow(s, t)),
            (seq(), seq(), 0u32..6, any::<bool>()).prop_map(|(a, b, n, m)| Op::Fork(a, b, n * 4, m)),
            (seq(), tokens()).prop_map(|(s, t)| Op::Truncate(s, t)),
            seq().prop_map(Op::Close),
            (seq(), tokens()).prop_map(|(s, t)| Op::Fill(s, t)),
            (seq(), tokens(), tokens(), any::<bool>()).prop_map(|(s, a, b, w)| Op::Lease(
                s,
                a.min(b),
                a.max(b),
                w
            )),
            (0usize..8).prop_map(Op::Release),
            ((0usize..8), seq()).prop_map(|(l, s)| Op::Commit(l, s)),
        ]
    }

    proptest! {
        /// Whatever is done in whatever order: blocks are never lost, never in two hands unless shared, and never
        /// handed out while leased.
        #[test]
        fn blocks_are_conserved(ops in prop::collection::vec(op(), 1..80)) {
            let mut pages = Pages::new(2, 12, 4);
            let mut leases: Vec<(LeaseId, Vec<u32>)> = Vec::new();
            for op in ops {
                let before: HashSet<u32> = pages.sequences.values().flat_map(|s| s.table.clone()).collect();
                let leased: HashSet<u32> = leases.iter().flat_map(|(_, blocks)| blocks.clone()).collect();
                let was = pages.usage();
                let failed = match op.clone() {
                    Op::Open(s, t) => pages.open(SeqId(s), t).is_err(),
                    Op::Grow(s, t) => pages.grow(SeqId(s), t).is_err(),
                    Op::Fork(a, b, t, m) => {
                        pages.fork(SeqId(a), SeqId(b), t, if m { Fork::Move } else { Fork::Share }).is_err()
                    }
                    Op::Truncate(s, t) => pages.truncate(SeqId(s), t).is_err(),
                    Op::Close(s) => pages.close(SeqId(s)).is_err(),
                    Op::Fill(s, t) => pages.fill(SeqId(s), 0..2, 0..t).is_err(),
                    Op::Lease(s, a, b, w) => {
                        let access = if w { Access::Write } else { Access::Read };
                        match pages.lease(SeqId(s), 0..2, a..b, access) {
                            Ok(id) => { leases.push((id, pages.leased_blocks(id).to_vec())); false }
                            Err(_) => true,
                        }
                    }
                    Op::Release(i) if i < leases.len() => { pages.release(leases.remove(i).0); false }
                    Op::Commit(i, s) if i < leases.len() => {
                        let _ = pages.commit(leases.remove(i).0, SeqId(s));
                        false
                    }
                    Op::Release(_) | Op::Commit(..) => true,
                };
                let now = pages.usage();
                prop_assert_eq!(now.total, now.free + now.used + now.quarantined);
                if failed {
                    prop_assert_eq!(now, was, "{:?} failed and changed something", op);
                }
                let held: HashSet<u32> = pages.sequences.values().flat_map(|s| s.table.clone()).collect();
                prop_assert_eq!(held.len() as u32, now.used);
                for fresh in held.difference(&before) {
                    prop_assert!(!leased.contains(fresh), "block {} handed out under a lease", fresh);
                }
                let free: HashSet<u32> = pages.free.iter().copied().collect();
                prop_assert_eq!(free.len(), pages.free.len());
                prop_assert!(free.is_disjoint(&held));
                for (index, block) in pages.blocks.iter().enumerate() {
                    let owners = pages.sequences.values().flat_map(|s| &s.table).filter(|b| **b == index as u32);
                    prop_assert_eq!(owners.count() as u32, block.sequences);
                    if !block.leases.is_empty() {
                        prop_assert!(!free.contains(&(index as u32)));
                    }
                }
            }
            for seq in 0..4 {
                let _ = pages.close(SeqId(seq));
            }
            for (lease, _) in leases {
                pages.release(lease);
            }
            prop_assert_eq!(pages.usage(), KvUsage { total: 12, free: 12, used: 0, quarantined: 0 });
        }
    }
}
