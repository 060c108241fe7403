//! One role on this machine: `baton router`, `baton prefill`, `baton decode`. Logs, signals, then the role's own `serve`.

use anyhow::Result;
use cluster::process;
use tokio_util::sync::CancellationToken;

use crate::config::{NodeSettings, RouterSettings};
use crate::supervised;

/// Runs a router until a stop signal.
pub async fn router(settings: RouterSettings) -> Result<()> {
    let shutdown = start(&settings.log, settings.log_format)?;
    shutdown.cancelled().await;
    Ok(())
}

/// Runs a prefill node until a stop signal.
pub async fn prefill(settings: NodeSettings) -> Result<()> {
    let shutdown = start(&settings.log, settings.log_format)?;
    shutdown.cancelled().await;
    Ok(())
}

/// Runs one rank of a decode group until a stop signal.
pub async fn decode(settings: NodeSettings) -> Result<()> {
    let shutdown = start(&settings.log, settings.log_format)?;
    shutdown.cancelled().await;
    Ok(())
}

/// What every role does first. The returned token is cancelled by Ctrl-C, SIGTERM, and the end of the `up` that started us.
fn start(log: &str, format: process::LogFormat) -> Result<CancellationToken> {
    process::init_logs(format, log)?;
    process::install_panic_hook();
    let shutdown = process::shutdown_on_signals()?;
    supervised::watch_parent(&shutdown);
    Ok(shutdown)
}
