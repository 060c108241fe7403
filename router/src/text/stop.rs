//! Stop strings: ends a text at the first of them, wherever token boundaries fall, and never lets a part of one out.
//! Pure. Called by `api::choice` with each piece of detokenized text.
//!
//! The text ends at the match that is complete first; of several that end at the same byte, the longest. What is found
//! does not depend on how the text is cut into pieces.

use std::sync::Arc;

/// One stop string with its failure table (Knuth, Morris, Pratt).
#[derive(Debug, Clone)]
struct Pattern {
    text: Box<[u8]>,
    /// `failure[i]`: length of the longest proper prefix of `text` that ends at `i`.
    failure: Box<[usize]>,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let text = text.as_bytes();
        let mut failure = vec![0; text.len()];
        let mut matched = 0;
        for i in 1..text.len() {
            while matched > 0 && text[i] != text[matched] {
                matched = failure[matched - 1];
            }
            matched += usize::from(text[i] == text[matched]);
            failure[i] = matched;
        }
        Self { text: text.into(), failure: failure.into() }
    }

    /// Bytes matched after `byte`, from `matched` before it; `matched < text.len()`.
    fn step(&self, mut matched: usize, byte: u8) -> usize {
        while matched > 0 && byte != self.text[matched] {
            matched = self.failure[matched - 1];
        }
        matched + usize::from(byte == self.text[matched])
    }
}

/// Stop strings, prepared once and shared by the choices of a request.
#[derive(Debug, Clone, Default)]
pub struct StopStrings(Arc<[Pattern]>);

impl StopStrings {
    /// Empty strings are ignored: they would match everywhere.
    pub fn new<S: AsRef<str>>(strings: &[S]) -> Self {
        Self(strings.iter().map(AsRef::as_ref).filter(|s| !s.is_empty()).map(Pattern::new).collect())
    }

    /// The stop string of this index.
    pub fn get(&self, index: usize) -> &str {
        std::str::from_utf8(&self.0[index].text).unwrap_or_default()
    }
}

/// Watches one text.
#[derive(Debug)]
pub struct StopMatcher {
    strings: StopStrings,
    include: bool,
    /// Per string: how many of its bytes the text ends with.
    matched: Vec<usize>,
    /// The end of the text that may be the beginning of a stop string.
    held: String,
}

impl StopMatcher {
    /// `include`: the text keeps the stop string that ends it.
    pub fn new(strings: StopStrings, include: bool) -> Self {
        Self { matched: vec![0; strings.0.len()], strings, include, held: String::new() }
    }

    /// Takes the next piece of text and appends to `out` what is certain. `Some(index)` of the stop string: the text is
    /// at its end, nothing may follow.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.strings.0.is_empty() {
            out.push_str(text);
            return None;
        }
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            let mut found: Option<usize> = None;
            for (index, pattern) in self.strings.0.iter().enumerate() {
                let matched = pattern.step(self.matched[index], byte);
                self.matched[index] = matched;
                let longer = found.is_none_or(|other: usize| matched > self.strings.0[other].text.len());
                if matched == pattern.text.len() && longer {
                    found = Some(index);
                }
            }
            if let Some(index) = found {
                // `held` is never shorter than what was matched before this piece, so the cut is within both.
                let end = self.held.len() + at + 1;
                let cut = if self.include { end } else { end - self.strings.0[index].text.len() };
                self.held.push_str(&text[..=at]);
                out.push_str(&self.held[..cut]);
                self.held.clear();
                self.matched.fill(0);
                return Some(index);
            }
        }
        // A prefix of a stop string begins with a whole character's first byte, so this cut is between characters.
        let keep = self.matched.iter().copied().max().unwrap_or(0);
        if keep < text.len() {
            let cut = text.len() - keep;
            out.push_str(&self.held);
            out.push_str(&text[..cut]);
            self.held.clear();
            self.held.push_str(&text[cut..]);
        } else {
            self.held.push_str(text);
            let cut = self.held.len() - keep;
            out.push_str(&self.held[..cut]);
            self.held.drain(..cut);
        }
        None
    }

    /// Takes text that no stop string may end (`min_tokens`). Matching begins anew after it.
    pub fn pass(&mut self, text: &str, out: &mut String) {
        self.finish(out);
        out.push_str(text);
    }

    /// The text has ended: what was held back belongs to it.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.matched.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, read off: the first end, then the longest.
    fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<String>) {
        for end in 0..=text.len() {
            let ends = |stop: &&String| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes());
            if let Some(stop) = stops.iter().filter(ends).max_by_key(|stop| stop.len()) {
                let cut = if include { end } else { end - stop.len() };
                return (text[..cut].to_string(), Some(stop.clone()));
            }
        }
        (text.to_string(), None)
    }

    fn run(pieces: &[String], stops: &[String], include: bool) -> (String, Option<String>) {
        let strings = StopStrings::new(stops);
        let mut matcher = StopMatcher::new(strings.clone(), include);
        let mut out = String::new();
        for piece in pieces {
            if let Some(index) = matcher.push(piece, &mut out) {
                return (out, Some(strings.get(index).to_string()));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Few letters, one of them of four bytes and one of two, so that strings overlap and cuts fall everywhere.
        #[test]
        fn equals_the_definition_however_the_text_is_cut(
            pieces in prop::collection::vec("[ab🙂é]{0,3}", 0..12),
            stops in prop::collection::vec("[ab🙂é]{0,4}", 0..4),
            include: bool,
        ) {
            prop_assert_eq!(run(&pieces, &stops, include), naive(&pieces.concat(), &stops, include));
        }

        /// What is out can never have been the start of a stop string that completes later.
        #[test]
        fn lets_nothing_of_a_stop_string_out(
            pieces in prop::collection::vec("[ab🙂]{0,3}", 0..12),
            stop in "[ab🙂]{1,4}",
        ) {
            let mut matcher = StopMatcher::new(StopStrings::new(&[&stop]), false);
            let (expected, _) = naive(&pieces.concat(), &[stop], false);
            let mut out = String::new();
            for piece in &pieces {
                let found = matcher.push(piece, &mut out);
                prop_assert!(expected.starts_with(&out));
                if found.is_some() {
                    break;
                }
            }
        }
    }

    #[test]
    fn text_is_held_no_longer_than_it_must_be() {
        let mut matcher = StopMatcher::new(StopStrings::new(&["\n\nUser:"]), false);
        let mut out = String::new();
        assert_eq!(matcher.push("Hi\n", &mut out), None);
        assert_eq!(out, "Hi");
        assert_eq!(matcher.push("there", &mut out), None);
        assert_eq!(out, "Hi\nthere");
    }

    #[test]
    fn passed_text_is_not_matched() {
        let mut matcher = StopMatcher::new(StopStrings::new(&["ab"]), false);
        let mut out = String::new();
        matcher.pass("ab", &mut out);
        matcher.pass("a", &mut out);
        assert_eq!(matcher.push("b", &mut out), None);
        assert_eq!(matcher.push("ab", &mut out), Some(0));
        assert_eq!(out, "abab");
    }
}
