//! Why a model could not be had, in one line that says what to do.

use std::fmt;
use std::path::PathBuf;

/// A number of bytes as people read it: `731 B`, `12.3 MB`, `1.64 TB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} B", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            1_000_000_000..1_000_000_000_000 => write!(f, "{:.2} GB", bytes / 1e9),
            _ => write!(f, "{:.2} TB", bytes / 1e12),
        }
    }
}

/// One line for the person who named a model.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Text that names no repository.
    #[error("{text:?} is not a model's name: expected ORG/NAME, ORG/NAME:QUANT or ORG/NAME@REVISION")]
    Name {
        /// As given.
        text: String,
    },
    /// No such repository, or none that a stranger may see.
    #[error("{repo} is not at {endpoint}; if it is private, set HF_TOKEN to a token that may read it")]
    NotFound {
        /// `ORG/NAME`.
        repo: String,
        /// Who was asked.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo} has no revision {revision:?}")]
    Revision {
        /// `ORG/NAME`.
        repo: String,
        /// As asked for.
        revision: String,
    },
    /// The repository lists no such file.
    #[error("{repo} has no file {file}")]
    File {
        /// `ORG/NAME`.
        repo: String,
        /// Name in the repository.
        file: String,
    },
    /// Terms must be accepted first, or the token is not of someone who did.
    #[error(
        "{repo} is gated: accept its terms at {endpoint}/{repo} and set HF_TOKEN to a token of that account{}",
        if *.token_given { " (the one that is set has no access)" } else { "" }
    )]
    Gated {
        /// `ORG/NAME`.
        repo: String,
        /// Who was asked.
        endpoint: String,
        /// A token was shown.
        token_given: bool,
    },
    /// The token is wrong.
    #[error("{endpoint} does not accept the token in HF_TOKEN (status {status})")]
    Token {
        /// Who was asked.
        endpoint: String,
        /// 401 or 403.
        status: u16,
    },
    /// Not in the cache, and the network must not be asked.
    #[error("{what} is not in the cache at {}, and HF_HUB_OFFLINE forbids to ask for it", cache.display())]
    Offline {
        /// Model as named.
        what: String,
        /// Cache directory.
        cache: PathBuf,
    },
    /// Nobody has answered.
    #[error(
        "{endpoint} cannot be reached: {reason}; offline, name a directory, a GGUF file or a model that is in the cache ({}); HF_ENDPOINT names a mirror",
        cache.display()
    )]
    Unreachable {
        /// Who was asked.
        endpoint: String,
        /// What the system said.
        reason: String,
        /// Cache directory.
        cache: PathBuf,
    },
    /// After others, nobody answers, or answers break off, again and again.
    #[error("{url}: {reason}, after {attempts} attempts")]
    Network {
        /// Address asked.
        url: String,
        /// What the last attempt ended with.
        reason: String,
        /// Attempts in a row that brought nothing.
        attempts: u32,
    },
    /// An answer that the protocol does not have.
    #[error("{url}: {reason}")]
    Protocol {
        /// Address asked.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// What arrived is not what was announced.
    #[error("{repo}: {file} arrived damaged twice: {what} is {got}, announced was {want}")]
    Damaged {
        /// `ORG/NAME`.
        repo: String,
        /// Name in the repository.
        file: String,
        /// `length` or a hash.
        what: &'static str,
        /// Of what arrived.
        got: String,
        /// As announced.
        want: String,
    },
    /// The disk is too small for it.
    #[error(
        "no space: {repo} is {total}, {there} of it are there already, {} are missing, and {} has {free} free",
        Bytes(total.0.saturating_sub(there.0)), path.display()
    )]
    Space {
        /// `ORG/NAME`.
        repo: String,
        /// Of all files asked for.
        total: Bytes,
        /// Downloaded before.
        there: Bytes,
        /// What the disk has left.
        free: Bytes,
        /// Cache directory.
        path: PathBuf,
    },
    /// Another process downloads the same file, and it does not grow.
    #[error("{} is locked by another process, and nothing has arrived for {seconds} s", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
        /// Since when.
        seconds: u64,
    },
    /// The cache cannot be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The repository holds no model that can be served.
    #[error("{repo}: {reason}")]
    Select {
        /// `ORG/NAME`.
        repo: String,
        /// What is missing, and what there is.
        reason: String,
    },
}

impl HubError {
    /// Whether asking somewhere else, or later, may help: the hub could not be asked.
    pub fn is_network(&self) -> bool {
        matches!(self, HubError::Unreachable { .. } | HubError::Network { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Refusals do their sums in front of the user.
    #[test]
    fn space_shows_its_arithmetic() {
        let error = HubError::Space {
            repo: "o/n".into(),
            total: Bytes(5_000_000_000),
            there: Bytes(1_200_000_000),
            free: Bytes(3_000_000),
            path: "/c".into(),
        };
        assert_eq!(
            error.to_string(),
            "no space: o/n is 5.00 GB, 1.20 GB of it are there already, 3.80 GB are missing, and /c has 3.0 MB free"
        );
    }

    #[test]
    fn bytes_for_people() {
        let shown = [999, 1_000, 12_345_678, 1_640_000_000_000].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(shown, ["999 B", "1.0 kB", "12.3 MB", "1.64 TB"]);
    }
}
