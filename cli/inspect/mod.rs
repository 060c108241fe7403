//! `baton inspect`: what a model is, what it takes, and whether it fits, before anything is fetched or loaded.

mod outline;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use backend::DType;
use hub::{Event, Hub, ModelName, Want};
use models::Checkpoint;

use crate::config::{self, Memory};
use crate::{model, print, system};
use report::{Facts, Rank};

/// What is to be looked at.
#[derive(clap::Args)]
pub struct Args {
    /// Directory or file of a model, or its name on the hub (ORG/NAME[:QUANT][@REVISION]), of which only headers are read
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Machines that share the model, each holding a part (tensor parallel)
    #[arg(long, value_name = "N", default_value_t = 1)]
    ranks: usize,
    /// Memory of each, for instance 64 or 64GB [default: this machine's]
    #[arg(long, value_name = "GB")]
    memory: Option<Memory>,
    /// Tokens of KV cache that each rank keeps room for [default: the model's context]
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Type of the KV cache: bf16 or f32
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// For programs
    #[arg(long)]
    json: bool,
}

/// Prints what the model is. Fails when it cannot be served, or does not fit.
pub async fn run(args: Args) -> Result<ExitCode> {
    ensure!(args.ranks > 0, "--ranks is 0: somebody must hold the model");
    ensure!(args.dtype != DType::F16, "--dtype f16: KV is kept in bf16 or f32");
    tokio::task::spawn_blocking(move || {
        let facts = look(&args)?;
        print(&if args.json { facts.json() } else { facts.text() });
        Ok(if facts.fits() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
    .await?
}

fn look(args: &Args) -> Result<Facts> {
    let Some(name) = model::on_hub(&args.model) else {
        model::require(&args.model)?;
        return facts(args, &args.model, args.model.display().to_string(), None);
    };
    let hub = Hub::new(config::hub());
    if let Some(found) = hub.cached(&name, &Want::Model) {
        return facts(args, &found.path, name.to_string(), Some(found.commit));
    }
    remote(args, &hub, &name)
}

/// Looks at headers only: nothing is kept.
fn remote(args: &Args, hub: &Hub, name: &ModelName) -> Result<Facts> {
    let asked = |event: Event<'_>| match event {
        Event::Asks(hub) => eprintln!("{name}: asking {hub}"),
        Event::AsksAgain(reason) => eprintln!("{name}: {reason}; asking again"),
        _ => {}
    };
    let peek = hub.peek(name, &asked).with_context(|| {
        format!("model {} (no file or directory of this name is here)", args.model.display())
    })?;
    let outline = outline::of(&peek, name.quant())?;
    let mut facts = facts(args, outline.path(), name.to_string(), Some(peek.commit().to_owned()))
        .map_err(|error| outline.without_place(error))?;
    facts.fetched = false;
    Ok(facts)
}

fn facts(args: &Args, path: &Path, model: String, commit: Option<String>) -> Result<Facts> {
    let checkpoint = Checkpoint::open(path)?;
    let config = checkpoint.config();
    let tokens = args.context.unwrap_or(config.context);
    ensure!(tokens <= config.context, "--context {tokens}: the model was made for {}", config.context);
    let kv = models::kv_specs(config, args.dtype, args.ranks)?;
    let whole = models::kv_specs(config, args.dtype, 1)?;
    let weights = checkpoint.rank_bytes(args.ranks)?;
    let ranks = weights.into_iter().zip(kv).map(|(weights, kv)| Rank {
        weight_bytes: weights,
        kv_bytes: kv.token_bytes() as u64 * tokens as u64,
    });
    Ok(Facts {
        model,
        commit,
        fetched: true,
        architecture: config.model_type.into(),
        parameters: config.parameters(),
        layers: config.layers,
        weight_bytes: checkpoint.weight_bytes(),
        formats: checkpoint.formats(),
        context: config.context,
        kv_dtype: args.dtype.name(),
        kv_token_bytes: whole.first().map_or(0, |spec| spec.token_bytes() as u64),
        tokens,
        ranks: ranks.collect(),
        memory_bytes: args.memory.map(|memory| memory.0).or_else(system::memory_bytes),
    })
}
