//! Text from ids, one at a time: a character is given out when its last byte is there, so an emoji over four tokens
//! never shows as replacement characters. Pure. Called by `api::choice` for every token.
//!
//! All increments together equal the tokenizer's own decoding of all ids. One exception: of ill-formed byte-fallback
//! runs, characters that were already complete are kept, where the tokenizer would take them back.

use std::sync::Arc;

use super::pieces::{Piece, Pieces};

/// Whether spaces at the very beginning are layout of the tokenizer, or text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// A text of its own, such as an answer in a chat.
    Text,
    /// Goes on after other text, such as a completion after its prompt.
    Continuation,
}

/// Turns one sequence of ids into text.
#[derive(Debug)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// Special, and text nevertheless.
    kept: Arc<[u32]>,
    /// Spaces that may still be dropped.
    leading_spaces: usize,
    /// Bytes of a character that is not complete; at most 3 between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// `skip_special`: markup tokens give no text.
    pub fn new(pieces: Arc<Pieces>, skip_special: bool, beginning: Beginning) -> Self {
        let leading_spaces = match beginning {
            Beginning::Text => pieces.joining().leading_spaces,
            Beginning::Continuation => 0,
        };
        Self { pieces, skip_special, kept: Arc::default(), leading_spaces, pending: Vec::new() }
    }

    /// With markup that somebody reads behind it: these ids are text.
    pub fn keeping(self, kept: Arc<[u32]>) -> Self {
        Self { kept, ..self }
    }

    /// Takes the next id; appends the text that is now certain.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let pieces = Arc::clone(&self.pieces);
        let bytes = match pieces.get(id) {
            Piece::None => return,
            Piece::Special(_) if self.skip_special && !self.kept.contains(&id) => return,
            Piece::Special(bytes) | Piece::Bytes(bytes) => bytes,
            Piece::Byte(byte) => {
                self.pending.push(byte);
                return self.drain(out);
            }
        };
        if pieces.joining().byte_level {
            self.pending.extend_from_slice(bytes);
            self.drain(out);
        } else {
            self.finish(out);
            self.emit(std::str::from_utf8(bytes).unwrap_or("\u{fffd}"), out);
        }
    }

    /// No more ids: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            let count = self.replacements(self.pending.len());
            self.pending.clear();
            (0..count).for_each(|_| self.emit("\u{fffd}", out));
        }
    }

    /// Gives out all complete characters; each ill-formed part becomes U+FFFD, as in `String::from_utf8_lossy`.
    fn drain(&mut self, out: &mut String) {
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.emit(text, out);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(error.valid_up_to());
            self.emit(std::str::from_utf8(valid).unwrap_or_default(), out);
            rest = after;
            let Some(len) = error.error_len() else { break };
            (0..self.replacements(len)).for_each(|_| self.emit("\u{fffd}", out));
            rest = &rest[len..];
        }
        let kept = pending.len() - rest.len();
        self.pending = pending;
        self.pending.drain(..kept);
    }

    /// Replacement characters for an ill-formed part of this many bytes: one for all, or with byte fallback one each.
    fn replacements(&self, bytes: usize) -> usize {
        if self.pieces.joining().byte_level { 1 } else { bytes }
    }

    fn emit(&mut self, mut text: &str, out: &mut String) {
        while self.leading_spaces > 0 && !text.is_empty() {
            match text.strip_prefix(' ') {
                Some(rest) => {
                    text = rest;
                    self.leading_spaces -= 1;
                }
                None => self.leading_spaces = 0,
            }
        }
        out.push_str(text);
    }
}

/// The text of all ids at once.
pub fn decode(pieces: &Arc<Pieces>, ids: &[u32], skip_special: bool) -> String {
    let mut out = String::new();
    let mut detokenizer = Detokenizer::new(Arc::clone(pieces), skip_special, Beginning::Text);
    ids.iter().for_each(|&id| detokenizer.push(id, &mut out));
    detokenizer.finish(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Tokenizer;
    use proptest::prelude::*;

    /// A SentencePiece vocabulary in the form of Llama 2 and Mistral: U+2581 for a space, bytes as a last resort.
    fn sentencepiece() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        let names = ["<unk>", "<s>", "</s>"].into_iter().map(String::from);
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let words = ["▁", "▁Hi", "a", "é", "▁▁"].into_iter().map(String::from);
        for (id, name) in names.chain(bytes).chain(words).enumerate() {
            vocab.insert(name, id.into());
        }
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        Tokenizer::from_bytes(json.to_string().as_bytes()).expect("a tokenizer")
    }

    const BYTE: u32 = 3;
    const SPACE: u32 = BYTE + 256;
    const HI: u32 = SPACE + 1;

    fn increments(tokenizer: &Tokenizer, ids: &[u32], beginning: Beginning) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer.pieces()), true, beginning);
        let mut parts: Vec<String> = ids
            .iter()
            .map(|&id| {
                let mut out = String::new();
                detokenizer.push(id, &mut out);
                out
            })
            .collect();
        parts.push(String::new());
        detokenizer.finish(parts.last_mut().expect("just pushed"));
        parts
    }

    #[test]
    fn an_emoji_over_four_byte_tokens_appears_with_its_last_byte() {
        let tokenizer = sentencepiece();
        let ids: Vec<u32> = "🙂".bytes().map(|byte| BYTE + u32::from(byte)).chain([HI]).collect();
        assert_eq!(increments(&tokenizer, &ids, Beginning::Text), ["", "", "", "🙂", " Hi", ""]);
        assert_eq!(
            increments(&tokenizer, &ids[1..], Beginning::Text),
            ["\u{fffd}", "\u{fffd}", "\u{fffd}", " Hi", ""]
        );
        assert_eq!(increments(&tokenizer, &ids[..2], Beginning::Text), ["", "", "\u{fffd}\u{fffd}"]);
    }

    #[test]
    fn the_first_words_space_is_layout_only_at_the_beginning_of_a_text() {
        let tokenizer = sentencepiece();
        assert_eq!(increments(&tokenizer, &[1, HI, HI, 2], Beginning::Text).concat(), "Hi Hi");
        assert_eq!(increments(&tokenizer, &[SPACE, HI], Beginning::Text).concat(), " Hi");
        assert_eq!(increments(&tokenizer, &[HI, HI], Beginning::Continuation).concat(), " Hi Hi");
    }

    proptest! {
        /// Where the run of bytes is well formed, the increments are the tokenizer's own decoding.
        #[test]
        fn byte_fallback_equals_the_tokenizers_decoding(ids in prop::collection::vec(0..HI + 6, 0..12), text in "[a-zé🙂 ]{0,4}") {
            let tokenizer = sentencepiece();
            let mut ids = ids;
            ids.extend(text.bytes().map(|byte| BYTE + u32::from(byte)));
            let whole = tokenizer.reference_decode(&ids, true);
            if !whole.contains('\u{fffd}') {
                prop_assert_eq!(increments(&tokenizer, &ids, Beginning::Text).concat(), whole);
            }
        }
    }
}
