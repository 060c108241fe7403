//! The ids of a golden file (`tests/golden/README.md` says what it holds): what `baton logits` and the bench of devices
//! compute, for comparison with another implementation or another device.

use std::path::Path;

use serde::Deserialize;

use crate::{Config, ModelError};

/// One prompt, and what follows it whatever the model would say.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Case {
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// Ids that are fed one by one after it. The last is not fed: nothing is compared behind it.
    pub greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

impl Case {
    /// Reads the golden file at `path`. Errors when it is none, and when a case is empty, longer than the context of the
    /// model of `config`, or has an id that the model lacks.
    pub fn read(path: &Path, config: &Config) -> Result<Vec<Case>, ModelError> {
        let shown = path.display().to_string();
        let json = std::fs::read(path).map_err(|reason| ModelError::Io { path: shown.clone(), reason })?;
        let format = |reason| ModelError::Format { path: shown.clone(), reason };
        let File { cases } = serde_json::from_slice(&json).map_err(|error| format(error.to_string()))?;
        let wrong = cases.iter().enumerate().find_map(|(i, case)| Some((i, case.wrong(config)?)));
        match wrong {
            Some((i, reason)) => Err(format(format!("case {i}: {reason}"))),
            None => Ok(cases),
        }
    }

    /// Tokens that are computed in all.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.greedy.len().saturating_sub(1)
    }

    /// The ids that are fed after the prompt.
    pub fn fed(&self) -> &[u32] {
        self.greedy.split_last().map_or(&[], |(_, fed)| fed)
    }

    fn wrong(&self, config: &Config) -> Option<String> {
        if self.prompt.is_empty() || self.greedy.is_empty() {
            return Some("no ids".into());
        }
        let (tokens, context, vocab) = (self.tokens(), config.context, config.vocab_size);
        if tokens > context {
            return Some(format!("{tokens} tokens, the model's context is {context}"));
        }
        let id = self.prompt.iter().chain(&self.greedy).find(|id| **id as usize >= vocab)?;
        Some(format!("id {id} is not below the vocabulary of {vocab}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read of `cases` for a model of 8 ids and a context of 4 tokens.
    fn read(cases: &str) -> Result<Vec<Case>, String> {
        let config = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4}"#;
        let config = Config::parse("c", config.as_bytes()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("g");
        std::fs::write(&path, format!(r#"{{"steps": 2, "cases": [{cases}]}}"#)).unwrap();
        let cut = |error: ModelError| error.to_string().replace(&path.display().to_string(), "g");
        Case::read(&path, &config).map_err(cut)
    }

    #[test]
    fn ids_are_those_of_the_model() {
        let cases = read(r#"{"prompt": [1, 7], "greedy": [2, 3, 4], "margin": 0.5}"#).unwrap();
        assert_eq!((cases[0].tokens(), cases[0].fed()), (4, &[2, 3][..]));
        for (cases, reason) in [
            (r#"{"prompt": [], "greedy": [1]}"#, "case 0: no ids"),
            (r#"{"prompt": [1], "greedy": [1]}, {"prompt": [1], "greedy": []}"#, "case 1: no ids"),
            (r#"{"prompt": [1, 2, 3], "greedy": [1, 2, 3]}"#, "case 0: 5 tokens, the model's context is 4"),
            (r#"{"prompt": [8], "greedy": [1]}"#, "case 0: id 8 is not below the vocabulary of 8"),
        ] {
            assert_eq!(read(cases), Err(format!("g: {reason}")));
        }
        assert!(read(r#"{"prompt": [1]}"#).unwrap_err().starts_with("g: missing field `greedy`"));
    }
}
