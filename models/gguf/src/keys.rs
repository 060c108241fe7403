//! Strict reading of an architecture's keys: every one is read by its family, known not to touch the computation, or an
//! error. A key that is ignored and changes the math would give a model that talks nonsense with a straight face.

use std::cell::RefCell;
use std::collections::BTreeSet;

use crate::{Gguf, GgufError, List, Value};

/// Keys that do not touch the forward pass, without the architecture's prefix.
const HARMLESS: &[&str] = &[
    // Of the norm that subtracts the mean, which no family here has.
    "attention.layer_norm_epsilon",
    "block_count_full",
    "context_length",
    "decoder_start_token_id",
    "embedding_length_per_head",
    "pooling_type",
    // How positions of pictures are told apart; of text they are all the same. The second is Ollama's word.
    "rope.dimension_sections",
    "rope.mrope_section",
    "rope.scaling.finetuned",
    "suppress_tokens",
    "tensor_data_layout",
    "vocab_size",
];

/// Factors that 1 leaves alone.
const FACTORS: &[&str] = &[
    "attention.output_scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scale_linear",
];

const CAUSAL: &str = "attention.causal";

/// The keys of one architecture, and which of them were read.
pub(crate) struct Keys<'g> {
    pub(crate) gguf: &'g Gguf,
    /// `qwen3moe.`
    prefix: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'g> Keys<'g> {
    pub(crate) fn new(gguf: &'g Gguf, architecture: &str) -> Self {
        Keys { gguf, prefix: format!("{architecture}."), read: RefCell::default() }
    }

    fn key(&self, key: &str) -> String {
        let key = format!("{}{key}", self.prefix);
        self.read.borrow_mut().insert(key.clone());
        key
    }

    /// An error about the architecture's `key`.
    pub(crate) fn error(&self, key: &str, reason: impl Into<String>) -> GgufError {
        self.gguf.metadata().error(&format!("{}{key}", self.prefix), reason)
    }

    /// A whole number; a list (one per layer) counts when all its items are equal.
    pub(crate) fn opt_count(&self, key: &str) -> Result<Option<u64>, GgufError> {
        let full = self.key(key);
        let list: Vec<i128> = match self.gguf.metadata().get(&full) {
            Some(Value::List(List::Unsigned(list))) => list.iter().map(|n| (*n).into()).collect(),
            Some(Value::List(List::Signed(list))) => list.iter().map(|n| (*n).into()).collect(),
            _ => return self.gguf.metadata().count(&full),
        };
        match list.first().map(|first| (u64::try_from(*first), list.iter().all(|n| n == first))) {
            Some((Ok(first), true)) => Ok(Some(first)),
            _ => Err(self.error(key, "layers that differ are not supported")),
        }
    }

    /// A whole number that must be there.
    pub(crate) fn count(&self, key: &str) -> Result<u64, GgufError> {
        self.opt_count(key)?.ok_or_else(|| self.error(key, "missing"))
    }

    pub(crate) fn opt_number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.gguf.metadata().number(&self.key(key))
    }

    pub(crate) fn number(&self, key: &str) -> Result<f64, GgufError> {
        self.opt_number(key)?.ok_or_else(|| self.error(key, "missing"))
    }

    pub(crate) fn opt_flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.gguf.metadata().flag(&self.key(key))
    }

    pub(crate) fn opt_text(&self, key: &str) -> Result<Option<&'g str>, GgufError> {
        self.gguf.metadata().text(&self.key(key))
    }

    /// Ends the reading: the first key of the architecture that nobody read and that may change the computation is an
    /// error. Keys that say "off" (false, zero, empty) pass.
    pub(crate) fn finish(self) -> Result<(), GgufError> {
        let read = self.read.borrow();
        for (key, value) in self.gguf.metadata().iter() {
            let Some(short) = key.strip_prefix(&self.prefix) else { continue };
            let known = read.contains(key)
                || HARMLESS.contains(&short)
                || FACTORS.contains(&short) && value.as_number() == Some(1.0)
                // The one feature that is on unless it is said to be off.
                || if short == CAUSAL { *value == Value::Flag(true) } else { off(value) };
            if !known {
                let reason = format!("{} is not supported: it may change the computation", value.short());
                return Err(self.error(short, reason));
            }
        }
        Ok(())
    }
}

/// Whether a value says that a feature is not used.
fn off(value: &Value) -> bool {
    match value {
        Value::Flag(flag) => !flag,
        Value::Text(text) => text.is_empty() || text == "none",
        Value::List(List::Unsigned(list)) => list.iter().all(|number| *number == 0),
        Value::List(List::Signed(list)) => list.iter().all(|number| *number == 0),
        Value::List(list) => list.is_empty(),
        number => number.as_number() == Some(0.0),
    }
}
