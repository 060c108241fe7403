//! What one device does without a cluster around it: the conformance suite, golden cases, prompts, ragged batches,
//! generation, and the cost of letting the cache go while it computes. `benches/h200.sh` runs it on a GPU.
//!
//! `device --backend cuda --config benches/configs/llama-3-8b.json --peak-tflops 989`

mod attention;
mod golden;
mod measure;
mod products;

use std::any::Any;
use std::cell::RefCell;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{Backend, CudaOptions, DType, DeviceOptions, Group, PromptAttention};
use backend_cpu::CpuBackend;
use backend_cuda::CudaBackend;
use clap::Parser;
use models::Checkpoint;
use models::replay::Rank;

use measure::{Bench, Replays};

/// Seed of the dummy weights.
const SEED: u64 = 7;

thread_local! {
    /// What is measured.
    static DEVICE: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

#[derive(Parser)]
#[command(about = "Measures one device: correctness, prompts, generation, cache on its way out")]
struct Args {
    /// Device: cuda or cpu
    #[arg(long, default_value = "cuda")]
    backend: String,
    /// A config.json: seeded random weights of its shape
    #[arg(long)]
    config: Option<PathBuf>,
    /// Only this many of its layers (results are per token of this smaller model)
    #[arg(long)]
    layers: Option<usize>,
    /// Run the conformance suite first
    #[arg(long)]
    conformance: bool,
    /// Compare golden cases below this folder with the CPU's
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Compare attention with a float64 reference over so many random shapes
    #[arg(long, value_name = "SHAPES")]
    attention: Option<usize>,
    /// Measure attention by itself over the long prompt
    #[arg(long)]
    attention_speed: bool,
    /// Attend prompts by the kernels of every generation, on Hopper and Blackwell too
    #[arg(long)]
    mma: bool,
    /// Measure products by themselves, by format of the weights
    #[arg(long)]
    products: bool,
    /// With --products: matrices of an eighth of the width, to try it out
    #[arg(long)]
    small: bool,
    /// Another implementation's seconds, as h200_torch.py writes them, to be shown beside
    #[arg(long, value_name = "FILE")]
    beside: Option<PathBuf>,
    /// Tokens of the long prompt
    #[arg(long, default_value_t = 8192)]
    prompt: usize,
    /// Runs of each kind; the median counts
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// What the device's dense bf16 products can do, for the share of it that prompts reach
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Type of activations and cache: bf16 or f32
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Compiled kernels are kept here
    #[arg(long)]
    cache: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let ended = match args.backend.as_str() {
        "cuda" => {
            let replays = Replays { turn: CudaBackend::replay_steps, count: CudaBackend::replayed_steps };
            run::<CudaBackend>(&args, Some(replays))
        }
        "cpu" => run::<CpuBackend>(&args, None),
        other => bail!("no backend {other:?}: cuda or cpu"),
    };
    // Before the process ends, and the driver in it.
    DEVICE.set(None);
    ended
}

fn run<B: Backend>(args: &Args, replays: Option<Replays<B>>) -> Result<()> {
    let dtype: DType = args.dtype.parse().map_err(anyhow::Error::msg)?;
    let attention = if args.mma { PromptAttention::Mma } else { PromptAttention::Auto };
    let cuda = CudaOptions { attention, ..CudaOptions::default() };
    let options = DeviceOptions { dtype, cuda, cache: args.cache.clone(), ..DeviceOptions::default() };
    let device = B::open(&options, Group::alone())?;
    println!("{}: {}", device.caps().name, device.caps().device);
    // Held to the end: while a GPU's context is there, opening it again takes little.
    DEVICE.set(Some(Box::new(device)));
    let beside = match &args.beside {
        Some(path) => {
            serde_json::from_slice(&std::fs::read(path)?).with_context(|| path.display().to_string())?
        }
        None => serde_json::Value::Null,
    };
    let mut passed = true;
    if let Some(shapes) = args.attention {
        passed &= attention::check::<B>(shapes, &options)?;
    }
    if let Some(root) = &args.golden {
        passed &= golden::run::<B>(root, &options)?;
    }
    if args.attention_speed {
        let time = attention::speed::<B>(args.prompt, args.runs.max(1), &options)?;
        let rate = attention::flops(args.prompt) / time.as_secs_f64() / 1e12;
        let beside = measure::times(&beside, "attention", time, "torch's flash SDPA (goal 0.8)");
        let kernels = if args.mma { ", mma.sync" } else { "" };
        println!(
            "| attention alone{kernels}, {} tokens, 32 heads of 128 on 8 | {time:.2?} | {rate:.1} TFLOP/s{beside} |",
            args.prompt
        );
    }
    if args.products {
        products::table::<B>(args.runs.max(1), args.small, &options)?;
    }
    if args.conformance {
        // Every case opens it: of a GPU that is open that takes little.
        let open = |options: &DeviceOptions, group: Group| {
            DEVICE.with_borrow(|device| match device.as_ref().and_then(|device| device.downcast_ref::<B>()) {
                Some(device) => device.beside(options, group),
                None => B::open(&DeviceOptions { cache: args.cache.clone(), ..options.clone() }, group),
            })
        };
        let tolerance = Tolerance { f32: 1e-5, bf16: 2e-2 };
        let dtypes = &[DType::F32, DType::BF16];
        Suite { open: &open, tolerance, dtypes, group: None, quants: QUANTS, plain_experts: dtypes }.run();
        println!("| conformance suite, f32 and bf16 | ok | |");
    }
    if !passed {
        bail!("a comparison failed");
    }
    let Some(config) = &args.config else { return Ok(()) };
    let config = shortened(config, args.layers)?;
    let checkpoint = Checkpoint::dummy(config.path(), SEED)?;
    let parameters = measure::parameters(checkpoint.config());
    println!("{parameters:.3e} parameters in products, {} bytes of weights", checkpoint.weight_bytes());
    let tokens = args.prompt.max(measure::RAGGED_TOKENS) + 1024;
    let rank = Rank::<B>::open(&options, Group::alone(), &checkpoint, tokens)?;
    let mut bench = Bench { rank, replays, runs: args.runs.max(1), next: 0 };
    bench.table(args.prompt, parameters, args.peak_tflops, &beside)
}

/// The config.json, with fewer layers where asked.
fn shortened(path: &std::path::Path, layers: Option<usize>) -> Result<tempfile::NamedTempFile> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut json: serde_json::Value = serde_json::from_str(&text)?;
    if let Some(layers) = layers {
        json["num_hidden_layers"] = layers.into();
    }
    let file = tempfile::Builder::new().suffix(".json").tempfile()?;
    std::fs::write(file.path(), json.to_string())?;
    Ok(file)
}
