//! One role on this machine: `baton router`, `baton prefill`, `baton decode`. Logs and signals, then the role's own `serve`.

mod node;
mod router;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use cluster::traces::{TraceConfig, Tracer};
use cluster::{ClusterToken, EnrollError, Shutdown, process};
use hub::Want;

use crate::config::Entry;
use crate::model::{self, Located};
use crate::{supervised, system};

pub use node::{decode, prefill, prepare};
pub use router::router;

/// At its end a process has this long to send the spans that wait.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Between two attempts to reach a router that is away.
const ENROLL_PAUSE: Duration = Duration::from_secs(1);

/// Attempts between two lines about a router that is away.
const ENROLL_SAID_EVERY: u32 = 10;

/// What every role does first. The returned token is cancelled by Ctrl-C, SIGTERM, and the end of the `up` that started us.
fn start(log: &str, format: process::LogFormat) -> Result<Shutdown> {
    process::init_logs(format, log)?;
    process::install_panic_hook();
    system::allow_open_files();
    let shutdown = process::shutdown_on_signals()?;
    supervised::watch_parent(&shutdown);
    Ok(shutdown)
}

/// Sends spans to `endpoint`, if there is one.
fn tracer(endpoint: Option<String>, service: &'static str, name: &str, percent: u32) -> Result<Tracer> {
    let config = |endpoint| TraceConfig { endpoint, service, instance: name.into(), percent };
    Ok(endpoint.map(config).map(Tracer::start).transpose()?.unwrap_or_default())
}

/// The model on this machine, fetched if need be; `None` when told to stop meanwhile.
async fn model(named: &Path, want: Want, shutdown: &Shutdown) -> Result<Option<Located>> {
    tokio::select! {
        found = model::locate(named, want, Some(|line| tracing::info!("{line}"))) => found.map(Some),
        () = shutdown.cancelled() => Ok(None),
    }
}

/// What a node is part of the cluster by: given, or got from one of its routers, which may be away for as long as they like. `None`
/// when told to stop meanwhile.
async fn enter(entry: Entry, routers: &[String], shutdown: &Shutdown) -> Result<Option<ClusterToken>> {
    let token = match entry {
        Entry::Secret(secret) => return Ok(Some(secret)),
        Entry::Join(token) => token,
    };
    for (attempt, router) in (0u32..).zip(routers.iter().cycle()) {
        let enrolled = tokio::select! {
            enrolled = cluster::enroll(router, &token) => enrolled,
            () = shutdown.cancelled() => return Ok(None),
        };
        match enrolled {
            Ok(secret) => return Ok(Some(secret)),
            Err(error @ EnrollError::Away { .. }) => {
                if attempt % ENROLL_SAID_EVERY == 1 {
                    tracing::warn!("no certificate yet, trying on: {error}");
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = tokio::time::sleep(ENROLL_PAUSE) => {}
            () = shutdown.cancelled() => return Ok(None),
        }
    }
    Ok(None)
}
