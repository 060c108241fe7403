//! Settings of `baton status`.

use std::path::PathBuf;

use anyhow::Result;
use cluster::ClusterToken;

use super::setting::settings;
use super::value::Secret;

settings! {
    /// Whom to ask.
    pub struct StatusSettings {
        /// The router's cluster address
        router: String ["HOST:PORT"] = "127.0.0.1:8001";
        /// Cluster token; better from a file
        token: Option<Secret> ["HEX"];
        /// File that holds the cluster token
        token_file: Option<PathBuf> ["FILE"];
    }
}

impl StatusSettings {
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The token, read from where it is.
    pub fn cluster_token(&self) -> Result<ClusterToken> {
        super::cluster_token(&self.token, self.token_file.as_deref())
    }
}
