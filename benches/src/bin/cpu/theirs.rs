//! llama.cpp's side: its llama-bench and llama-batched-bench as child processes, one test each.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process;

/// The peer's executables.
pub struct Theirs {
    bench: PathBuf,
    threads: usize,
    /// Cores that its threads stay on, as flags of both executables.
    cores: Vec<String>,
    /// Whether seconds are the processor's.
    cpu_time: bool,
}

impl Theirs {
    /// `bench` is llama-bench; llama-batched-bench lies beside it.
    pub fn new(bench: PathBuf, threads: usize, cores: Vec<usize>, cpu_time: bool) -> Result<Self> {
        ensure!(
            bench.is_file(),
            "no llama-bench at {}: see benches/README.md on building it",
            bench.display()
        );
        let cores = match cores.is_empty() {
            true => Vec::new(),
            false => vec!["--cpu-mask".into(), mask(&cores)?, "--cpu-strict".into(), "1".into()],
        };
        Ok(Theirs { bench, threads, cores, cpu_time })
    }

    /// Tokens per second of a prompt behind `depth` positions.
    pub fn prefill(&self, model: &Path, tokens: usize, depth: usize) -> Result<f64> {
        self.bench(model, &["-p", &tokens.to_string(), "-n", "0"], depth, tokens)
    }

    /// Tokens per second of one sequence behind `depth` positions, `steps` steps.
    pub fn decode(&self, model: &Path, depth: usize, steps: usize) -> Result<f64> {
        self.bench(model, &["-p", "0", "-n", &steps.to_string()], depth, steps)
    }

    fn bench(&self, model: &Path, test: &[&str], depth: usize, tokens: usize) -> Result<f64> {
        let mut command = Command::new(&self.bench);
        command.arg("-m").arg(model).args(test).args(["-o", "jsonl"]);
        command.args(["-t", &self.threads.to_string(), "-d", &depth.to_string()]).args(&self.cores);
        if self.cpu_time {
            // Loading and the first repetition are in both.
            let run = |runs: &str| {
                let mut again = Command::new(&self.bench);
                again.args(command.get_args()).args(["--no-warmup", "-r", runs]);
                process::run(again)
            };
            return Ok(2.0 * tokens as f64 / (run("3")?.busy - run("1")?.busy));
        }
        command.args(["-r", "1"]);
        speed(command, "avg_ts")
    }

    /// Tokens per second of `count` sequences together, behind prompts of `prompt` tokens.
    pub fn batch(&self, model: &Path, count: usize, prompt: usize, steps: usize) -> Result<f64> {
        let mut command = Command::new(self.bench.with_file_name("llama-batched-bench"));
        // Of a context each sequence gets an equal part, in whole pages of 256.
        let context = count * (prompt + steps).next_multiple_of(256);
        command.arg("-m").arg(model).args(["--output-format", "jsonl"]).args(&self.cores);
        if self.cpu_time {
            bail!("llama-batched-bench has no repetitions: not with --cpu-time");
        }
        for (flag, n) in [
            ("-npp", prompt),
            ("-ntg", steps),
            ("-npl", count),
            ("-c", context),
            ("-t", self.threads),
            ("-tb", self.threads),
        ] {
            command.args([flag, &n.to_string()]);
        }
        speed(command, "speed_tg")
    }

    /// A process that loads the model and generates one token.
    pub fn load(&self, model: &Path) -> Command {
        let mut command = Command::new(&self.bench);
        command.arg("-m").arg(model).args(["-p", "0", "-n", "1", "-r", "1", "--no-warmup"]);
        command.args(["-t", &self.threads.to_string()]).args(&self.cores);
        command
    }
}

/// Cores as llama.cpp's mask of bits, in hexadecimal.
fn mask(cores: &[usize]) -> Result<String> {
    let bit = |core: &usize| {
        1u128.checked_shl(*core as u32).context("llama.cpp's mask is made of the first 128 cores")
    };
    let bits = cores.iter().map(bit).try_fold(0, |all, bit| Ok::<_, anyhow::Error>(all | bit?))?;
    Ok(format!("0x{bits:x}"))
}

/// Field `name` of the line of JSON that the command prints.
fn speed(mut command: Command, name: &str) -> Result<f64> {
    let out = process::anywhere(&mut command).stdin(Stdio::null()).stderr(Stdio::piped()).output();
    let out = out.with_context(|| format!("running {:?}", command.get_program()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().filter_map(|line| serde_json::from_str::<Value>(line.trim()).ok());
    match line.filter_map(|line| line[name].as_f64()).next_back() {
        Some(speed) if out.status.success() => Ok(speed),
        _ => {
            let errors = String::from_utf8_lossy(&out.stderr);
            let last: Vec<_> = errors.lines().rev().take(5).collect();
            bail!("{:?} ended with {}: {last:?}", command.get_program(), out.status)
        }
    }
}
