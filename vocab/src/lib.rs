//! What token ids mean: their bytes, the special ids, and the identity that router and nodes compare at join.
//! The router turns ids into text with it; nodes only compare [`Vocab::identity`]. Every source of a vocabulary becomes a
//! [`TokenizerJson`] first, one file each (`gguf_file`, `tiktoken`), so that all give the same [`Token`]s.

mod gguf_file;
mod pieces;
mod split;
mod text_file;
mod tiktoken;
mod tokenizer;
mod tokenizer_json;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use gguf::GgufError;
use sha2::{Digest, Sha256};

pub use text_file::text_file;
pub use tokenizer::TokenizerJson;

/// Ids are below this, so that one absurd id in a file cannot ask for gigabytes (largest known vocabulary: 262,144).
pub const MAX_IDS: u32 = 1 << 24;

/// Ids are below so many for each token, and so many more: a table by id is made.
const IDS_PER_TOKEN: usize = 16;
const IDS_MORE: usize = 1 << 16;

/// Words that only one of two vocabularies may have, see [`Vocab::guesses_for`].
const WORDS_ALONE_MAX: usize = 128;

/// One entry of a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Token id.
    pub id: u32,
    /// The bytes that it stands for; may be a part of a UTF-8 character.
    pub bytes: Vec<u8>,
    /// A control token (`<|im_end|>`): its bytes are its name and no text.
    pub special: bool,
}

/// A vocabulary: ids to bytes, in order of id; ids may have gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocab {
    /// All bytes, in order of id.
    bytes: Vec<u8>,
    /// `[start, end)` in `bytes` by id; `None` where the id is not used.
    places: Vec<Option<(u32, u32)>>,
    /// Ascending.
    special: Vec<u32>,
}

/// Why a vocabulary could not be read.
#[derive(Debug, thiserror::Error)]
pub enum VocabError {
    /// The file cannot be read.
    #[error("{path}: {reason}")]
    Io {
        /// File.
        path: String,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {reason}")]
    Format {
        /// File.
        path: String,
        /// What disagreed.
        reason: String,
    },
    /// The same, of a GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

impl Vocab {
    /// Reads the vocabulary of the model at `path`, a directory or a GGUF file; see [`TokenizerJson::read`].
    pub fn read(path: &Path) -> Result<Vocab, VocabError> {
        let Some(TokenizerJson { path, json }) = TokenizerJson::read(path)? else {
            let reason = "no tokenizer.json, tiktoken.model or GGUF file is there".into();
            return Err(VocabError::Format { path: path.display().to_string(), reason });
        };
        let format = |reason| VocabError::Format { path: path.display().to_string(), reason };
        Vocab::from_tokenizer_json(&json).map_err(format)
    }

    /// Parses a Hugging Face `tokenizer.json`: byte-level BPE, or a SentencePiece conversion (BPE or Unigram). The
    /// error is one line without the file's name.
    pub fn from_tokenizer_json(json: &[u8]) -> Result<Vocab, String> {
        Vocab::new(tokenizer_json::tokens(json)?)
    }

    /// A vocabulary of `tokens` in any order. Errors when an id is given twice with unlike meaning, is not below
    /// [`MAX_IDS`], or is far above the number of tokens.
    pub fn new(tokens: impl IntoIterator<Item = Token>) -> Result<Vocab, String> {
        let mut by_id: BTreeMap<u32, Token> = BTreeMap::new();
        for token in tokens {
            if token.id >= MAX_IDS {
                return Err(format!("token id {} is not below {MAX_IDS}", token.id));
            }
            match by_id.entry(token.id) {
                Entry::Vacant(place) => {
                    place.insert(token);
                }
                Entry::Occupied(place) if *place.get() == token => {}
                Entry::Occupied(place) => {
                    return Err(format!(
                        "token id {} means both {:?} and {:?}",
                        token.id,
                        String::from_utf8_lossy(&place.get().bytes),
                        String::from_utf8_lossy(&token.bytes),
                    ));
                }
            }
        }
        let len = by_id.last_key_value().map_or(0, |(id, _)| *id as usize + 1);
        if len > IDS_PER_TOKEN * by_id.len() + IDS_MORE {
            return Err(format!("token id {} is too large for {} tokens", len - 1, by_id.len()));
        }
        let mut vocab = Vocab { bytes: Vec::new(), places: vec![None; len], special: Vec::new() };
        for (id, token) in by_id {
            let start = vocab.bytes.len();
            vocab.bytes.extend_from_slice(&token.bytes);
            let end =
                u32::try_from(vocab.bytes.len()).map_err(|_| "more than 4 GiB of tokens".to_string())?;
            vocab.places[id as usize] = Some((start as u32, end));
            if token.special {
                vocab.special.push(id);
            }
        }
        Ok(vocab)
    }

    /// One more than the largest id. A model's logits may be wider (padding), never narrower.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are no ids at all.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The bytes of `id`; `None` for an id that is not used.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.places.get(id as usize)?)?;
        Some(&self.bytes[start as usize..end as usize])
    }

    /// Whether `id` is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// The control tokens, ascending.
    pub fn special_ids(&self) -> &[u32] {
        &self.special
    }

    /// The id whose bytes are exactly `text`, the smallest where several are. Linear in the vocabulary: for start-up.
    pub fn id(&self, text: &str) -> Option<u32> {
        (0..self.len() as u32).find(|id| self.bytes(*id) == Some(text.as_bytes()))
    }

    /// Whether ids mean in `other` what they mean here, so that one model may guess for another: words of both have the same bytes,
    /// and few are in one alone. Control tokens and padding may differ. The error says what does not agree, this vocabulary's
    /// first. Source: `common_speculative_are_compatible` of llama.cpp, whose bound this is.
    pub fn guesses_for(&self, other: &Vocab) -> Result<(), String> {
        let mut alone = 0;
        for id in 0..self.len().max(other.len()) as u32 {
            let words = [self, other].map(|vocab| {
                let control = |bytes: &&[u8]| vocab.is_special(id) || looks_special(bytes);
                (vocab.bytes(id), vocab.bytes(id).is_some_and(|bytes| control(&bytes)))
            });
            match words {
                [(Some(here), false), (Some(there), false)] if here != there => {
                    let [here, there] = [here, there].map(String::from_utf8_lossy);
                    return Err(format!("token {id} is {here:?} in the one and {there:?} in the other"));
                }
                [(Some(_), false), (None, _)] | [(None, _), (Some(_), false)] => alone += 1,
                _ => {}
            }
        }
        match alone {
            0..=WORDS_ALONE_MAX => Ok(()),
            _ => Err(format!("{alone} tokens are in one of them alone, at most {WORDS_ALONE_MAX} may be")),
        }
    }

    /// SHA-256 over ids, bytes and special flags, in hex: equal for equal vocabularies, whatever file they came from. A name
    /// such as `<|x|>` counts as special: writers of GGUF files flag it so, whatever the original says.
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"vocab 1\n");
        for id in 0..self.len() as u32 {
            let Some(bytes) = self.bytes(id) else { continue };
            hash.update(id.to_le_bytes());
            hash.update([u8::from(self.is_special(id) || looks_special(bytes))]);
            hash.update((bytes.len() as u32).to_le_bytes());
            hash.update(bytes);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Whether a token's name is that of a control token. Source: `does_token_look_special` of llama.cpp's converter.
fn looks_special(name: &[u8]) -> bool {
    let within =
        |front: &str, back: &str| name.starts_with(front.as_bytes()) && name.ends_with(back.as_bytes());
    within("<|", "|>") || within("<｜", "｜>") || within("<unused", ">")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str, special: bool) -> Token {
        Token { id, bytes: text.as_bytes().to_vec(), special }
    }

    #[test]
    fn ids_with_gaps_keep_their_bytes() {
        let vocab = Vocab::new([token(5, "b", false), token(0, "a", false), token(7, "<s>", true)]).unwrap();
        assert_eq!(vocab.len(), 8);
        assert_eq!(vocab.bytes(0), Some(&b"a"[..]));
        assert_eq!(vocab.bytes(5), Some(&b"b"[..]));
        assert_eq!(vocab.bytes(4), None);
        assert_eq!(vocab.bytes(8), None);
        assert_eq!(vocab.special_ids(), [7]);
        assert!(vocab.is_special(7) && !vocab.is_special(5));
        assert_eq!(vocab.id("b"), Some(5));
        assert_eq!(vocab.id("c"), None);
    }

    #[test]
    fn identity_sees_bytes_ids_and_flags_but_not_order() {
        let base = || vec![token(0, "a", false), token(1, "bc", false)];
        let identity = |tokens: Vec<Token>| Vocab::new(tokens).unwrap().identity();
        let same = identity(base());
        assert_eq!(same.len(), 64);
        assert_eq!(identity(base().into_iter().rev().collect()), same);
        assert_ne!(identity(vec![token(0, "a", false), token(2, "bc", false)]), same);
        assert_ne!(identity(vec![token(0, "ab", false), token(1, "c", false)]), same);
        assert_ne!(identity(vec![token(0, "a", true), token(1, "bc", false)]), same);
        let flagged = |special| identity(vec![token(0, "<|a|>", special)]);
        assert_eq!(flagged(true), flagged(false));
    }

    /// Protects: a small model of the family may guess, whose table differs in padding and control tokens; none of another may.
    #[test]
    fn who_may_guess_for_whom() {
        let vocab = |more: Vec<Token>| {
            let words = (0..200).map(|id| token(id, &format!("w{id}"), false));
            Vocab::new(words.chain(more)).unwrap()
        };
        let large = vocab(vec![token(200, "<s>", true), token(201, "<|reserved_1|>", true)]);
        let small =
            vocab(vec![token(200, "<s>", true), token(201, "<|pad|>", false), token(205, "<think>", false)]);
        assert_eq!((small.guesses_for(&large), large.guesses_for(&small)), (Ok(()), Ok(())));
        let other = vocab(vec![token(200, "<s>", true), token(201, "x", false)]);
        let mut words: Vec<Token> = (0..200).map(|id| token(id, &format!("w{id}"), false)).collect();
        words[7].bytes = b"v7".to_vec();
        let foreign = Vocab::new(words).unwrap();
        assert_eq!(
            foreign.guesses_for(&other),
            Err("token 7 is \"v7\" in the one and \"w7\" in the other".into())
        );
        let short = Vocab::new((0..60).map(|id| token(id, &format!("w{id}"), false))).unwrap();
        let error = short.guesses_for(&large).unwrap_err();
        assert_eq!(error, "140 tokens are in one of them alone, at most 128 may be");
    }

    #[test]
    fn an_id_with_two_meanings_or_too_large_is_refused() {
        let error = Vocab::new([token(3, "a", false), token(3, "b", false)]).unwrap_err();
        assert_eq!(error, "token id 3 means both \"a\" and \"b\"");
        let error = Vocab::new([token(u32::MAX, "a", false)]).unwrap_err();
        assert_eq!(error, "token id 4294967295 is not below 16777216");
        let error = Vocab::new([token(0, "a", false), token(1 << 20, "b", false)]).unwrap_err();
        assert_eq!(error, "token id 1048576 is too large for 2 tokens");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Vocab::read(Path::new("no/such/dir")).unwrap_err().to_string();
        assert_eq!(error, "no/such/dir: no tokenizer.json, tiktoken.model or GGUF file is there");
    }

    #[test]
    fn a_pointer_in_place_of_a_file_is_named() {
        let folder = std::env::temp_dir().join(format!("baton-vocab-pointer-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("tokenizer.json"), "version https://git-lfs.github.com/spec/v1\n")
            .expect("a file");
        let error = Vocab::read(&folder).unwrap_err().to_string();
        std::fs::remove_dir_all(&folder).expect("cleans up");
        assert!(error.contains("tokenizer.json: ") && error.contains("`git lfs pull`"), "{error}");
    }
}
