//! `baton bench decode`: how fast a model generates on this machine's device, for several batch sizes, and beside it `mlx_lm` on
//! the same checkpoint where a Python that has it is named. Steps run as in serving: the device draws the tokens, and the next
//! step is submitted before the one before is waited for.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use backend::draw::{Draw, Rule};
use backend::{Backend, Batch, DType, DeviceOptions, Group, KvStore, Out, Pending, SeqId, Step};
use models::Checkpoint;
use models::replay::Rank;

/// Steps before the clock starts.
const WARM_STEPS: usize = 4;

/// Prompt tokens per step.
const CHUNK: usize = 512;

/// What `python -c` runs: for every batch size that it reads, the loop of `mlx_lm.generate` over a batch.
const MLX_LM: &str = r#"
import sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
from mlx_lm.models.cache import make_prompt_cache
path, context, tokens, warm = sys.argv[1], *map(int, sys.argv[2:5])
model, config = load_model(Path(path))
vocabulary = config.get("text_config", config)["vocab_size"]
print(mx.__version__, flush=True)
for line in sys.stdin:
    batch = int(line)
    cache = make_prompt_cache(model)
    prompt = mx.array([[(row * 7919 + i * 104729) % vocabulary for i in range(context)] for row in range(batch)])
    step = lambda ids: mx.argmax(model(ids, cache=cache)[:, -1, :], axis=-1)
    ids = step(prompt)
    mx.eval(ids)
    for at in range(warm + tokens):
        if at == warm:
            mx.eval(ids)
            begun, busy = time.perf_counter(), time.process_time()
        after = step(ids[:, None])
        mx.async_eval(after)
        ids.tolist()
        ids = after
    mx.eval(ids)
    print(time.perf_counter() - begun, time.process_time() - busy, flush=True)
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
    /// Measurements of each batch size, in turns with mlx_lm's; the median counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
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

/// The measured steps of one round.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Took {
    seconds: f64,
    /// Of all processors together, in this process.
    busy_seconds: f64,
}

/// What one batch size gave in every round, and the bytes that a token costs.
#[derive(Default)]
struct Rates {
    ours: Vec<Took>,
    others: Vec<Took>,
    token_bytes: f64,
}

/// Measures and prints.
pub fn run(command: &BenchCommand) -> Result<()> {
    let BenchCommand::Decode(args) = command;
    ensure!(args.context > 0 && args.steps > 0, "--context and --steps are at least 1");
    ensure!(!args.batch.is_empty() && !args.batch.contains(&0), "--batch is at least 1");
    ensure!(args.rounds > 0, "--rounds is at least 1");
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokens = args.context + WARM_STEPS + args.steps + 1;
    let most = checkpoint.config().context;
    ensure!(tokens <= most, "{tokens} tokens per sequence, the model's context is {most}");
    let mut other = args.mlx_lm.as_deref().map(|python| MlxLm::start(python, args)).transpose()?;
    let rates = match args.backend.as_str() {
        "cpu" => measure::<backend_cpu::CpuBackend>(args, &checkpoint, tokens, &mut other)?,
        "cuda" => measure::<backend_cuda::CudaBackend>(args, &checkpoint, tokens, &mut other)?,
        #[cfg(feature = "mlx")]
        "mlx" => measure::<backend_mlx::MlxBackend>(args, &checkpoint, tokens, &mut other)?,
        name => bail!("no backend {name:?} in this build"),
    };
    crate::print(&table(args, &rates, other.as_ref().map(|other| other.version.as_str())));
    Ok(())
}

/// The report. `version`: of the MLX that was measured beside.
fn table(args: &DecodeArgs, rates: &[Rates], version: Option<&str>) -> String {
    let DecodeArgs { backend, dtype, context, steps, rounds, .. } = args;
    let mut text = format!(
        "{backend}, {dtype}, {context} tokens of context, {steps} steps, median of {rounds} (least to most)\n"
    );
    text += "batch    tok/s                    GB/s   CPU ms/step";
    if let Some(version) = version {
        text += &format!(
            "   {:<28}   CPU ms/step   ratio by turns: tok/s, CPU",
            format!("mlx_lm tok/s (mlx {version})")
        );
    }
    text += "\n";
    for (batch, rates) in args.batch.iter().zip(rates) {
        let shown = |all: &[Took]| {
            let [low, rate, high] = spread(all, |took| (batch * steps) as f64 / took.seconds);
            let [_, busy, _] = spread(all, |took| 1e3 * took.busy_seconds / *steps as f64);
            (rate, busy, format!("{rate:>8.1} {:<19}", format!("({low:.1} to {high:.1})")))
        };
        let (ours, our_busy, range) = shown(&rates.ours);
        let gbytes = ours * rates.token_bytes / 1e9;
        text += &format!("{batch:>5} {range} {gbytes:>5.2} {our_busy:>13.2}");
        if version.is_some() {
            let (_, busy, range) = shown(&rates.others);
            let rate = paired(&rates.others, &rates.ours, |took| took.seconds);
            let cpu = paired(&rates.ours, &rates.others, |took| took.busy_seconds);
            text += &format!("   {range} {busy:>13.2}   {rate:>5.2} {cpu:>5.2}");
        }
        text += "\n";
    }
    text
}

/// Least, median and most.
fn spread(all: &[Took], number: impl Fn(&Took) -> f64) -> [f64; 3] {
    let mut numbers: Vec<f64> = all.iter().map(number).collect();
    numbers.sort_by(f64::total_cmp);
    let at = |at: usize| numbers.get(at).copied().unwrap_or(f64::NAN);
    [at(0), at(numbers.len().saturating_sub(1) / 2), at(numbers.len().saturating_sub(1))]
}

/// Median of the rounds' ratios: what changes from minute to minute on a machine that others use is the same for both sides of
/// a round.
fn paired(some: &[Took], others: &[Took], number: impl Fn(&Took) -> f64) -> f64 {
    let mut ratios: Vec<f64> = some.iter().zip(others).map(|(a, b)| number(a) / number(b)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// Processor time of this process so far, in seconds.
fn busy_seconds() -> f64 {
    // SAFETY: plain numbers, for which zeros are a value.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: a place of ours, that lives during the call. A clock that is not there leaves zeros.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn measure<B: Backend>(
    args: &DecodeArgs,
    checkpoint: &Checkpoint,
    tokens: usize,
    other: &mut Option<MlxLm>,
) -> Result<Vec<Rates>> {
    let options = DeviceOptions { dtype: args.dtype, threads: args.threads, ..DeviceOptions::default() };
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let room = tokens.next_multiple_of(options.block_tokens as usize) * most;
    let mut rank: Rank<B> = Rank::open(&options, Group::alone(), checkpoint, room)?;
    let weights = checkpoint.rank_bytes(1)?.first().copied().unwrap_or(0);
    // Every step reads all weights once, and every sequence's cache.
    let cached = args.context + WARM_STEPS + args.steps / 2;
    let cache = (cached * rank.model.kv_spec().token_bytes()) as f64;
    let mut all: Vec<Rates> = Vec::new();
    all.resize_with(args.batch.len(), Rates::default);
    for _ in 0..args.rounds {
        for (batch, rates) in args.batch.iter().zip(&mut all) {
            rates.token_bytes = weights as f64 / *batch as f64 + cache;
            rates.ours.push(one(&mut rank, args, *batch, tokens)?);
            if let Some(other) = other {
                rates.others.push(other.measure(*batch)?);
            }
        }
    }
    Ok(all)
}

/// One batch size: prompts, then steps of one token each.
fn one<B: Backend>(rank: &mut Rank<B>, args: &DecodeArgs, batch: usize, tokens: usize) -> Result<Took> {
    let vocabulary = rank.model.vocab_size();
    let seqs: Vec<SeqId> = (0..batch as u64).map(SeqId).collect();
    for (row, seq) in seqs.iter().enumerate() {
        let prompt: Vec<u32> =
            (0..args.context).map(|i| ((row * 7919 + i * 104_729) % vocabulary) as u32).collect();
        rank.begin(*seq, tokens)?;
        rank.feed(*seq, 0, &prompt, CHUNK)?;
    }
    let mut before: Option<Box<dyn Pending<B::Hidden>>> = None;
    let (mut begun, mut busy) = (Instant::now(), 0.0);
    for step in 0..WARM_STEPS + args.steps {
        if step == WARM_STEPS {
            // What was submitted before counts as before.
            if let Some(pending) = before.take() {
                pending.wait()?;
            }
            (begun, busy) = (Instant::now(), busy_seconds());
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
    let took = Took { seconds: begun.elapsed().as_secs_f64(), busy_seconds: busy_seconds() - busy };
    for seq in &seqs {
        rank.end(*seq)?;
    }
    let _ = rank.kv.usage();
    Ok(took)
}

/// `mlx_lm` in a Python of its own.
struct MlxLm {
    child: Child,
    asks: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// Of MLX.
    version: String,
}

impl MlxLm {
    /// Loads the model.
    fn start(python: &Path, args: &DecodeArgs) -> Result<Self> {
        let mut child = Command::new(python)
            .args(["-c", MLX_LM])
            .arg(&args.model)
            .args([args.context, args.steps, WARM_STEPS].map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}", python.display()))?;
        let (asks, answers) = (child.stdin.take(), child.stdout.take());
        let (asks, answers) = asks.zip(answers).context("pipes to python")?;
        let answers = BufReader::new(answers).lines();
        let mut other = MlxLm { child, asks, answers, version: String::new() };
        other.version = other.line()?;
        Ok(other)
    }

    fn measure(&mut self, batch: usize) -> Result<Took> {
        writeln!(self.asks, "{batch}")?;
        let line = self.line()?;
        took(&line).with_context(|| format!("what mlx_lm said: {line}"))
    }

    fn line(&mut self) -> Result<String> {
        Ok(self.answers.next().context("mlx_lm ended; what it said is above")??)
    }
}

impl Drop for MlxLm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Seconds, and of the processor, as [`MLX_LM`] prints them.
fn took(line: &str) -> Option<Took> {
    let (seconds, busy) = line.trim().split_once(' ')?;
    Some(Took { seconds: seconds.parse().ok()?, busy_seconds: busy.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn took_of(seconds: f64) -> Took {
        Took { seconds, busy_seconds: seconds / 2.0 }
    }

    #[test]
    fn the_median_is_between() {
        let spread =
            |all: &[f64]| spread(&all.iter().copied().map(took_of).collect::<Vec<_>>(), |took| took.seconds);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), [1.0, 2.0, 3.0]);
        assert_eq!(spread(&[5.0]), [5.0; 3]);
        assert!(spread(&[])[1].is_nan());
    }

    /// A slow minute, in which both were slow, is one ratio among others.
    #[test]
    fn ratios_are_of_rounds() {
        let [ours, others] = [[1.0, 30.0, 1.1], [2.0, 60.0, 2.2]].map(|all| all.map(took_of).to_vec());
        assert!((paired(&others, &ours, |took| took.seconds) - 2.0).abs() < 1e-9);
        assert!(paired(&[], &[], |took| took.seconds).is_nan());
    }

    #[test]
    fn what_mlx_lm_says_is_two_numbers() {
        assert_eq!(took("0.5 0.25"), Some(took_of(0.5)));
        assert_eq!(took("0.5"), None);
        assert_eq!(took("Traceback (most recent call last):"), None);
    }

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: BenchCommand,
    }

    /// Rates, bytes and ratios of numbers that can be worked out by hand.
    #[test]
    fn the_table_shows_both() {
        let line = Line::parse_from(["b", "decode", "--model=m", "--backend=mlx", "--batch=4", "--steps=10"]);
        let BenchCommand::Decode(args) = line.command;
        let (ours, others) = (vec![took_of(0.5); 3], vec![took_of(1.0); 3]);
        let rates = [Rates { ours, others, token_bytes: 1e8 }];
        let text = table(&args, &rates, Some("1.2"));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "mlx, bf16, 128 tokens of context, 10 steps, median of 5 (least to most)");
        assert!(lines[1].contains("mlx_lm tok/s (mlx 1.2)"), "{text}");
        let columns = "4 80.0 (80.0 to 80.0) 8.00 25.00 40.0 (40.0 to 40.0) 50.00 2.00 0.50";
        assert_eq!(lines[2].split_whitespace().collect::<Vec<_>>().join(" "), columns);
        let alone = table(&args, &rates, None);
        let columns = "4 80.0 (80.0 to 80.0) 8.00 25.00";
        assert_eq!(
            alone.lines().last().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")),
            Some(columns.into())
        );
    }
}
