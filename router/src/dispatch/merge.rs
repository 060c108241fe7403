//! One output out of several sources: the prefill node's first token and the decode group's others may arrive in any
//! order, and an attempt may repeat what an earlier one delivered. Pure.
//!
//! Caller: [`super::request`].

use std::collections::BTreeMap;

use crate::inference::Token;

/// Tokens that wait for an earlier one. The group runs ahead of the first token's message by some steps at the most.
const AHEAD_MAX: u32 = 1024;

/// A token that cannot belong to this output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("token {index} arrived while token {next} is awaited")]
pub struct TooFarAhead {
    /// Its index.
    pub index: u32,
    /// The index awaited.
    pub next: u32,
}

/// Puts tokens in order, each index once.
#[derive(Debug, Default)]
pub struct Merge {
    next: u32,
    ahead: BTreeMap<u32, Token>,
}

impl Merge {
    /// The index awaited: so many tokens were delivered.
    pub fn next_index(&self) -> u32 {
        self.next
    }

    /// Takes a token; returns those that are now in order. An index that was delivered before is dropped.
    pub fn take(&mut self, token: Token) -> Result<Vec<Token>, TooFarAhead> {
        if token.index < self.next {
            return Ok(Vec::new());
        }
        if token.index - self.next > AHEAD_MAX {
            return Err(TooFarAhead { index: token.index, next: self.next });
        }
        self.ahead.entry(token.index).or_insert(token);
        let mut ready = Vec::new();
        while let Some(token) = self.ahead.remove(&self.next) {
            self.next += 1;
            ready.push(token);
        }
        Ok(ready)
    }

    /// A new attempt starts: what waits is of the old one, and is generated again.
    pub fn restart(&mut self) {
        self.ahead.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(index: u32) -> Token {
        Token { index, id: 100 + index, logprob: None, top: Vec::new(), predicted: false }
    }

    /// Protects: nothing waits for a token that is absurdly far ahead.
    #[test]
    fn far_ahead_is_an_error() {
        let mut merge = Merge::default();
        assert!(merge.take(token(AHEAD_MAX)).unwrap().is_empty());
        assert_eq!(
            merge.take(token(AHEAD_MAX + 1)).unwrap_err().to_string(),
            format!("token {} arrived while token 0 is awaited", AHEAD_MAX + 1)
        );
    }

    proptest! {
        /// Protects: any order, any repetition, any restarts: the client sees 0, 1, 2, ... once each.
        #[test]
        fn every_index_once_and_in_order(arrivals in proptest::collection::vec(0..40u32, 0..200), restart in 0..50usize) {
            let mut merge = Merge::default();
            let mut seen = Vec::new();
            for (count, index) in arrivals.iter().enumerate() {
                if restart > 0 && count % restart == restart - 1 {
                    merge.restart();
                }
                seen.extend(merge.take(token(*index)).unwrap());
            }
            let indices: Vec<u32> = seen.iter().map(|token| token.index).collect();
            prop_assert_eq!(indices, (0..merge.next_index()).collect::<Vec<_>>());
            prop_assert!(seen.iter().all(|token| token.id == 100 + token.index));
        }
    }
}
