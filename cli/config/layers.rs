//! Where a value comes from: flag, then environment, then file, then default. Pure: the environment is an argument.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, anyhow};

use super::file::File;
use super::setting::{Kind, Setting, Value};

/// The layers over the defaults.
pub struct Layers<'a> {
    /// Values given on the command line, by key.
    pub flags: &'a BTreeMap<String, Vec<String>>,
    /// The environment.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// The settings file, if there is one.
    pub file: Option<&'a File>,
}

/// Effective values of one role.
pub struct Values {
    /// In the order of the role's list.
    pub entries: Vec<Entry>,
}

/// One setting's effective value.
pub struct Entry {
    /// Which setting.
    pub setting: &'static Setting,
    /// What was given; `None` when nothing was.
    pub raw: Option<Vec<String>>,
    /// By whom.
    pub source: Source,
}

/// Who gave a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--key`.
    Flag(String),
    /// This variable.
    Env(String),
    /// This file.
    File(PathBuf),
    /// The built-in default, or nobody.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Flag(key) => write!(f, "--{key}"),
            Source::Env(name) => f.write_str(name),
            Source::File(path) => write!(f, "{}", path.display()),
            Source::Default => f.write_str("default"),
        }
    }
}

impl Values {
    /// Takes each setting of `table` from the first layer that has it. `section` is the role's table in the file.
    pub fn resolve(table: &'static [Setting], section: &str, layers: &Layers) -> Values {
        let entry = |setting: &'static Setting| {
            let (raw, source) = if let Some(raw) = layers.flags.get(&setting.key) {
                (Some(raw.clone()), Source::Flag(setting.key.clone()))
            } else if let Some(text) = (layers.env)(&setting.variable()) {
                (Some(split(setting.kind, &text)), Source::Env(setting.variable()))
            } else if let Some((file, raw)) =
                layers.file.and_then(|f| Some((f, f.get(section, &setting.key)?)))
            {
                (Some(raw.to_vec()), Source::File(file.path.clone()))
            } else {
                (setting.default.map(|text| split(setting.kind, text)), Source::Default)
            };
            Entry { setting, raw, source }
        };
        Values { entries: table.iter().map(entry).collect() }
    }

    /// Parses the setting of the struct field `field`. The error names the setting, its value and who gave it.
    pub fn get<T: Value>(&self, field: &str) -> Result<T> {
        let key = field.replace('_', "-");
        let entry = self.entries.iter().find(|e| e.setting.key == key);
        let entry = entry.ok_or_else(|| anyhow!("{key} is not a setting of this role"))?;
        T::from_raw(entry.raw.as_deref()).map_err(|expected| match &entry.raw {
            None => {
                let variable = entry.setting.variable();
                anyhow!("{key} is not set: give --{key}, {variable}, or {key} in baton.toml")
            }
            Some(_) => anyhow!("{key} = {} ({}): {expected}", entry.shown(), entry.source),
        })
    }
}

impl Entry {
    /// The value for people, as TOML where it can be; secrets redacted.
    pub fn shown(&self) -> String {
        let Some(raw) = &self.raw else {
            return if self.setting.kind == Kind::Switch { "false" } else { "(not set)" }.into();
        };
        if self.setting.secret {
            return "(set)".into();
        }
        let quote = |text: &String| {
            let plain = text.parse::<i64>().is_ok() || text.parse::<bool>().is_ok();
            if plain { text.clone() } else { format!("{text:?}") }
        };
        match (self.setting.kind, raw.last()) {
            (Kind::Many, _) => format!("[{}]", raw.iter().map(quote).collect::<Vec<_>>().join(", ")),
            (_, Some(last)) => quote(last),
            (_, None) => "\"\"".into(),
        }
    }
}

/// One text from environment or default as a list of values.
pub fn split(kind: Kind, text: &str) -> Vec<String> {
    match kind {
        Kind::Many => text.split(',').map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned).collect(),
        Kind::One | Kind::Switch => vec![text.to_owned()],
    }
}
