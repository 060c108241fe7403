//! The processes of the measured cluster: this executable again, once per node and once for the router's part.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster::{ClusterToken, process};
use node::{BackendKind, GroupConfig, LoadFormat, NodeConfig};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use crate::args::Args;
use crate::drive::{self, Driven};
use crate::link::{Link, Side};

/// Holds the cluster token for the children: arguments are seen by every user.
const TOKEN: &str = "BATON_BENCH_TOKEN";

/// Ports in a network namespace of our own are all free.
const CLUSTER_PORT: u16 = 7801;
const LEADER_PORT: u16 = 7802;

/// Seed of made-up weights.
const SEED: u64 = 7;

/// Name under which the cluster serves the model.
pub const SERVED: &str = "bench";

/// What a node is started with.
#[derive(Debug, Serialize, Deserialize)]
pub struct NodeSpec {
    pub prefill: bool,
    pub name: String,
    pub model: PathBuf,
    pub dummy: bool,
    pub router: String,
    pub host: String,
    pub world: usize,
    pub rank: usize,
    pub leader: Option<String>,
    pub dtype: String,
    pub threads: usize,
    pub kv_bytes: u64,
    pub context: u32,
    pub chunk: usize,
    pub pace: Option<u64>,
}

/// Runs the node of `spec` until the process is killed or told to stop.
pub async fn node(spec: &str) -> Result<()> {
    let spec: NodeSpec = serde_json::from_str(spec).context("spec")?;
    // At the end the driver goes first; that its nodes miss it is no news.
    process::init_logs(process::LogFormat::Human, "warn,cluster::client=error")?;
    let shutdown = process::shutdown_on_signals()?;
    let any: SocketAddr = format!("{}:0", spec.host).parse().context("host")?;
    let config = NodeConfig {
        name: spec.name,
        model: spec.model,
        served_name: SERVED.into(),
        load_format: if spec.dummy { LoadFormat::Dummy { seed: SEED } } else { LoadFormat::Files },
        routers: vec![spec.router],
        token: token()?,
        bind: any,
        kv_bind: any,
        metrics: None,
        tracer: Default::default(),
        advertise: None,
        // The namespaces are reached from this machine alone.
        insecure: true,
        backend: BackendKind::Auto,
        cache: None,
        dtype: spec.dtype.parse().map_err(anyhow::Error::msg)?,
        threads: spec.threads,
        kv_bytes: Some(spec.kv_bytes),
        block_tokens: 64,
        context_tokens: Some(spec.context),
        batch_max: 4,
        draft_model: None,
        draft_max: 0,
        step: node::StepBounds { step_tokens: Some(spec.chunk + 8), chunk_tokens: Some(spec.chunk) },
        group: GroupConfig { world: spec.world, rank: spec.rank, leader: spec.leader },
        sealing: node::Sealing::default(),
        allow_mixed_weights: false,
        pace: spec.pace,
        kv_codec: kvtransfer::CodecPolicy::Always(kvtransfer::Codec::Exact),
        kv_streams: 1,
        kv_transport: node::KvTransport::Tcp,
        kv_staged: false,
        cpu: backend::CpuOptions::default(),
        cuda: backend::CudaOptions::default(),
        land_deadline: Duration::from_secs(120),
        drain: Duration::from_secs(1),
    };
    match spec.prefill {
        true => prefill_node::serve(config, shutdown).await?,
        false => decode_node::serve(config, shutdown).await?,
    }
    Ok(())
}

/// The token that the outer process made.
pub fn token() -> Result<ClusterToken> {
    Ok(ClusterToken::parse(&std::env::var(TOKEN).context(TOKEN)?)?)
}

/// Starts the cluster over `link`, lets it be measured, and stops it.
pub async fn cluster(args: &Args, link: &Link) -> Result<Driven> {
    let token = ClusterToken::generate()?;
    let executable = std::env::current_exe().context("own executable")?;
    let start = |side: Side, command: &str, spec: String, output: Stdio| -> Result<Child> {
        let (program, leading) = link.start(side, &executable);
        Command::new(program)
            .args(leading)
            .args([command, "--spec", &spec])
            .env(TOKEN, token.expose())
            .stdin(Stdio::null())
            .stdout(output)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {command}"))
    };
    let (cluster, leader) = match link {
        Link::Shaped { .. } => (CLUSTER_PORT, LEADER_PORT),
        Link::Loopback | Link::Paced(_) => (free_port()?, free_port()?),
    };
    let near = link.host(Side::Near);
    let router = format!("{near}:{cluster}");
    let (model, dummy) = args.model();
    // Prompt and answer of one request at a time; as much again for what the prefix cache keeps.
    let context = args.prompt + args.output + 8;
    let spec = |prefill: bool, rank: usize| NodeSpec {
        prefill,
        name: if prefill { "prefill".into() } else { format!("decode.{rank}") },
        model: model.clone(),
        dummy,
        router: router.clone(),
        host: link.host(if prefill { Side::Far } else { Side::Near }).into(),
        world: if prefill { 1 } else { args.tp },
        rank,
        leader: (!prefill && args.tp > 1).then(|| format!("{near}:{leader}")),
        dtype: args.dtype.name().into(),
        threads: args.threads,
        kv_bytes: 1 << 30,
        context,
        chunk: args.chunk,
        pace: link.pace(),
    };
    let plan = drive::Plan {
        bind: router.clone(),
        model: model.clone(),
        prompt: args.prompt,
        output: args.output,
        runs: args.runs,
        link: link.describe(),
        link_bytes_per_s: link.bytes_per_s(),
    };
    let driver = start(Side::Near, "drive", serde_json::to_string(&plan)?, Stdio::piped())?;
    let mut nodes = vec![start(Side::Far, "node", serde_json::to_string(&spec(true, 0))?, Stdio::null())?];
    for rank in 0..args.tp {
        nodes.push(start(Side::Near, "node", serde_json::to_string(&spec(false, rank))?, Stdio::null())?);
    }
    let driven = watched(driver, &mut nodes).await;
    for node in &mut nodes {
        // A node that has ended already is as good.
        let _ = node.kill().await;
    }
    driven
}

/// The driver's result; an error as soon as a node ends before it.
async fn watched(driver: Child, nodes: &mut [Child]) -> Result<Driven> {
    let first = async {
        let ends = nodes.iter_mut().map(|node| Box::pin(node.wait()));
        futures::future::select_all(ends).await.0
    };
    let signals = process::shutdown_on_signals()?;
    let output = tokio::select! {
        output = driver.wait_with_output() => output.context("driver")?,
        end = first => anyhow::bail!("a node ended before the measurement: {}", end.context("node")?),
        () = signals.cancelled() => anyhow::bail!("stopped"),
    };
    ensure!(output.status.success(), "the driver failed: {}", output.status);
    serde_json::from_slice(&output.stdout).context("the driver's result")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no free port")?;
    Ok(listener.local_addr().context("no free port")?.port())
}
