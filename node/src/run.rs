//! A node process: load, serve, join, and at the end drain. Rank 0 of a group serves and joins; the others only follow it.

use std::time::Duration;

use cluster::{JoinEvent, Shutdown, server};
use engine::Engine;
use proto::v1::{DrainReply, ProbeReply, Role};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::service::Routes;
use tonic::{Response, Status};

use crate::config::NodeConfig;
use crate::error::NodeError;
use crate::grammars::Grammars;
use crate::{convert, metrics, rank, report};

/// How often a drain looks whether work is left.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// After the drain, calls and the engine get this long to end.
const STOP_GRACE: Duration = Duration::from_secs(2);

type Ended = oneshot::Receiver<Result<(), NodeError>>;

/// Runs one rank of a node until `shutdown`, then lets running work end. `service` makes the role's gRPC service.
/// Errors when the node cannot start, when its routers refuse it or one has revoked its join token, or when its device fails.
pub async fn run(
    config: NodeConfig,
    role: Role,
    shutdown: Shutdown,
    service: impl FnOnce(Engine, Grammars) -> Routes,
) -> Result<(), NodeError> {
    let (routers, token) = (config.routers.clone(), config.token.clone());
    tokio::select! {
        end = work(config, role, shutdown, service) => end,
        // At once: it has no part in the cluster any more, and nothing that it still computes is wanted.
        refused = cluster::follow_revocations(routers, &token) => Err(refused.into()),
    }
}

async fn work(
    config: NodeConfig,
    role: Role,
    shutdown: Shutdown,
    service: impl FnOnce(Engine, Grammars) -> Routes,
) -> Result<(), NodeError> {
    // With a certificate, gRPC and the KV wire are TLS.
    let is_encrypted = config.token.identity().is_some();
    cluster::require_loopback_or_insecure(config.bind, config.insecure || is_encrypted)?;
    cluster::require_loopback_or_insecure(config.kv_bind, config.insecure || is_encrypted)?;
    // Ports first: a taken one is said at once, not after minutes of loading.
    let listener = match config.group.rank {
        0 => Some(server::bind(config.bind).await?),
        _ => None,
    };
    let page = match config.metrics {
        Some(address) => {
            cluster::require_loopback_or_insecure(address, config.insecure)?;
            Some(server::bind(address).await?)
        }
        None => None,
    };
    let place = rank::place(&config)?;
    let opening = config.clone();
    let opened = tokio::task::spawn_blocking(move || rank::open(&opening))
        .await
        .map_err(|_| NodeError::Panicked)??;
    // The thread needs the checkpoint, the join request the rest: the message is made before the checkpoint leaves.
    let (engine, commands) = engine::engine();
    // Ends with this function.
    let mut pages = tokio::task::JoinSet::new();
    if let Some(listener) = page {
        let name = if role == Role::Prefill { "prefill" } else { "decode" };
        let (model, node) = (config.served_name.clone(), config.name.clone());
        let refusals = config.token.refusals().clone();
        pages.spawn(metrics::serve(listener, engine.clone(), refusals, model, node, name));
    }
    let request = match &listener {
        Some(listener) => {
            let bound =
                listener.local_addr().map_err(|reason| NodeError::System { what: "gRPC port", reason })?;
            Some(report::join_request(&config, role, &opened, bound)?)
        }
        None => None,
    };
    let (loaded, is_loaded) = oneshot::channel();
    let mut ended = rank::start(&config, opened, place, commands, loaded)?;
    let about = tokio::select! {
        about = is_loaded => about,
        () = shutdown.cancelled() => return Ok(()),
    };
    let Ok(about) = about else {
        return outcome(ended.await);
    };
    let Some((listener, mut request)) = listener.zip(request) else {
        return follow(&config, &engine, ended, shutdown).await;
    };
    request.kv_addresses = about.kv_addresses;
    request.backend = about.backend;
    let sender = about.sender;
    tracing::info!(grpc = request.grpc_address, backend = request.backend, "loaded");

    let (behind, leave) = (Shutdown::new(), Shutdown::new());
    let routes = service(engine.clone(), Grammars::new(config.model.clone()));
    let serving = {
        let (token, behind) = (config.token.clone(), behind.clone());
        tokio::spawn(async move { server::serve(listener, &token, routes, behind, STOP_GRACE).await })
    };
    let member = {
        let (config, engine, leave) = (config.clone(), engine.clone(), leave.clone());
        let beat = engine.clone();
        tokio::spawn(async move {
            let links = sender.clone();
            let told = move |event| match event {
                JoinEvent::Drain => engine.drain(),
                JoinEvent::Peers(peers) => sender.know(peers),
                JoinEvent::Joined { .. } | JoinEvent::Lost { .. } => {}
            };
            let report = move || report::heartbeat(&beat, &links);
            cluster::join_all(config.routers, request, &config.token, report, told, leave).await
        })
    };
    let (mut serving, mut member) = (serving, member);
    let early = tokio::select! {
        () = shutdown.cancelled() => None,
        end = &mut ended => Some(outcome(end)),
        end = &mut member => Some(match end {
            Ok(result) => result.map_err(NodeError::from),
            Err(_) => Err(NodeError::Panicked),
        }),
        end = &mut serving => Some(match end {
            Ok(result) => result.map_err(NodeError::from),
            Err(_) => Err(NodeError::Panicked),
        }),
    };
    if early.is_none() {
        drained(&engine, config.drain).await;
    }
    leave.cancel();
    behind.cancel();
    engine.stop();
    // Each is bounded by itself; what does not end in time ends with the process.
    let _ = tokio::time::timeout(STOP_GRACE, async {
        // The one that ended early has been heard already.
        if !member.is_finished() {
            let _ = (&mut member).await;
        }
        if !serving.is_finished() {
            let _ = (&mut serving).await;
        }
    })
    .await;
    match early {
        Some(result) => result,
        None => match tokio::time::timeout(STOP_GRACE, ended).await {
            Ok(end) => outcome(end),
            Err(_) => Ok(()),
        },
    }
}

/// A rank that is not the leader: works until, after a stop signal, the leader ends the group or the drain is over.
async fn follow(
    config: &NodeConfig,
    engine: &Engine,
    mut ended: Ended,
    shutdown: Shutdown,
) -> Result<(), NodeError> {
    let until = async {
        shutdown.cancelled().await;
        engine.drain();
        sleep(config.drain + STOP_GRACE).await;
    };
    tokio::select! {
        end = &mut ended => return outcome(end),
        () = until => {}
    }
    engine.stop();
    match tokio::time::timeout(STOP_GRACE, ended).await {
        Ok(end) => outcome(end),
        Err(_) => Ok(()),
    }
}

fn outcome(end: Result<Result<(), NodeError>, oneshot::error::RecvError>) -> Result<(), NodeError> {
    end.unwrap_or(Err(NodeError::Panicked))
}

/// Refuses new work and waits until the rest has ended, for `most` at the longest.
async fn drained(engine: &Engine, most: Duration) {
    engine.drain();
    let until = Instant::now() + most;
    let idle = async {
        while engine.jobs() > 0 {
            sleep(DRAIN_POLL).await;
        }
    };
    tokio::select! {
        () = idle => {}
        () = sleep_until(until) => tracing::warn!("drain is over, running work is cut off"),
    }
}

/// Answers a probe with the time of a real engine step.
pub async fn probe(engine: &Engine) -> Result<Response<ProbeReply>, Status> {
    match engine.probe().await {
        Ok(step) => Ok(Response::new(ProbeReply { step_us: convert::micros(step) })),
        Err(error) => Err(convert::error_status(&error)),
    }
}

/// Answers a drain call: no new work from now on.
pub fn drain(engine: &Engine) -> Result<Response<DrainReply>, Status> {
    engine.drain();
    Ok(Response::new(DrainReply { running: engine.jobs() as u32 }))
}
