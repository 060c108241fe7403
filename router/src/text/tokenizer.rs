//! Ids from text, and text from ids, with the model's own tokenizer.json. Callers encode on a blocking thread.
//!
//! Special tokens written out in a text are parsed to their ids wherever they stand, in a client's words too, as Hugging
//! Face and vLLM do.

use std::path::Path;
use std::sync::Arc;

use super::TextError;
use super::detokenizer::decode;
use super::pieces::Pieces;

/// A tokenizer and its table of pieces.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Arc<Pieces>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} ids)", self.pieces.len())
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    pub fn load(path: &Path) -> Result<Self, TextError> {
        let bytes = vocab::text_file(path).map_err(|error| TextError::read(path, &error))?;
        Self::from_bytes(&bytes).map_err(|error| error.at(path))
    }

    /// From the bytes of a `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        let wrong = |reason: String| TextError::Malformed { path: "tokenizer.json".into(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| wrong(error.to_string()))?;
        // What a training run left there has no place in serving: prompts are checked, never cut.
        inner.with_truncation(None).map_err(|error| wrong(error.to_string()))?;
        inner.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        let ids = inner.get_vocab(true).values().copied().max().map_or(0, |id| id + 1);
        let tokens: Vec<_> = (0..ids)
            .map(|id| {
                let special = added.get(&id).is_some_and(|token| token.special);
                inner.id_to_token(id).map(|name| (name, special))
            })
            .collect();
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|error| wrong(error.to_string()))?;
        let pieces = Pieces::new(&tokens, &decoder).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { inner, pieces: Arc::new(pieces) })
    }

    /// Ids of a text. `add_special`: with what the model wants around a text (a begin token); a rendered chat has it already.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|error| TextError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids. `skip_special`: without markup tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        decode(&self.pieces, ids, skip_special)
    }

    /// The id of a token, by its name in the vocabulary.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// The name of an id in the vocabulary.
    pub fn name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// What ids contribute to text.
    pub fn pieces(&self) -> &Arc<Pieces> {
        &self.pieces
    }

    /// The library's own decoding, which ours is compared with.
    #[cfg(test)]
    pub(crate) fn reference_decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).expect("decodable")
    }
}
