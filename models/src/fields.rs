//! Strict reading of `config.json`: every field is read by the architecture, known not to touch the computation, or an
//! error. A field that is ignored and changes the math would give a model that talks nonsense with a straight face.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::ModelError;

/// Sizes are below this, so that products of two of them never overflow.
const SIZE_MAX: u64 = 1 << 31;

/// Fields of Hugging Face configurations that do not touch the forward pass.
const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "aux_loss_alpha",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "ep_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_nextn_predict_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sep_token_id",
    "seq_aux",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Factors that some families have: 1 is as good as none.
const FACTORS: &[&str] = &[
    "attention_multiplier",
    "embedding_multiplier",
    "layernorm_full_attention_beta",
    "layernorm_linear_attention_beta",
    "layernorm_mlp_beta",
    "logit_scale",
    "logits_scaling",
    "partial_rotary_factor",
    "residual_multiplier",
];

/// The fields of one JSON object, and which of them were read.
pub(crate) struct Fields {
    path: String,
    /// `rope_scaling.` for a nested object.
    prefix: String,
    /// Whether this is a model's configuration, not an object in one.
    model: bool,
    map: Map<String, Value>,
    read: BTreeSet<&'static str>,
}

impl Fields {
    /// Parses `json`; `path` is for messages.
    pub(crate) fn parse(path: &str, json: &[u8]) -> Result<Fields, ModelError> {
        let format = |reason: String| ModelError::Format { path: path.into(), reason };
        match serde_json::from_slice(json) {
            Ok(Value::Object(map)) => Ok(Fields {
                path: path.into(),
                prefix: String::new(),
                model: true,
                map,
                read: BTreeSet::new(),
            }),
            Ok(_) => Err(format("not a JSON object".into())),
            Err(error) => Err(format(error.to_string())),
        }
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// An error about `field`.
    pub(crate) fn error(&self, field: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Field {
            path: self.path.clone(),
            field: format!("{}{field}", self.prefix),
            reason: reason.into(),
        }
    }

    /// The value of `field`, where present and not null.
    pub(crate) fn value(&mut self, field: &'static str) -> Option<&Value> {
        self.read.insert(field);
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is there, be it null.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    fn typed<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let result = read(value).ok_or_else(|| short(value));
        result.map(Some).map_err(|value| self.error(field, format!("{value} is not {expected}")))
    }

    /// A whole number in `[0, 2^31)`.
    pub(crate) fn opt_size(&mut self, field: &'static str) -> Result<Option<usize>, ModelError> {
        self.typed(field, "a whole number below 2^31", |value| {
            value.as_u64().filter(|number| *number < SIZE_MAX).map(|number| number as usize)
        })
    }

    /// A whole number in `[1, 2^31)`, which must be there.
    pub(crate) fn size(&mut self, field: &'static str) -> Result<usize, ModelError> {
        match self.opt_size(field)? {
            Some(0) => Err(self.error(field, "0 is not a size")),
            Some(size) => Ok(size),
            None => Err(self.error(field, "missing")),
        }
    }

    /// A finite number.
    pub(crate) fn opt_number(&mut self, field: &'static str) -> Result<Option<f64>, ModelError> {
        self.typed(field, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    /// A number greater than zero.
    pub(crate) fn opt_positive(&mut self, field: &'static str) -> Result<Option<f64>, ModelError> {
        match self.opt_number(field)? {
            Some(number) if number <= 0.0 => Err(self.error(field, format!("{number} is not positive"))),
            number => Ok(number),
        }
    }

    /// A number greater than zero, which must be there.
    pub(crate) fn positive(&mut self, field: &'static str) -> Result<f64, ModelError> {
        self.opt_positive(field)?.ok_or_else(|| self.error(field, "missing"))
    }

    /// `true` or `false`.
    pub(crate) fn flag(&mut self, field: &'static str, default: bool) -> Result<bool, ModelError> {
        Ok(self.opt_flag(field)?.unwrap_or(default))
    }

    /// `true` or `false`, where given.
    pub(crate) fn opt_flag(&mut self, field: &'static str) -> Result<Option<bool>, ModelError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A string that is one of `known`, or absent.
    pub(crate) fn one_of(&mut self, field: &'static str, known: &[&str]) -> Result<(), ModelError> {
        match self.opt_text(field)? {
            Some(text) if !known.contains(&text.as_str()) => {
                let known = known.join(", ");
                Err(self.error(field, format!("{text:?} is not supported (known: {known})")))
            }
            _ => Ok(()),
        }
    }

    /// Fields that do not touch the forward pass of this family.
    pub(crate) fn harmless(&mut self, names: &[&'static str]) {
        self.read.extend(names);
    }

    /// The fields that nobody read, in order of name.
    pub(crate) fn unread(&self) -> Vec<(String, Value)> {
        let unread = self.map.iter().filter(|(name, _)| !self.read.contains(name.as_str()));
        unread.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// The fields of an object that is the value of `field`.
    pub(crate) fn nested(&self, field: &str, map: Map<String, Value>) -> Fields {
        let prefix = format!("{}{field}.", self.prefix);
        Fields { path: self.path.clone(), prefix, model: false, map, read: BTreeSet::new() }
    }

    /// A string.
    pub(crate) fn opt_text(&mut self, field: &'static str) -> Result<Option<String>, ModelError> {
        self.typed(field, "a string", |value| value.as_str().map(str::to_string))
    }

    /// A list of whole numbers; none where absent.
    pub(crate) fn sizes(&mut self, field: &'static str) -> Result<Vec<usize>, ModelError> {
        let size = |value: &Value| value.as_u64().filter(|n| *n < SIZE_MAX).map(|n| n as usize);
        let sizes = self.typed(field, "a list of whole numbers", |value| {
            value.as_array()?.iter().map(size).collect::<Option<Vec<_>>>()
        })?;
        Ok(sizes.unwrap_or_default())
    }

    /// One token id or a list of them.
    pub(crate) fn ids(&mut self, field: &'static str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.typed(field, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// A nested object.
    pub(crate) fn opt_object(&mut self, field: &'static str) -> Result<Option<Fields>, ModelError> {
        let map = self.typed(field, "an object", |value| value.as_object().cloned())?;
        Ok(map.map(|map| self.nested(field, map)))
    }

    /// The configuration of a model within another's, as the value of `field`.
    pub(crate) fn opt_model(&mut self, field: &'static str) -> Result<Option<Fields>, ModelError> {
        Ok(self.opt_object(field)?.map(|fields| Fields { model: true, ..fields }))
    }

    /// Ends the reading: the first field that nobody read and that may change the computation is an error. Fields
    /// that say "off" (null, false, zero, empty) pass.
    pub(crate) fn finish(self) -> Result<(), ModelError> {
        for (name, value) in &self.map {
            let known = self.read.contains(name.as_str())
                || self.model && (HARMLESS.contains(&name.as_str()) || name.starts_with('_'))
                || FACTORS.contains(&name.as_str()) && value.as_f64() == Some(1.0);
            if !known && !off(value) {
                return Err(self.error(
                    name,
                    format!("{} is not supported: it may change the computation", short(value)),
                ));
            }
        }
        Ok(())
    }
}

/// Whether a value says that a feature is not used.
fn off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// A value in a message: at most 60 characters.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse("c.json", json.as_bytes()).unwrap()
    }

    #[test]
    fn unread_fields_that_may_matter_are_named() {
        let finish = |json: &str| fields(json).finish().map_err(|error| error.to_string());
        assert_eq!(
            finish(
                r#"{"use_cache": true, "_name": "x", "use_mrope": false, "logit_softcapping": null,
                       "num_experts": 0, "mlp_only_layers": [], "residual_multiplier": 1.0}"#
            ),
            Ok(())
        );
        assert_eq!(
            finish(r#"{"residual_multiplier": 0.22}"#),
            Err("c.json: residual_multiplier: 0.22 is not supported: it may change the computation".into())
        );
        assert_eq!(
            finish(r#"{"quantization": {"bits": 4}}"#),
            Err("c.json: quantization: {\"bits\":4} is not supported: it may change the computation".into())
        );
        let mut read = fields(r#"{"num_experts": 8}"#);
        assert_eq!(read.size("num_experts").unwrap(), 8);
        read.finish().unwrap();
    }

    #[test]
    fn wrong_values_are_named_with_what_was_expected() {
        let mut f = fields(r#"{"a": "x", "b": 0, "c": -1, "d": 4294967296, "e": {"f": []}, "g": null}"#);
        let text = |error: ModelError| error.to_string();
        assert_eq!(text(f.size("a").unwrap_err()), "c.json: a: \"x\" is not a whole number below 2^31");
        assert_eq!(text(f.size("b").unwrap_err()), "c.json: b: 0 is not a size");
        assert_eq!(text(f.size("c").unwrap_err()), "c.json: c: -1 is not a whole number below 2^31");
        assert_eq!(text(f.size("d").unwrap_err()), "c.json: d: 4294967296 is not a whole number below 2^31");
        assert_eq!(text(f.size("g").unwrap_err()), "c.json: g: missing");
        assert_eq!(text(f.positive("c").unwrap_err()), "c.json: c: -1 is not positive");
        let mut e = f.opt_object("e").unwrap().unwrap();
        assert_eq!(text(e.flag("f", true).unwrap_err()), "c.json: e.f: [] is not true or false");
    }
}
