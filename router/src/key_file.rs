//! The file of API keys: who has one and what they may use; of the keys themselves only digests. Written by `baton key`,
//! read by the gateway, which follows its changes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use cluster::small_file::{self, LIST_BYTES_MAX};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Random bytes of a key: nobody guesses it, so its digest needs neither salt nor work.
const KEY_BYTES: usize = 24;
/// Random bytes of an id, which is no secret.
const ID_BYTES: usize = 4;
/// Longest name.
const NAME_CHARS_MAX: usize = 64;

/// All keys, in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFile {
    /// Revoked ones, too: a list that forgets cannot be checked.
    pub keys: Vec<KeyRecord>,
}

/// One key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRecord {
    /// Hex; names the key in lists and logs.
    pub id: String,
    /// Whose it is.
    pub name: String,
    /// SHA-256 of the key, in hex.
    pub digest: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Since when it opens nothing any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<u64>,
    /// What it may use.
    #[serde(default)]
    pub limits: KeyLimits,
}

/// What the holder of a key may use; `None`: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLimits {
    /// Requests per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
    /// Requests at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrent: Option<u32>,
}

/// Why a file of keys cannot be used. None of these shows a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file cannot be read or written.
    #[error("key file {}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// It holds something else.
    #[error("key file {}: {reason}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A name that people could not tell apart, or that would break a list.
    #[error("a key's name is 1 to {NAME_CHARS_MAX} letters, digits or any of . _ - @")]
    Name,
    /// The name is in use.
    #[error("there is a key named {name} already: revoke it first, or take another name")]
    Taken {
        /// As given.
        name: String,
    },
    /// Nothing of this name or id is left to revoke.
    #[error("no key {which:?} that is not revoked yet")]
    Unknown {
        /// As given.
        which: String,
    },
    /// The system gives no random bytes.
    #[error("no random bytes for a key: {0}")]
    Random(String),
}

impl KeyFile {
    /// Reads `path`.
    pub fn read(path: &Path) -> Result<KeyFile, KeyFileError> {
        let io = |error| KeyFileError::Io { path: path.into(), error };
        let format = |reason: String| KeyFileError::Format { path: path.into(), reason };
        let text = small_file::bytes(path, LIST_BYTES_MAX).map_err(io)?;
        let file: KeyFile = serde_json::from_slice(&text).map_err(|error| format(error.to_string()))?;
        match file.keys.iter().find(|key| unhex(&key.digest).is_none()) {
            Some(key) => Err(format(format!("key {} has no SHA-256 digest", key.id))),
            None => Ok(file),
        }
    }

    /// Changes the file at `path`, which need not be there; one process at a time. Nobody ever reads half of it.
    pub fn change<T>(
        path: &Path,
        change: impl FnOnce(&mut KeyFile) -> Result<T, KeyFileError>,
    ) -> Result<T, KeyFileError> {
        let io = |error| KeyFileError::Io { path: path.into(), error };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(io)?;
        }
        let beside = |end: &str| {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(end);
            path.with_file_name(name)
        };
        let private =
            |path: &Path| File::options().create(true).truncate(true).write(true).mode(0o600).open(path);
        let lock = private(&beside(".lock")).map_err(io)?;
        lock.lock().map_err(io)?;
        let mut file = match KeyFile::read(path) {
            Err(KeyFileError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                KeyFile::default()
            }
            other => other?,
        };
        let value = change(&mut file)?;
        let text = serde_json::to_vec_pretty(&file).map_err(|error| io(error.into()))?;
        let aside = beside(".new");
        let write = || -> io::Result<()> {
            let mut out = private(&aside)?;
            out.write_all(&text)?;
            out.sync_all()?;
            fs::rename(&aside, path)
        };
        write().map_err(io)?;
        Ok(value)
    }

    /// Makes a key for `name` and returns it: it is shown once and kept nowhere. `now`: seconds since 1970.
    pub fn create(&mut self, name: &str, limits: KeyLimits, now: u64) -> Result<String, KeyFileError> {
        key_name(name)?;
        if self.keys.iter().any(|key| key.revoked.is_none() && key.name == name) {
            return Err(KeyFileError::Taken { name: name.into() });
        }
        let key = format!("sk-baton-{}", random::<KEY_BYTES>()?);
        let (id, digest) = (random::<ID_BYTES>()?, hex(&Sha256::digest(&key)));
        self.keys.push(KeyRecord { id, name: name.into(), digest, created: now, revoked: None, limits });
        Ok(key)
    }

    /// Revokes the key that is named so, or has this id; returns its record.
    pub fn revoke(&mut self, which: &str, now: u64) -> Result<KeyRecord, KeyFileError> {
        let mut active = self.keys.iter_mut().filter(|key| key.revoked.is_none());
        let key = active.find(|key| key.name == which || key.id == which);
        let key = key.ok_or_else(|| KeyFileError::Unknown { which: which.into() })?;
        key.revoked = Some(now);
        Ok(key.clone())
    }
}

/// What a key may be named; else the error says so.
pub fn key_name(text: &str) -> Result<String, KeyFileError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    match (1..=NAME_CHARS_MAX).contains(&text.len()) && text.chars().all(plain) {
        true => Ok(text.into()),
        false => Err(KeyFileError::Name),
    }
}

impl KeyRecord {
    /// The digest that opens; `None` once revoked.
    pub fn opens(&self) -> Option<[u8; 32]> {
        unhex(&self.digest).filter(|_| self.revoked.is_none())
    }
}

fn random<const N: usize>() -> Result<String, KeyFileError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| KeyFileError::Random(error.to_string()))?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("baton-keys-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    /// A key is made, kept as a digest in a private file, listed, and revoked.
    #[test]
    fn a_key_lives_and_ends() {
        let folder = folder("life");
        let path = folder.join("deep/keys.json");
        let limits = KeyLimits { concurrent: Some(2), ..KeyLimits::default() };
        let key = KeyFile::change(&path, |file| file.create("alice", limits, 10)).unwrap();
        KeyFile::change(&path, |file| file.create("bob", KeyLimits::default(), 11)).unwrap();
        assert!(key.starts_with("sk-baton-") && key.len() == 9 + 48);
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&key[9..]), "the key itself is in the file");
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);

        let file = KeyFile::read(&path).unwrap();
        assert_eq!((file.keys[0].name.as_str(), file.keys[0].limits), ("alice", limits));
        assert_eq!(file.keys[0].opens(), Some(Sha256::digest(&key).into()));
        let taken = KeyFile::change(&path, |file| file.create("alice", limits, 12)).unwrap_err();
        assert_eq!(
            taken.to_string(),
            "there is a key named alice already: revoke it first, or take another name"
        );

        let revoked = KeyFile::change(&path, |file| file.revoke("alice", 12)).unwrap();
        assert_eq!((revoked.opens(), revoked.revoked), (None, Some(12)));
        assert!(KeyFile::change(&path, |file| file.revoke("alice", 13)).is_err());
        // The name is free again; the id still tells them apart.
        let id = file.keys[1].id.clone();
        assert_eq!(KeyFile::change(&path, |file| file.revoke(&id, 13)).unwrap().name, "bob");
        KeyFile::change(&path, |file| file.create("alice", limits, 14)).unwrap();
        assert_eq!(KeyFile::read(&path).unwrap().keys.len(), 3);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let error = KeyFile::read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert_eq!(error, "key file /dev/zero: more than 16777216 bytes");
    }

    /// What is no file of keys is refused by name and never overwritten.
    #[test]
    fn other_files_are_refused() {
        let folder = folder("other");
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("keys.json");
        for text in [
            "",
            "[]",
            r#"{"keys": [{"id": "1"}]}"#,
            r#"{"keys": [], "more": 1}"#,
            r#"{"keys": [{"id": "1", "name": "a", "digest": "zz", "created": 1}]}"#,
        ] {
            fs::write(&path, text).unwrap();
            let error = KeyFile::change(&path, |file| file.create("a", KeyLimits::default(), 1)).unwrap_err();
            assert!(error.to_string().contains("keys.json: "), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        for name in ["", "a b", "a\n", "ü", &"x".repeat(65)] {
            assert!(KeyFile::default().create(name, KeyLimits::default(), 1).is_err(), "{name:?}");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
