//! `baton prefill` and `baton decode`: settings into a node's configuration, then its `serve`.

use anyhow::{Context, Result};
use backend::{CpuOptions, CudaOptions};
use cluster::Shutdown;
use hub::Want;
use node::{GroupConfig, LoadFormat, NodeConfig};

use crate::config::NodeSettings;
use crate::system;

/// A reservation without progress lapses after this; a sender that lives says something every second.
const LAND_DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);

/// What a rank needs before anything else: called by `main` while it is the only thread.
pub fn prepare(settings: &NodeSettings) {
    let group = GroupConfig { world: settings.tp, rank: settings.rank, leader: settings.leader.clone() };
    // SAFETY: no thread has been started.
    unsafe { node::prepare(settings.backend, &group) };
}

/// Runs one rank of a prefill node until a stop signal.
pub async fn prefill(settings: NodeSettings) -> Result<()> {
    let Some((config, shutdown)) = start(settings, "prefill").await? else { return Ok(()) };
    let tracer = config.tracer.clone();
    let served = prefill_node::serve(config, shutdown).await;
    tracer.flush(super::LAST_SPANS);
    Ok(served?)
}

/// Runs one rank of a decode group until a stop signal.
pub async fn decode(settings: NodeSettings) -> Result<()> {
    let Some((config, shutdown)) = start(settings, "decode").await? else { return Ok(()) };
    let tracer = config.tracer.clone();
    let served = decode_node::serve(config, shutdown).await;
    tracer.flush(super::LAST_SPANS);
    Ok(served?)
}

/// `None`: told to stop before there was anything to serve.
async fn start(settings: NodeSettings, role: &str) -> Result<Option<(NodeConfig, Shutdown)>> {
    let shutdown = super::start(&settings.log, settings.log_format)?;
    let entry = settings.entry()?;
    let step = settings.step();
    let Some(token) = super::enter(entry, &settings.router, &shutdown).await? else { return Ok(None) };
    let want = match settings.load_format {
        LoadFormat::Files => Want::Model,
        LoadFormat::Dummy { .. } => Want::Text,
    };
    let Some(model) = super::model(&settings.model, want.clone(), &shutdown).await? else { return Ok(None) };
    // Prefill nodes draw one token, which nobody guesses; the other ranks compute what the first one plans.
    let draft_model = match &settings.draft_model {
        Some(named) if role == "decode" && settings.rank == 0 => {
            let Some(found) = super::model(named, want, &shutdown).await.context("draft model")? else {
                return Ok(None);
            };
            Some(found.path)
        }
        _ => None,
    };
    let name = settings.name.map_or_else(|| format!("{role}@{}", system::host_name()), |name| name.0);
    let service = if role == "prefill" { "baton-prefill" } else { "baton-decode" };
    // The router says which requests are traced.
    let tracer = super::tracer(settings.otlp_endpoint, service, &name, 0)?;
    let config = NodeConfig {
        name,
        served_name: settings.served_name.map_or(model.name, |name| name.0),
        model: model.path,
        load_format: settings.load_format,
        routers: settings.router,
        token,
        bind: settings.bind,
        kv_bind: settings.kv_bind,
        metrics: settings.metrics_bind,
        tracer,
        advertise: settings.advertise,
        insecure: settings.insecure,
        backend: settings.backend,
        cache: crate::config::cache_dir(),
        dtype: settings.dtype,
        threads: settings.threads.unwrap_or(0),
        kv_bytes: settings.kv_memory.bytes(),
        block_tokens: settings.block_tokens,
        context_tokens: settings.context,
        batch_max: settings.max_batch,
        draft_max: settings.draft_max,
        draft_model,
        step,
        group: GroupConfig { world: settings.tp, rank: settings.rank, leader: settings.leader },
        sealing: settings.rank_encryption,
        allow_mixed_weights: settings.allow_mixed_weights,
        pace: None,
        kv_codec: settings.kv_codec,
        kv_streams: settings.kv_streams,
        kv_transport: settings.kv_transport,
        kv_staged: settings.kv_staged,
        cpu: CpuOptions {
            level: settings.cpu_level,
            activations: settings.cpu_activations,
            pin: settings.cpu_pin,
        },
        cuda: CudaOptions {
            activations: settings.cuda_activations,
            eager: settings.cuda_eager,
            attention: settings.cuda_attention,
        },
        land_deadline: LAND_DEADLINE,
        drain: settings.drain.0,
    };
    Ok(Some((config, shutdown)))
}
