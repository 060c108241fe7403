//! The thread that owns the device: opens it, loads this rank's part of the model, and serves the engine until stopped.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use backend::{Backend, BackendError, DeviceOptions, KvSpec};
use backend_cpu::CpuBackend;
use cluster::Door;
use engine::tp::Trust;
use engine::{Commands, EngineOptions, Place, Runner, Terms};
use kvtransfer::transport::tls::{self, CertificateDer, Tls};
use kvtransfer::{OnTurned, Turned, Ways};
use models::{Checkpoint, Identity, Model, ModelError};
use tokio::sync::oneshot;

use crate::config::{BackendKind, GroupConfig, KvTransport, LoadFormat, NodeConfig};
use crate::draft::Draft;
use crate::error::NodeError;
use crate::loading;
use crate::memory::{self, Need, TooMuch};

/// Longest time for MLX's fabric to come up between ranks that have met: it tries for as long as it lives.
#[cfg(feature = "mlx")]
const JOIN_MAX: std::time::Duration = std::time::Duration::from_secs(20);

/// A model's files and numbers, before any weight is read.
pub struct Opened {
    pub checkpoint: Checkpoint,
    pub identity: Identity,
    /// Longest sequence.
    pub context_tokens: u32,
    /// Cache of the whole model.
    pub kv_spec: KvSpec,
    /// Of this rank's weights, as they are stored, the draft model's among them.
    weight_bytes: u64,
    draft: Option<Draft>,
    /// Bytes that a token takes in the caches of this rank: the model's, and the draft model's.
    token_bytes: [usize; 2],
}

/// What is known once the model is on the device.
pub struct Loaded {
    /// Name and device for people, e.g. `cpu (avx512, 2 threads)`.
    pub backend: String,
    pub kv_addresses: Vec<String>,
    /// Knows the links to decode groups.
    pub sender: kvtransfer::Sender,
}

/// Opens the checkpoint and checks the settings against it. Reads samples of the weights: not for an async thread.
pub fn open(config: &NodeConfig) -> Result<Opened, NodeError> {
    let named = |reason: models::ModelError| NodeError::Model {
        model: config.model.display().to_string(),
        reason: reason.into(),
    };
    let files = |path: &Path| match config.load_format {
        LoadFormat::Files => Checkpoint::open(path),
        LoadFormat::Dummy { seed } => Checkpoint::dummy(path, seed),
    };
    let checkpoint = files(&config.model).map_err(named)?;
    let (rank, world) = (config.group.rank, config.group.world);
    let draft = config.draft_model.as_deref().filter(|_| rank == 0).map(|path| {
        let failed = |reason: ModelError| NodeError::Model {
            model: path.display().to_string(),
            reason: reason.into(),
        };
        Draft::of(files(path).map_err(failed)?, &checkpoint, config.dtype)
    });
    let draft = draft.transpose()?;
    let held = checkpoint.rank_bytes(world).map_err(named)?;
    let specs = models::kv_specs(checkpoint.config(), config.dtype, world).map_err(named)?;
    let token_bytes = [specs[rank].token_bytes(), draft.as_ref().map_or(0, |draft| draft.token_bytes)];
    let need = Need {
        weights: held.get(rank).copied().unwrap_or(0) + draft.as_ref().map_or(0, |draft| draft.weight_bytes),
        kv: memory::kv_bytes_of_both(config.kv_bytes, None, token_bytes).iter().sum(),
    };
    // A GPU has its own memory, and says itself when it is too small.
    let host = chosen(config.backend, config.group.world) != BackendKind::Cuda;
    let available = memory::available().filter(|_| host);
    if let Some(reason) = available.and_then(|available| need.beyond(available)) {
        return Err(too_much(config, reason));
    }
    #[cfg(feature = "mlx")]
    if chosen(config.backend, config.group.world) == BackendKind::Mlx {
        backend_mlx::fits(need.weights, need.kv)?;
    }
    let identity = Identity::read(&checkpoint).map_err(named)?;
    let most = checkpoint.config().context;
    let context_tokens = match config.context_tokens {
        Some(asked) if asked as usize > most => return Err(NodeError::Context { asked, most }),
        Some(asked) => asked,
        None => u32::try_from(most).unwrap_or(u32::MAX).min(proto::SEQUENCE_TOKENS_MAX as u32),
    };
    let kv_spec = models::kv_specs(checkpoint.config(), config.dtype, 1).map_err(named)?.swap_remove(0);
    let weight_bytes = need.weights;
    Ok(Opened { checkpoint, identity, context_tokens, kv_spec, weight_bytes, draft, token_bytes })
}

fn too_much(config: &NodeConfig, reason: TooMuch) -> NodeError {
    NodeError::Memory {
        model: config.model.display().to_string(),
        rank: config.group.rank,
        world: config.group.world,
        reason,
    }
}

/// This process's place in its group. Rank 0 of several opens the meeting place.
pub fn place(config: &NodeConfig) -> Result<Place, NodeError> {
    let group = &config.group;
    if group.world == 1 {
        return Ok(Place::Alone);
    }
    let address = group.leader.clone().unwrap_or_default();
    if group.rank > 0 {
        return Ok(Place::Follow { leader: address, rank: group.rank });
    }
    let failed = |reason| NodeError::Leader { address: address.clone(), reason };
    let listener = TcpListener::bind(&address).map_err(failed)?;
    // MLX's ranks have links of their own, in clear.
    let native = chosen(config.backend, group.world) == BackendKind::Mlx;
    let encrypted = config.token.identity().is_some() && !native;
    let bound = listener.local_addr().map_err(failed)?;
    cluster::require_loopback_or_insecure(bound, config.insecure || encrypted)?;
    Ok(Place::Lead { listener, world: group.world })
}

/// Starts the thread. `loaded` hears when the model is there; the returned receiver hears how it ended.
pub fn start(
    config: &NodeConfig,
    opened: Opened,
    place: Place,
    commands: Commands,
    loaded: oneshot::Sender<Loaded>,
) -> Result<oneshot::Receiver<Result<(), NodeError>>, NodeError> {
    let (done, ended) = oneshot::channel();
    let config = config.clone();
    let work = move || {
        tell_choice(config.backend, config.group.world);
        let result = match chosen(config.backend, config.group.world) {
            #[cfg(feature = "mlx")]
            BackendKind::Mlx => {
                let about = backend_mlx::describe();
                let native = engine::Native { about, join_max: JOIN_MAX, renew: crate::renew::renew };
                let native = (config.group.world > 1).then_some(native);
                serve::<backend_mlx::MlxBackend>(&config, opened, &place, native, 0, &commands, loaded)
            }
            #[cfg(not(feature = "mlx"))]
            BackendKind::Mlx => {
                let reason = "this build is without it (cargo feature mlx)".to_owned();
                Err(backend::BackendError::Unavailable { backend: "mlx", reason }.into())
            }
            BackendKind::Cuda => {
                // Ranks of one machine take its GPUs in turn.
                let gpus = backend_cuda::probe().map_or(1, |gpus| gpus.max(1) as usize);
                let device = config.group.rank % gpus;
                serve::<backend_cuda::CudaBackend>(&config, opened, &place, None, device, &commands, loaded)
            }
            BackendKind::Auto | BackendKind::Cpu => {
                serve::<CpuBackend>(&config, opened, &place, None, 0, &commands, loaded)
            }
        };
        // A process that is ending does not ask.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("engine".into())
        .spawn(work)
        .map_err(|reason| NodeError::System { what: "engine thread", reason })?;
    Ok(ended)
}

/// What `auto` means: MLX in builds that have it, else an NVIDIA GPU where there is one, else the CPU. Several ranks must all
/// have the same, so there a GPU is asked for by name.
fn chosen(asked: BackendKind, world: usize) -> BackendKind {
    if asked == BackendKind::Auto && cfg!(feature = "mlx") {
        return BackendKind::Mlx;
    }
    if asked != BackendKind::Auto || world > 1 {
        return asked;
    }
    if backend_cuda::probe().is_ok() { BackendKind::Cuda } else { BackendKind::Cpu }
}

/// Says what `auto` has found, and why.
fn tell_choice(asked: BackendKind, world: usize) {
    if asked != BackendKind::Auto || world > 1 || cfg!(feature = "mlx") {
        return;
    }
    match backend_cuda::probe() {
        Ok(gpus) => tracing::info!(gpus, "computing on the GPU"),
        Err(reason) => tracing::info!("computing on the CPU: {reason}"),
    }
}

/// What must happen before the process has a second thread: MLX finds the other ranks of its group through the environment.
///
/// # Safety
/// The process has one thread.
pub unsafe fn prepare(backend: BackendKind, group: &GroupConfig) {
    #[cfg(feature = "mlx")]
    if group.world > 1 && chosen(backend, group.world) == BackendKind::Mlx {
        // SAFETY: the caller's promise.
        unsafe { backend_mlx::prepare(group.rank, group.leader.as_deref().unwrap_or_default()) };
    }
    #[cfg(not(feature = "mlx"))]
    let _ = (backend, group);
}

fn serve<B: Backend>(
    config: &NodeConfig,
    opened: Opened,
    place: &Place,
    native: Option<engine::Native>,
    device: usize,
    commands: &Commands,
    loaded: oneshot::Sender<Loaded>,
) -> Result<(), NodeError> {
    let (rank, world) = (config.group.rank, config.group.world);
    let device = DeviceOptions {
        dtype: config.dtype,
        threads: config.threads,
        block_tokens: config.block_tokens,
        device,
        cache: config.cache.clone(),
        cpu: config.cpu.clone(),
        cuda: config.cuda,
    };
    let links = engine::tp::unmet(rank, world)
        .map_err(|reason| NodeError::System { what: "sockets between ranks", reason })?;
    let mut backend = B::open(&device, links)?;
    let caps = backend.caps();
    let begun = Instant::now();
    let had = backend.free_bytes();
    let failed = |model: String, reason: ModelError| {
        // Where the sums show it they are told, and not the weight at which it ended.
        let need = Need { weights: opened.weight_bytes, kv: config.kv_bytes.unwrap_or(0) };
        let full = matches!(reason, ModelError::Backend(BackendError::OutOfMemory { .. }));
        match had.filter(|_| full).and_then(|had| need.beyond_device(had)) {
            Some(much) => too_much(config, much),
            None => NodeError::Model { model, reason: reason.into() },
        }
    };
    let model = Model::load(
        &mut backend,
        &opened.checkpoint,
        rank,
        world,
        config.dtype,
        &mut loading::progress(config.model.display().to_string()),
    )
    .map_err(|reason| failed(config.model.display().to_string(), reason))?;
    tracing::info!("{} loaded in {:.1} s", config.model.display(), begun.elapsed().as_secs_f32());
    let draft = opened
        .draft
        .as_ref()
        .map(|draft| draft.load(&backend, &device).map_err(|reason| failed(draft.shown(), reason)));
    let draft = draft.transpose()?;
    let free = backend.free_bytes();
    let [kv_bytes, draft_kv_bytes] = memory::kv_bytes_of_both(config.kv_bytes, free, opened.token_bytes);
    if let Some(free) = free {
        let (kv, free) = (memory::gib(kv_bytes + draft_kv_bytes), memory::gib(free));
        tracing::info!("{kv} of KV cache, of {free} that are free on the device");
    }
    let (step_tokens, chunk_tokens) = config.step.resolve(caps.chunk_tokens);
    let options = EngineOptions {
        kv_bytes,
        context_tokens: opened.context_tokens,
        batch_max: config.batch_max,
        step_tokens,
        chunk_tokens,
        draft_max: config.draft_max,
        kv_bind: config.kv_bind,
        kv_tls: certified(config)?,
        kv_turned: turned(config, Door::Kv),
        kv_advertise: config.advertise.iter().cloned().collect(),
        land_deadline: config.land_deadline,
        pace: config.pace,
        kv_codec: config.kv_codec,
        kv_streams: config.kv_streams,
        kv_ways: kv_ways(config)?,
        kv_probe: Some(kvtransfer::Ticket::probe(config.token.expose().as_bytes())),
        ..EngineOptions::default()
    };
    let ways = options.kv_ways;
    let mut runner = Runner::new(backend, model, options)?;
    if let Some(draft) = draft {
        runner.draft_with(draft.ready(draft_kv_bytes)?);
    }
    if let Some(place) = runner.stays() {
        match kvtransfer::transport::ucx::reaches(place, ways) {
            Ok(()) => tracing::info!(
                "KV leaves the GPU by GPUDirect where the other end has RDMA, by the host elsewhere"
            ),
            Err(why) => tracing::info!("KV leaves the GPU by the host, not by GPUDirect: {why}"),
        }
    }
    let about = Loaded {
        backend: format!("{} ({})", caps.name, caps.device),
        kv_addresses: runner.kv_addresses(),
        sender: runner.sender(),
    };
    // Nobody waits when the process is ending.
    let _ = loaded.send(about);
    let identity = &opened.identity;
    let terms = Terms {
        trust: Trust {
            secret: config.token.expose().as_bytes().to_vec(),
            tls: certified(config)?,
            sealing: config.sealing,
            turned: turned(config, Door::Rank),
        },
        version: env!("CARGO_PKG_VERSION").into(),
        identity: format!("{} {} {} {}", identity.graph, identity.vocab, identity.weights, config.dtype),
        first_epoch: first_epoch()?,
        native,
    };
    Ok(engine::serve(&mut runner, place, &terms, commands)?)
}

/// What carries KV beside TCP. Errors where UCX is asked for by name and is not there.
fn kv_ways(config: &NodeConfig) -> Result<Ways, NodeError> {
    let ways = config.kv_transport.ways(config.token.identity().is_some(), config.kv_staged);
    match kvtransfer::transport::ucx::available() {
        Ok(version) if ways.any() => tracing::info!("UCX {version} carries KV where the other end has it"),
        Err(words) if config.kv_transport == KvTransport::Ucx => {
            return Err(NodeError::System { what: "kv-transport ucx", reason: std::io::Error::other(words) });
        }
        _ => {}
    }
    Ok(ways)
}

/// Counts who is turned away at `door`.
fn turned(config: &NodeConfig, door: Door) -> OnTurned {
    let refusals = config.token.refusals().clone();
    OnTurned::new(move |turned| match turned {
        Turned::Handshake(error) => refusals.handshake(door, error),
        Turned::Because(reason) => refusals.count(door, reason),
    })
}

/// TLS for the KV wire and the links of ranks, where this process has a certificate.
fn certified(config: &NodeConfig) -> Result<Option<Tls>, NodeError> {
    let Some(identity) = config.token.identity() else { return Ok(None) };
    let (server, client, name) = identity
        .nodes()
        .map_err(|error| NodeError::System { what: "TLS", reason: std::io::Error::other(error) })?;
    let peers = identity.revocations().map(|revocations| Arc::new(Peers(revocations.clone())) as _);
    Ok(Some(Tls { server, client, name, peers }))
}

/// Which other nodes this one exchanges anything with.
struct Peers(Arc<cluster::trust::Revocations>);

impl tls::Peers for Peers {
    fn version(&self) -> u64 {
        self.0.version()
    }

    fn stands(&self, certs: &[CertificateDer<'_>]) -> bool {
        self.0.stands(certs)
    }
}

/// Unlike any epoch of an earlier process, whatever the system's clock says: as large as people can still read.
fn first_epoch() -> Result<u64, NodeError> {
    let failed = |error: getrandom::Error| std::io::Error::other(error.to_string());
    let random = getrandom::u64().map_err(failed);
    let random = random.map_err(|reason| NodeError::System { what: "random numbers", reason })?;
    Ok(1 + (random >> 24))
}
