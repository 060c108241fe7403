//! Models by name: `ORG/NAME` from the Hugging Face hub, kept in the cache that the other tools of that ecosystem share.
//! Called by the command line only, before a role starts; the rooms behind it know directories and files.
//!
//! The protocol is spoken here rather than through a client library: a broken download must go on where it stopped, and
//! nothing may get into the cache whose length and hash were not checked. Blocking: not for async threads.
//!
//! ```text
//! name.rs      ORG/NAME[:QUANT][@REV]
//! select.rs    which of a repository's files a model needs (pure)
//! remote.rs    requests: list, ask, read a range
//! download.rs  one file, resumed and verified
//! cache.rs     blobs, snapshots, refs and locks on disk
//! pull.rs      a model: what is there, what is missing, get it
//! ```

mod cache;
mod digest;
mod download;
mod error;
mod name;
mod pull;
mod remote;
mod select;
mod space;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use error::{Bytes, HubError};
pub use name::ModelName;
pub use pull::{Event, Found, Hub, Peek, Want, Watch};
pub use select::{Weights, index_files, weights};

/// Where models are and who asks for them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The hub, without a slash at the end: `https://huggingface.co` or a mirror.
    pub endpoint: String,
    /// Shown to the endpoint, and to nobody that it redirects to.
    pub token: Option<Token>,
    /// The directory that holds `models--ORG--NAME`.
    pub cache: PathBuf,
    /// Never ask the network.
    pub offline: bool,
    /// How long to go on when the network does not.
    pub patience: Patience,
}

/// How a bad connection is borne.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts in a row that bring nothing before a file is given up.
    pub attempts: u32,
    /// Pause after the first of them; doubled after each further one.
    pub pause: Duration,
    /// Longest silence of a connection.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { attempts: 6, pause: Duration::from_millis(500), silence: Duration::from_secs(30) }
    }
}

/// An access token of the hub; never printed.
#[derive(Clone)]
pub struct Token(pub String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(set)")
    }
}
