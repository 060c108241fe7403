//! Which node is believed to hold which prefixes: chained hashes over blocks of tokens, bounded, least recent out first.
//! Pure. A belief only steers placement: a node says itself what it holds when it admits a request.
//!
//! Caller: [`super::book`].

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

/// Tokens of one hashed block: as fine as a usual KV block, coarse enough for long prompts.
pub const BLOCK_TOKENS: usize = 32;

/// Blocks remembered at the most: 4 million tokens, some 15 MB.
const BLOCKS_MAX: usize = 1 << 17;

/// Nodes remembered for one block.
const HOLDERS_MAX: usize = 8;

/// A node between two losses of its cache: a new number after every restart.
pub type Holder = u32;

/// The hashes of a sequence's whole blocks, extended as it grows. Keyed and salted: of no use outside this router.
#[derive(Debug, Clone)]
pub struct Chain {
    keys: RandomState,
    last: u64,
    partial: Vec<u32>,
    blocks: Vec<u64>,
}

impl Chain {
    /// Of `tokens`, within the sharing domain of `salt`.
    pub fn new(keys: &RandomState, salt: &[u8], tokens: &[u32]) -> Chain {
        let mut chain = Chain {
            keys: keys.clone(),
            last: keys.hash_one(salt),
            partial: Vec::with_capacity(BLOCK_TOKENS),
            blocks: Vec::with_capacity(tokens.len() / BLOCK_TOKENS),
        };
        for &token in tokens {
            chain.push(token);
        }
        chain
    }

    /// One more token.
    pub fn push(&mut self, token: u32) {
        self.partial.push(token);
        if self.partial.len() == BLOCK_TOKENS {
            let mut hasher = self.keys.build_hasher();
            hasher.write_u64(self.last);
            for token in self.partial.drain(..) {
                hasher.write_u32(token);
            }
            self.last = hasher.finish();
            self.blocks.push(self.last);
        }
    }

    /// One hash for each whole block, the first block first.
    pub fn blocks(&self) -> &[u64] {
        &self.blocks
    }
}

/// Blocks and their holders. Two generations: when the young one is full, the old one is forgotten.
#[derive(Debug, Default)]
pub struct PrefixMap {
    young: HashMap<u64, Vec<Holder>>,
    old: HashMap<u64, Vec<Holder>>,
}

impl PrefixMap {
    /// `holder` has these blocks now.
    pub fn record(&mut self, holder: Holder, blocks: &[u64]) {
        for &block in blocks {
            let holders = self.renew(block);
            holders.retain(|&known| known != holder);
            holders.insert(0, holder);
            holders.truncate(HOLDERS_MAX);
        }
    }

    /// `holder` turned out to have no more than `tokens` tokens of these blocks.
    pub fn correct(&mut self, holder: Holder, blocks: &[u64], tokens: u32) {
        for block in blocks.iter().skip((tokens as usize).div_ceil(BLOCK_TOKENS)) {
            for generation in [&mut self.young, &mut self.old] {
                if let Some(holders) = generation.get_mut(block) {
                    holders.retain(|&known| known != holder);
                }
            }
        }
    }

    /// Tokens at the start of these blocks that each of `holders` is believed to have.
    pub fn cached_tokens(&self, holders: &[Holder], blocks: &[u64]) -> Vec<u32> {
        let mut tokens = vec![0; holders.len()];
        let mut open: Vec<usize> = (0..holders.len()).collect();
        for (index, block) in blocks.iter().enumerate() {
            let known = self.young.get(block).or_else(|| self.old.get(block));
            open.retain(|&at| known.is_some_and(|known| known.contains(&holders[at])));
            if open.is_empty() {
                break;
            }
            for &at in &open {
                tokens[at] = ((index + 1) * BLOCK_TOKENS) as u32;
            }
        }
        tokens
    }

    /// The holders of a block, moved to the young generation.
    fn renew(&mut self, block: u64) -> &mut Vec<Holder> {
        if self.young.len() >= BLOCKS_MAX / 2 && !self.young.contains_key(&block) {
            self.old = std::mem::take(&mut self.young);
        }
        let old = &mut self.old;
        self.young.entry(block).or_insert_with(|| old.remove(&block).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).collect()
    }

    /// Protects: prefixes are found by tokens and salt, whole blocks only, for the node that has them.
    #[test]
    fn longest_known_prefix() {
        let keys = RandomState::new();
        let mut map = PrefixMap::default();
        map.record(1, Chain::new(&keys, b"a", &tokens(100)).blocks());
        let longer = Chain::new(&keys, b"a", &tokens(200));
        assert_eq!(map.cached_tokens(&[1, 2], longer.blocks()), [96, 0]);
        assert_eq!(map.cached_tokens(&[1], Chain::new(&keys, b"b", &tokens(200)).blocks()), [0]);
        let mut other = tokens(200);
        other[40] = 7;
        assert_eq!(map.cached_tokens(&[1], Chain::new(&keys, b"a", &other).blocks()), [32]);
        map.record(2, &longer.blocks()[..2]);
        map.correct(1, longer.blocks(), 64);
        assert_eq!(map.cached_tokens(&[1, 2], longer.blocks()), [64, 64]);
    }

    /// Protects: a chain that grows token by token is the chain of the whole.
    #[test]
    fn chains_grow() {
        let keys = RandomState::new();
        let mut grown = Chain::new(&keys, b"", &tokens(50));
        for token in 50..130 {
            grown.push(token);
        }
        assert_eq!(grown.blocks(), Chain::new(&keys, b"", &tokens(130)).blocks());
        assert_eq!(grown.blocks().len(), 4);
    }

    /// Protects: memory is bounded, and what is in use outlives what is not.
    #[test]
    fn least_recent_goes_first() {
        let mut map = PrefixMap::default();
        map.record(1, &[u64::MAX - 1]);
        map.record(1, &[u64::MAX]);
        for block in 0..2 * BLOCKS_MAX as u64 {
            map.record(2, &[block]);
            if block % 1000 == 0 {
                map.record(1, &[u64::MAX]);
            }
            assert!(map.young.len() + map.old.len() <= BLOCKS_MAX);
        }
        assert_eq!(map.cached_tokens(&[1], &[u64::MAX]), [BLOCK_TOKENS as u32]);
        assert_eq!(map.cached_tokens(&[1], &[u64::MAX - 1]), [0]);
    }
}
