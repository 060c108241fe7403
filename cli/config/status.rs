//! Settings of `baton status`.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::Entry;
use super::setting::settings;
use super::value::Secret;

settings! {
    /// Whom to ask.
    pub struct StatusSettings {
        /// The router's cluster address; of several the first that answers
        router: Vec<String> ["HOST:PORT,..."] = "127.0.0.1:8001";
        /// Join token; better from a file
        token: Option<Secret> ["TOKEN"];
        /// File that holds the join token, or the cluster's secret
        token_file: Option<PathBuf> ["FILE"];
    }
}

impl StatusSettings {
    fn check(&self) -> Result<()> {
        ensure!(!self.router.is_empty(), "router is empty: give the address of one");
        Ok(())
    }

    /// The token, read from where it is.
    pub fn entry(&self) -> Result<Entry> {
        super::entry(&self.token, self.token_file.as_deref())
    }
}
