//! `generation_config.json`: which tokens end an answer, and how the model's authors would sample. The router puts these
//! where a request says nothing.

use std::path::Path;

use crate::fields::Fields;
use crate::{Config, ModelError, config};

/// Defaults of generation; `None` where the file says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Tokens that end an answer: of this file, else of `config.json`.
    pub eos_ids: Vec<u32>,
    /// Whether to sample at all; `Some(false)` is greedy.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most likely ids kept.
    pub top_k: Option<u32>,
    /// Least probability kept, relative to the most likely id's.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of ids seen.
    pub repetition_penalty: Option<f32>,
}

impl Generation {
    /// Reads `generation_config.json` of the model directory `dir`; a directory without one has the end tokens of
    /// `config` alone.
    pub fn read(dir: &Path, config: &Config) -> Result<Generation, ModelError> {
        let file = dir.join("generation_config.json");
        let path = file.display().to_string();
        match vocab::text_file(&file) {
            Ok(json) => Generation::parse(&path, &json, config),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Generation { eos_ids: config.eos_ids.clone(), ..Generation::default() })
            }
            Err(reason) => Err(ModelError::Io { path, reason }),
        }
    }

    /// Parses the text of a `generation_config.json`; `path` is for messages. Unknown fields are left alone: they do
    /// not touch the model.
    pub fn parse(path: &str, json: &[u8], config: &Config) -> Result<Generation, ModelError> {
        let mut fields = Fields::parse(path, json)?;
        let mut eos_ids = config::eos_ids(&mut fields, config.vocab_size)?;
        if eos_ids.is_empty() {
            eos_ids.clone_from(&config.eos_ids);
        }
        let mut number = |field| fields.opt_number(field).map(|number| number.map(|number| number as f32));
        Ok(Generation {
            eos_ids,
            temperature: number("temperature")?,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
            top_k: fields.opt_size("top_k")?.map(|count| count as u32),
            do_sample: fields.value("do_sample").and_then(|value| value.as_bool()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_file_counts_before_the_configuration() {
        let config = br#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 5}"#;
        let config = Config::parse("c", config).unwrap();
        let parse = |json: &str| Generation::parse("g", json.as_bytes(), &config);
        let given = parse(
            r#"{"eos_token_id": [7, 9], "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
            "transformers_version": "4.51"}"#,
        );
        let want = Generation {
            eos_ids: vec![7, 9],
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            min_p: None,
            repetition_penalty: None,
        };
        assert_eq!(given.unwrap(), want);
        assert_eq!(parse("{}").unwrap(), Generation { eos_ids: vec![5], ..Generation::default() });
        assert_eq!(
            parse(r#"{"temperature": "hot"}"#).unwrap_err().to_string(),
            "g: temperature: \"hot\" is not a number"
        );
    }
}
