//! Where the text side of a model lies: chat templates and the names of special tokens, in Hugging Face's files or in the
//! metadata of a GGUF file. Called by [`super::ModelText::load`].

use std::io::ErrorKind;
use std::path::Path;

use gguf::Gguf;
use serde_json::{Map, Value};

use super::TextError;

/// Names and texts of templates, `default` among them unless there are none.
pub(super) type Sources = Vec<(String, String)>;

const DEFAULT: &str = "default";

/// Most templates of their own files, and the longest in bytes; the longest known has 20 KB.
const TEMPLATES_MAX: usize = 64;
const TEMPLATE_BYTES_MAX: u64 = 4 << 20;

/// The bytes of a file, where there is one.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match vocab::text_file(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(TextError::read(path, &error)),
    }
}

/// A file of JSON, where there is one.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, TextError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| TextError::malformed(path, error))
}

/// `bos_token`, `eos_token` and the like of a tokenizer_config.json, each a string or an object with `content`.
pub(super) fn specials(config: &Map<String, Value>) -> Map<String, Value> {
    config
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
            Some((name.clone(), Value::from(text)))
        })
        .collect()
}

/// The templates of a directory: `chat_template.jinja` and those in `additional_chat_templates/`, which are named by their
/// files, win over `chat_template` of tokenizer_config.json, a text or a list of named texts.
pub(super) fn templates(dir: &Path, config: &Map<String, Value>) -> Result<Sources, TextError> {
    let mut sources = of_config(&dir.join("tokenizer_config.json"), config)?;
    let mut files = vec![(DEFAULT.to_string(), dir.join("chat_template.jinja"))];
    if let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) {
        let paths = entries.flatten().map(|entry| entry.path());
        let jinja = paths.filter(|path| path.extension().is_some_and(|end| end == "jinja"));
        let name = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        files.extend(jinja.take(TEMPLATES_MAX).map(|path| (name(&path), path)));
    }
    for (name, path) in files {
        if std::fs::metadata(&path).is_ok_and(|data| data.len() > TEMPLATE_BYTES_MAX) {
            return Err(TextError::malformed(
                &path,
                format!("a template of more than {TEMPLATE_BYTES_MAX} bytes"),
            ));
        }
        let Some(bytes) = read(&path)? else { continue };
        let source = String::from_utf8(bytes).map_err(|error| TextError::malformed(&path, error))?;
        sources.retain(|(other, _)| *other != name);
        sources.push((name, source));
    }
    Ok(sources)
}

fn of_config(path: &Path, config: &Map<String, Value>) -> Result<Sources, TextError> {
    let wrong = || TextError::malformed(path, "chat_template is neither a text nor a list of named texts");
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![(DEFAULT.into(), source.clone())]),
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

/// Templates and special tokens of a GGUF file.
pub(super) fn of_gguf(gguf: &Gguf) -> Result<(Sources, Map<String, Value>), TextError> {
    let metadata = gguf.metadata();
    let mut sources = Sources::new();
    if let Some(source) = metadata.text("tokenizer.chat_template")? {
        sources.push((DEFAULT.into(), source.into()));
    }
    for name in metadata.texts("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(source) = metadata.text(&format!("tokenizer.chat_template.{name}"))? {
            sources.push((name.clone(), source.into()));
        }
    }
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let mut specials = Map::new();
    for (name, key) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        let id = metadata.count(&format!("tokenizer.ggml.{key}_token_id"))?;
        if let Some(text) = id.and_then(|id| tokens.get(usize::try_from(id).ok()?)) {
            specials.insert(format!("{name}_token"), Value::from(text.as_str()));
        }
    }
    Ok((sources, specials))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn files_of_their_own_win_by_name() {
        let dir = std::env::temp_dir().join(format!("templates-{}", std::process::id()));
        let more = dir.join("additional_chat_templates");
        std::fs::create_dir_all(&more).expect("a directory");
        let config = json!({"chat_template": [
            {"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, {"name": "rag", "template": "c"}
        ]});
        let config = config.as_object().expect("an object");
        let of = |name: &str| {
            let sources = templates(&dir, config).expect("templates");
            sources.into_iter().find(|(other, _)| other == name).map(|(_, source)| source)
        };
        assert_eq!(of("default").as_deref(), Some("a"));
        std::fs::write(dir.join("chat_template.jinja"), "d").expect("written");
        std::fs::write(more.join("tool_use.jinja"), "e").expect("written");
        std::fs::write(more.join("notes.txt"), "f").expect("written");
        assert_eq!(
            [of("default"), of("tool_use"), of("rag"), of("notes")].map(|s| s.unwrap_or_default()),
            ["d", "e", "c", ""]
        );
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
