//! Settings of `baton router`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::setting::settings;
use super::value::{Seconds, Secret, choice};

settings! {
    /// What a router is told.
    pub struct RouterSettings {
        /// Directory of the model: tokenizer and chat template are read, the weights are not
        model: PathBuf ["DIR"];
        /// Name that clients ask for [default: the directory's name]
        served_name: Option<String> ["NAME"];
        /// Address for HTTP clients
        host: IpAddr ["ADDRESS"] = "127.0.0.1";
        /// Port for HTTP clients
        port: u16 ["PORT"] = "8000";
        /// Where nodes join; gRPC
        cluster_bind: SocketAddr ["ADDRESS:PORT"] = "127.0.0.1:8001";
        /// Cluster token; better from a file, arguments are seen by every user of the machine
        token: Option<Secret> ["HEX"];
        /// File that holds the cluster token
        token_file: Option<PathBuf> ["FILE"];
        /// Keys that clients must show; none: no key is asked for
        api_key: Vec<Secret> ["KEY,..."];
        /// Who computes prompts: auto (whoever is estimated to be sooner), always (prefill nodes) or never
        disaggregation: Disaggregation ["MODE"] = "auto";
        /// Requests that may wait for room; more are refused with 429
        queue_max: usize ["REQUESTS"] = "1024";
        /// After a stop signal, running requests may go on for this long
        drain: Seconds ["SECONDS"] = "10";
        /// Serve other machines in clear and without API keys; for networks that are yours alone
        insecure: bool [""];
        /// Log filter, for instance info,router=debug
        log: String ["FILTER"] = "info";
        /// How log lines look: human or json
        log_format: cluster::process::LogFormat ["FORMAT"] = "human";
    }
}

/// Who computes prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disaggregation {
    /// Whoever is estimated to be sooner.
    Auto,
    /// Prefill nodes, as long as there are any.
    Always,
    /// Decode groups.
    Never,
}

impl Disaggregation {
    /// As it is written in settings.
    pub fn name(self) -> &'static str {
        match self {
            Disaggregation::Auto => "auto",
            Disaggregation::Always => "always",
            Disaggregation::Never => "never",
        }
    }
}

choice!(Disaggregation { "auto" => Disaggregation::Auto, "always" => Disaggregation::Always, "never" => Disaggregation::Never });
choice!(cluster::process::LogFormat {
    "human" => cluster::process::LogFormat::Human,
    "json" => cluster::process::LogFormat::Json,
});

impl RouterSettings {
    fn check(&self) -> Result<()> {
        ensure!(self.queue_max > 0, "queue-max is 0: no request could ever be served");
        ensure!(
            self.insecure || self.host.is_loopback() || !self.api_key.is_empty(),
            "refusing to serve {}:{} without API keys: give --api-key, bind a loopback address, or name the risk with --insecure",
            self.host,
            self.port
        );
        Ok(())
    }
}
