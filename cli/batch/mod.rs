//! `baton batch`: has the lines of a file answered by a server's batch jobs, and fetches the answers.

mod input;
mod order;
mod progress;
mod run;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::api::{Api, Server};
use crate::print;
use input::Input;
use progress::Progress;

/// Between two looks at a batch: from the first to the last, longer each time.
const LOOK_MIN: Duration = Duration::from_millis(200);
const LOOK_MAX: Duration = Duration::from_secs(2);

/// A server that does not answer for so long is given up; the batch goes on there all the same.
const AWAY_MAX: Duration = Duration::from_secs(300);

/// What to do with batches.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Have all lines of a file answered and write the answers in their order; started again, it goes on where it stopped
    Run(run::Args),
    /// Upload a file and begin a batch; prints the batch's id
    Submit {
        /// Lines in OpenAI's batch format, bodies of requests, or plain prompts
        file: PathBuf,
        /// Wait for its end
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        server: Server,
    },
    /// Show where a batch is
    Status {
        /// The batch's id
        #[arg(value_parser = batch_id)]
        id: String,
        /// Wait for its end
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        server: Server,
    },
    /// Fetch the answers of a batch that has ended: good ones first, then errors
    Results {
        /// The batch's id
        #[arg(value_parser = batch_id)]
        id: String,
        /// Where to [default: standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        #[command(flatten)]
        server: Server,
    },
    /// End a batch; what was answered stays
    Cancel {
        /// The batch's id
        #[arg(value_parser = batch_id)]
        id: String,
        #[command(flatten)]
        server: Server,
    },
    /// List batches, newest first
    List {
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
        #[command(flatten)]
        server: Server,
    },
}

/// How lines become requests.
#[derive(Clone, clap::Args)]
pub struct How {
    /// Take every line for a prompt, whatever it looks like
    #[arg(long)]
    text: bool,
    /// For prompts: model to ask for [default: the server's first]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// For prompts: what the model is told before
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// For prompts: longest answer
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// For prompts: 0 always takes the likeliest token
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// The server may take so long, such as 24h or 7d
    #[arg(long, value_name = "TIME", default_value = "24h")]
    window: String,
}

/// Runs one command until Ctrl-C, which leaves no file of ours behind. The exit code tells whether all lines got what they
/// asked for, where it is known.
pub async fn run(args: Args) -> Result<ExitCode> {
    let goes_on = OnceLock::new();
    tokio::select! {
        biased;
        _ = tokio::signal::ctrl_c() => match goes_on.get() {
            Some(what) => bail!("interrupted: {what}"),
            None => bail!("interrupted"),
        },
        done = carry_out(args.command, &goes_on) => done,
    }
}

/// `goes_on` hears what goes on without us.
async fn carry_out(command: Command, goes_on: &OnceLock<String>) -> Result<ExitCode> {
    let at_the_server = |id: &str| _ = goes_on.set(format!("{id} goes on at the server"));
    match command {
        Command::Run(args) => run::run(args, goes_on).await,
        Command::Submit { file, wait, how, server } => {
            let api = server.api()?;
            let path = file.clone();
            let input = Arc::new(aside(move || Input::open(&path, how.text)).await?);
            let prepared = run::prepare(&api, &input, &how, &Arc::new(HashMap::new()), None).await?;
            let uploaded = api.upload(prepared.path(&file)).await?;
            let asked = request(&uploaded, &how.window, prepared.endpoint);
            let id = id_of(&api.post("/v1/batches", &asked).await?)?;
            print(&format!("{id}\n"));
            if !wait {
                return Ok(ExitCode::SUCCESS);
            }
            at_the_server(&id);
            ended(&wait_for(&api, &id).await?)
        }
        Command::Status { id, wait, server } => {
            let api = server.api()?;
            if wait {
                at_the_server(&id);
            }
            let batch = if wait { wait_for(&api, &id).await? } else { get(&api, &id).await? };
            print(&describe(&batch));
            if wait { ended(&batch) } else { Ok(ExitCode::SUCCESS) }
        }
        Command::Results { id, output, server } => {
            let api = server.api()?;
            let batch = get(&api, &id).await?;
            if !is_over(&batch) {
                bail!("{id} is {}: there are answers when it has ended", status(&batch));
            }
            match output {
                Some(path) => {
                    let at = |error| format!("cannot write {}: {error}", path.display());
                    let mut file = File::create(&path).map_err(|error| anyhow::anyhow!(at(error)))?;
                    fetch(&api, &batch, &mut file).await?;
                    file.sync_all().map_err(|error| anyhow::anyhow!(at(error)))?;
                }
                None => fetch(&api, &batch, &mut stdout()).await?,
            }
            ended(&batch)
        }
        Command::Cancel { id, server } => {
            let batch = server.api()?.post(&format!("/v1/batches/{id}/cancel"), &json!({})).await?;
            print(&describe(&batch));
            Ok(ExitCode::SUCCESS)
        }
        Command::List { limit, server } => {
            print(&all(&server.api()?, limit).await?.iter().map(row).collect::<String>());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Reads or writes files that may be large on a thread of its own, so that Ctrl-C is heard meanwhile; nobody waits for that
/// thread then. What it writes to is removed by its caller, whatever it still does.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// What begins a batch of an uploaded file.
fn request(file: &str, window: &str, endpoint: &str) -> Value {
    json!({"input_file_id": file, "endpoint": endpoint, "completion_window": window})
}

/// An id becomes part of an address: what is none must not lead elsewhere.
fn batch_id(text: &str) -> Result<String, &'static str> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if plain { Ok(text.into()) } else { Err("a batch's id is letters, digits, _ and -") }
}

fn id_of(batch: &Value) -> Result<String> {
    Ok(batch["id"].as_str().context("the server's batch has no id")?.to_owned())
}

async fn get(api: &Api, id: &str) -> Result<Value> {
    api.get(&format!("/v1/batches/{id}")).await
}

/// Waits for the end of a batch, and shows how far it is. Errors when the server stays away.
async fn wait_for(api: &Api, id: &str) -> Result<Value> {
    let mut progress = Progress::new(io::stderr().is_terminal());
    let (mut look, mut seen) = (LOOK_MIN, Instant::now());
    loop {
        match api.try_get(&format!("/v1/batches/{id}")).await {
            Ok(batch) => {
                seen = Instant::now();
                let count = |name: &str| batch["request_counts"][name].as_u64().unwrap_or(0);
                let (total, completed, failed) = (count("total"), count("completed"), count("failed"));
                let waits = batch["baton_waits_for"].as_str();
                progress.show(status(&batch), [total, completed, failed], waits, Instant::now());
                if is_over(&batch) {
                    progress.end();
                    return Ok(batch);
                }
            }
            // Busy, stopping or starting anew.
            Err((status, error)) => {
                let passes = status
                    .is_none_or(|status| status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS);
                if !passes || seen.elapsed() > AWAY_MAX {
                    progress.end();
                    return Err(error.context(format!("{id} goes on at the server; no news of it")));
                }
                progress.say(&format!("{error}; looking again"), Instant::now());
            }
        }
        tokio::time::sleep(look).await;
        look = (look + look / 4).min(LOOK_MAX);
    }
}

/// Writes the content of a batch's files to `to`.
async fn fetch(api: &Api, batch: &Value, to: &mut impl Write) -> Result<()> {
    for name in ["output_file_id", "error_file_id"] {
        if let Some(id) = batch[name].as_str() {
            api.download(&format!("/v1/files/{id}/content"), to).await?;
        }
    }
    Ok(())
}

/// Whether all lines of a batch that has ended got what they asked for; says what is wrong with the input.
fn ended(batch: &Value) -> Result<ExitCode> {
    if let Some(problems) = batch["errors"]["data"].as_array().filter(|problems| !problems.is_empty()) {
        for problem in problems {
            let line = problem["line"].as_u64().map_or(String::new(), |line| format!("line {line}: "));
            eprintln!("baton: {line}{}", problem["message"].as_str().unwrap_or("wrong"));
        }
        bail!("the batch has failed: nothing was answered");
    }
    let counts = &batch["request_counts"];
    let all = status(batch) == "completed" && counts["completed"] == counts["total"];
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn status(batch: &Value) -> &str {
    batch["status"].as_str().unwrap_or("unknown")
}

fn is_over(batch: &Value) -> bool {
    ["completed", "failed", "expired", "cancelled"].contains(&status(batch))
}

fn describe(batch: &Value) -> String {
    let counts = &batch["request_counts"];
    let mut text = format!("{}  {}\n", batch["id"].as_str().unwrap_or_default(), status(batch));
    let mut add = |name: &str, value: String| text += &format!("  {name:<10} {value}\n");
    add("lines", format!("{} of {}, {} failed", counts["completed"], counts["total"], counts["failed"]));
    for (name, field) in
        [("input", "input_file_id"), ("output", "output_file_id"), ("errors", "error_file_id")]
    {
        if let Some(id) = batch[field].as_str() {
            add(name, id.into());
        }
    }
    if let Some(waits) = batch["baton_waits_for"].as_str() {
        add("waits for", waits.into());
    }
    let problems = batch["errors"]["data"].as_array().cloned().unwrap_or_default();
    for problem in problems {
        let line = problem["line"].as_u64().map_or("input".into(), |line| format!("line {line}"));
        add(&line, problem["message"].as_str().unwrap_or_default().into());
    }
    text
}

fn row(batch: &Value) -> String {
    let counts = &batch["request_counts"];
    format!(
        "{}  {:<11}  {}/{} lines, {} failed\n",
        batch["id"].as_str().unwrap_or_default(),
        status(batch),
        counts["completed"],
        counts["total"],
        counts["failed"]
    )
}

/// The newest batches first, `limit` at most.
async fn all(api: &Api, limit: usize) -> Result<Vec<Value>> {
    let (mut all, mut after) = (Vec::new(), String::new());
    while all.len() < limit {
        let left = limit - all.len();
        let page = api.get(&format!("/v1/batches?limit={}{after}", left.min(100))).await?;
        let batches = page["data"].as_array().context("the server's list has no data")?;
        all.extend(batches.iter().take(left).cloned());
        match page["last_id"].as_str().filter(|_| page["has_more"] == true) {
            Some(last) => after = format!("&after={last}"),
            None => break,
        }
    }
    Ok(all)
}
