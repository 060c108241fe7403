//! Settings that baton shares with every tool of the Hugging Face hub: `HF_*`. Their names and defaults are those of
//! `huggingface_hub`, so that a model that one tool has fetched is there for the other.

use std::path::{Path, PathBuf};

use hub::{Patience, Settings, Token};

/// Pure: `env` looks variables up, `read` files.
pub fn settings(env: &dyn Fn(&str) -> Option<String>, read: &dyn Fn(&Path) -> Option<String>) -> Settings {
    let named = |name: &str| env(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let dir = |name: &str| named(name).map(PathBuf::from);
    let home = dir("HF_HOME").unwrap_or_else(|| {
        let cache = dir("XDG_CACHE_HOME").or_else(|| Some(dir("HOME")?.join(".cache")));
        cache.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
    });
    let cache = dir("HF_HUB_CACHE").or_else(|| dir("HUGGINGFACE_HUB_CACHE"));
    let token = named("HF_TOKEN").or_else(|| {
        // Where `hf auth login` leaves it.
        let path = dir("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        read(&path).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    });
    let is_on = |name: &str| {
        named(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
    };
    let endpoint = named("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
    Settings {
        endpoint: endpoint.trim_end_matches('/').into(),
        token: token.map(Token),
        cache: cache.unwrap_or_else(|| home.join("hub")),
        offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        patience: Patience::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Settings {
        let env =
            |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let read = |path: &Path| (path == Path::new("/hf/token")).then(|| "from-file\n".to_owned());
        settings(&env, &read)
    }

    /// The cache of other tools is found, in their order of precedence.
    #[test]
    fn where_the_cache_is() {
        let cache = |variables: &[(&str, &str)]| of(variables).cache.display().to_string();
        let home = ("HOME", "/me");
        assert_eq!(cache(&[home]), "/me/.cache/huggingface/hub");
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[home, ("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/x")]), "/hf/hub");
        assert_eq!(cache(&[home, ("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/c");
        assert_eq!(cache(&[home, ("HF_HOME", "")]), "/me/.cache/huggingface/hub");
    }

    #[test]
    fn token_endpoint_and_offline() {
        let token = |variables: &[(&str, &str)]| of(variables).token.map(|Token(token)| token);
        assert_eq!(token(&[("HOME", "/me")]), None);
        assert_eq!(token(&[("HF_HOME", "/hf")]).as_deref(), Some("from-file"));
        assert_eq!(token(&[("HF_HOME", "/hf"), ("HF_TOKEN", " t ")]).as_deref(), Some("t"));
        assert_eq!(of(&[]).endpoint, "https://huggingface.co");
        assert_eq!(of(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
        assert!(!of(&[("HF_HUB_OFFLINE", "0")]).offline);
        assert!(of(&[("HF_HUB_OFFLINE", "1")]).offline && of(&[("TRANSFORMERS_OFFLINE", "true")]).offline);
    }
}
