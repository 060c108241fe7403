//! Settings of `baton prefill` and `baton decode`.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use backend::{Activations, DType, Fp8Activations, PromptAttention};
use kvtransfer::{Codec, CodecPolicy};
use node::{BackendKind, KvTransport, LoadFormat, Sealing, StepBounds};

use super::Entry;
use super::setting::settings;
use super::value::{KvMemory, Name, Seconds, Secret, choice};

/// CPU threads of one process; more is a mistake, and the system would refuse them in the middle of the start.
const THREADS_MAX: usize = 1024;

settings! {
    /// What a node is told.
    pub struct NodeSettings {
        /// Directory or GGUF file of the model, or its name on the Hugging Face hub (ORG/NAME); a config.json with --load-format dummy
        model: PathBuf ["MODEL"];
        /// Name that the cluster serves the model under [default: the directory's, or NAME]
        served_name: Option<Name> ["NAME"];
        /// The router's cluster address; several routers may share the node
        router: Vec<String> ["HOST:PORT,..."] = "127.0.0.1:8001";
        /// Join token; better from a file, arguments are seen by every user of the machine
        token: Option<Secret> ["TOKEN"];
        /// File that holds the join token, or the cluster's secret
        token_file: Option<PathBuf> ["FILE"];
        /// Where the router reaches this node; port 0 picks one
        bind: SocketAddr ["ADDRESS:PORT"] = "127.0.0.1:0";
        /// Where KV is received; port 0 picks one
        kv_bind: SocketAddr ["ADDRESS:PORT"] = "127.0.0.1:0";
        /// Where Prometheus reads this node's own metrics [default: nowhere; the router shows those of all nodes]
        metrics_bind: Option<SocketAddr> ["ADDRESS:PORT"];
        /// OpenTelemetry collector that spans are sent to, over OTLP/HTTP, such as http://127.0.0.1:4318 [default: no traces]
        otlp_endpoint: Option<String> ["URL"];
        /// Host by which other machines reach this one [default: the bound address]
        advertise: Option<String> ["HOST"];
        /// Device: auto (the best of this build and machine), cuda, mlx or cpu
        backend: BackendKind ["NAME"] = "auto";
        /// Type of activations and KV: bf16 or f32
        dtype: DType ["TYPE"] = "bf16";
        /// Memory for KV, per rank: a size, or auto (on an NVIDIA GPU what is free beside the weights, less 2 GiB or a tenth; elsewhere 1GiB)
        kv_memory: KvMemory ["SIZE"] = "auto";
        /// How KV travels: exact, fp8, int8, int4, or auto (exact unless the link is slower than the computation)
        kv_codec: CodecPolicy ["NAME"] = "exact";
        /// What carries KV: auto (shared memory or RDMA where both ends have UCX, else TCP), tcp, or ucx (RDMA also where a cluster with certificates encrypts: KV in clear)
        kv_transport: KvTransport ["NAME"] = "auto";
        /// Copy KV to the host before it leaves an NVIDIA GPU, also where RDMA could read it there (GPUDirect)
        kv_staged: bool [""];
        /// Connections per path of a KV push; large ones through shared memory take at least 2
        kv_streams: usize ["N"] = "1";
        /// Tokens per KV block
        block_tokens: u32 ["TOKENS"] = "32";
        /// Longest sequence [default: the model's]
        context: Option<u32> ["TOKENS"];
        /// Sequences that run at once
        max_batch: usize ["SEQUENCES"] = "32";
        /// Tokens of one step at most, prompts and running sequences together [default: 4096 on an NVIDIA GPU, elsewhere 2048]
        step_tokens: Option<usize> ["TOKENS"];
        /// Tokens of one prompt in one step at most [default: 2048 on an NVIDIA GPU, elsewhere 512]
        chunk_tokens: Option<usize> ["TOKENS"];
        /// Tokens guessed ahead per sequence and step at most, from what prompt and answer repeat, where measured to be worth it; 0: none
        draft_max: usize ["TOKENS"] = "16";
        /// Small model with the same tokens that guesses ahead, too, on rank 0 of a decode group: directory, GGUF file or name on the hub
        draft_model: Option<PathBuf> ["MODEL"];
        /// CPU threads [default: one per core]
        threads: Option<usize> ["N"];
        /// CPU instructions: portable, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx [default: the best of this machine]
        cpu_level: Option<String> ["NAME"];
        /// How activations meet quantised weights on the CPU: exact, or int8 (rounded to 8 bits: coarser, faster for few rows)
        cpu_activations: Activations ["NAME"] = "exact";
        /// Keep each CPU thread on a core of its own; for a process that has its cores alone
        cpu_pin: bool [""];
        /// How activations meet FP8 weights on an NVIDIA GPU: exact, or fp8 (rounded to FP8 as well: coarser, for long prompts)
        cuda_activations: Fp8Activations ["NAME"] = "exact";
        /// Queue every step kernel by kernel on an NVIDIA GPU, without CUDA graphs
        cuda_eager: bool [""];
        /// Attention of prompts on an NVIDIA GPU: auto, or mma (the kernels of every generation, on Hopper and Blackwell too)
        cuda_attention: PromptAttention ["NAME"] = "auto";
        /// Processes that share the model, each holding a part (tensor parallel)
        tp: usize ["N"] = "1";
        /// Which of them this process is; rank 0 leads
        rank: usize ["R"] = "0";
        /// Where rank 0 waits for the other ranks
        leader: Option<String> ["HOST:PORT"];
        /// Links between ranks in a cluster with certificates: auto (encrypted between machines), always, or control (activations in clear between machines, for a network that is yours alone)
        rank_encryption: Sealing ["NAME"] = "auto";
        /// Join a cluster whose other nodes hold other weights of the same model
        allow_mixed_weights: bool [""];
        /// Weights: files, or dummy (seeded random numbers, for measurements)
        load_format: LoadFormat ["FORMAT"] = "files";
        /// Name for people [default: role and host name]
        name: Option<Name> ["NAME"];
        /// After a stop signal, running requests may go on for this long
        drain: Seconds ["SECONDS"] = "10";
        /// Serve other machines in clear; for networks that are yours alone
        insecure: bool [""];
        /// Log filter, for instance info,engine=debug
        log: String ["FILTER"] = "info";
        /// How log lines look: human or json
        log_format: cluster::process::LogFormat ["FORMAT"] = "human";
    }
}

choice!(BackendKind { "auto" => BackendKind::Auto, "cpu" => BackendKind::Cpu, "cuda" => BackendKind::Cuda, "mlx" => BackendKind::Mlx });
choice!(Activations { "exact" => Activations::Exact, "int8" => Activations::Int8 });
choice!(PromptAttention { "auto" => PromptAttention::Auto, "mma" => PromptAttention::Mma });
choice!(Fp8Activations { "exact" => Fp8Activations::Exact, "fp8" => Fp8Activations::Fp8 });
choice!(DType { "bf16" => DType::BF16, "f32" => DType::F32 });
choice!(CodecPolicy {
    "exact" => CodecPolicy::Always(Codec::Exact), "auto" => CodecPolicy::Auto,
    "fp8" => CodecPolicy::Always(Codec::Fp8), "int8" => CodecPolicy::Always(Codec::Int8),
    "int4" => CodecPolicy::Always(Codec::Int4),
});
choice!(KvTransport { "auto" => KvTransport::Auto, "tcp" => KvTransport::Tcp, "ucx" => KvTransport::Ucx });
choice!(Sealing { "auto" => Sealing::Network, "always" => Sealing::Always, "control" => Sealing::Control });
choice!(LoadFormat { "files" => LoadFormat::Files, "dummy" => LoadFormat::Dummy { seed: 0 } });

impl NodeSettings {
    fn check(&self) -> Result<()> {
        let routers = &self.router;
        ensure!(!routers.is_empty(), "router is empty: a node has at least one");
        let twice = routers.iter().enumerate().find(|(index, router)| routers[..*index].contains(router));
        ensure!(twice.is_none(), "router names {} twice", twice.map_or("", |(_, router)| router));
        let (tp, rank) = (self.tp, self.rank);
        ensure!(tp > 0, "tp is 0: a group has at least one rank");
        ensure!(rank < tp, "rank {rank} is not below tp {tp}");
        ensure!(tp == 1 || self.leader.is_some(), "tp {tp} needs --leader HOST:PORT, the same on every rank");
        let threads = self.threads.unwrap_or(0);
        ensure!(threads <= THREADS_MAX, "threads is {threads}: at most {THREADS_MAX}");
        let streams = self.kv_streams;
        ensure!((1..=16).contains(&streams), "kv-streams is {streams}: from 1 to 16");
        ensure!(self.max_batch > 0, "max-batch is 0: no sequence could ever run");
        super::check_drafts(self.draft_max, self.draft_model.is_some())?;
        let block = self.block_tokens;
        ensure!(block.is_power_of_two(), "block-tokens is {block}: a power of two is wanted, such as 32");
        // What is not said fits what is.
        let (step, chunk) = self.step().resolve(1);
        ensure!(0 < chunk && chunk <= step, "chunk-tokens {chunk} is not within 1 to step-tokens {step}");
        ensure!(self.max_batch < step, "max-batch {} does not fit into step-tokens {step}", self.max_batch);
        Ok(())
    }

    /// Bounds of a step.
    pub fn step(&self) -> StepBounds {
        StepBounds { step_tokens: self.step_tokens, chunk_tokens: self.chunk_tokens }
    }

    /// The token, read from where it is.
    pub fn entry(&self) -> Result<Entry> {
        super::entry(&self.token, self.token_file.as_deref())
    }
}
