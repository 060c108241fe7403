//! A cache in plain memory with leases on it, whose every byte is a function of its place: what the tests send and land.
#![allow(dead_code)] // each test binary uses its share

pub mod net;
pub mod sim;

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backend::{DType, KvError, KvExport, KvLanding, KvSpec, Piece, Plane, Sharding};
use kvtransfer::{Close, Expect, Peers, PushSpec, Sender, SessionId, TargetSpec, Ticket};

/// Blocks of `block_tokens` per layer and plane: `[token][head of this rank][dim]`.
#[derive(Clone)]
pub struct Cache {
    pub spec: KvSpec,
    pub tokens: Range<u32>,
    block_tokens: u32,
    blocks: Vec<Vec<u8>>,
}

/// The bytes of one head of one token, anywhere in the model.
fn truth(layer: usize, plane: usize, head: usize, token: u32, out: &mut [u8]) {
    let mut x = (layer as u64) << 48 ^ (plane as u64) << 40 ^ (head as u64) << 32 ^ u64::from(token);
    for byte in out {
        x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1);
        *byte = (x >> 56) as u8;
    }
}

impl Cache {
    pub fn empty(spec: &KvSpec, tokens: Range<u32>, block_tokens: u32) -> Self {
        let count = tokens.len().div_ceil(block_tokens as usize);
        let blocks = (0..spec.layers)
            .flat_map(|_| spec.planes.iter())
            .flat_map(|plane| (0..count).map(move |_| vec![0; block_tokens as usize * plane.token_bytes()]))
            .collect();
        Cache { spec: spec.clone(), tokens, block_tokens, blocks }
    }

    pub fn full(spec: &KvSpec, tokens: Range<u32>, block_tokens: u32) -> Self {
        let mut cache = Cache::empty(spec, tokens.clone(), block_tokens);
        for layer in 0..spec.layers {
            for (index, plane) in spec.planes.iter().enumerate() {
                for token in tokens.clone() {
                    let (block, row) = cache.place(layer, index, token);
                    let head_bytes = plane.head_bytes();
                    for (local, head) in plane.heads().enumerate() {
                        let start = row * plane.token_bytes() + local * head_bytes;
                        truth(layer, index, head, token, &mut cache.blocks[block][start..start + head_bytes]);
                    }
                }
            }
        }
        cache
    }

    /// Whether every byte is what the sender's cache has at that place.
    pub fn is_right(&self) -> bool {
        self.blocks == Cache::full(&self.spec, self.tokens.clone(), self.block_tokens).blocks
    }

    /// Appends the bytes of a piece in wire order.
    pub fn read(&self, piece: &Piece, out: &mut Vec<u8>) {
        for (block, start, end) in self.ranges(piece) {
            out.extend_from_slice(&self.blocks[block][start..end]);
        }
    }

    /// Index of the block, and the row within it.
    fn place(&self, layer: usize, plane: usize, token: u32) -> (usize, usize) {
        let count = self.tokens.len().div_ceil(self.block_tokens as usize);
        let at = (token - self.tokens.start) as usize;
        let base = (layer * self.spec.planes.len() + plane) * count;
        (base + at / self.block_tokens as usize, at % self.block_tokens as usize)
    }

    /// Byte ranges of a piece: (block, start, end), in wire order.
    fn ranges(&self, piece: &Piece) -> Vec<(usize, usize, usize)> {
        let plane = &self.spec.planes[piece.plane];
        let (row_bytes, head_bytes) = (plane.token_bytes(), plane.head_bytes());
        let first = (piece.heads.start - plane.heads().start) * head_bytes;
        let last = (piece.heads.end - plane.heads().start) * head_bytes;
        let mut ranges: Vec<(usize, usize, usize)> = Vec::new();
        for token in piece.tokens.clone() {
            let (block, row) = self.place(piece.layer, piece.plane, token);
            let (start, end) = (row * row_bytes + first, row * row_bytes + last);
            match ranges.last_mut() {
                Some((b, _, e)) if *b == block && *e == start => *e = end,
                _ => ranges.push((block, start, end)),
            }
        }
        ranges
    }
}

/// A lease on some layers and tokens of a full cache.
pub struct MemExport {
    pub cache: Arc<Cache>,
    pub layers: Range<usize>,
    pub tokens: Range<u32>,
    /// Gives slices (otherwise only `read`).
    pub direct: bool,
}

impl KvExport for MemExport {
    fn tokens(&self) -> Range<u32> {
        self.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        self.cache.read(piece, out);
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        let slices = || {
            let ranges = self.cache.ranges(piece);
            ranges
                .into_iter()
                .map(|(block, start, end)| IoSlice::new(&self.cache.blocks[block][start..end]))
                .collect()
        };
        self.direct.then(slices)
    }
}

/// A write lease on a whole cache.
pub struct MemLanding {
    pub cache: Cache,
    /// Gives slices (otherwise only `write`).
    pub direct: bool,
}

impl MemLanding {
    pub fn new(spec: &KvSpec, tokens: Range<u32>, block_tokens: u32, direct: bool) -> Self {
        MemLanding { cache: Cache::empty(spec, tokens, block_tokens), direct }
    }
}

impl KvLanding for MemLanding {
    fn tokens(&self) -> Range<u32> {
        self.cache.tokens.clone()
    }

    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        let mut left = bytes;
        for (block, start, end) in self.cache.ranges(piece) {
            let (now, rest) = left.split_at(end - start);
            self.cache.blocks[block][start..end].copy_from_slice(now);
            left = rest;
        }
        assert!(left.is_empty(), "{} bytes too many for {piece:?}", left.len());
        Ok(())
    }

    fn slices(&mut self, piece: &Piece) -> Option<Vec<IoSliceMut<'_>>> {
        if !self.direct {
            return None;
        }
        let ranges = self.cache.ranges(piece);
        let mut slices = Vec::with_capacity(ranges.len());
        let mut ranges = ranges.into_iter().peekable();
        for (index, block) in self.cache.blocks.iter_mut().enumerate() {
            let mut rest = &mut block[..];
            let mut offset = 0;
            while let Some((_, start, end)) = ranges.next_if(|(wanted, _, _)| *wanted == index) {
                let (_, tail) = rest.split_at_mut(start - offset);
                let (slice, tail) = tail.split_at_mut(end - start);
                slices.push(IoSliceMut::new(slice));
                (rest, offset) = (tail, end);
            }
        }
        Some(slices)
    }
}

/// Two planes of `heads` for each rank's range.
pub fn gqa_ranks(layers: usize, heads_total: usize, dim: usize, ranks: &[Range<usize>]) -> Vec<KvSpec> {
    ranks.iter().map(|heads| KvSpec::gqa(layers, heads_total, heads.clone(), dim, DType::BF16)).collect()
}

/// Two replicated planes of unlike width.
pub fn mla(layers: usize) -> KvSpec {
    let plane =
        |name, dim| Plane { name, heads_total: 1, dim, dtype: DType::BF16, sharding: Sharding::Replicated };
    KvSpec { layers, planes: vec![plane("latent", 24), plane("rope", 8)] }
}

/// `total` heads in `ranks` consecutive ranges, as equal as they get.
pub fn even(total: usize, ranks: usize) -> Vec<Range<usize>> {
    (0..ranks).map(|rank| rank * total / ranks..(rank + 1) * total / ranks).collect()
}

pub const CLOSE: Close = Close { token: 42, finish: 1 };

/// What both ends of a test's session know.
#[derive(Clone)]
pub struct Case {
    pub session: SessionId,
    pub ticket: Ticket,
    pub request: String,
    pub attempt: u32,
    pub epoch: u64,
    pub from: Vec<KvSpec>,
    pub to: Vec<KvSpec>,
    pub tokens: Range<u32>,
    pub deadline: Duration,
}

impl Case {
    pub fn new(from: Vec<KvSpec>, to: Vec<KvSpec>, tokens: Range<u32>) -> Self {
        Case {
            session: SessionId::random(),
            ticket: Ticket::random(),
            request: "req-7".into(),
            attempt: 1,
            epoch: 9,
            from,
            to,
            tokens,
            deadline: Duration::from_secs(20),
        }
    }

    pub fn expect(&self, rank: usize) -> Expect {
        Expect {
            session: self.session,
            ticket: self.ticket.clone(),
            request: self.request.clone(),
            attempt: self.attempt,
            epoch: self.epoch,
            spec: self.to[rank].clone(),
            tokens: self.tokens.clone(),
            deadline: self.deadline,
            peers: None,
        }
    }

    /// As [`Case::expect`], within a group whose ranks are at `addresses`.
    pub fn expect_in(&self, rank: usize, addresses: &[Vec<String>], sender: &Sender) -> Expect {
        let targets = self.push(0, addresses).to;
        Expect { peers: Some(Peers { rank, targets, sender: sender.clone() }), ..self.expect(rank) }
    }

    /// `addresses`: one list per receiver.
    pub fn push(&self, from_rank: usize, addresses: &[Vec<String>]) -> PushSpec {
        let target = |(rank, addresses): (usize, &Vec<String>)| TargetSpec {
            rank,
            addresses: addresses.clone(),
            spec: self.to[rank].clone(),
        };
        PushSpec {
            session: self.session,
            ticket: self.ticket.clone(),
            request: self.request.clone(),
            attempt: self.attempt,
            epoch: self.epoch,
            from: self.from.clone(),
            from_rank,
            to: addresses.iter().enumerate().map(target).collect(),
            tokens: self.tokens.clone(),
            deadline: self.deadline,
            compute_bytes_per_s: None,
            chunk_tokens: 512,
        }
    }
}

/// xorshift64*: the same numbers for a seed on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    pub fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}
