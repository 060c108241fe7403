//! `--model`: a directory or file, or the name of a model on the hub. Called by every role and by `up`, which hand a path on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hub::{Hub, ModelName, Want};

use crate::config;
use crate::pull::Shown;

/// Where a model is on this machine, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// A directory, or a file.
    pub path: PathBuf,
    /// The name that it is served under unless told otherwise.
    pub name: String,
}

/// Finds `named` here, or in the hub's cache, or fetches what `want` says; `say` hears of a download that takes its time.
/// A directory of that name goes before the hub. Without `say` it is shown on standard error.
pub async fn locate(named: &Path, want: Want, say: Option<fn(&str)>) -> Result<Located> {
    let Some(name) = on_hub(named) else {
        require(named)?;
        return Ok(Located { path: named.into(), name: model_name(named) });
    };
    let settings = config::hub();
    let found = tokio::task::spawn_blocking({
        let name = name.clone();
        move || {
            let hub = Hub::new(settings);
            let shown = match &say {
                Some(say) => Shown::lines(name.to_string(), say),
                None => Shown::here(name.to_string()),
            };
            shown.during(|watch| hub.find(&name, &want, watch))
        }
    })
    .await?
    .with_context(|| format!("model {} (no file or directory of this name is here)", named.display()))?;
    Ok(Located { path: found.path, name: name.short().into() })
}

/// Errors when there is nothing at `named` that could be a model.
pub fn require(named: &Path) -> Result<()> {
    let shown = named.display();
    if !named.exists() {
        bail!("model {shown}: no such file or directory; on the Hugging Face hub models are named ORG/NAME");
    }
    // A config.json is enough for random weights.
    let config = named.extension().is_some_and(|end| end == "json") || named.join("config.json").exists();
    if config || gguf::find(named)?.is_some() {
        return Ok(());
    }
    match named.is_dir() {
        true => bail!("model {shown}: no config.json and no GGUF file in this directory"),
        false => bail!("model {shown}: neither a model's directory nor a GGUF file"),
    }
}

/// The name on the hub that `named` is; `None` when it is a path.
pub fn on_hub(named: &Path) -> Option<ModelName> {
    match named.exists() {
        true => None,
        false => named.to_str()?.parse().ok(),
    }
}

/// The name under which the model in `path` is served unless told otherwise: that of its directory, or of its GGUF file
/// (without the number of a part).
fn model_name(path: &Path) -> String {
    // A link's own name is its model's, whatever it leads to.
    if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
        // A blob of Ollama's is known by what is in it.
        let blob = || !path.is_dir() && gguf::find(path).is_ok_and(|file| file.is_some());
        let stem = name.strip_suffix(".gguf");
        if let Some(name) = stem.or_else(|| blob().then_some(name)) {
            return name.rsplit_once("-00001-of-").map_or(name, |(name, _)| name).to_owned();
        }
    }
    // `.` and `..` have a name, too.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let directory = if path.is_file() { path.parent().unwrap_or(&path) } else { &path };
    directory.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is here goes before what is elsewhere; what cannot be a name is a path.
    #[test]
    fn paths_and_names() {
        assert!(on_hub(Path::new("models/demo")).is_none(), "a directory of this project");
        assert_eq!(
            on_hub(Path::new("org/name:Q4_K_M")).map(|name| name.to_string()).as_deref(),
            Some("org/name:Q4_K_M")
        );
        for path in ["/nowhere/model", "./org/name", "../org/name", "name", "a/b/c", "~/x/y"] {
            assert!(on_hub(Path::new(path)).is_none(), "{path}");
        }
    }

    #[test]
    fn names_of_directories() {
        assert_eq!(model_name(Path::new("models/demo")), "demo");
        assert_eq!(model_name(Path::new("models/demo/README.md")), "demo");
        assert_eq!(model_name(Path::new("/nowhere/Qwen3-8B-Q4_K_M.gguf")), "Qwen3-8B-Q4_K_M");
        assert_eq!(model_name(Path::new("R1-Q4_K_M-00001-of-00009.gguf")), "R1-Q4_K_M");
        assert_eq!(model_name(Path::new("/nowhere/x")), "x");
    }
}
