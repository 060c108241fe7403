//! Text in and out: templates, tokenizing, detokenizing, stop strings, reasoning and tool calls. The gateway (`api`) is the only caller.

pub mod answer;
pub mod detokenizer;
pub mod generation;
pub mod json;
pub mod pieces;
pub mod stop;
pub mod strftime;
pub mod template;
pub mod tokenizer;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

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
    /// Reads a model's folder: `tokenizer.json` (required), `tokenizer_config.json`, `chat_template.jinja`,
    /// `generation_config.json`, and of `config.json` the end-of-sequence ids, each in Hugging Face's layout. Reads files: call
    /// it off the async threads.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
        let config_path = dir.join("tokenizer_config.json");
        let config: Map<String, Value> = read_json(&config_path)?.unwrap_or_default();
        let specials = special_tokens(&config);
        let sources = template_sources(dir, &config_path, &config)?;
        let templates =
            if sources.is_empty() { Templates::none() } else { Templates::new(sources, specials.clone())? };
        let generation_path = dir.join("generation_config.json");
        let mut defaults = match read(&generation_path)? {
            Some(bytes) => {
                Defaults::parse(&bytes).map_err(|reason| TextError::malformed(&generation_path, reason))?
            }
            None => Defaults::default(),
        };
        if defaults.eos_ids.is_empty() {
            defaults.eos_ids = eos_of_model_config(&dir.join("config.json"))?;
        }
        // The tokenizer's own end token ends an answer too, whatever the model's files list.
        let own = specials.get("eos_token").and_then(Value::as_str).and_then(|name| tokenizer.id(name));
        if let Some(id) = own.filter(|id| !defaults.eos_ids.contains(id)) {
            defaults.eos_ids.push(id);
        }
        Ok(Self { tokenizer, templates, defaults })
    }

    /// The form of the model's tool calls, if its template teaches one that can be read.
    pub fn tool_family(&self) -> Option<answer::Family> {
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

fn read(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::read(path, &error)),
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, TextError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| TextError::malformed(path, error))
}

/// `bos_token`, `eos_token` and the like, each a string or an object with `content`.
fn special_tokens(config: &Map<String, Value>) -> Map<String, Value> {
    config
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
            Some((name.clone(), Value::from(text)))
        })
        .collect()
}

/// A file of its own wins over `tokenizer_config.json`, where the value is a text or a list of named texts.
fn template_sources(
    dir: &Path,
    config_path: &Path,
    config: &Map<String, Value>,
) -> Result<Vec<(String, String)>, TextError> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = read(&path)? {
        let source = String::from_utf8(bytes).map_err(|error| TextError::malformed(&path, error))?;
        return Ok(vec![("default".into(), source)]);
    }
    let wrong =
        || TextError::malformed(config_path, "chat_template is neither a text nor a list of named texts");
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![("default".into(), source.clone())]),
        Some(Value::Array(named)) => named
            .iter()
            .map(|entry| {
                let text = |key: &str| entry.get(key).and_then(Value::as_str).map(String::from);
                Some((text("name")?, text("template")?))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(wrong),
        Some(_) => Err(wrong()),
    }
}

fn eos_of_model_config(path: &Path) -> Result<Vec<u32>, TextError> {
    #[derive(serde::Deserialize)]
    struct Config {
        eos_token_id: Option<generation::Ids>,
    }
    let config: Option<Config> = read_json(path)?;
    Ok(config.and_then(|config| config.eos_token_id).map(generation::Ids::into_vec).unwrap_or_default())
}
