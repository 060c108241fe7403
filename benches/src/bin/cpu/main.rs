//! The CPU backend beside llama.cpp: the same file of random weights, the same threads, by turns. One table: speed of
//! both, the ratio of medians, and what ours reaches of the limits of this machine.
//!
//! `cpu --vs llama.cpp --llama-bench PATH`

mod blocks;
mod gguf;
mod limits;
mod neighbour;
mod ours;
mod process;
mod shape;
mod table;
mod theirs;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use backend::{Activations, CpuOptions};
use clap::Parser;

use blocks::Recipe;
use limits::{Limits, Probe};
use neighbour::Neighbour;
use ours::Ours;
use shape::{SHAPES, Shape};
use table::{Test, Work};
use theirs::Theirs;

#[derive(Parser)]
#[command(about = "Measures the CPU backend, beside llama.cpp if asked")]
struct Args {
    /// The peer: llama.cpp
    #[arg(long)]
    vs: Option<String>,
    /// Its llama-bench, with llama-batched-bench beside it
    #[arg(long, default_value = "target/llama.cpp/bin/llama-bench")]
    llama_bench: PathBuf,
    /// llama-3.2-1b, qwen3-0.6b, qwen3-moe, deepseek, gpt-oss or tiny
    #[arg(long, default_value = "llama-3.2-1b")]
    shape: String,
    /// Formats: bf16, f16, q8_0, q4_0, q2_k, q3_k, q4_k_m, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4
    #[arg(long, value_delimiter = ',', default_value = "bf16,q8_0,q4_k_m")]
    formats: Vec<String>,
    /// Threads of both
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, |n| n.get()))]
    threads: usize,
    /// Runs of each, by turns
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Lengths of prompts
    #[arg(long, value_delimiter = ',', default_value = "512")]
    prompts: Vec<usize>,
    /// Positions of cache before a decoded token
    #[arg(long, value_delimiter = ',', default_value = "0,2048")]
    depths: Vec<usize>,
    /// Sequences that decode together
    #[arg(long, value_delimiter = ',', default_value = "16")]
    batches: Vec<usize>,
    /// Count the processor's time instead of the clock's, tokens per second of it: for a machine that others use too. With
    /// one thread, as threads that wait for each other count as well
    #[arg(long)]
    cpu_time: bool,
    /// Keep the threads of both each on a core of its own: for systems that move them together
    #[arg(long)]
    pin: bool,
    /// Ours with activations in 8 bits, as llama.cpp has them always
    #[arg(long)]
    int8: bool,
    /// Ours at this instruction level: portable, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx
    #[arg(long)]
    level: Option<String>,
    /// Steps of a decode
    #[arg(long, default_value_t = 32)]
    steps: usize,
    /// Also decode while another process keeps a core busy
    #[arg(long)]
    neighbour: bool,
    /// Also compare the time to load and generate one token, and the memory it takes
    #[arg(long)]
    load: bool,
    /// Instead: our cost curve, prompts of 128 to 16,384 tokens and decode behind 0 to 16,384
    #[arg(long)]
    curve: bool,
    /// Where files of weights are kept
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Loads this file, generates one token and ends
    #[arg(long, hide = true)]
    only_load: Option<PathBuf>,
    /// Runs a program and prints what it took
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    only_run: Vec<OsString>,
    /// Computes until it is killed
    #[arg(long, hide = true)]
    only_spin: bool,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.only_spin {
        neighbour::spin();
    }
    if !args.only_run.is_empty() {
        return process::measure(&args.only_run);
    }
    if let Some(path) = &args.only_load {
        return Ours::open(path, args.threads, args.cpu(), 64)?.decode(1, 0, 1).map(drop);
    }
    // Noted before a thread is kept on one of them.
    process::all_cores();
    let shape = Shape::named(&args.shape).with_context(|| {
        format!("no shape {:?}: {}", args.shape, SHAPES.map(|shape| shape.name).join(", "))
    })?;
    let theirs = match args.vs.as_deref() {
        None => None,
        Some("llama.cpp") => {
            Some(Theirs::new(args.llama_bench.clone(), args.threads, args.cores(), args.cpu_time)?)
        }
        Some(other) => bail!("no peer {other:?}: llama.cpp"),
    };
    if args.curve {
        (args.prompts, args.depths) = (vec![128, 512, 2048, 8192, 16_384], vec![0, 512, 2048, 8192, 16_384]);
        args.batches.clear();
    }
    let dir = args.dir.clone().unwrap_or_else(|| std::env::temp_dir().join("baton-bench-cpu"));
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    for (at, format) in args.formats.iter().enumerate() {
        let recipe = Recipe::named(format).with_context(|| format!("no format {format:?}"))?;
        let path = dir.join(format!("{}-{format}.gguf", shape.name));
        gguf::write(&path, &shape, recipe)?;
        // On a thread of its own, which a pool may keep on a core.
        let measured = std::thread::scope(|scope| {
            scope.spawn(|| measure(&args, shape, recipe, format, &path, theirs.as_ref(), at == 0)).join()
        });
        measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    Ok(())
}

impl Args {
    /// Cores that threads stay on, one each; none where they go where they like.
    fn cores(&self) -> Vec<usize> {
        let usable = if self.pin { process::all_cores() } else { &[] };
        usable.iter().copied().take(self.threads).collect()
    }

    fn cpu(&self) -> CpuOptions {
        let activations = if self.int8 { Activations::Int8 } else { Activations::Exact };
        CpuOptions { level: self.level.clone(), activations, pin: self.pin }
    }
}

/// The tests of `args`, the longest last.
fn tests(args: &Args) -> Vec<Test> {
    let mut all: Vec<Test> =
        args.prompts.iter().map(|tokens| Test::Prefill { tokens: *tokens, depth: 0 }).collect();
    all.extend(args.depths.iter().map(|depth| Test::Decode { count: 1, depth: *depth }));
    all.extend(args.batches.iter().map(|count| Test::Decode { count: *count, depth: ours::BATCH_PROMPT }));
    if args.neighbour {
        all.push(Test::Disturbed);
    }
    all
}

/// All tests of one file.
fn measure(
    args: &Args,
    shape: Shape,
    recipe: Recipe,
    format: &str,
    path: &Path,
    theirs: Option<&Theirs>,
    first: bool,
) -> Result<()> {
    let tests = tests(args);
    let tokens = |test: &Test| match *test {
        Test::Prefill { tokens, depth } => tokens + depth,
        Test::Decode { count, depth } => count * (depth + args.steps + 64),
        Test::Disturbed => args.steps + 64,
    };
    let most = tests.iter().map(tokens).max().unwrap_or(0).next_multiple_of(64);
    // Before the pool keeps this thread on one core.
    let probe = Probe::new(args.threads, args.cores());
    let mut ours = Ours::open(path, args.threads, args.cpu(), most)?;
    ours.cpu_time = args.cpu_time;
    let mut limits = Limits::default();
    (0..3).for_each(|_| limits = limits.best(probe.measure()));
    if first {
        table::heading(&shape, limits, &ours.device(), args.threads);
    }
    let work = Work::new(shape, recipe);
    for test in tests {
        let (mut own, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let _busy = if test == Test::Disturbed { Some(Neighbour::start()?) } else { None };
            limits = limits.best(if test == Test::Disturbed { limits } else { probe.measure() });
            own.push(match test {
                Test::Prefill { tokens, depth } => ours.prefill(tokens, depth)?,
                Test::Decode { count, depth } => ours.decode(count, depth, args.steps)?,
                Test::Disturbed => ours.decode(1, 0, args.steps)?,
            });
            // Batches of theirs are one run, of which the processor's time cannot be told from loading.
            let apart = args.cpu_time && matches!(test, Test::Decode { count: 2.., .. });
            let Some(theirs) = theirs.filter(|_| !apart) else { continue };
            peer.push(match test {
                Test::Prefill { tokens, depth } => theirs.prefill(path, tokens, depth)?,
                Test::Decode { count: 1, depth } => theirs.decode(path, depth, args.steps)?,
                Test::Decode { count, depth } => theirs.batch(path, count, depth, args.steps)?,
                Test::Disturbed => theirs.decode(path, 0, args.steps)?,
            });
        }
        table::row(format, test, &work, &own, &peer, limits);
    }
    drop(ours);
    if args.load {
        process::compare(args, format, path, theirs)?;
    }
    Ok(())
}
