//! Join tokens: what a machine is given to become part of a cluster. Of their secrets the file keeps digests only.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{hex, private_file, unhex};
use crate::small_file::{self, LIST_BYTES_MAX};

const FILE: &str = "join-tokens.json";
const PREFIX: &str = "baton-join";
const ID_BYTES: usize = 4;
const SECRET_BYTES: usize = 32;
/// A token file holds the token and perhaps a line end.
const TEXT_CHARS_MAX: usize = 4096;
/// Longest name.
const NAME_CHARS_MAX: usize = 64;

/// `baton-join-<id>-<secret>-<fingerprint of the authority>`. Its `Debug` form shows the id only.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub(super) id: [u8; ID_BYTES],
    pub(super) secret: [u8; SECRET_BYTES],
    pub(super) authority: [u8; 32],
}

impl JoinToken {
    /// Whether `text` is meant to be one.
    pub fn is_one(text: &str) -> bool {
        text.trim_start().starts_with(PREFIX)
    }

    /// The token as text, to be shown once.
    pub fn expose(&self) -> String {
        format!("{PREFIX}-{}-{}-{}", hex(&self.id), hex(&self.secret), hex(&self.authority))
    }

    fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.secret).into()
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let text = text.trim();
        let rest = text.strip_prefix(PREFIX).filter(|_| text.len() <= TEXT_CHARS_MAX);
        let mut parts = rest.and_then(|rest| rest.strip_prefix('-')).unwrap_or_default().split('-');
        let mut next = || parts.next().unwrap_or_default();
        let (id, secret, authority) = (next(), next(), next());
        match (unhex(id), unhex(secret), unhex(authority), parts.next()) {
            (Some(id), Some(secret), Some(authority), None) => Ok(JoinToken { id, secret, authority }),
            _ => Err(JoinTokenError::Text),
        }
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, secret)", hex(&self.id))
    }
}

/// Why there is no token. None of these shows one.
#[derive(Debug, thiserror::Error)]
pub enum JoinTokenError {
    /// Other text.
    #[error("not a join token: it begins with {PREFIX}- and is printed whole by `baton token create`")]
    Text,
    /// The file cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file holds something else.
    #[error("{}: {reason}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A name that would break a list.
    #[error("a token's name is 1 to {NAME_CHARS_MAX} letters, digits or any of . _ - @")]
    Name,
    /// Nothing of this name or id is left to revoke.
    #[error("no join token {which:?} that is not revoked yet")]
    Unknown {
        /// As given.
        which: String,
    },
    /// The system gives no random bytes.
    #[error("no random bytes for a token: {0}")]
    Random(String),
}

/// All join tokens of a cluster, in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Revoked ones, too.
    pub tokens: Vec<TokenRecord>,
}

/// One join token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// Hex; names the token in lists, logs and certificates.
    pub id: String,
    /// For people.
    pub name: String,
    /// SHA-256 of the secret, in hex.
    pub digest: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Lets nobody in from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<u64>,
    /// Since when it lets nobody in any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<u64>,
}

/// What a token may be named; else the error says so.
pub fn token_name(text: &str) -> Result<String, JoinTokenError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    match (1..=NAME_CHARS_MAX).contains(&text.len()) && text.chars().all(plain) {
        true => Ok(text.into()),
        false => Err(JoinTokenError::Name),
    }
}

impl Tokens {
    /// Those of the cluster in `folder`; none where there is no file yet.
    pub fn read(folder: &Path) -> Result<Tokens, JoinTokenError> {
        let path = folder.join(FILE);
        let bytes = match small_file::bytes(&path, LIST_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Tokens::default()),
            Err(error) => return Err(JoinTokenError::Io { path, error }),
        };
        serde_json::from_slice(&bytes)
            .map_err(|error| JoinTokenError::Format { path, reason: error.to_string() })
    }

    /// Changes those of the cluster in `folder`; one process at a time.
    pub fn change<T>(
        folder: &Path,
        change: impl FnOnce(&mut Tokens) -> Result<T, JoinTokenError>,
    ) -> Result<T, JoinTokenError> {
        let path = folder.join(FILE);
        let io = |error| JoinTokenError::Io { path: path.clone(), error };
        let _lock = private_file::lock(folder).map_err(io)?;
        let mut tokens = Tokens::read(folder)?;
        let value = change(&mut tokens)?;
        let text = serde_json::to_vec_pretty(&tokens).map_err(|error| io(error.into()))?;
        private_file::write(&path, &text).map_err(io)?;
        Ok(value)
    }

    /// Makes a token for the cluster of the authority with this fingerprint. Times are seconds since 1970.
    pub fn create(
        &mut self,
        name: &str,
        authority: [u8; 32],
        now: u64,
        expires: Option<u64>,
    ) -> Result<JoinToken, JoinTokenError> {
        token_name(name)?;
        let token = JoinToken { id: random()?, secret: random()?, authority };
        let (id, digest) = (hex(&token.id), hex(&token.digest()));
        self.tokens.push(TokenRecord { id, name: name.into(), digest, created: now, expires, revoked: None });
        Ok(token)
    }

    /// Revokes the token of this id, or the newest that is named so; returns its record.
    pub fn revoke(&mut self, which: &str, now: u64) -> Result<TokenRecord, JoinTokenError> {
        let active = self.tokens.iter_mut().rev().filter(|token| token.revoked.is_none());
        let mut found: Vec<&mut TokenRecord> =
            active.filter(|token| token.id == which || token.name == which).collect();
        found.sort_by_key(|token| token.id != which);
        let token = found.into_iter().next();
        let token = token.ok_or_else(|| JoinTokenError::Unknown { which: which.into() })?;
        token.revoked = Some(now);
        Ok(token.clone())
    }

    /// The record of a token that lets somebody in at `now`. Every digest is compared, whole.
    pub(super) fn admits(&self, token: &JoinToken, now: u64) -> Option<&TokenRecord> {
        let digest = token.digest();
        let mut found = None;
        for record in &self.tokens {
            let known: [u8; 32] = unhex(&record.digest).unwrap_or_default();
            let same = bool::from(known.ct_eq(&digest)) && record.id == hex(&token.id);
            if same && record.is_active(now) {
                found = Some(record);
            }
        }
        found
    }

    /// Whether nodes that came in by the token `id` still belong: revoked ones do not; one that has expired lets nobody in, but
    /// throws nobody out.
    pub(super) fn stands(&self, id: &str) -> bool {
        self.tokens.iter().any(|token| token.id == id && token.revoked.is_none())
    }
}

impl TokenRecord {
    /// Whether it lets somebody in at `now`, in seconds since 1970.
    pub fn is_active(&self, now: u64) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|expires| now < expires)
    }
}

fn random<const N: usize>() -> Result<[u8; N], JoinTokenError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| JoinTokenError::Random(error.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn text_is_read_whole_or_not_at_all() {
        let token = Tokens::default().create("a", [7; 32], 1, None).unwrap();
        let text = token.expose();
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&hex(&token.secret)));
        for wrong in [
            &text[..text.len() - 1],
            &format!("{text}-00"),
            &text.replace("baton-join", "baton"),
            "",
            "baton-join---",
        ] {
            assert!(wrong.parse::<JoinToken>().is_err(), "{wrong}");
        }
        assert!(JoinToken::is_one(&text) && !JoinToken::is_one(&"5e".repeat(32)));
    }

    /// A token lets in from its making to its end; the secret itself is nowhere.
    #[test]
    fn a_token_lives_and_ends() {
        let folder = std::env::temp_dir().join(format!("baton-join-tokens-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        private_file::folder(&folder).unwrap();
        assert_eq!(Tokens::read(&folder).unwrap(), Tokens::default());
        let make = |name: &str, expires| {
            Tokens::change(&folder, |tokens| tokens.create(name, [7; 32], 10, expires)).unwrap()
        };
        let (forever, short) = (make("a", None), make("b", Some(20)));
        assert!(!fs::read_to_string(folder.join(FILE)).unwrap().contains(&hex(&forever.secret)));

        let tokens = Tokens::read(&folder).unwrap();
        assert_eq!(tokens.admits(&short, 19).map(|record| record.name.as_str()), Some("b"));
        assert!(tokens.admits(&short, 20).is_none() && tokens.stands(&hex(&short.id)));
        let forged = JoinToken { secret: [0; SECRET_BYTES], ..forever.clone() };
        let other_id = JoinToken { id: short.id, ..forever.clone() };
        assert!(tokens.admits(&forged, 11).is_none() && tokens.admits(&other_id, 11).is_none());

        let revoked = Tokens::change(&folder, |tokens| tokens.revoke("a", 12)).unwrap();
        assert_eq!(revoked.id, hex(&forever.id));
        let tokens = Tokens::read(&folder).unwrap();
        assert!(tokens.admits(&forever, 13).is_none() && !tokens.stands(&revoked.id));
        assert!(Tokens::change(&folder, |tokens| tokens.revoke("a", 13)).is_err());
        assert!(Tokens::change(&folder, |tokens| tokens.create("a b", [7; 32], 1, None)).is_err());
        fs::remove_dir_all(folder).unwrap();
    }
}
