//! Moves a scattered cache between two processes and compares with iperf3, NIXL and Mooncake on the same blocks, by turns in one
//! run. `benches/README.md` says how to read the table.

mod cache;
mod contender;
mod ends;
#[allow(dead_code)] // shared with `handoff`, each uses its share
#[path = "../handoff/link.rs"]
mod link;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use crate::contender::{Contender, Field, Sample};
use crate::ends::Spec;
use crate::link::{Link, Rate};

/// Compares ways to move a KV cache.
#[derive(Parser, Debug)]
#[command(args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    end: Option<End>,

    /// Emulate this link: 10gbit, 1gbit, ...; 10gbit,1gbit: of two unlike ports; without it both ends share loopback
    #[arg(long, value_delimiter = ',', value_name = "RATE")]
    link: Vec<Rate>,

    /// Ports between the two ends, where one rate is given
    #[arg(long, default_value_t = 1, value_name = "N")]
    ports: usize,

    /// Every transfer is the first one of its sender, which has measured nothing yet
    #[arg(long)]
    fresh: bool,

    /// The second port falls silent so many ms after each transfer has begun; implies --fresh
    #[arg(long, value_name = "MS")]
    silent: Option<u64>,

    /// MiB of cache, a multiple of 64
    #[arg(long, value_delimiter = ',', default_values_t = [256], value_name = "MIB")]
    total: Vec<usize>,

    /// KiB of a block
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256, 1024], value_name = "KIB")]
    block: Vec<usize>,

    /// Measured transfers of each contender and case
    #[arg(long, default_value_t = 5, value_name = "N")]
    runs: usize,

    /// Contenders by name, all that are here otherwise
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,

    /// Connections of our own
    #[arg(long, default_value_t = 1, value_name = "N")]
    streams: usize,

    /// KiB of our own frames
    #[arg(long, default_value_t = 1024, value_name = "KIB")]
    frame: usize,

    /// Python with numpy and nixl
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,

    /// Directory with the Python package mooncake
    #[arg(long, value_name = "DIR")]
    mooncake: Option<PathBuf>,

    /// Make the cache at this rate, and measure what is exposed of its transfer: 5500 as a DGX Spark does an 8B model
    #[arg(long, value_name = "TOKENS_PER_S")]
    made: Option<f64>,

    /// Tokens that are made at once, with --made
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    chunk: u32,

    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// What the executable does when it is started by itself.
#[derive(Subcommand, Debug)]
enum End {
    #[command(hide = true)]
    Receive {
        #[arg(long)]
        spec: String,
    },
    #[command(hide = true)]
    Send {
        #[arg(long)]
        spec: String,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.end {
        Some(End::Receive { spec }) => return ends::receive(&serde_json::from_str::<Spec>(spec)?),
        Some(End::Send { spec }) => return ends::send(&serde_json::from_str::<Spec>(spec)?),
        None => {}
    }
    ensure!(
        args.runs > 0 && args.streams > 0 && args.frame > 0,
        "--runs, --streams and --frame are at least 1"
    );
    let rates =
        if args.link.len() == 1 { vec![args.link[0]; args.ports.clamp(1, 2)] } else { args.link.clone() };
    ensure!(rates.len() <= 2, "--link: at most two ports");
    ensure!(args.silent.is_none() || rates.len() == 2, "--silent: of two ports one falls silent");
    let link = Link::make(&rates)?;
    eprintln!("kvpipe: {}; load {}", link.describe(), load());
    for total in &args.total {
        ensure!(*total > 0 && total % 64 == 0, "--total {total}: a multiple of 64 MiB");
        compare(&args, &link, total << 20)?;
    }
    Ok(())
}

/// One table: all contenders, all blocks.
fn compare(args: &Args, link: &Link, total_bytes: usize) -> Result<()> {
    let field = Field {
        link,
        total_bytes,
        streams: args.streams,
        frame_bytes: args.frame << 10,
        python: args.python.clone(),
        mooncake: args.mooncake.clone(),
        made: args.made.map(|rate| (rate, args.chunk)),
        fresh: args.fresh || args.silent.is_some(),
        silent: args.silent.map(Duration::from_millis),
    };
    let mut contenders = Contender::all(&field, &args.only)?;
    let mut rows: Vec<(String, usize, Vec<Sample>)> = Vec::new();
    for block in &args.block {
        let block_bytes = block << 10;
        let mut failed = None;
        contenders.retain_mut(|contender| match contender.go(block_bytes, link) {
            Ok(_) => true,
            // A peer that does not run here is no reason to measure nothing.
            Err(error) if !contender.name.starts_with("baton") => {
                eprintln!("kvpipe: {} is left out: {error:#}", contender.name);
                false
            }
            Err(error) => {
                failed.get_or_insert_with(|| error.context(format!("{}: warm-up", contender.name)));
                true
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if link.near_hosts().len() > 1 && !field.fresh && rows.is_empty() {
            // The paths are probed in the background.
            std::thread::sleep(Duration::from_secs(6));
        }
        let mut samples: Vec<Vec<Sample>> = contenders.iter().map(|_| Vec::new()).collect();
        for run in 1..=args.runs {
            for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
                samples.push(contender.go(block_bytes, link).with_context(|| contender.name.clone())?);
            }
            eprintln!("kvpipe: {block} KiB, run {run} of {}; load {}", args.runs, load());
        }
        rows.extend(contenders.iter().zip(samples).map(|(c, samples)| (c.name.clone(), *block, samples)));
    }
    print(args, link, total_bytes, &rows);
    Ok(())
}

fn print(args: &Args, link: &Link, total_bytes: usize, rows: &[(String, usize, Vec<Sample>)]) {
    let gb = total_bytes as f64 / 1e9;
    if args.json {
        for (name, block, samples) in rows {
            let line = serde_json::json!({
                "contender": name, "block_kib": block, "total_mib": total_bytes >> 20, "link": link.describe(),
                "gbytes_per_s": samples.iter().map(|s| gb / s.seconds).collect::<Vec<_>>(),
                "seconds": samples.iter().map(|s| s.seconds).collect::<Vec<_>>(),
                "cpu_s_per_gb": samples.iter().map(|s| s.cpu_s / gb).collect::<Vec<_>>(),
            });
            println!("{line}");
        }
        return;
    }
    println!(
        "\n{}, {} MiB, median of {} alternating runs, load {}\n",
        link.describe(),
        total_bytes >> 20,
        args.runs,
        load()
    );
    if args.made.is_some() {
        return print_exposed(args, link, gb, rows);
    }
    println!(
        "| blocks | | GB/s | of iperf3 | spread | longest ms | CPU s/GB | by |\n|---|---|---|---|---|---|---|---|"
    );
    for (name, block, samples) in rows {
        let rate = |s: &Sample| if s.rate > 0.0 { s.rate } else { gb / s.seconds };
        let rates = sorted(samples.iter().map(rate));
        let iperf = rows.iter().find(|(other, of, _)| other == "iperf3" && of == block);
        let base = iperf.map(|(_, _, samples)| median(&sorted(samples.iter().map(rate))));
        let share = base.map_or("-".into(), |base| format!("{:.3}", median(&rates) / base));
        let cpu = median(&sorted(samples.iter().map(|s| if s.rate > 0.0 { s.cpu_s } else { s.cpu_s / gb })));
        let longest = samples.iter().map(|s| s.seconds * 1e3).fold(0.0, f64::max);
        let longest = if samples.iter().any(|s| s.rate > 0.0) { "-".into() } else { format!("{longest:.0}") };
        let cpu = if cpu > 0.0 { format!("{cpu:.3}") } else { "-".into() };
        println!(
            "| {block} KiB | {name} | {:.3} | {share} | {:.2}-{:.2} | {longest} | {cpu} | {} |",
            median(&rates),
            rates[0],
            rates[rates.len() - 1],
            samples[samples.len() - 1].way
        );
    }
}

/// How much of a transfer shows where the cache is made meanwhile.
fn print_exposed(args: &Args, link: &Link, gb: f64, rows: &[(String, usize, Vec<Sample>)]) {
    println!(
        "| blocks | made in ms | exposed ms | of bytes / link rate | estimated ms |\n|---|---|---|---|---|"
    );
    for (_, block, samples) in rows {
        let of = |value: fn(&Sample) -> f64| median(&sorted(samples.iter().map(value)));
        let exposed = of(|s| s.exposed_s);
        let share = link
            .bytes_per_s()
            .map_or("-".into(), |rate| format!("{:.2} %", exposed / (gb * 1e9 / rate) * 1e2));
        let made = gb * 1e9 / cache::TOKEN_BYTES as f64 / args.made.unwrap_or(f64::INFINITY);
        let estimated = of(|s| s.estimated_s) * 1e3;
        println!("| {block} KiB | {:.0} | {:.2} | {share} | {estimated:.2} |", made * 1e3, exposed * 1e3);
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// Of the last minute; what else runs here is in it.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}
