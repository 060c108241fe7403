//! One role on this machine: `baton router`, `baton prefill`, `baton decode`. Logs and signals, then the role's own `serve`.

mod node;
mod router;

use std::path::Path;

use anyhow::Result;
use cluster::{Shutdown, process};
use hub::Want;

use crate::model::{self, Located};
use crate::supervised;

pub use node::{decode, prefill};
pub use router::router;

/// What every role does first. The returned token is cancelled by Ctrl-C, SIGTERM, and the end of the `up` that started us.
fn start(log: &str, format: process::LogFormat) -> Result<Shutdown> {
    process::init_logs(format, log)?;
    process::install_panic_hook();
    let shutdown = process::shutdown_on_signals()?;
    supervised::watch_parent(&shutdown);
    Ok(shutdown)
}

/// The model on this machine, fetched if need be; `None` when told to stop meanwhile.
async fn model(named: &Path, want: Want, shutdown: &Shutdown) -> Result<Option<Located>> {
    tokio::select! {
        found = model::locate(named, want, Some(|line| tracing::info!("{line}"))) => found.map(Some),
        () = shutdown.cancelled() => Ok(None),
    }
}
