//! A cache of an 8B model's shape in one piece of memory, whose blocks lie scattered: what is sent and what is landed in. Every
//! byte follows from its place, so that what has come can be looked at.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use backend::{DType, KvError, KvExport, KvLanding, KvSpec, Piece};

const LAYERS: usize = 32;
const HEADS: usize = 8;
const HEAD_BYTES: usize = 256;
const PAGE_BYTES: usize = 4096;

/// Bytes of one token: 32 layers x 2 planes x 8 heads x 128 bf16.
pub const TOKEN_BYTES: usize = LAYERS * 2 * HEADS * HEAD_BYTES;

/// Each rank's part of the cache: as equal ranges of heads.
pub fn specs(ranks: usize) -> Vec<KvSpec> {
    let heads = |rank| rank * HEADS / ranks..(rank + 1) * HEADS / ranks;
    (0..ranks).map(|rank| KvSpec::gqa(LAYERS, HEADS, heads(rank), 128, DType::BF16)).collect()
}

/// Memory in pages that are there, and blocks in it.
pub struct Cache {
    spec: KvSpec,
    tokens: u32,
    /// Tokens of a block of one plane of one layer.
    block_tokens: usize,
    bytes: Vec<u8>,
    /// Where the first block begins: at a page, as the peers' do.
    base: usize,
    /// Where each block of `[layer][plane][block]` lies.
    slots: Vec<u32>,
}

impl Cache {
    /// `block_bytes`: of one plane of one layer, with all its heads. The seed says how the blocks lie.
    pub fn new(spec: &KvSpec, tokens: u32, block_bytes: usize, seed: u64) -> Self {
        let row = spec.planes[0].token_bytes();
        let block_tokens = block_bytes / (HEADS * HEAD_BYTES);
        let blocks = LAYERS * 2 * (tokens as usize).div_ceil(block_tokens);
        let mut slots: Vec<u32> = (0..blocks as u32).collect();
        let mut state = seed | 1;
        for at in (1..blocks).rev() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            slots.swap(at, (state >> 33) as usize % (at + 1));
        }
        let bytes = vec![0; blocks * block_tokens * row + PAGE_BYTES];
        let base = bytes.as_ptr().align_offset(PAGE_BYTES);
        let mut cache = Cache { spec: spec.clone(), tokens, block_tokens, bytes, base, slots };
        cache.wipe();
        cache
    }

    /// Overwrites everything, so that nothing of an earlier run is taken for new; the pages are there afterwards.
    pub fn wipe(&mut self) {
        self.bytes.fill(0xff);
    }

    pub fn fill(&mut self, seed: u64) {
        self.each(|bytes, first| {
            for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&pattern(seed, first + at as u64).to_le_bytes());
            }
        });
    }

    pub fn is(&mut self, seed: u64) -> bool {
        let mut right = true;
        self.each(|bytes, first| {
            let words = bytes.chunks_exact(8).enumerate();
            right &= words.fold(true, |right, (at, word)| {
                right & (word == pattern(seed, first + at as u64).to_le_bytes())
            });
        });
        right
    }

    /// Every head of every token, with the number of its first word in the whole model.
    fn each(&mut self, mut visit: impl FnMut(&mut [u8], u64)) {
        let heads = self.spec.planes[0].heads();
        for layer in 0..LAYERS {
            for plane in 0..2 {
                for token in 0..self.tokens {
                    let place = self.place(layer, plane, token);
                    for (index, head) in heads.clone().enumerate() {
                        let row = (layer * 2 + plane) as u64 * u64::from(self.tokens) + u64::from(token);
                        let first = (row * HEADS as u64 + head as u64) * (HEAD_BYTES / 8) as u64;
                        visit(&mut self.bytes[place + index * HEAD_BYTES..][..HEAD_BYTES], first);
                    }
                }
            }
        }
    }

    fn row(&self) -> usize {
        self.spec.planes[0].token_bytes()
    }

    fn place(&self, layer: usize, plane: usize, token: u32) -> usize {
        let (block, row) = (token as usize / self.block_tokens, token as usize % self.block_tokens);
        let blocks = (self.tokens as usize).div_ceil(self.block_tokens);
        let slot = self.slots[(layer * 2 + plane) * blocks + block] as usize;
        self.base + (slot * self.block_tokens + row) * self.row()
    }

    /// Where whole rows of a piece lie: (start, bytes), block by block.
    fn runs(&self, piece: &Piece) -> Vec<(usize, usize)> {
        let mut runs = Vec::new();
        let mut token = piece.tokens.start;
        while token < piece.tokens.end {
            let end =
                ((token as usize / self.block_tokens + 1) * self.block_tokens).min(piece.tokens.end as usize);
            runs.push((self.place(piece.layer, piece.plane, token), (end - token as usize) * self.row()));
            token = end as u32;
        }
        runs
    }

    fn whole(&self, piece: &Piece) -> bool {
        piece.heads == self.spec.planes[piece.plane].heads()
    }
}

fn pattern(seed: u64, at: u64) -> u64 {
    (at ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A lease on some tokens of one layer.
pub struct Lease {
    pub cache: Arc<Cache>,
    pub layer: usize,
    pub tokens: Range<u32>,
}

impl KvExport for Lease {
    fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.layer..self.layer + 1
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        let skip = (piece.heads.start - self.cache.spec.planes[piece.plane].heads().start) * HEAD_BYTES;
        let bytes = piece.heads.len() * HEAD_BYTES;
        for token in piece.tokens.clone() {
            let place = self.cache.place(piece.layer, piece.plane, token) + skip;
            out.extend_from_slice(&self.cache.bytes[place..place + bytes]);
        }
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        let slice = |(start, bytes): (usize, usize)| IoSlice::new(&self.cache.bytes[start..start + bytes]);
        self.cache.whole(piece).then(|| self.cache.runs(piece).into_iter().map(slice).collect())
    }
}

/// Exports of some tokens of all layers, in order.
pub fn leases(cache: &Arc<Cache>, tokens: Range<u32>) -> impl ExactSizeIterator<Item = Lease> {
    (0..LAYERS).map(move |layer| Lease { cache: cache.clone(), layer, tokens: tokens.clone() })
}

/// A cache to be filled.
pub struct Landing(pub Cache);

impl KvLanding for Landing {
    fn tokens(&self) -> Range<u32> {
        0..self.0.tokens
    }

    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        let mut rest = bytes;
        for (start, count) in self.0.runs(piece) {
            let (now, later) = rest.split_at(count);
            self.0.bytes[start..start + count].copy_from_slice(now);
            rest = later;
        }
        Ok(())
    }

    fn slices(&mut self, piece: &Piece) -> Option<Vec<IoSliceMut<'_>>> {
        if !self.0.whole(piece) {
            return None;
        }
        let base = self.0.bytes.as_mut_ptr();
        // SAFETY: runs lie in different blocks, or one behind another in one: no two share a byte; they borrow self.
        let slice = |(start, bytes): (usize, usize)| unsafe {
            IoSliceMut::new(std::slice::from_raw_parts_mut(base.add(start), bytes))
        };
        Some(self.0.runs(piece).into_iter().map(slice).collect())
    }
}
