//! Watches a cluster come up: every node joined and ready, then a real step on every role. Called by `up`, which shows the
//! state meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster::{ClusterToken, NodeChannel, channel};
use proto::v1::StatusRequest;

use super::console::Console;
use crate::api::error_message;

/// Asked this often.
const INTERVAL: Duration = Duration::from_millis(150);
/// An answer takes no longer; a probe waits for the step that runs.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The cluster to watch.
pub struct Readiness {
    health: String,
    http: reqwest::Client,
    router: NodeChannel,
    /// Names that nodes join under.
    nodes: Vec<String>,
}

impl Readiness {
    /// The cluster whose router serves HTTP on `port` and nodes on `cluster_port`, both on loopback.
    pub fn new(port: u16, cluster_port: u16, token: &ClusterToken, nodes: Vec<String>) -> Result<Self> {
        let http =
            reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build().context("no HTTP client")?;
        let router = cluster::connect_lazy(&format!("127.0.0.1:{cluster_port}"), token)?;
        Ok(Readiness { health: format!("http://127.0.0.1:{port}/health"), http, router, nodes })
    }

    /// Returns once the cluster serves. Without a deadline of its own: a large model loads for minutes, and a process that
    /// gives up ends `up`.
    pub async fn wait(self, console: &Console) {
        let begun = Instant::now();
        while let Err(state) = self.look().await {
            console.progress(&format!("starting, {:.0} s: {state}", begun.elapsed().as_secs_f64()));
            tokio::time::sleep(INTERVAL).await;
        }
        console.end_progress();
    }

    /// What is still missing.
    async fn look(&self) -> Result<(), String> {
        let mut router = channel::cluster_client(self.router.clone());
        let status = tokio::time::timeout(TIMEOUT, router.status(StatusRequest {})).await;
        let Ok(Ok(status)) = status else { return Err("the router is not there yet".into()) };
        let members = status.into_inner().members;
        let is_ready = |name: &&String| {
            members.iter().any(|member| {
                member.join.as_ref().is_some_and(|join| join.name == **name)
                    && member.report.as_ref().is_some_and(|report| report.ready)
            })
        };
        let missing: Vec<_> = self.nodes.iter().filter(|name| !is_ready(name)).cloned().collect();
        if !missing.is_empty() {
            return Err(format!("waiting for {}", missing.join(", ")));
        }
        match self.http.get(&self.health).send().await {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => Err(error_message(answer).await),
            Err(_) => Err("the router does not serve yet".into()),
        }
    }
}
