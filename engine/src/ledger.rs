//! The leader's book of KV blocks: which sequences and transfers hold each block of every rank's store. Stores carry
//! out the same operations in the same order, so a block that is free here is free on every rank; a block under a
//! transfer is given back only when all ranks have said that they let go of it. Pure: no memory is touched.

use std::collections::HashMap;
use std::ops::Range;

use backend::{Fork, KvError, SeqId};

use crate::request::Blocks;

/// A transfer that keeps blocks: a landing or a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// Who a sequence's blocks count for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// Held by the prefix cache.
    Cached,
    /// Waits for its KV to land.
    Reserved,
    /// Computed or generated.
    Running,
}

/// Blocks by holder.
#[derive(Debug)]
pub struct Ledger {
    block_tokens: u32,
    /// Forked prefixes are the same blocks, not copies.
    shares: bool,
    blocks: Vec<Block>,
    free: Vec<u32>,
    sequences: HashMap<SeqId, Vec<u32>>,
    leases: HashMap<LeaseId, Vec<u32>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    sequences: u32,
    leases: u32,
}

impl Ledger {
    /// A book of `total` free blocks. `shares`: forks share blocks instead of copying.
    pub fn new(total: u32, block_tokens: u32, shares: bool) -> Self {
        Ledger {
            block_tokens,
            shares,
            blocks: vec![Block::default(); total as usize],
            free: (0..total).rev().collect(),
            sequences: HashMap::new(),
            leases: HashMap::new(),
        }
    }

    /// Blocks that hold `tokens`.
    pub fn blocks_of(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// Free blocks.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// All blocks.
    pub fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks that sequences hold, shared ones once.
    pub fn held(&self) -> u32 {
        self.blocks.iter().filter(|b| b.sequences > 0).count() as u32
    }

    /// Tokens that `seq` has room for; 0 when it is unknown.
    pub fn capacity(&self, seq: SeqId) -> u32 {
        self.sequences.get(&seq).map_or(0, |blocks| blocks.len() as u32 * self.block_tokens)
    }

    /// As [`backend::KvStore::open`].
    pub fn open(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        if self.sequences.contains_key(&seq) {
            return Err(KvError::Exists(seq));
        }
        let blocks = self.take(self.blocks_of(tokens))?;
        self.sequences.insert(seq, blocks);
        Ok(())
    }

    /// As [`backend::KvStore::grow`].
    pub fn grow(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        let held = self.sequences.get(&seq).ok_or(KvError::Unknown(seq))?.len() as u32;
        let more = self.take(self.blocks_of(tokens).saturating_sub(held))?;
        self.sequences.entry(seq).or_default().extend(more);
        Ok(())
    }

    /// As [`backend::KvStore::fork`].
    pub fn fork(&mut self, from: SeqId, to: SeqId, tokens: u32, mode: Fork) -> Result<(), KvError> {
        if self.sequences.contains_key(&to) {
            return Err(KvError::Exists(to));
        }
        let count = self.blocks_of(tokens) as usize;
        let held = self.sequences.get(&from).ok_or(KvError::Unknown(from))?;
        let blocks = held.get(..count).map(<[u32]>::to_vec).ok_or(KvError::Range {
            what: "tokens",
            start: 0,
            end: u64::from(tokens),
            limit_start: 0,
            limit_end: held.len() as u64 * u64::from(self.block_tokens),
        })?;
        let blocks = if mode == Fork::Move {
            self.truncate(from, tokens)?;
            self.sequences.remove(&from);
            blocks
        } else if self.shares {
            for &block in &blocks {
                self.blocks[block as usize].sequences += 1;
            }
            blocks
        } else {
            self.take(count as u32)?
        };
        self.sequences.insert(to, blocks);
        Ok(())
    }

    /// As [`backend::KvStore::truncate`].
    pub fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<(), KvError> {
        let keep = self.blocks_of(tokens) as usize;
        let held = self.sequences.get_mut(&seq).ok_or(KvError::Unknown(seq))?;
        let tail = held.split_off(keep.min(held.len()));
        self.release(&tail);
        Ok(())
    }

    /// As [`backend::KvStore::close`].
    pub fn close(&mut self, seq: SeqId) -> Result<(), KvError> {
        let held = self.sequences.remove(&seq).ok_or(KvError::Unknown(seq))?;
        self.release(&held);
        Ok(())
    }

    /// Notes that transfer `lease` holds the blocks of `tokens` of `seq` on every rank.
    pub fn lease(&mut self, lease: LeaseId, seq: SeqId, tokens: Range<u32>) -> Result<(), KvError> {
        let held = self.sequences.get(&seq).ok_or(KvError::Unknown(seq))?;
        let blocks = (tokens.start / self.block_tokens) as usize..self.blocks_of(tokens.end) as usize;
        let blocks = held.get(blocks).map(<[u32]>::to_vec).ok_or(KvError::Range {
            what: "tokens",
            start: u64::from(tokens.start),
            end: u64::from(tokens.end),
            limit_start: 0,
            limit_end: held.len() as u64 * u64::from(self.block_tokens),
        })?;
        for &block in &blocks {
            self.blocks[block as usize].leases += 1;
        }
        self.leases.entry(lease).or_default().extend(blocks);
        Ok(())
    }

    /// Notes that every rank has let go of what `lease` held.
    pub fn unlease(&mut self, lease: LeaseId) {
        for block in self.leases.remove(&lease).unwrap_or_default() {
            let entry = &mut self.blocks[block as usize];
            entry.leases -= 1;
            if entry.sequences == 0 && entry.leases == 0 {
                self.free.push(block);
            }
        }
    }

    /// Whether a transfer holds a block of `seq`.
    pub fn leased(&self, seq: SeqId) -> bool {
        let held = self.sequences.get(&seq).map(Vec::as_slice).unwrap_or_default();
        held.iter().any(|&block| self.blocks[block as usize].leases > 0)
    }

    /// Blocks that would become free if the sequences that `closing` names were closed, but for those of `except`.
    pub fn freeable(&self, closing: impl Fn(SeqId) -> bool, except: Option<(SeqId, u32)>) -> u32 {
        let mut holders = vec![0; self.blocks.len()];
        for (&seq, held) in self.sequences.iter().filter(|(seq, _)| closing(**seq)) {
            let spared = except.filter(|e| e.0 == seq).map_or(0, |e| self.blocks_of(e.1));
            for &block in held.iter().skip(spared as usize) {
                holders[block as usize] += 1;
            }
        }
        let freed = |(block, &closed): (&Block, &u32)| {
            block.sequences > 0 && block.sequences == closed && block.leases == 0
        };
        self.blocks.iter().zip(&holders).filter(|pair| freed(*pair)).count() as u32
    }

    /// How many leading blocks of `seq` may stay so that cutting off the others frees `wanted`; 0 when all must go.
    pub fn keep_to_free(&self, seq: SeqId, wanted: u32) -> u32 {
        let held = self.sequences.get(&seq).map(Vec::as_slice).unwrap_or_default();
        let mut freed = 0;
        for (keep, &block) in held.iter().enumerate().rev() {
            let block = self.blocks[block as usize];
            freed += u32::from(block.sequences == 1 && block.leases == 0);
            if freed >= wanted {
                return keep as u32;
            }
        }
        0
    }

    /// Blocks by owner. A block that several sequences share counts for the greatest [`Owner`] of them.
    pub fn count(&self, owner: impl Fn(SeqId) -> Owner) -> Blocks {
        let mut owners: Vec<Option<Owner>> = vec![None; self.blocks.len()];
        for (&seq, held) in &self.sequences {
            let owner = Some(owner(seq));
            for &block in held {
                let entry = &mut owners[block as usize];
                *entry = owner.max(*entry);
            }
        }
        let number = |wanted| owners.iter().filter(|o| **o == wanted).count() as u32;
        Blocks {
            block_tokens: self.block_tokens,
            total: self.total(),
            free: self.free(),
            used: number(Some(Owner::Running)),
            cached: number(Some(Owner::Cached)),
            reserved: number(Some(Owner::Reserved)),
            quarantined: self.blocks.iter().filter(|b| b.sequences == 0 && b.leases > 0).count() as u32,
            audit_errors: 0,
        }
    }

    fn take(&mut self, count: u32) -> Result<Vec<u32>, KvError> {
        let Some(start) = self.free.len().checked_sub(count as usize) else {
            return Err(KvError::Full { wanted_blocks: count, free_blocks: self.free() });
        };
        let blocks = self.free.split_off(start);
        for &block in &blocks {
            self.blocks[block as usize].sequences = 1;
        }
        Ok(blocks)
    }

    fn release(&mut self, blocks: &[u32]) {
        for &block in blocks {
            let entry = &mut self.blocks[block as usize];
            entry.sequences -= 1;
            if entry.sequences == 0 && entry.leases == 0 {
                self.free.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: SeqId = SeqId(1);
    const B: SeqId = SeqId(2);

    #[test]
    fn shared_blocks_count_once_and_live_as_long_as_a_holder() {
        let mut ledger = Ledger::new(8, 4, true);
        ledger.open(A, 12).unwrap();
        ledger.fork(A, B, 8, Fork::Share).unwrap();
        ledger.grow(B, 13).unwrap();
        assert_eq!(ledger.free(), 3);
        let counted = ledger.count(|seq| if seq == A { Owner::Cached } else { Owner::Running });
        assert_eq!((counted.used, counted.cached, counted.free), (4, 1, 3));
        ledger.close(A).unwrap();
        assert_eq!(ledger.free(), 4);
        ledger.close(B).unwrap();
        assert_eq!(ledger.free(), 8);
    }

    #[test]
    fn freeable_blocks_are_those_that_nobody_else_holds() {
        let mut ledger = Ledger::new(8, 4, true);
        ledger.open(A, 16).unwrap();
        ledger.fork(A, B, 4, Fork::Share).unwrap();
        ledger.lease(LeaseId(1), A, 12..16).unwrap();
        // A: [shared with B] [own] [own] [leased]
        assert_eq!(ledger.freeable(|seq| seq == A, None), 2);
        assert_eq!(ledger.freeable(|seq| seq == A, Some((A, 8))), 1);
        assert_eq!(ledger.freeable(|_| true, None), 3);
        assert_eq!(
            (ledger.keep_to_free(A, 1), ledger.keep_to_free(A, 2), ledger.keep_to_free(A, 3)),
            (2, 1, 0)
        );
    }

    #[test]
    fn copies_take_their_own_blocks() {
        let mut ledger = Ledger::new(4, 4, false);
        ledger.open(A, 8).unwrap();
        ledger.fork(A, B, 8, Fork::Share).unwrap();
        assert_eq!(ledger.free(), 0);
    }

    #[test]
    fn a_move_takes_none() {
        let mut ledger = Ledger::new(4, 4, false);
        ledger.open(A, 12).unwrap();
        ledger.fork(A, B, 8, Fork::Move).unwrap();
        assert_eq!((ledger.free(), ledger.capacity(A), ledger.capacity(B)), (2, 0, 8));
    }

    #[test]
    fn a_closed_block_under_a_lease_is_quarantined() {
        let mut ledger = Ledger::new(4, 4, true);
        ledger.open(A, 9).unwrap();
        ledger.lease(LeaseId(7), A, 4..6).unwrap();
        assert!(ledger.leased(A));
        ledger.close(A).unwrap();
        assert_eq!(ledger.free(), 3);
        assert_eq!(ledger.count(|_| Owner::Running).quarantined, 1);
        ledger.unlease(LeaseId(7));
        assert_eq!(ledger.free(), 4);
    }

    #[test]
    fn a_full_book_changes_nothing() {
        let mut ledger = Ledger::new(2, 4, true);
        ledger.open(A, 4).unwrap();
        assert_eq!(ledger.grow(A, 13), Err(KvError::Full { wanted_blocks: 3, free_blocks: 1 }));
        assert_eq!((ledger.free(), ledger.capacity(A)), (1, 4));
    }

    proptest! {
        // Whatever is done, every block has exactly one state.
        #[test]
        fn the_sum_is_the_total(ops in prop::collection::vec((0u8..7, 0u64..5, 0u64..5, 0u32..40), 0..60)) {
            let mut ledger = Ledger::new(16, 4, true);
            for (op, a, b, tokens) in ops {
                let (from, to) = (SeqId(a), SeqId(b));
                let _ = match op {
                    0 => ledger.open(from, tokens),
                    1 => ledger.grow(from, tokens),
                    2 => ledger.fork(from, to, tokens, if b.is_multiple_of(2) { Fork::Share } else { Fork::Move }),
                    3 => ledger.truncate(from, tokens),
                    4 => ledger.close(from),
                    5 => ledger.lease(LeaseId(b), from, tokens / 2..tokens),
                    _ => { ledger.unlease(LeaseId(b)); Ok(()) }
                };
                let c = ledger.count(|seq| if seq.0 < 2 { Owner::Running } else { Owner::Cached });
                prop_assert_eq!(c.free + c.used + c.cached + c.reserved + c.quarantined, c.total);
                prop_assert_eq!(ledger.held(), c.used + c.cached);
            }
        }
    }
}
