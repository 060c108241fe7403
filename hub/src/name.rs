//! `ORG/NAME[:QUANT][@REV]`, parsed at the door: what is inside can be part of a path and of an address.

use std::fmt;
use std::str::FromStr;

use crate::HubError;

/// Longest owner or name, as on the hub.
const PART_MAX: usize = 96;

/// A model of the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    owner: String,
    name: String,
    quant: Option<String>,
    revision: Option<String>,
}

impl ModelName {
    /// `ORG/NAME`.
    pub fn repo(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// `NAME`, for people.
    pub fn short(&self) -> &str {
        &self.name
    }

    /// Which quantisation of a GGUF repository.
    pub fn quant(&self) -> Option<&str> {
        self.quant.as_deref()
    }

    /// Branch, tag or commit; `main` where none is named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The repository's directory in a cache.
    pub(crate) fn folder(&self) -> String {
        format!("models--{}--{}", self.owner, self.name)
    }
}

impl FromStr for ModelName {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let wrong = || HubError::Name { text: text.into() };
        let (rest, revision) = match text.split_once('@') {
            Some((rest, revision)) => (rest, Some(revision)),
            None => (text, None),
        };
        let (rest, quant) = match rest.split_once(':') {
            Some((rest, quant)) => (rest, Some(quant)),
            None => (rest, None),
        };
        let (owner, name) = rest.split_once('/').ok_or_else(wrong)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let part = |text: &str| {
            !text.is_empty()
                && text.len() <= PART_MAX
                && text.chars().all(plain)
                && !text.starts_with(['.', '-'])
                && !text.contains("..")
                // Two dashes separate owner and name in the cache.
                && !text.contains("--")
        };
        let branch = |text: &str| {
            text.len() <= PART_MAX
                && text.split('/').all(|part| !part.is_empty() && part.chars().all(plain))
                && !text.contains("..")
                && !text.starts_with(['.', '-'])
        };
        let ok = part(owner) && part(name) && quant.is_none_or(part) && revision.is_none_or(branch);
        if !ok {
            return Err(wrong());
        }
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Ok(ModelName {
            owner: owner.into(),
            name: name.into(),
            quant: owned(quant),
            revision: owned(revision),
        })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        if let Some(quant) = &self.quant {
            write!(f, ":{quant}")?;
        }
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_parts() {
        let name: ModelName = "unsloth/Qwen3-0.6B-GGUF:Q4_K_M@refs/pr/1".parse().unwrap();
        assert_eq!(
            (name.repo().as_str(), name.quant(), name.revision()),
            ("unsloth/Qwen3-0.6B-GGUF", Some("Q4_K_M"), "refs/pr/1")
        );
        assert_eq!(name.folder(), "models--unsloth--Qwen3-0.6B-GGUF");
        assert_eq!(name.to_string(), "unsloth/Qwen3-0.6B-GGUF:Q4_K_M@refs/pr/1");
        let plain: ModelName = "Qwen/Qwen3-0.6B".parse().unwrap();
        assert_eq!((plain.quant(), plain.revision(), plain.short()), (None, "main", "Qwen3-0.6B"));
    }

    /// A name becomes a directory and an address: nothing may lead out of either.
    #[test]
    fn nothing_leads_elsewhere() {
        for text in [
            "", "name", "a/b/c", "/b", "a/", "../b", "a/..", "./b", "a/b:", "a/b@", "a/b@../x", "a/b@x//y",
            "a b/c", "a/b?x", "a/b:q/4", "-a/b", "a--b/c", "a/b@-x", "~/models",
        ] {
            assert!(text.parse::<ModelName>().is_err(), "{text:?}");
        }
        assert_eq!(
            "x".parse::<ModelName>().unwrap_err().to_string(),
            "\"x\" is not a model's name: expected ORG/NAME, ORG/NAME:QUANT or ORG/NAME@REVISION"
        );
    }
}
