//! `baton router`: the membership service for nodes, dispatch over its members, and the gateway in front.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster::small_file::{self, TEXT_BYTES_MAX};
use cluster::{
    Authority, ClusterService, ClusterToken, Enrolment, Members, MembershipConfig, Shutdown,
    require_loopback_or_insecure, server,
};
use hub::Want;
use router::batch::BatchConfig;
use router::dispatch::{Dispatch, DispatchConfig};
use router::inference::Inference;
use router::{GatewayConfig, TlsFiles, serve};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::service::Routes;
use vocab::Vocab;

use crate::config::{RouterSettings, Secret};
use crate::model::Located;
use crate::{certificate, dirs, system, token};

/// At the end, nodes and `status` have this long to take their last answer.
const CLUSTER_DRAIN: Duration = Duration::from_secs(1);

/// Seconds of a day.
const DAY_S: u64 = 24 * 3600;

/// Runs until a stop signal, then lets running requests end.
pub async fn router(settings: RouterSettings) -> Result<()> {
    let shutdown = super::start(&settings.log, settings.log_format)?;
    // A file that must not grow further is an error of its write, not the end of the process.
    let _size_limit = signal(SignalKind::from_raw(libc::SIGXFSZ)).context("signal handler")?;
    let (token, open) = cluster(&settings)?;
    let Some(model) = super::model(&settings.model, Want::Text, &shutdown).await? else { return Ok(()) };
    let mut gateway = gateway(&settings, &model)?;
    let tracer =
        super::tracer(settings.otlp_endpoint.clone(), "baton-router", "router", settings.trace_percent)?;
    gateway.tracer = tracer.clone();
    gateway.refusals = Arc::clone(token.refusals());
    let vocab = Vocab::read(&model.path)?;
    let for_clients = listen(&settings).await?;
    let for_nodes = server::bind(settings.cluster_bind).await?;

    // Running requests need the cluster until they have ended, so what is behind the gateway stops after it.
    let behind = Shutdown::new();
    let members = Members::new(MembershipConfig {
        model: Some(gateway.model.clone()),
        vocab: Some(vocab.identity()),
        allow_mixed_weights: settings.allow_mixed_weights,
        ..MembershipConfig::default()
    });
    let config = DispatchConfig {
        disaggregation: settings.disaggregation,
        queue_max: settings.queue_max,
        ..DispatchConfig::default()
    };
    let dispatch = Dispatch::new(config, members.clone(), token.clone());
    let load = dispatch.clone();
    let requests = Arc::new(move || {
        let load = load.load();
        (load.running, load.queued)
    });
    tracing::info!(address = %settings.cluster_bind, "nodes may join");
    let service = server::cluster(ClusterService::new(members.clone(), requests, behind.clone()));
    let routes = Routes::new(service);
    let identity = token.identity().cloned();
    let nodes = tokio::spawn({
        let behind = behind.clone();
        async move { server::serve_open(for_nodes, &token, routes, open, behind, CLUSTER_DRAIN).await }
    });
    let tokens = identity.map(|identity| {
        let (members, behind) = (members.clone(), behind.clone());
        tokio::spawn(async move { members.follow_tokens(identity, behind).await })
    });
    let leases = tokio::spawn({
        let behind = behind.clone();
        async move { members.expire_leases(behind).await }
    });
    let watch = tokio::spawn({
        let (dispatch, behind) = (dispatch.clone(), behind.clone());
        async move { dispatch.watch(behind).await }
    });

    let gateway = serve(for_clients, gateway, Arc::new(dispatch), shutdown);
    let mut nodes = std::pin::pin!(nodes);
    let served = tokio::select! {
        served = gateway => served.map_err(anyhow::Error::from),
        // Without its cluster a router is of no use.
        ended = &mut nodes => {
            ended.context("membership service")??;
            anyhow::bail!("the membership service ended")
        }
    };
    behind.cancel();
    nodes.await.context("membership service")??;
    leases.await.context("leases")?;
    if let Some(tokens) = tokens {
        tokens.await.context("join tokens")?;
    }
    watch.await.context("dispatch")?;
    tracer.flush(super::LAST_SPANS);
    served
}

/// The socket for HTTP clients: made here, or by whoever started us.
async fn listen(settings: &RouterSettings) -> Result<TcpListener> {
    let Some(number) = settings.listen_fd else {
        return Ok(server::bind((settings.host, settings.port).into()).await?);
    };
    let opened = || format!("listen-fd {number}");
    let listener = system::inherited(i32::try_from(number).with_context(opened)?).with_context(opened)?;
    let address = listener.local_addr().with_context(opened)?;
    // What may be served without keys or in clear was judged by the address of the settings.
    ensure!(
        address.ip() == settings.host,
        "listen-fd {number} listens on {}, host is {}: give --host={}",
        address.ip(),
        settings.host,
        address.ip()
    );
    listener.set_nonblocking(true).with_context(opened)?;
    TcpListener::from_std(listener).with_context(opened)
}

fn gateway(settings: &RouterSettings, located: &Located) -> Result<GatewayConfig> {
    let model = settings.served_name.clone().map_or_else(|| located.name.clone(), |name| name.0);
    let context = match settings.context {
        Some(tokens) => tokens as usize,
        None => context_of(&located.path)?,
    };
    let mut gateway = GatewayConfig::new(&located.path, model, context);
    gateway.keys = settings.api_key.iter().map(|Secret(key)| key.clone()).collect();
    gateway.tool_parser = settings.tool_family()?;
    gateway.reasoning_parser = settings.reasons()?;
    gateway.tls = certificate(settings)?;
    gateway.key_file.clone_from(&settings.key_file);
    gateway.allowed_hosts = settings.hosts();
    gateway.allowed_origins.clone_from(&settings.allowed_origin);
    gateway.limits.drain = settings.drain.0;
    gateway.batch = batches(settings);
    Ok(gateway)
}

/// What the router is part of its cluster by, and what it serves to those who have no part yet.
fn cluster(settings: &RouterSettings) -> Result<(ClusterToken, Routes)> {
    if let Some(secret) = settings.secret()? {
        require_loopback_or_insecure(settings.cluster_bind, settings.insecure)?;
        return Ok((secret, Routes::default()));
    }
    let authority = Arc::new(Authority::open(&token::cluster_dir(settings.cluster_dir.clone())?)?);
    tracing::info!("the cluster's certificates and join tokens are in {}", authority.folder().display());
    let token = authority.router()?;
    let enrolment = Enrolment::service(authority, Arc::clone(token.refusals()));
    Ok((token, Routes::new(enrolment)))
}

/// How files and batch jobs are kept; `None` where this user has no directory for them.
fn batches(settings: &RouterSettings) -> Option<BatchConfig> {
    let own = || Ok::<_, anyhow::Error>(dirs::data()?.join("batches").join(settings.port.to_string()));
    let mut config = match settings.batch_dir.clone().map_or_else(own, Ok) {
        Ok(folder) => BatchConfig::new(folder),
        Err(error) => {
            tracing::warn!("no files and batches: {error:#}; give --batch-dir");
            return None;
        }
    };
    config.file_bytes = settings.batch_file_max.0;
    let days = u64::from(settings.batch_retention);
    config.space.lifetime = (days > 0).then_some(days * DAY_S);
    Some(config)
}

/// The certificate for HTTPS, made if it is to be our own.
fn certificate(settings: &RouterSettings) -> Result<Option<TlsFiles>> {
    if settings.tls_self_signed {
        return Ok(Some(certificate::own(&dirs::data()?, settings.host)?));
    }
    let files = settings.tls_cert.clone().zip(settings.tls_key.clone());
    Ok(files.map(|(cert, key)| TlsFiles { cert, key }))
}

/// Longest sequence that the model was made for: of its config.json, or of its GGUF file.
fn context_of(model: &Path) -> Result<usize> {
    let path = model.join("config.json");
    let file = if path.exists() { None } else { gguf::find(model)? };
    let (path, config) = match file {
        Some(file) => {
            let config = gguf::config_json(&gguf::Gguf::open(&file)?)?;
            (file, config)
        }
        None => {
            let text = small_file::bytes(&path, TEXT_BYTES_MAX);
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            let config: serde_json::Value =
                serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
            (path, config)
        }
    };
    // Models that see pictures have their text model's numbers inside.
    let text = if config["text_config"].is_object() { &config["text_config"] } else { &config };
    let tokens = text["max_position_embeddings"].as_u64().and_then(|tokens| usize::try_from(tokens).ok());
    tokens.with_context(|| format!("{} has no max_position_embeddings: give --context", path.display()))
}
