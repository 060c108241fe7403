//! The command line.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use backend::DType;
use clap::{ArgGroup, Parser, Subcommand};

use crate::link::Rate;

/// Measures prefill, transfer and decode of one request at a time, with and without a handoff.
#[derive(Parser, Debug)]
#[command(args_conflicts_with_subcommands = true, group(ArgGroup::new("what").args(["model", "config"])))]
pub struct Args {
    #[command(subcommand)]
    pub child: Option<Child>,

    /// Directory of a model
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// A config.json; weights are seeded random numbers
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Emulate this link between prefill node and decode group: 10gbit, 1gbit, ...; without it they share loopback
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,

    /// Tokens of the prompt
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    pub prompt: u32,

    /// Tokens of the answer
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    pub output: u32,

    /// Ranks of the decode group
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub tp: usize,

    /// Activations and KV: bf16 or f32
    #[arg(long, default_value = "bf16", value_name = "TYPE")]
    pub dtype: DType,

    /// Measured requests of each kind, by turns
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub runs: usize,

    /// Tokens that the prefill node computes in one step
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub chunk: usize,

    /// Threads of every node; the two never compute at the same time here
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,

    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What the executable does when it is started by itself.
#[derive(Subcommand, Debug)]
#[command(hide = true)]
pub enum Child {
    /// A prefill node, or a rank of the decode group.
    #[command(hide = true)]
    Node {
        #[arg(long)]
        spec: String,
    },
    /// The router's part: membership, dispatch, and the clock.
    #[command(hide = true)]
    Drive {
        #[arg(long)]
        spec: String,
    },
}

impl Args {
    /// Errors name the flags that do not go together.
    pub fn check(&self) -> Result<()> {
        ensure!(self.model.is_some() || self.config.is_some(), "give --model DIR or --config FILE");
        ensure!(self.prompt >= 2, "a prompt of {} tokens: at least 2", self.prompt);
        ensure!(self.output >= 8, "an answer of {} tokens: at least 8, for a rate", self.output);
        ensure!(self.runs > 0 && self.tp > 0 && self.chunk > 0, "--runs, --tp and --chunk are at least 1");
        Ok(())
    }

    /// Path of the model, and whether its weights are made up.
    pub fn model(&self) -> (PathBuf, bool) {
        match (&self.model, &self.config) {
            (Some(dir), _) => (dir.clone(), false),
            (None, config) => (config.clone().unwrap_or_default(), true),
        }
    }
}
