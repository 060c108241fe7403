//! Text in and out: templates, tokenizing, detokenizing, stop strings, reasoning and tool calls. The gateway (`api`) is the only caller.

pub mod answer;
pub mod detokenizer;
pub mod generation;
pub mod gpt_oss;
pub mod json;
mod model_files;
pub mod pieces;
mod python;
pub mod stop;
pub mod strftime;
pub mod template;
pub mod tokenizer;

use std::path::{Path, PathBuf};

use gguf::{Gguf, GgufError};
use serde_json::{Map, Value};
use vocab::{TokenizerJson, VocabError};

pub use detokenizer::{Beginning, Detokenizer};
pub use generation::Defaults;
pub use stop::{StopMatcher, StopStrings};
pub use template::{Conversation, TemplateError, Templates};
pub use tokenizer::Tokenizer;

/// Why a model's text files cannot be used, or a text cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing or unreadable.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// Of the file.
        path: PathBuf,
        /// From the operating system.
        reason: String,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Malformed {
        /// Of the file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A chat template does not parse.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer failed on a text.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// The vocabulary is not what it should be.
    #[error(transparent)]
    Vocab(#[from] VocabError),
    /// A GGUF file is not what it should be.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

impl TextError {
    fn read(path: &Path, error: &std::io::Error) -> Self {
        Self::Read { path: path.into(), reason: error.to_string() }
    }

    fn malformed(path: &Path, reason: impl ToString) -> Self {
        Self::Malformed { path: path.into(), reason: reason.to_string() }
    }

    fn at(self, path: &Path) -> Self {
        match self {
            Self::Malformed { reason, .. } => Self::malformed(path, reason),
            other => other,
        }
    }
}

/// Everything about a model that is text.
#[derive(Debug)]
pub struct ModelText {
    /// Ids and text.
    pub tokenizer: Tokenizer,
    /// From a conversation to text.
    pub templates: Templates,
    /// Recommended sampling, and the ids that end an answer.
    pub defaults: Defaults,
}

impl ModelText {
    /// Reads the text side of the model at `path`. A directory has Hugging Face's files: a tokenizer (`tokenizer.json` or
    /// `tiktoken.model`), `tokenizer_config.json`, templates, `generation_config.json`, and in `config.json` the
    /// end-of-sequence ids. A GGUF file, alone or the only one of a directory, has all of it in its metadata; files beside
    /// it in the directory win. Reads files: call it off the async threads.
    pub fn load(path: &Path) -> Result<Self, TextError> {
        let Some(TokenizerJson { path: file, json }) = TokenizerJson::read(path)? else {
            let reason = "the model has no tokenizer: neither tokenizer.json, tiktoken.model nor a GGUF file";
            return Err(TextError::Read { path: path.into(), reason: reason.into() });
        };
        let tokenizer = Tokenizer::from_bytes(&json).map_err(|error| error.at(&file))?;
        let config_path = path.join("tokenizer_config.json");
        let config: Option<Map<String, Value>> = model_files::read_json(&config_path)?;
        let mut sources = model_files::templates(path, &config.clone().unwrap_or_default())?;
        let mut specials = config.as_ref().map(model_files::specials).unwrap_or_default();
        let generation_path = path.join("generation_config.json");
        let mut defaults = match model_files::read(&generation_path)? {
            Some(bytes) => {
                Defaults::parse(&bytes).map_err(|reason| TextError::malformed(&generation_path, reason))?
            }
            None => Defaults::default(),
        };
        if defaults.eos_ids.is_empty() {
            defaults.eos_ids = eos_of_model_config(&path.join("config.json"))?;
        }
        if let Some(file) = gguf::find(path)?.filter(|_| sources.is_empty() || defaults.eos_ids.is_empty()) {
            let gguf = Gguf::open(&file)?;
            let (templates, tokens) = model_files::of_gguf(&gguf)?;
            if sources.is_empty() {
                sources = templates;
            }
            if config.is_none() {
                specials = tokens;
            }
            if defaults.eos_ids.is_empty() {
                defaults.eos_ids = gguf::end_ids(gguf.metadata())?;
            }
        }
        let templates =
            if sources.is_empty() { Templates::none() } else { Templates::new(sources, specials.clone())? };
        // The tokenizer's own end token ends an answer too, whatever the model's files list.
        let own = specials.get("eos_token").and_then(Value::as_str).and_then(|name| tokenizer.id(name));
        let family = templates.source(true).and_then(answer::Family::of_template);
        let ends = family.map(answer::Family::ends).unwrap_or_default();
        for id in own.into_iter().chain(ends.iter().filter_map(|name| tokenizer.id(name))) {
            if !defaults.eos_ids.contains(&id) {
                defaults.eos_ids.push(id);
            }
        }
        // GGUF files cannot say that what ends the answers of others ends only a message of these.
        if family == Some(answer::Family::Harmony) {
            defaults.eos_ids.retain(|id| tokenizer.name(*id).as_deref() != Some("<|end|>"));
        }
        Ok(Self { tokenizer, templates, defaults })
    }

    /// The form of the model's answers, if its template teaches one that can be read.
    pub fn family(&self) -> Option<answer::Family> {
        self.templates.source(true).and_then(answer::Family::of_template)
    }

    /// True if the model reasons between tags before it answers.
    pub fn reasons(&self) -> bool {
        self.templates.source(false).is_some_and(|source| source.contains("</think>"))
    }

    /// True if the template asks for this variable.
    pub fn template_has(&self, variable: &str) -> bool {
        self.templates.source(false).is_some_and(|source| source.contains(variable))
    }

    /// True if the template itself knows the role `developer`; otherwise it is another name for `system`.
    pub fn knows_developer(&self) -> bool {
        self.templates.source(false).is_some_and(|source| source.contains("developer"))
    }
}

fn eos_of_model_config(path: &Path) -> Result<Vec<u32>, TextError> {
    #[derive(serde::Deserialize)]
    struct Config {
        eos_token_id: Option<generation::Ids>,
    }
    let config: Option<Config> = model_files::read_json(path)?;
    Ok(config.and_then(|config| config.eos_token_id).map(generation::Ids::into_vec).unwrap_or_default())
}
