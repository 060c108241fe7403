//! The `baton` executable. Each role of a cluster is a subcommand: parse, load settings, serve, drain.

mod api;
mod batch;
mod bench;
mod bundled;
mod certificate;
mod chat;
mod config;
mod dirs;
mod doctor;
mod inspect;
mod key;
mod links;
mod logits;
mod meter;
mod model;
mod pull;
mod roles;
mod status;
mod supervised;
mod system;
mod token;
mod up;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use config::{Flags, NodeSettings, RouterSettings, ShowRole, UpSettings};

/// Serves large language models on a mixed cluster: one machine reads the prompt, others generate the answer.
#[derive(Parser)]
#[command(version, max_term_width = 110, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a whole cluster on this machine
    Up(Flags<UpSettings>),
    /// Serve the HTTP API and hand requests to the nodes that join
    Router(Flags<RouterSettings>),
    /// Compute prompts and send their KV cache to decode nodes
    Prefill(Flags<NodeSettings>),
    /// Generate tokens
    Decode(Flags<NodeSettings>),
    /// Talk to a model in this terminal
    Chat(chat::Args),
    /// Have the lines of a file answered as a batch job
    Batch(batch::Args),
    /// Show the nodes of a cluster, their load and their links
    Status(status::Args),
    /// Look for what is wrong: this machine's ports, the router, the links between nodes
    Doctor(doctor::Args),
    /// Fetch models from the Hugging Face hub into its cache
    Pull(pull::Args),
    /// Make, list and revoke the tokens by which machines join a cluster
    Token(token::Args),
    /// Make, list and revoke API keys
    Key(key::Args),
    /// Show what a model is, what it takes, and whether it fits
    Inspect(inspect::Args),
    /// Write a model's logits for comparison with another implementation
    Logits(logits::LogitsArgs),
    /// Measure this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Show settings
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the effective settings of a role, or of all, and where each came from
    Show {
        #[command(subcommand)]
        role: Option<ShowRole>,
    },
}

fn main() -> ExitCode {
    // TLS of clients. There is none before.
    _ = rustls::crypto::ring::default_provider().install_default();
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            // Nobody may be there to read it (`baton ... 2>&1 | head`).
            _ = writeln!(std::io::stderr(), "baton: {}", cluster::process::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    if let Command::Prefill(flags) = &command {
        roles::prepare(&config::load("prefill", flags)?);
    } else if let Command::Decode(flags) = &command {
        roles::prepare(&config::load("decode", flags)?);
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no async runtime")?;
    let done = runtime.block_on(async {
        match command {
            Command::Up(flags) => return up::run(config::load("up", &flags)?).await,
            Command::Router(flags) => roles::router(config::load("router", &flags)?).await?,
            Command::Prefill(flags) => roles::prefill(config::load("prefill", &flags)?).await?,
            Command::Decode(flags) => roles::decode(config::load("decode", &flags)?).await?,
            Command::Chat(args) => chat::run(args).await?,
            Command::Batch(args) => return batch::run(args).await,
            Command::Status(args) => status::run(args).await?,
            Command::Doctor(args) => return doctor::run(args).await,
            Command::Pull(args) => pull::run(args).await?,
            Command::Token(args) => token::run(args)?,
            Command::Key(args) => key::run(args)?,
            Command::Inspect(args) => return inspect::run(args).await,
            Command::Logits(args) => logits::run(&args)?,
            Command::Bench(command) => bench::run(&command)?,
            Command::Config(ConfigCommand::Show { role }) => {
                let (text, wrong) = config::show(role)?;
                print(&text);
                wrong.map_or(Ok(()), Err)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    });
    // A thread that reads standard input cannot be waited for.
    runtime.shutdown_background();
    done
}

/// Writes to standard output at once. A reader that went away (`baton status | head`) is no error.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
