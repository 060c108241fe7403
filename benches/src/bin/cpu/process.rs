//! Time and memory of whole processes that load a model and generate one token.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use backend_cpu::cores;

use crate::Args;
use crate::table::median;
use crate::theirs::Theirs;

/// Prints both sides' medians.
pub fn compare(args: &Args, format: &str, path: &Path, theirs: Option<&Theirs>) -> Result<()> {
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--only-load").arg(path).args(["--threads", &args.threads.to_string()]);
        if args.int8 {
            command.arg("--int8");
        }
        own.push(run(command)?);
        if let Some(theirs) = theirs {
            peer.push(run(theirs.load(path))?);
        }
    }
    let show = |who: &str, runs: &[Ended]| {
        let part = |of: fn(&Ended) -> f64| median(&runs.iter().map(of).collect::<Vec<_>>());
        println!(
            "{format}, load and one token, {who}: {:.2} s, {:.0} MB at most",
            part(|run| run.took),
            part(|run| run.memory) / 1e6
        );
    };
    show("ours", &own);
    if !peer.is_empty() {
        show("llama.cpp", &peer);
    }
    Ok(())
}

/// Cores that this process may use, as first asked: before a thread is kept on one.
pub fn all_cores() -> &'static [usize] {
    static ALL: OnceLock<Vec<usize>> = OnceLock::new();
    ALL.get_or_init(cores::usable)
}

/// Has a process begin on all of them, wherever the thread that starts it is kept.
pub fn anywhere(command: &mut Command) -> &mut Command {
    let all = all_cores();
    // SAFETY: one system call, and no memory is asked for.
    unsafe {
        command.pre_exec(|| {
            cores::stay_on(all);
            Ok(())
        })
    }
}

/// What a process took.
pub struct Ended {
    /// Seconds.
    pub took: f64,
    /// Seconds of processors.
    pub busy: f64,
    /// Bytes of memory at most.
    pub memory: f64,
}

/// Runs a process to its end, from one that holds nothing: a child's largest memory counts what its parent held when it was made.
pub fn run(command: Command) -> Result<Ended> {
    let mut small = Command::new(std::env::current_exe()?);
    small.arg("--only-run").arg(command.get_program()).args(command.get_args());
    let done = anywhere(&mut small).stdin(Stdio::null()).stderr(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&done.stdout);
    let figures: Vec<f64> = text.split_whitespace().flat_map(str::parse).collect();
    match figures[..] {
        [took, busy, memory] if done.status.success() => Ok(Ended { took, busy, memory }),
        _ => bail!("{:?} ended with {}", command.get_program(), done.status),
    }
}

/// What `--only-run` does: runs a process to its end and prints what [`run`] reads.
pub fn measure(words: &[OsString]) -> Result<()> {
    let (program, args) = words.split_first().context("nothing to run")?;
    let Ended { took, busy, memory } = end(Command::new(program).args(args))?;
    println!("{took} {busy} {memory}");
    Ok(())
}

fn end(command: &mut Command) -> Result<Ended> {
    let begun = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let child = child.with_context(|| format!("running {:?}", command.get_program()))?;
    // SAFETY: zeros are a valid rusage; the call fills both places, and the child is ours and waited for once.
    let (waited, status, usage) = unsafe {
        let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
        (libc::wait4(child.id() as i32, &mut status, 0, &mut usage), status, usage)
    };
    ensure!(waited > 0 && status == 0, "{:?} ended with {status}", command.get_program());
    // Kilobytes, but on macOS.
    let unit = if cfg!(target_os = "macos") { 1.0 } else { 1024.0 };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    Ok(Ended {
        took: begun.elapsed().as_secs_f64(),
        busy: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        memory: usage.ru_maxrss as f64 * unit,
    })
}
