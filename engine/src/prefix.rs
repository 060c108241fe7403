//! Finds sequences that already hold the beginning of a prompt. Prefixes are named block by block by a keyed, chained
//! 128-bit hash over salt and tokens, so that tenants with different salts share nothing and cannot probe each other.
//! Pure: no memory is touched; the runner turns what it decides here into operations on every rank's store.

use std::collections::HashMap;

use backend::SeqId;
use sha2::{Digest, Sha256};

/// Name of a prefix that ends at a block boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 16]);

/// Names prefixes; two caches with different secrets name them differently.
#[derive(Clone)]
pub struct Namer {
    secret: [u8; 16],
}

impl Namer {
    /// A namer that only those who know `secret` can imitate.
    pub fn new(secret: [u8; 16]) -> Self {
        Namer { secret }
    }

    /// The empty prefix within `salt`.
    pub fn root(&self, salt: &[u8]) -> Key {
        self.key(b"salt", &[salt])
    }

    /// The prefix `parent` and one more block of `tokens`.
    pub fn next(&self, parent: Key, tokens: &[u32]) -> Key {
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        self.key(b"next", &[&parent.0, &bytes])
    }

    fn key(&self, domain: &[u8; 4], parts: &[&[u8]]) -> Key {
        let mut hash = Sha256::new_with_prefix(self.secret);
        hash.update(domain);
        for part in parts {
            hash.update(part);
        }
        let mut key = [0; 16];
        key.copy_from_slice(&hash.finalize()[..16]);
        Key(key)
    }
}

/// A sequence that holds the beginning of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Where to fork from.
    pub seq: SeqId,
    /// Tokens to take over, a multiple of the block.
    pub tokens: u32,
    /// Whether that is all that a kept sequence holds: whoever goes on from there makes it superfluous.
    pub whole: bool,
}

/// What becomes of a sequence that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retired {
    /// Tokens to keep, a multiple of the block; 0: close it.
    pub keep: u32,
    /// Kept sequences that it makes superfluous: close them.
    pub superfluous: Vec<SeqId>,
}

/// Which sequences hold which prefixes: running ones as far as they are computed, and kept ones that have ended.
pub struct PrefixCache {
    namer: Namer,
    block_tokens: u32,
    /// Holders of each prefix, in order of registration.
    holders: HashMap<Key, Vec<SeqId>>,
    chains: HashMap<SeqId, Chain>,
    /// Counts uses, for "least recently used".
    clock: u64,
}

struct Chain {
    root: Key,
    keys: Vec<Key>,
    /// Set for kept sequences: when they were last of use.
    kept: Option<u64>,
}

impl PrefixCache {
    /// An empty cache over blocks of `block_tokens`.
    pub fn new(namer: Namer, block_tokens: u32) -> Self {
        PrefixCache { namer, block_tokens, holders: HashMap::new(), chains: HashMap::new(), clock: 0 }
    }

    /// The longest registered prefix of `tokens`, at least one token shorter than it: something must be left to
    /// compute the logits from.
    pub fn find(&mut self, salt: &[u8], tokens: &[u32]) -> Option<Hit> {
        let blocks = tokens.len().saturating_sub(1) / self.block_tokens as usize;
        let mut key = self.namer.root(salt);
        let mut hit = None;
        for (index, block) in tokens.chunks_exact(self.block_tokens as usize).take(blocks).enumerate() {
            key = self.namer.next(key, block);
            let Some(&seq) = self.holders.get(&key).and_then(|held| held.last()) else { break };
            hit = Some(Hit { seq, tokens: (index as u32 + 1) * self.block_tokens, whole: false });
        }
        let mut hit = hit?;
        self.clock += 1;
        if let Some(chain) = self.chains.get_mut(&hit.seq)
            && let Some(kept) = chain.kept.as_mut()
        {
            *kept = self.clock;
            hit.whole = chain.keys.len() as u32 * self.block_tokens == hit.tokens;
        }
        Some(hit)
    }

    /// Registers the full blocks of `computed` as held by the running `seq`. Called again as more is computed.
    pub fn extend(&mut self, seq: SeqId, salt: &[u8], computed: &[u32]) {
        let root = || self.namer.root(salt);
        let chain =
            self.chains.entry(seq).or_insert_with(|| Chain { root: root(), keys: Vec::new(), kept: None });
        let mut parent = chain.keys.last().copied().unwrap_or(chain.root);
        for block in computed.chunks_exact(self.block_tokens as usize).skip(chain.keys.len()) {
            parent = self.namer.next(parent, block);
            chain.keys.push(parent);
            self.holders.entry(parent).or_default().push(seq);
        }
    }

    /// Decides whether the ended `seq` is kept for its prefix.
    pub fn retire(&mut self, seq: SeqId) -> Retired {
        let keys = self.chains.get(&seq).map(|chain| chain.keys.clone()).unwrap_or_default();
        let covered = keys.last().is_none_or(|key| self.holders.get(key).is_none_or(|held| held.len() > 1));
        if covered {
            self.forget(seq);
            return Retired { keep: 0, superfluous: Vec::new() };
        }
        let mut superfluous = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            for &holder in self.holders.get(key).map(Vec::as_slice).unwrap_or_default() {
                let chain = self.chains.get(&holder);
                if holder != seq && chain.is_some_and(|c| c.kept.is_some() && c.keys.len() == index + 1) {
                    superfluous.push(holder);
                }
            }
        }
        for &holder in &superfluous {
            self.forget(holder);
        }
        self.clock += 1;
        if let Some(chain) = self.chains.get_mut(&seq) {
            chain.kept = Some(self.clock);
        }
        Retired { keep: keys.len() as u32 * self.block_tokens, superfluous }
    }

    /// Forgets `seq`: it is closed or its blocks are no longer what they were.
    pub fn forget(&mut self, seq: SeqId) {
        self.shorten(seq, 0);
        self.chains.remove(&seq);
    }

    /// Forgets `seq`, whose cache has turned out to be no numbers somewhere, with all that hold a block that it holds: whose the fault
    /// is nobody knows. Those of them that were kept: close them.
    pub fn spoil(&mut self, seq: SeqId) -> Vec<SeqId> {
        let first = self.chains.get(&seq).and_then(|chain| chain.keys.first());
        // Who holds any of its blocks holds the first.
        let holders = first.and_then(|key| self.holders.get(key)).cloned().unwrap_or_default();
        let kept = holders.iter().copied().filter(|holder| self.keeps(*holder)).collect();
        holders.into_iter().for_each(|holder| self.forget(holder));
        kept
    }

    /// Forgets all but the first `blocks` of `seq`.
    pub fn shorten(&mut self, seq: SeqId, blocks: u32) {
        let Some(chain) = self.chains.get_mut(&seq) else { return };
        for key in chain.keys.drain((blocks as usize).min(chain.keys.len())..) {
            if let Some(held) = self.holders.get_mut(&key) {
                held.retain(|holder| *holder != seq);
                if held.is_empty() {
                    self.holders.remove(&key);
                }
            }
        }
    }

    /// The kept sequence that was of use longest ago among those that `evictable` allows.
    pub fn oldest(&self, evictable: impl Fn(SeqId) -> bool) -> Option<SeqId> {
        let kept = |(&seq, chain): (&SeqId, &Chain)| Some((chain.kept?, seq));
        let mut kept: Vec<(u64, SeqId)> = self.chains.iter().filter_map(kept).collect();
        kept.sort_unstable();
        kept.into_iter().map(|(_, seq)| seq).find(|&seq| evictable(seq))
    }

    /// Whether `seq` has ended and is kept.
    pub fn keeps(&self, seq: SeqId) -> bool {
        self.chains.get(&seq).is_some_and(|chain| chain.kept.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cache() -> PrefixCache {
        PrefixCache::new(Namer::new([7; 16]), 4)
    }

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).collect()
    }

    const A: SeqId = SeqId(1);
    const B: SeqId = SeqId(2);

    #[test]
    fn finds_the_longest_prefix_that_leaves_a_token() {
        let mut cache = cache();
        cache.extend(A, b"", &tokens(9));
        assert_eq!(cache.find(b"", &tokens(9)), Some(Hit { seq: A, tokens: 8, whole: false }));
        assert_eq!(cache.find(b"", &tokens(8)), Some(Hit { seq: A, tokens: 4, whole: false }));
        assert_eq!(cache.find(b"", &tokens(4)), None);
        let mut other = tokens(9);
        other[5] = 99;
        assert_eq!(cache.find(b"", &other), Some(Hit { seq: A, tokens: 4, whole: false }));
        other[0] = 99;
        assert_eq!(cache.find(b"", &other), None);
    }

    #[test]
    fn salts_share_nothing() {
        let mut cache = cache();
        cache.extend(A, b"tenant a", &tokens(9));
        assert_eq!(cache.find(b"tenant b", &tokens(9)), None);
        assert_eq!(cache.find(b"", &tokens(9)), None);
    }

    #[test]
    fn a_key_names_the_whole_prefix_and_needs_the_secret() {
        let (one, two) = (Namer::new([1; 16]), Namer::new([2; 16]));
        let chain = |namer: &Namer, first: u32| namer.next(namer.next(namer.root(b"s"), &[first]), &[9]);
        assert_eq!(chain(&one, 5), chain(&one, 5));
        assert_ne!(chain(&one, 5), chain(&one, 6));
        assert_ne!(chain(&one, 5), chain(&two, 5));
    }

    #[test]
    fn an_ended_sequence_is_kept_for_its_full_blocks() {
        let mut cache = cache();
        cache.extend(A, b"", &tokens(5));
        cache.extend(A, b"", &tokens(11));
        assert!(!cache.keeps(A));
        assert_eq!(cache.retire(A), Retired { keep: 8, superfluous: vec![] });
        assert!(cache.keeps(A));
        assert_eq!(cache.oldest(|_| true), Some(A));
    }

    #[test]
    fn sequences_that_add_nothing_are_closed() {
        let mut cache = cache();
        cache.extend(A, b"", &tokens(8));
        cache.retire(A);
        cache.extend(B, b"", &tokens(7));
        assert_eq!(cache.retire(B), Retired { keep: 0, superfluous: vec![] }, "covered by A");
        cache.extend(B, b"", &tokens(12));
        assert_eq!(cache.retire(B), Retired { keep: 12, superfluous: vec![A] }, "covers A");
        cache.extend(A, b"", &tokens(3));
        assert_eq!(cache.retire(A), Retired { keep: 0, superfluous: vec![] }, "no full block");
        assert_eq!(cache.find(b"", &tokens(13)), Some(Hit { seq: B, tokens: 12, whole: true }));
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut cache = cache();
        cache.extend(A, b"a", &tokens(8));
        cache.extend(B, b"b", &tokens(8));
        cache.retire(A);
        cache.retire(B);
        assert_eq!(cache.oldest(|_| true), Some(A));
        cache.find(b"a", &tokens(8));
        assert_eq!(cache.oldest(|_| true), Some(B));
        assert_eq!(cache.oldest(|seq| seq == A), Some(A));
        cache.shorten(A, 1);
        assert_eq!(cache.find(b"a", &tokens(9)), Some(Hit { seq: A, tokens: 4, whole: true }));
        cache.forget(A);
        assert_eq!(cache.find(b"a", &tokens(9)), None);
    }

    proptest! {
        // A hit is always a true prefix within the same salt, whatever was registered, kept and forgotten.
        #[test]
        fn hits_are_true_prefixes(
            ops in prop::collection::vec(
                (0u8..4, 1u64..5, 0u8..2, prop::collection::vec(0u32..2, 0..14)), 0..40,
            ),
        ) {
            let mut cache = PrefixCache::new(Namer::new([3; 16]), 2);
            let mut truth: HashMap<SeqId, (u8, Vec<u32>)> = HashMap::new();
            for (op, seq, salt, text) in ops {
                let seq = SeqId(seq);
                match op {
                    0 if !truth.contains_key(&seq) => {
                        cache.extend(seq, &[salt], &text);
                        truth.insert(seq, (salt, text));
                    }
                    1 if !cache.keeps(seq) && truth.contains_key(&seq) => {
                        let retired = cache.retire(seq);
                        for closed in retired.superfluous {
                            truth.remove(&closed);
                        }
                        if retired.keep == 0 {
                            truth.remove(&seq);
                        }
                    }
                    2 => {
                        cache.forget(seq);
                        truth.remove(&seq);
                    }
                    _ => if let Some(hit) = cache.find(&[salt], &text) {
                        let (held_salt, held) = &truth[&hit.seq];
                        let end = hit.tokens as usize;
                        prop_assert!(end < text.len() && hit.tokens % 2 == 0);
                        prop_assert_eq!((*held_salt, &held[..end]), (salt, &text[..end]));
                    }
                }
            }
        }
    }
}
