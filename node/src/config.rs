//! Settings of a node process, already parsed and validated by the command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use backend::{CpuOptions, CudaOptions, DType};
pub use engine::tp::Sealing;
use kvtransfer::Ways;

/// All that a prefill or decode process is told.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// For people; shown in status.
    pub name: String,
    /// Directory of the checkpoint, or a config.json with [`LoadFormat::Dummy`].
    pub model: PathBuf,
    /// Model name that the cluster serves.
    pub served_name: String,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Cluster addresses of the routers, `host:port`; each knows of the node by itself.
    pub routers: Vec<String>,
    /// Secret shared by the cluster's processes.
    pub token: cluster::ClusterToken,
    /// Where gRPC is served; port 0 picks one.
    pub bind: SocketAddr,
    /// Where KV is received; port 0 picks one.
    pub kv_bind: SocketAddr,
    /// Where the node's own metrics are read, over HTTP; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Goes on with the traces of requests.
    pub tracer: cluster::traces::Tracer,
    /// Host that other machines reach this one by; the bind addresses' own when `None`.
    pub advertise: Option<String>,
    /// Serve off loopback without encryption.
    pub insecure: bool,
    /// Which device.
    pub backend: BackendKind,
    /// Where compiled GPU kernels are kept between runs.
    pub cache: Option<PathBuf>,
    /// Activations and KV.
    pub dtype: DType,
    /// CPU threads; 0: one per usable core.
    pub threads: usize,
    /// What only a CPU is asked.
    pub cpu: CpuOptions,
    /// What only an NVIDIA GPU is asked.
    pub cuda: CudaOptions,
    /// Bytes for the KV store of this rank; `None`: what the device has free beside the weights, less a margin.
    pub kv_bytes: Option<u64>,
    /// Tokens per KV block.
    pub block_tokens: u32,
    /// Longest sequence; `None`: the model's.
    pub context_tokens: Option<u32>,
    /// Sequences running at once.
    pub batch_max: usize,
    /// Tokens guessed ahead per sequence and step, at most.
    pub draft_max: usize,
    /// A model that guesses, on rank 0: a path as [`NodeConfig::model`].
    pub draft_model: Option<PathBuf>,
    /// Rows of a step.
    pub step: StepBounds,
    /// Tensor-parallel group.
    pub group: GroupConfig,
    /// Which links between its ranks are encrypted where this process has a certificate.
    pub sealing: Sealing,
    /// Join a cluster whose other nodes hold other weights of the same model.
    pub allow_mixed_weights: bool,
    /// KV bytes per second that a push may take; `None`: all that the link gives.
    pub pace: Option<u64>,
    /// How the numbers of KV pushes travel.
    pub kv_codec: kvtransfer::CodecPolicy,
    /// Connections per path of a KV push.
    pub kv_streams: usize,
    /// What carries KV beside TCP.
    pub kv_transport: KvTransport,
    /// KV always leaves a GPU by the host's memory.
    pub kv_staged: bool,
    /// Reservations without progress lapse after this.
    pub land_deadline: Duration,
    /// Time for running work to end after a stop signal.
    pub drain: Duration,
}

/// What carries KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvTransport {
    /// UCX where both ends have it and nothing is lost by it: shared memory within a machine, and RDMA where the cluster talks in
    /// clear anyway; TCP elsewhere.
    Auto,
    /// TCP alone.
    Tcp,
    /// As `Auto`, and RDMA in a cluster with certificates too: the KV cache crosses the network in clear.
    Ucx,
}

impl std::fmt::Display for KvTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            KvTransport::Auto => "auto",
            KvTransport::Tcp => "tcp",
            KvTransport::Ucx => "ucx",
        })
    }
}

impl KvTransport {
    /// What a rank may use. `sealed`: its connections are encrypted; `staged`: nobody reads a device's memory.
    pub fn ways(self, sealed: bool, staged: bool) -> Ways {
        let device = !staged;
        match self {
            KvTransport::Tcp => Ways::NONE,
            KvTransport::Auto => Ways { shm: true, rdma: !sealed, tcp: false, device },
            KvTransport::Ucx => Ways { shm: true, rdma: true, tcp: false, device },
        }
    }
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's files.
    Files,
    /// Seeded random weights for a config.json.
    Dummy {
        /// Seed of the weights.
        seed: u64,
    },
}

/// Which device computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// The best that this build and machine have.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// MLX: Apple Silicon, or MLX's CPU library on Linux. In builds with the feature `mlx`.
    Mlx,
}

/// This process's place in a tensor-parallel group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// Number of ranks.
    pub world: usize,
    /// This process's rank; 0 leads, serves gRPC and joins the routers.
    pub rank: usize,
    /// Where the leader waits for the other ranks (bound by rank 0, dialled by the others); unused for one rank.
    pub leader: Option<String>,
}

/// Rows of a step at the most, as far as somebody says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepBounds {
    /// Of all sequences; `None`: two chunks, and at least 2,048.
    pub step_tokens: Option<usize>,
    /// Of one prompt; `None`: what keeps the device computing, as far as it fits a step.
    pub chunk_tokens: Option<usize>,
}

impl StepBounds {
    const STEP_TOKENS: usize = 2048;

    /// Rows of a step and of a chunk on a device that `busy` rows keep computing.
    pub fn resolve(self, busy: usize) -> (usize, usize) {
        let chunk = self.chunk_tokens.unwrap_or_else(|| busy.min(self.step_tokens.unwrap_or(busy)));
        (self.step_tokens.unwrap_or_else(|| chunk.saturating_mul(2).max(Self::STEP_TOKENS)), chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: what a cluster with certificates sends to other machines stays encrypted unless somebody says otherwise by name.
    #[test]
    fn rdma_in_clear_needs_a_word_where_connections_are_sealed() {
        let ways = |transport: KvTransport, sealed| {
            let Ways { shm, rdma, device, .. } = transport.ways(sealed, false);
            assert_eq!((device, transport.ways(sealed, true).device), (transport != KvTransport::Tcp, false));
            (shm, rdma)
        };
        assert_eq!(ways(KvTransport::Auto, true), (true, false));
        assert_eq!(ways(KvTransport::Auto, false), (true, true));
        assert_eq!(ways(KvTransport::Ucx, true), (true, true));
        assert_eq!(ways(KvTransport::Tcp, false), (false, false));
    }

    #[test]
    fn what_is_not_said_fits_the_device_and_what_is() {
        let of = |step_tokens, chunk_tokens, busy| StepBounds { step_tokens, chunk_tokens }.resolve(busy);
        assert_eq!(of(None, None, 512), (2048, 512));
        assert_eq!(of(None, None, 2048), (4096, 2048));
        assert_eq!(of(Some(128), None, 512), (128, 128));
        assert_eq!(of(None, Some(3000), 512), (6000, 3000));
        assert_eq!(of(Some(256), Some(37), 2048), (256, 37));
    }
}
