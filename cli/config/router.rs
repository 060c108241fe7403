//! Settings of `baton router`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use cluster::ClusterToken;
use cluster::process::LogFormat;
use router::placement::Disaggregation;
use router::text::answer::Family;

use super::Entry;
use super::setting::settings;
use super::value::{Name, Seconds, Secret, Size, choice};

settings! {
    /// What a router is told.
    pub struct RouterSettings {
        /// Directory or GGUF file of the model, or its name on the Hugging Face hub (ORG/NAME): tokenizer and chat template are read, the weights are not
        model: PathBuf ["MODEL"];
        /// Name that clients ask for [default: the directory's, or NAME]
        served_name: Option<Name> ["NAME"];
        /// Address for HTTP clients
        host: IpAddr ["ADDRESS"] = "127.0.0.1";
        /// Port for HTTP clients
        port: u16 ["PORT"] = "8000";
        /// Take HTTP clients from this listening socket, which whoever starts the router keeps open (systemd: 3): none is refused while it restarts
        listen_fd: Option<u32> ["NUMBER"];
        /// Where nodes join; gRPC
        cluster_bind: SocketAddr ["ADDRESS:PORT"] = "127.0.0.1:8001";
        /// Where the cluster's certificate authority and join tokens are kept [default: cluster in the user's data directory]
        cluster_dir: Option<PathBuf> ["DIR"];
        /// A secret that all processes share, in place of certificates; for networks that are yours alone
        token: Option<Secret> ["HEX"];
        /// File that holds that secret
        token_file: Option<PathBuf> ["FILE"];
        /// Keys that clients must show; none: no key is asked for
        api_key: Vec<Secret> ["KEY,..."];
        /// Form of the model's tool calls: auto (as its chat template says), none, hermes, llama3, deepseek, kimi_k2, minimax_m2, glm45, qwen3_coder or openai (gpt-oss)
        tool_parser: String ["NAME"] = "auto";
        /// Whether what the model writes between <think> tags is told apart: auto (as its chat template says), on or off
        reasoning_parser: String ["MODE"] = "auto";
        /// File of keys that `baton key` makes, with limits; changes are followed
        key_file: Option<PathBuf> ["FILE"];
        /// Certificate chain for HTTPS, in PEM; read again when it changes
        tls_cert: Option<PathBuf> ["FILE"];
        /// Private key of the certificate
        tls_key: Option<PathBuf> ["FILE"];
        /// HTTPS with a certificate of its own, made at the first start and kept in the user's data directory
        tls_self_signed: bool [""];
        /// Names that clients may reach this server by (the Host header) [default: on loopback its own; else any]
        allowed_host: Vec<String> ["NAME,..."];
        /// Origins of web pages that may call, such as https://chat.example, or * [default: none]
        allowed_origin: Vec<String> ["ORIGIN,..."];
        /// Where files and batch jobs are kept [default: batches/PORT in the user's data directory]
        batch_dir: Option<PathBuf> ["DIR"];
        /// Files and ended batches are deleted after so many days; 0: never
        batch_retention: u32 ["DAYS"] = "30";
        /// Largest file that a client may upload
        batch_file_max: Size ["SIZE"] = "1GiB";
        /// Who computes prompts: auto (whoever is estimated to be sooner), always (prefill nodes) or never
        disaggregation: Disaggregation ["MODE"] = "auto";
        /// Longest prompt and answer together [default: the model's]
        context: Option<u32> ["TOKENS"];
        /// Requests that may wait for room; more are refused with 429
        queue_max: usize ["REQUESTS"] = "1024";
        /// OpenTelemetry collector that spans are sent to, over OTLP/HTTP, such as http://127.0.0.1:4318 [default: no traces]
        otlp_endpoint: Option<String> ["URL"];
        /// Of requests without a traceparent, how many per cent are traced
        trace_percent: u32 ["PERCENT"] = "100";
        /// After a stop signal, running requests may go on for this long
        drain: Seconds ["SECONDS"] = "10";
        /// Let nodes join whose weights differ (same model, other format)
        allow_mixed_weights: bool [""];
        /// Serve other machines in clear and without API keys; for networks that are yours alone
        insecure: bool [""];
        /// Log filter, for instance info,router=debug
        log: String ["FILTER"] = "info";
        /// How log lines look: human or json
        log_format: LogFormat ["FORMAT"] = "human";
    }
}

choice!(Disaggregation { "auto" => Disaggregation::Auto, "always" => Disaggregation::Always, "never" => Disaggregation::Never });
choice!(LogFormat {
    "human" => LogFormat::Human,
    "json" => LogFormat::Json,
});

fn family_names() -> String {
    Family::ALL.map(Family::name).join(", ")
}

impl RouterSettings {
    fn check(&self) -> Result<()> {
        let percent = self.trace_percent;
        ensure!(percent <= 100, "trace-percent is {percent}: from 0 to 100");
        ensure!(self.queue_max > 0, "queue-max is 0: no request could ever be served");
        ensure!(
            self.insecure || self.host.is_loopback() || !self.api_key.is_empty() || self.key_file.is_some(),
            "refusing to serve {}:{} without API keys: make one with `baton key create` and give --key-file, bind a loopback address, or name the risk with --insecure",
            self.host,
            self.port
        );
        self.tool_family()?;
        self.reasons()?;
        let files = (self.tls_cert.is_some(), self.tls_key.is_some());
        ensure!(files.0 == files.1, "tls-cert and tls-key belong together: give both");
        ensure!(
            !(files.0 && self.tls_self_signed),
            "tls-cert and tls-self-signed are both set: give one of them"
        );
        ensure!(
            self.insecure || self.host.is_loopback() || files.0 || self.tls_self_signed,
            "refusing to serve {}:{} in clear: give --tls-cert and --tls-key, or --tls-self-signed, or name the risk with --insecure",
            self.host,
            self.port
        );
        Ok(())
    }

    /// The form of tool calls; `None`: as the chat template says; `Some(None)`: there are none.
    pub fn tool_family(&self) -> Result<Option<Option<Family>>> {
        match (self.tool_parser.as_str(), Family::named(&self.tool_parser)) {
            ("auto", _) => Ok(None),
            ("none", _) => Ok(Some(None)),
            (_, Some(family)) => Ok(Some(Some(family))),
            (name, None) => bail!("tool-parser is {name:?}: auto, none or one of {}", family_names()),
        }
    }

    /// Whether reasoning is told apart; `None`: as the chat template says.
    pub fn reasons(&self) -> Result<Option<bool>> {
        match self.reasoning_parser.as_str() {
            "auto" => Ok(None),
            "on" => Ok(Some(true)),
            "off" => Ok(Some(false)),
            mode => bail!("reasoning-parser is {mode:?}: auto, on or off"),
        }
    }

    /// Names that are served. A page on the web can give its own name the address of this machine and so reach a server on
    /// loopback (DNS rebinding): there only the names of loopback are served.
    pub fn hosts(&self) -> Vec<String> {
        let own = ["localhost".into(), "127.0.0.1".into(), "[::1]".into(), self.host.to_string()];
        match self.allowed_host.is_empty() && self.host.is_loopback() {
            true => own.into(),
            false => self.allowed_host.clone(),
        }
    }

    /// The secret that all processes share; `None`: there are certificates.
    pub fn secret(&self) -> Result<Option<ClusterToken>> {
        if self.token.is_none() && self.token_file.is_none() {
            return Ok(None);
        }
        ensure!(self.cluster_dir.is_none(), "cluster-dir and a token are both set: give one of them");
        match super::entry(&self.token, self.token_file.as_deref())? {
            Entry::Secret(secret) => Ok(Some(secret)),
            Entry::Join(_) => {
                bail!("a join token is for nodes: the router makes them (`baton token create`)")
            }
        }
    }
}
