//! The router alone against a mock engine, beside the LiteLLM proxy in front of the same mock: what each adds to the latency
//! of a token at 100, 1,000 and 5,000 concurrent streams, and how many requests a core serves in a second.
//!
//!     python3 -m venv V && V/bin/pip install 'litellm[proxy]'
//!     cargo run --release -p benches --bin gateway -- --litellm V/bin/litellm
//!
//! Each gateway runs in a process of its own, and they take turns. The mock tells tokens by a schedule; what comes later than the schedule is
//! latency. `direct` is the mock's own HTTP face without a gateway: what the client, loopback and the machine add anyway.

mod children;
mod load;
mod mock;
mod table;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};

use children::Gateway;

#[derive(Parser, Debug)]
struct Args {
    /// Concurrent streams, each count in turn
    #[arg(long, value_delimiter = ',', default_value = "100,1000,5000")]
    streams: Vec<usize>,
    /// Tokens of a stream
    #[arg(long, default_value_t = 16)]
    tokens: u32,
    /// Seconds over which the streams of a run begin; the first token comes so long after its request
    #[arg(long, default_value_t = 5.0)]
    ramp: f64,
    /// Milliseconds between the tokens of a stream
    #[arg(long, default_value_t = 500)]
    interval: u64,
    /// Requests of the run that counts CPU time
    #[arg(long, default_value_t = 4000)]
    requests: usize,
    /// How often all is measured; the table shows each round
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Executable of the LiteLLM proxy; without it only baton is measured
    #[arg(long)]
    litellm: Option<PathBuf>,
    /// Print every run as JSON
    #[arg(long)]
    json: bool,
    /// What this process is: set by the bench itself
    #[arg(long, hide = true)]
    role: Option<Role>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    /// The mock engine behind HTTP.
    Mock,
    /// The router with the mock engine in its process.
    Baton,
}

fn main() -> Result<()> {
    let args = Args::parse();
    children::many_files()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match args.role {
            Some(Role::Mock) => mock::over_http().await,
            Some(Role::Baton) => mock::behind_the_router().await,
            None => measure(&args).await,
        }
    })
}

async fn measure(args: &Args) -> Result<()> {
    if args.streams.is_empty() || args.tokens == 0 || args.requests == 0 || args.ramp < 0.1 {
        bail!("nothing to measure: streams, tokens and requests are above 0, ramp at least 0.1 s");
    }
    let mock = Gateway::own("direct", Role::Mock).await?;
    let mut gateways = vec![Gateway::own("baton", Role::Baton).await?];
    if let Some(litellm) = &args.litellm {
        gateways.push(Gateway::litellm(litellm, mock.port).await?);
    }
    gateways.insert(0, mock);
    let mut rows = Vec::new();
    for round in 0..args.rounds {
        for gateway in &gateways {
            eprintln!("round {round}: {} requests to {}", args.requests, gateway.name);
            rows.push(table::Row::cost(round, gateway, args.requests).await?);
        }
        for &streams in &args.streams {
            for gateway in &gateways {
                let schedule = load::Schedule {
                    streams,
                    tokens: args.tokens,
                    ramp_s: args.ramp,
                    interval_ms: args.interval,
                };
                eprintln!("round {round}: {streams} streams through {}", gateway.name);
                rows.push(table::Row::latency(round, gateway, schedule).await?);
                gateway.settle().await?;
            }
        }
    }
    table::print(&rows, args.json)
}
