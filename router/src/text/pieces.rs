//! What each id contributes to text: a table of bytes, made once from the tokenizer's vocabulary and decoder, so that
//! detokenizing a token is a copy of a few bytes. Used by `detokenizer` and for the tokens of log probabilities.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

/// An id's part in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// An id without a token (the vocabulary is padded).
    None,
    /// Bytes; characters may continue in the next piece.
    Bytes(&'a [u8]),
    /// One byte of a character that the vocabulary lacks (`<0xE2>`).
    Byte(u8),
    /// A token that is markup, not text; its name.
    Special(&'a [u8]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Bytes,
    Byte,
    Special,
}

/// How the decoder of a family joins pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joining {
    /// Pieces are arbitrary bytes (byte-level BPE); otherwise each but `Piece::Byte` is whole characters.
    pub byte_level: bool,
    /// Spaces that a text loses at its very beginning (SentencePiece puts one before the first word).
    pub leading_spaces: usize,
}

/// The table.
#[derive(Debug)]
pub struct Pieces {
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1] .. ends[id]]` are of this id.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    joining: Joining,
    longest: usize,
}

/// The decoder cannot be rendered in this way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("decoder {0} of tokenizer.json is not supported")]
pub struct UnsupportedDecoder(pub String);

/// What a decoder does to one token, and to the whole.
#[derive(Debug)]
struct Plan {
    byte_level: bool,
    byte_fallback: bool,
    replacements: Vec<(String, String)>,
    leading_spaces: usize,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Decoder {
    ByteLevel,
    Sequence { decoders: Vec<Value> },
    Replace { pattern: Pattern, content: String },
    ByteFallback,
    Fuse,
    Strip { content: char, start: usize, stop: usize },
    Metaspace { replacement: char, prepend_scheme: Option<String> },
}

#[derive(Deserialize)]
enum Pattern {
    String(String),
}

impl Plan {
    /// `decoder`: as in tokenizer.json.
    fn new(decoder: &Value) -> Result<Self, UnsupportedDecoder> {
        let mut plan =
            Self { byte_level: false, byte_fallback: false, replacements: Vec::new(), leading_spaces: 0 };
        plan.add(decoder)?;
        // Byte-level pieces are joined before they are text: nothing else can be done to one of them.
        if plan.byte_level && (plan.byte_fallback || !plan.replacements.is_empty() || plan.leading_spaces > 0)
        {
            return Err(UnsupportedDecoder(decoder.to_string()));
        }
        Ok(plan)
    }

    fn add(&mut self, decoder: &Value) -> Result<(), UnsupportedDecoder> {
        let unsupported = || UnsupportedDecoder(decoder.to_string());
        match Decoder::deserialize(decoder).map_err(|_| unsupported())? {
            Decoder::ByteLevel => self.byte_level = true,
            Decoder::Sequence { decoders } => return decoders.iter().try_for_each(|inner| self.add(inner)),
            Decoder::Replace { pattern: Pattern::String(pattern), content } => {
                self.replacements.push((pattern, content))
            }
            Decoder::ByteFallback => self.byte_fallback = true,
            Decoder::Fuse => {}
            Decoder::Strip { content: ' ', start, stop: 0 } => self.leading_spaces = start,
            Decoder::Strip { .. } => return Err(unsupported()),
            Decoder::Metaspace { replacement, prepend_scheme } => {
                self.replacements.push((replacement.to_string(), " ".to_string()));
                if prepend_scheme.as_deref() != Some("never") {
                    self.leading_spaces = usize::MAX;
                }
            }
        }
        Ok(())
    }
}

impl Pieces {
    /// `tokens[id]`: the token's name in the vocabulary, and whether it is special. `decoder`: as in tokenizer.json.
    /// Errors when the decoder is of a kind that no supported family has.
    pub fn new(tokens: &[Option<(String, bool)>], decoder: &Value) -> Result<Self, UnsupportedDecoder> {
        let plan = Plan::new(decoder)?;
        let byte_of = byte_level_alphabet();
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(tokens.len()),
            kinds: Vec::with_capacity(tokens.len()),
            joining: Joining { byte_level: plan.byte_level, leading_spaces: plan.leading_spaces },
            longest: 1,
        };
        for token in tokens {
            let start = pieces.bytes.len();
            let kind = match token {
                None => Kind::None,
                Some((name, special)) => {
                    let fallback = if plan.byte_fallback { fallback_byte(name) } else { None };
                    match fallback {
                        Some(byte) if !special => {
                            pieces.bytes.push(byte);
                            Kind::Byte
                        }
                        _ => {
                            pieces.push_text(name, &plan, &byte_of);
                            if *special { Kind::Special } else { Kind::Bytes }
                        }
                    }
                }
            };
            pieces.longest = pieces.longest.max(pieces.bytes.len() - start);
            pieces.ends.push(pieces.bytes.len() as u32);
            pieces.kinds.push(kind);
        }
        Ok(pieces)
    }

    fn push_text(&mut self, name: &str, plan: &Plan, byte_of: &HashMap<char, u8>) {
        if plan.byte_level {
            let bytes: Option<Vec<u8>> = name.chars().map(|c| byte_of.get(&c).copied()).collect();
            // A name with a character outside of the alphabet is an added token: its name is its text.
            self.bytes.extend(bytes.unwrap_or_else(|| name.as_bytes().to_vec()));
        } else {
            let text =
                plan.replacements.iter().fold(name.to_string(), |text, (from, to)| text.replace(from, to));
            self.bytes.extend_from_slice(text.as_bytes());
        }
    }

    /// What the id contributes.
    pub fn get(&self, id: u32) -> Piece<'_> {
        let index = id as usize;
        let Some(&kind) = self.kinds.get(index) else { return Piece::None };
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        let bytes = &self.bytes[start..self.ends[index] as usize];
        match kind {
            Kind::None => Piece::None,
            Kind::Bytes => Piece::Bytes(bytes),
            Kind::Byte => Piece::Byte(bytes[0]),
            Kind::Special => Piece::Special(bytes),
        }
    }

    /// The bytes of an id, markup included; empty for an id without a token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        &self.bytes[start..end as usize]
    }

    /// How pieces are joined.
    pub fn joining(&self) -> &Joining {
        &self.joining
    }

    /// Ids in the table.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// True without any id.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Bytes of the longest token: a text of more than `longest * n` bytes has more than n tokens.
    pub fn longest(&self) -> usize {
        self.longest
    }
}

fn fallback_byte(name: &str) -> Option<u8> {
    let hex = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on.
/// Source: openai/gpt-2, encoder.py, bytes_to_unicode.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| {
            let itself = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if itself { u32::from(byte) } else { next };
            next += u32::from(!itself);
            (char::from_u32(code).unwrap_or('\0'), byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn byte_level_names_become_bytes() {
        let tokens: Vec<_> =
            ["Ġhi", "ðŁĻĤ", "Ã", "<｜User｜>"].map(|name| Some((name.to_string(), false))).into();
        let pieces = Pieces::new(&tokens, &json!({"type": "ByteLevel"})).expect("supported");
        assert_eq!(pieces.get(0), Piece::Bytes(b" hi"));
        assert_eq!(pieces.get(1), Piece::Bytes("🙂".as_bytes()));
        assert_eq!(pieces.get(2), Piece::Bytes(&[0xc3]));
        assert_eq!(pieces.get(3), Piece::Bytes("<｜User｜>".as_bytes()));
        assert_eq!((pieces.get(4), pieces.longest()), (Piece::None, "<｜User｜>".len()));
    }

    #[test]
    fn decoders_that_cannot_be_followed_are_named() {
        for decoder in [
            json!({"type": "WordPiece"}),
            json!({"type": "Strip", "content": "x", "start": 1, "stop": 0}),
            json!(null),
        ] {
            let error = Pieces::new(&[], &decoder).expect_err("unsupported");
            assert_eq!(error.0, decoder.to_string());
        }
        let mixed =
            json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]});
        assert!(Pieces::new(&[], &mixed).is_err());
    }
}
