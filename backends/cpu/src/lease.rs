//! Leases on the CPU store: raw memory kept alive by an `Arc`, read or written on other threads.
//!
//! Why that is sound: [`Pages`](backend::paged::Pages) grants a read lease on finished positions only and then refuses
//! every write to them (steps ask before they write, landings before they are made) until the lease is reported ended;
//! and it grants a write lease only where nobody else has any, and then refuses steps and other leases those positions.
//! Blocks under a lease are not handed out again. So for every position of a layer there are, at any time, either only
//! readers or one writer. A lease reports its end when it is dropped, after its last access.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use backend::paged::LeaseId;
use backend::{KvError, KvExport, KvLanding, Piece, SeqId};

use crate::kv::Slab;

/// What both kinds of lease hold.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) slab: Arc<Slab>,
    pub(crate) lease: LeaseId,
    /// Where the end is reported; `None` once the store has taken the lease back.
    pub(crate) ended: Option<Arc<Mutex<Vec<LeaseId>>>>,
    /// The first holds the first token.
    pub(crate) blocks: Vec<u32>,
    pub(crate) layers: Range<usize>,
    pub(crate) tokens: Range<u32>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(ended) = &self.ended {
            ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self.lease);
        }
    }
}

/// Consecutive tokens of one block.
struct Run {
    at: *mut u8,
    tokens: usize,
}

impl Hold {
    /// The bytes that `piece` takes; errors when it is not within the lease.
    fn check(&self, piece: &Piece) -> Result<usize, KvError> {
        let planes = &self.slab.spec.planes;
        within("layer", piece.layer..piece.layer + 1, &self.layers)?;
        within("plane", piece.plane..piece.plane + 1, &(0..planes.len()))?;
        let plane = &planes[piece.plane];
        within("heads", piece.heads.clone(), &plane.heads())?;
        let tokens = piece.tokens.start as usize..piece.tokens.end as usize;
        within("tokens", tokens, &(self.tokens.start as usize..self.tokens.end as usize))?;
        Ok(piece.tokens.len() * piece.heads.len() * plane.head_bytes())
    }

    /// The places of the piece's tokens (all heads), block by block; neighbouring blocks are one run.
    fn runs(&self, piece: &Piece) -> Vec<Run> {
        let (block_tokens, row) = (self.slab.block_tokens, self.slab.spec.planes[piece.plane].token_bytes());
        let first_block = self.tokens.start / block_tokens;
        let mut runs: Vec<Run> = Vec::new();
        let mut token = piece.tokens.start;
        while token < piece.tokens.end {
            let end = (token / block_tokens + 1).saturating_mul(block_tokens).min(piece.tokens.end);
            let block = self.blocks[(token / block_tokens - first_block) as usize];
            let at = self.slab.token(piece.layer, piece.plane, block, token % block_tokens);
            let tokens = (end - token) as usize;
            match runs.last_mut() {
                Some(last) if last.at.wrapping_add(last.tokens * row) == at => last.tokens += tokens,
                _ => runs.push(Run { at, tokens }),
            }
            token = end;
        }
        runs
    }

    fn whole_heads(&self, piece: &Piece) -> bool {
        piece.heads == self.slab.spec.planes[piece.plane].heads()
    }

    /// The places of the piece's bytes, token by token, as `(address, bytes)` in wire order.
    fn parts(&self, piece: &Piece) -> impl Iterator<Item = (*mut u8, usize)> {
        let plane = &self.slab.spec.planes[piece.plane];
        let (row, head) = (plane.token_bytes(), plane.head_bytes());
        let skip = (piece.heads.start - plane.heads().start) * head;
        let bytes = piece.heads.len() * head;
        let whole = self.whole_heads(piece);
        self.runs(piece).into_iter().flat_map(move |run| {
            // Whole rows lie together; parts of rows are one per token.
            let (count, bytes) = if whole { (1, run.tokens * row) } else { (run.tokens, bytes) };
            (0..count).map(move |token| (run.at.wrapping_add(token * row + skip), bytes))
        })
    }
}

fn within(what: &'static str, asked: Range<usize>, held: &Range<usize>) -> Result<(), KvError> {
    if asked.start <= asked.end && asked.start >= held.start && asked.end <= held.end {
        return Ok(());
    }
    let (start, end) = (asked.start as u64, asked.end as u64);
    Err(KvError::Range { what, start, end, limit_start: held.start as u64, limit_end: held.end as u64 })
}

/// A read lease.
#[derive(Debug)]
pub struct CpuExport {
    pub(crate) hold: Hold,
}

impl KvExport for CpuExport {
    fn tokens(&self) -> Range<u32> {
        self.hold.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.hold.layers.clone()
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        out.reserve(self.hold.check(piece)?);
        for (at, bytes) in self.hold.parts(piece) {
            // SAFETY: finished positions of the lease, which nobody writes while it lives.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(at, bytes) });
        }
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        self.hold.check(piece).ok()?;
        if !self.hold.whole_heads(piece) {
            return None;
        }
        let parts = self.hold.parts(piece);
        // SAFETY: as in read; the slices live no longer than the lease.
        Some(
            parts.map(|(at, bytes)| IoSlice::new(unsafe { std::slice::from_raw_parts(at, bytes) })).collect(),
        )
    }
}

/// A write lease.
#[derive(Debug)]
pub struct CpuLanding {
    pub(crate) seq: SeqId,
    pub(crate) hold: Hold,
}

impl KvLanding for CpuLanding {
    fn tokens(&self) -> Range<u32> {
        self.hold.tokens.clone()
    }

    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        let want = self.hold.check(piece)?;
        if bytes.len() != want {
            return Err(KvError::Length { got: bytes.len(), want });
        }
        let mut rest = bytes;
        for (at, count) in self.hold.parts(piece) {
            let (now, later) = rest.split_at(count);
            // SAFETY: positions of the lease, which nobody else touches while it lives.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), at, count) };
            rest = later;
        }
        Ok(())
    }

    fn slices(&mut self, piece: &Piece) -> Option<Vec<IoSliceMut<'_>>> {
        self.hold.check(piece).ok()?;
        if !self.hold.whole_heads(piece) {
            return None;
        }
        let parts = self.hold.parts(piece);
        // SAFETY: as in write; the parts are disjoint, and the borrow of self makes them the only slices.
        Some(
            parts
                .map(|(at, bytes)| IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(at, bytes) }))
                .collect(),
        )
    }
}
