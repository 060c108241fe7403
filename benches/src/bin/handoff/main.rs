//! What a handoff costs: `cargo run --release -p benches --bin handoff -- --config benches/configs/llama-3.2-1b.json`.
//!
//! Starts a prefill node and a decode group as processes of their own (this executable again), joined by loopback or
//! by an emulated link, and asks the real dispatch for answers: by turns with the prompt computed at the prefill node
//! and handed over, and with it computed by the decode group itself. See `benches/README.md` for the rows.

mod args;
mod children;
mod drive;
mod gateway;
mod link;
mod table;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use args::{Args, Child};

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("handoff: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no async runtime")?;
    match args.child {
        Some(Child::Node { spec }) => runtime.block_on(children::node(&spec)),
        Some(Child::Drive { spec }) => runtime.block_on(drive::child(&spec)),
        None => {
            let measured = runtime.block_on(measure(&args))?;
            match args.json {
                true => println!("{}", serde_json::to_string_pretty(&measured)?),
                false => print!("{}", table::render(&measured)),
            }
            Ok(())
        }
    }
}

async fn measure(args: &Args) -> Result<table::Measured> {
    args.check()?;
    let link = link::Link::make(args.link.as_slice())?;
    eprintln!("handoff: {}", link.describe());
    let driven = children::cluster(args, &link).await?;
    drop(link);
    eprintln!("handoff: the gateway against a mock engine");
    let gateway = gateway::measure(args.prompt).await?;
    Ok(table::Measured::new(args, driven, gateway))
}
