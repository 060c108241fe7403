//! Which positions of a sequence hold finished cache: a sorted set of token ranges. Used by [`crate::paged`].

use std::ops::Range;

/// Disjoint ranges of positions in ascending order; neighbours are merged, so one prefix is one range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents(Vec<Range<u32>>);

impl Extents {
    /// Adds `tokens`.
    pub fn insert(&mut self, tokens: Range<u32>) {
        if tokens.is_empty() {
            return;
        }
        // [0, first) ends before `tokens`   [first, last) touches it   [last, ..) begins after it
        let first = self.0.partition_point(|held| held.end < tokens.start);
        let last = self.0.partition_point(|held| held.start <= tokens.end);
        let start = self.0[first..last].first().map_or(tokens.start, |held| held.start.min(tokens.start));
        let end = self.0[first..last].last().map_or(tokens.end, |held| held.end.max(tokens.end));
        self.0.splice(first..last, std::iter::once(start..end));
    }

    /// Removes `tokens`.
    pub fn remove(&mut self, tokens: Range<u32>) {
        if tokens.is_empty() {
            return;
        }
        let held = std::mem::take(&mut self.0);
        for range in held {
            let before = range.start..range.end.min(tokens.start);
            let after = range.start.max(tokens.end)..range.end;
            self.0.extend([before, after].into_iter().filter(|part| !part.is_empty()));
        }
    }

    /// Whether all of `tokens` is held.
    pub fn contains(&self, tokens: &Range<u32>) -> bool {
        let held = self.around(tokens.start);
        tokens.is_empty() || (held.start <= tokens.start && tokens.end <= held.end)
    }

    /// The range that holds `token`, or the empty range there.
    pub fn around(&self, token: u32) -> Range<u32> {
        let at = self.0.partition_point(|held| held.end <= token);
        match self.0.get(at) {
            Some(held) if held.start <= token => held.clone(),
            _ => token..token,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The set agrees with one flag per position, and stays merged.
        #[test]
        fn agrees_with_flags(ops in prop::collection::vec((any::<bool>(), 0u32..24, 0u32..24), 1..24)) {
            let (mut set, mut flags) = (Extents::default(), [false; 48]);
            for (add, start, len) in ops {
                let range = start..start + len;
                flags[start as usize..(start + len) as usize].fill(add);
                if add { set.insert(range) } else { set.remove(range) }
                let runs = flags.windows(2).filter(|pair| !pair[0] && pair[1]).count() + usize::from(flags[0]);
                prop_assert_eq!(set.0.len(), runs);
                for a in 0..47u32 {
                    for b in a..48 {
                        prop_assert_eq!(set.contains(&(a..b)), flags[a as usize..b as usize].iter().all(|held| *held));
                    }
                }
            }
        }
    }
}
