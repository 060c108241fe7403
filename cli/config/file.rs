//! The settings file: found, read, and refused where it says something that no role knows.
//!
//! ```toml
//! token-file = "/etc/baton/token"   # for every role that has the setting
//! [decode]                          # for one role; goes before the above
//! kv-memory = "8GiB"
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cluster::small_file::{self, TEXT_BYTES_MAX};

use super::setting::{Kind, Setting};

/// A settings file's content, all of it known to some role.
#[derive(Debug)]
pub struct File {
    /// Where it was read.
    pub path: PathBuf,
    /// Values by (section, key); the section of the top level is empty.
    values: BTreeMap<(String, String), Vec<String>>,
}

/// The sections that a file may have, with the settings of each.
pub type Sections = [(&'static str, &'static [Setting])];

impl File {
    /// The file to use: the one that was named (an empty name means none), else `baton.toml` here, else the user's.
    pub fn find(named: Option<&Path>, env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
        if let Some(path) = named {
            return (!path.as_os_str().is_empty()).then(|| path.to_owned());
        }
        let user = match (env("XDG_CONFIG_HOME"), env("HOME")) {
            (Some(dir), _) if !dir.is_empty() => Some(PathBuf::from(dir)),
            (_, Some(home)) => Some(Path::new(&home).join(".config")),
            (_, None) => None,
        };
        let candidates = [Some(PathBuf::from("baton.toml")), user.map(|dir| dir.join("baton/baton.toml"))];
        candidates.into_iter().flatten().find(|path| path.is_file())
    }

    /// Reads and checks `path`.
    pub fn read(path: &Path, sections: &Sections) -> Result<File> {
        let text = small_file::text(path, TEXT_BYTES_MAX);
        Self::parse(path, &text.with_context(|| format!("cannot read {}", path.display()))?, sections)
    }

    /// Checks `text`: every section and key must be known, every value must be text, a number, a switch, or a list where several
    /// are taken.
    pub fn parse(path: &Path, text: &str, sections: &Sections) -> Result<File> {
        let at = path.display();
        let document: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let line =
                error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            anyhow::anyhow!("{at}, line {line}: {}", error.message())
        })?;
        let mut file = File { path: path.to_owned(), values: BTreeMap::new() };
        for (name, value) in document {
            if let toml::Value::Table(table) = value {
                let Some((section, settings)) = sections.iter().find(|(section, _)| *section == name) else {
                    let known = sections.iter().map(|(section, _)| *section).collect::<Vec<_>>().join(", ");
                    bail!("{at}: unknown section [{name}]; there are {known}");
                };
                for (key, value) in table {
                    let Some(setting) = settings.iter().find(|setting| setting.key == key) else {
                        bail!("{at}: unknown key {key} in [{section}]; `baton {section} --help` lists them");
                    };
                    file.insert(section, key, value, setting.kind == Kind::Many)?;
                }
                continue;
            }
            let mut same =
                sections.iter().flat_map(|(_, settings)| *settings).filter(|s| s.key == name).peekable();
            if same.peek().is_none() {
                bail!("{at}: unknown key {name}; `baton config show` lists them");
            }
            let many = same.all(|setting| setting.kind == Kind::Many);
            file.insert("", name, value, many)?;
        }
        Ok(file)
    }

    /// `many`: a list may stand there.
    fn insert(&mut self, section: &str, key: String, value: toml::Value, many: bool) -> Result<()> {
        let scalar = |value: toml::Value| match value {
            toml::Value::String(text) => Ok(text),
            toml::Value::Integer(number) => Ok(number.to_string()),
            toml::Value::Float(number) => Ok(number.to_string()),
            toml::Value::Boolean(on) => Ok(on.to_string()),
            other => bail!("{}: {key} cannot be a {}", self.path.display(), other.type_str()),
        };
        let values = match value {
            toml::Value::Array(_) if !many => {
                bail!("{}: {key} takes one value, not a list", self.path.display())
            }
            toml::Value::Array(list) => list.into_iter().map(scalar).collect::<Result<_>>()?,
            one => vec![scalar(one)?],
        };
        self.values.insert((section.into(), key), values);
        Ok(())
    }

    /// The role's own value, else that of the top level.
    pub fn get(&self, section: &str, key: &str) -> Option<&[String]> {
        let find = |section: &str| self.values.get(&(section.to_owned(), key.to_owned()));
        find(section).or_else(|| find("")).map(Vec::as_slice)
    }
}
