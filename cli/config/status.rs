//! Settings of `baton status`.

use std::path::PathBuf;

use anyhow::Result;

use super::Entry;
use super::setting::settings;
use super::value::Secret;

settings! {
    /// Whom to ask.
    pub struct StatusSettings {
        /// The router's cluster address
        router: String ["HOST:PORT"] = "127.0.0.1:8001";
        /// Join token; better from a file
        token: Option<Secret> ["TOKEN"];
        /// File that holds the join token, or the cluster's secret
        token_file: Option<PathBuf> ["FILE"];
    }
}

impl StatusSettings {
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The token, read from where it is.
    pub fn entry(&self) -> Result<Entry> {
        super::entry(&self.token, self.token_file.as_deref())
    }
}
