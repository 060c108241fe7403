//! `baton prefill` and `baton decode`.
use crate::config::NodeSettings;
use anyhow::Result;
pub async fn prefill(settings: NodeSettings) -> Result<()> {
    super::start(&settings.log, settings.log_format)?.cancelled().await;
    Ok(())
}
pub async fn decode(settings: NodeSettings) -> Result<()> {
    prefill(settings).await
}
