//! `baton bench decode`: how fast a model generates on this machine's device, for several batch sizes, and beside it `mlx_lm` on
//! the same checkpoint where a Python that has it is named. Steps run as in serving: the device draws the tokens, and the next
//! step is submitted before the one before is waited for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use backend::draw::{Draw, Rule};
use backend::{Backend, Batch, DType, DeviceOptions, Group, KvStore, Out, Pending, SeqId, Step};
use models::Checkpoint;
use models::replay::Rank;
use serde::Deserialize;

/// Steps before the clock starts.
const WARM_STEPS: usize = 4;

/// Prompt tokens per step.
const CHUNK: usize = 512;

/// What `python -c` runs: the loop of `mlx_lm.generate`, over a batch.
const MLX_LM: &str = r#"
import json, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
from mlx_lm.models.cache import make_prompt_cache
path, context, tokens, warm = sys.argv[1], *map(int, sys.argv[2:5])
model, config = load_model(Path(path))
vocabulary = config.get("text_config", config)["vocab_size"]
rates = []
for batch in map(int, sys.argv[5].split(",")):
    cache = make_prompt_cache(model)
    prompt = mx.array([[(row * 7919 + i * 104729) % vocabulary for i in range(context)] for row in range(batch)])
    step = lambda ids: mx.argmax(model(ids, cache=cache)[:, -1, :], axis=-1)
    ids = step(prompt)
    mx.eval(ids)
    for at in range(warm + tokens):
        if at == warm:
            mx.eval(ids)
            begun = time.perf_counter()
        after = step(ids[:, None])
        mx.async_eval(after)
        ids.tolist()
        ids = after
    mx.eval(ids)
    rates.append(batch * tokens / (time.perf_counter() - begun))
print(json.dumps({"version": mx.__version__, "rates": rates}))
"#;

/// Flags of `baton bench`.
#[derive(clap::Subcommand, Debug)]
pub enum BenchCommand {
    /// Tokens per second and memory traffic of generation
    Decode(DecodeArgs),
}

/// Flags of `baton bench decode`.
#[derive(clap::Args, Debug)]
pub struct DecodeArgs {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Device: cpu, cuda or mlx
    #[arg(long, value_name = "NAME", default_value = if cfg!(feature = "mlx") { "mlx" } else { "cpu" })]
    backend: String,
    /// Sequences that generate at once
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [1, 4, 16])]
    batch: Vec<usize>,
    /// Tokens in the cache before
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    context: usize,
    /// Steps to measure
    #[arg(long, value_name = "STEPS", default_value_t = 64)]
    steps: usize,
    /// Type of activations and cache: f32, bf16 or f16
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// CPU threads; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// A Python that has mlx_lm, to be measured on the same checkpoint in the same run
    #[arg(long, value_name = "FILE")]
    mlx_lm: Option<PathBuf>,
}

/// What one batch size gave.
struct Rate {
    tokens_per_s: f64,
    gbytes_per_s: f64,
}

/// What the script of `mlx_lm` prints.
#[derive(Deserialize)]
struct Other {
    version: String,
    rates: Vec<f64>,
}

/// Measures and prints.
pub fn run(command: &BenchCommand) -> Result<()> {
    let BenchCommand::Decode(args) = command;
    ensure!(args.context > 0 && args.steps > 0, "--context and --steps are at least 1");
    ensure!(!args.batch.is_empty() && !args.batch.contains(&0), "--batch is at least 1");
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokens = args.context + WARM_STEPS + args.steps + 1;
    let most = checkpoint.config().context;
    ensure!(tokens <= most, "{tokens} tokens per sequence, the model's context is {most}");
    let rates = match args.backend.as_str() {
        "cpu" => measure::<backend_cpu::CpuBackend>(args, &checkpoint, tokens)?,
        "cuda" => measure::<backend_cuda::CudaBackend>(args, &checkpoint, tokens)?,
        #[cfg(feature = "mlx")]
        "mlx" => measure::<backend_mlx::MlxBackend>(args, &checkpoint, tokens)?,
        other => bail!("no backend {other:?} in this build"),
    };
    let other = args.mlx_lm.as_deref().map(|python| mlx_lm(python, args)).transpose()?;
    let (name, dtype, context) = (&args.backend, args.dtype, args.context);
    let mut text = format!("{name}, {dtype}, {context} tokens of context, {} steps\n", args.steps);
    text += "batch    tok/s     GB/s";
    if let Some(other) = &other {
        text += &format!("   mlx_lm tok/s (mlx {})   ratio", other.version);
    }
    text += "\n";
    for (at, (batch, rate)) in args.batch.iter().zip(&rates).enumerate() {
        text += &format!("{batch:>5} {:>8.1} {:>8.2}", rate.tokens_per_s, rate.gbytes_per_s);
        if let Some(other) = other.as_ref().and_then(|other| other.rates.get(at)) {
            text += &format!("   {other:>12.1}   {:>6.2}", rate.tokens_per_s / other);
        }
        text += "\n";
    }
    crate::print(&text);
    Ok(())
}

fn measure<B: Backend>(args: &DecodeArgs, checkpoint: &Checkpoint, tokens: usize) -> Result<Vec<Rate>> {
    let options = DeviceOptions { dtype: args.dtype, threads: args.threads, ..DeviceOptions::default() };
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let room = tokens.next_multiple_of(options.block_tokens as usize) * most;
    let mut rank: Rank<B> = Rank::open(&options, Group::alone(), checkpoint, room)?;
    let weights = checkpoint.rank_bytes(1)?.first().copied().unwrap_or(0);
    args.batch.iter().map(|batch| one(&mut rank, args, *batch, tokens, weights)).collect()
}

/// One batch size: prompts, then steps of one token each.
fn one<B: Backend>(
    rank: &mut Rank<B>,
    args: &DecodeArgs,
    batch: usize,
    tokens: usize,
    weights: u64,
) -> Result<Rate> {
    let vocabulary = rank.model.vocab_size();
    let seqs: Vec<SeqId> = (0..batch as u64).map(SeqId).collect();
    for (row, seq) in seqs.iter().enumerate() {
        let prompt: Vec<u32> =
            (0..args.context).map(|i| ((row * 7919 + i * 104_729) % vocabulary) as u32).collect();
        rank.begin(*seq, tokens)?;
        rank.feed(*seq, 0, &prompt, CHUNK)?;
    }
    let mut before: Option<Box<dyn Pending<B::Hidden>>> = None;
    let mut begun = Instant::now();
    for step in 0..WARM_STEPS + args.steps {
        if step == WARM_STEPS {
            // What was submitted before counts as before.
            if let Some(pending) = before.take() {
                pending.wait()?;
            }
            begun = Instant::now();
        }
        let mut rows = Batch::default();
        for (row, seq) in seqs.iter().enumerate() {
            let at = (args.context + step) as u32;
            match step {
                0 => rows.push(*seq, at, &[row as u32]),
                _ => rows.push_drawn(*seq, at, row as u32),
            }
        }
        let mut next = rank.backend.step(&mut rank.kv, &rows);
        let logits = rank.model.forward(&mut next, &rows.last_rows(), &mut |_, _| {});
        let pending = next.submit(Out::Draw(logits, vec![Draw::Token(Rule::GREEDY); batch]));
        if let Some(before) = before.replace(pending) {
            before.wait()?;
        }
    }
    if let Some(pending) = before {
        pending.wait()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    // Every step reads all weights once, and every sequence's cache.
    let cached = args.context + WARM_STEPS + args.steps / 2;
    let cache = (batch * cached * rank.model.kv_spec().token_bytes()) as f64;
    let bytes = (weights as f64 + cache) * args.steps as f64;
    for seq in &seqs {
        rank.end(*seq)?;
    }
    let _ = rank.kv.usage();
    Ok(Rate { tokens_per_s: (batch * args.steps) as f64 / seconds, gbytes_per_s: bytes / seconds / 1e9 })
}

fn mlx_lm(python: &Path, args: &DecodeArgs) -> Result<Other> {
    let batches: Vec<String> = args.batch.iter().map(usize::to_string).collect();
    let output = Command::new(python)
        .args(["-c", MLX_LM])
        .arg(&args.model)
        .args([args.context.to_string(), args.steps.to_string(), WARM_STEPS.to_string(), batches.join(",")])
        .output()
        .with_context(|| format!("{}", python.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", python.display(), said.trim());
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("what {} said: {line}", python.display()))
}
