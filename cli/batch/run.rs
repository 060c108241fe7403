//! `baton batch run`: from an input to a file of answers in its order. What has been done is remembered beside the output: in
//! `OUT.batch.json` the batch that is under way, in OUT the answers that there are. Started again, only lines without a good
//! answer are asked for. A batch carries a name of ours that is remembered before it begins: one that began without our
//! hearing of it is found by that.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use cluster::small_file::{self, TEXT_BYTES_MAX};
use reqwest::StatusCode;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::input::{Form, Input};
use super::order::{Place, places};
use super::{How, all, aside, ended, fetch, id_of, request, status, wait_for};
use crate::api::{Api, Server};

/// What is read at once.
const PIECE_BYTES: usize = 1 << 20;

/// Under which a batch has our name in its metadata.
const NAME: &str = "baton_run";

/// What is asked of whom.
#[derive(clap::Args)]
pub struct Args {
    /// Lines in OpenAI's batch format, bodies of requests, or plain prompts
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// Answers, in the order of the lines
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    server: Server,
}

/// What is uploaded.
pub struct Prepared {
    /// What its lines ask for.
    pub endpoint: &'static str,
    /// A file of our own, removed in the end; `None`: the input as it is.
    made: Option<Made>,
    lines: usize,
}

struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Prepared {
    /// Where it is; `input`: the user's file.
    pub fn path<'p>(&'p self, input: &'p Path) -> &'p Path {
        self.made.as_ref().map_or(input, |made| &made.0)
    }
}

/// Makes what a server takes of an input, without the lines that are in `done`. `beside`: where the user's files are.
pub async fn prepare(
    api: &Api,
    input: &Arc<Input>,
    how: &How,
    done: &Arc<HashMap<String, Place>>,
    beside: Option<&Path>,
) -> Result<Prepared> {
    let (endpoint, input, done, how) = (input.endpoint, Arc::clone(input), Arc::clone(done), how.clone());
    if input.form == Form::OpenAi && done.is_empty() {
        let count = move || {
            let mut lines = 0;
            input.each(&how, "", |_| {
                lines += 1;
                Ok(())
            })?;
            Ok(lines)
        };
        return Ok(Prepared { endpoint, made: None, lines: aside(count).await? });
    }
    let model = match &how.model {
        Some(model) => model.clone(),
        None if input.form == Form::OpenAi => String::new(),
        None => api.model().await?,
    };
    let name = format!("baton-batch-{}.jsonl", std::process::id());
    let path = beside.map_or_else(|| std::env::temp_dir().join(name), |output| beside_of(output, ".asked"));
    // Left by a process that was killed, or somebody's trap where everybody may write.
    let _ = fs::remove_file(&path);
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    let made = Made(path.clone());
    let write = move || {
        let failed = || format!("cannot write {}", path.display());
        let (mut file, mut lines) = (BufWriter::new(file), 0);
        input.each(&how, &model, |request| {
            if !done.contains_key(&request.id) {
                lines += 1;
                writeln!(file, "{}", request.line).with_context(failed)?;
            }
            Ok(())
        })?;
        file.flush().with_context(failed)?;
        Ok(lines)
    };
    Ok(Prepared { endpoint, made: Some(made), lines: aside(write).await? })
}

/// Runs it. `goes_on` hears which batch goes on without us.
pub async fn run(args: Args, goes_on: &OnceLock<String>) -> Result<ExitCode> {
    let Args { input, output, how, server } = args;
    if let (Ok(from), Ok(to)) = (input.canonicalize(), output.canonicalize()) {
        ensure!(from != to, "{} is the input: name another file for the answers", output.display());
    }
    ensure!(output.is_file() || !output.exists(), "{} is no file", output.display());
    let api = server.api()?;
    let (state, answers) = (beside_of(&output, ".batch.json"), beside_of(&output, ".part"));
    let failed = |path: &Path| format!("cannot write {}", path.display());
    // Nothing is asked for that could not be kept.
    File::create(&answers).with_context(|| failed(&answers))?;
    drop(Made(answers.clone()));
    let path = input.clone();
    let (source, digest) = aside(move || Ok((Input::open(&path, how.text)?, digest(&path)?))).await?;
    let source = Arc::new(source);
    // A batch of the same input that is under way, or has ended without our seeing it.
    let mut id = None;
    if let Ok(text) = small_file::text(&state, TEXT_BYTES_MAX) {
        let known: Value = serde_json::from_str(&text).unwrap_or_default();
        if known["input"] != digest || known["url"] != api.url() {
            bail!("{} is of another input or server: remove it to begin anew", state.display());
        }
        id = match (known["batch"].as_str(), known["name"].as_str()) {
            (Some(batch), _) => match api.try_get(&format!("/v1/batches/{batch}")).await {
                Err((Some(StatusCode::NOT_FOUND), _)) => None,
                _ => Some(batch.to_owned()),
            },
            (None, Some(name)) => {
                let all = all(&api, usize::MAX).await?;
                all.iter().find(|batch| batch["metadata"][NAME] == name).map(id_of).transpose()?
            }
            (None, None) => None,
        };
    }
    let path = output.clone();
    let read = move || if path.exists() { places(&path) } else { Ok(HashMap::new()) };
    let mut before = aside(read).await?;
    if before.is_empty() && fs::metadata(&output).is_ok_and(|file| file.is_file() && file.len() > 0) {
        bail!("{} is there already and holds no answers: name another file", output.display());
    }
    before.retain(|_, place| place.good);
    let before = Arc::new(before);
    let id = match id {
        Some(id) => {
            eprintln!("going on with {id}");
            id
        }
        None => {
            let prepared = prepare(&api, &source, &how, &before, Some(&output)).await?;
            if prepared.lines == 0 {
                eprintln!("all lines are answered already: {}", output.display());
                return Ok(ExitCode::SUCCESS);
            }
            let file = api.upload(prepared.path(&input)).await?;
            let mut asked = request(&file, &how.window, prepared.endpoint);
            let name = name()?;
            asked["metadata"] = json!({ NAME: name });
            let mut known = json!({"name": name, "input": digest, "url": api.url()});
            remember(&state, &known)?;
            let batch = match api.try_post("/v1/batches", &asked).await {
                Ok(batch) => batch,
                Err((status, error)) => {
                    // Else it may have begun.
                    if status.is_some_and(|status| status.is_client_error()) {
                        let _ = fs::remove_file(&state);
                    }
                    return Err(error);
                }
            };
            let id = id_of(&batch)?;
            known["batch"] = id.as_str().into();
            remember(&state, &known)?;
            id
        }
    };
    goes_on.get_or_init(|| {
        format!("{id} goes on at the server; run the same again to fetch the answers, or `baton batch cancel {id}`")
    });
    let batch = wait_for(&api, &id).await?;
    if batch["errors"]["data"].as_array().is_some_and(|problems| !problems.is_empty()) {
        let _ = fs::remove_file(&state);
        return ended(&batch);
    }
    let mut file = File::create(&answers).with_context(|| failed(&answers))?;
    let _part = Made(answers.clone());
    fetch(&api, &batch, &mut file).await?;
    let ordered = Made(beside_of(&output, ".new"));
    let to = File::create(&ordered.0).with_context(|| failed(&ordered.0))?;
    let from = Answers { before, output: output.clone(), fresh: answers.clone() };
    let written = aside(move || write(&source, &how, &from, to)).await?;
    fs::rename(&ordered.0, &output).with_context(|| failed(&output))?;
    let _ = fs::remove_file(&state);
    let Written { good, all, refusal } = written;
    eprintln!("{}: {good} of {all} lines have answers, in {}", status(&batch), output.display());
    if let Some(refusal) = refusal {
        eprintln!("baton: the first of the others: {refusal}");
    }
    Ok(if good == all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What has become of the lines of an input.
#[derive(Default)]
struct Written {
    /// So many got what they asked for.
    good: usize,
    /// So many there are.
    all: usize,
    /// Why the first of the others did not.
    refusal: Option<String>,
}

/// Where answers are.
struct Answers {
    /// The good ones in `output`.
    before: Arc<HashMap<String, Place>>,
    output: PathBuf,
    /// A file of newer ones.
    fresh: PathBuf,
}

/// Writes answers to `to` in the order of the input.
fn write(source: &Input, how: &How, answers: &Answers, to: File) -> Result<Written> {
    let Answers { before, output, fresh } = answers;
    let (new, fresh, mut to) = (File::open(fresh)?, places(fresh)?, BufWriter::new(to));
    let old = if before.is_empty() { None } else { Some(File::open(output)?) };
    let (mut written, mut line) = (Written::default(), Vec::new());
    source.each(how, "", |request| {
        written.all += 1;
        let found = match (fresh.get(&request.id), before.get(&request.id), &old) {
            (Some(place), ..) => Some((place, &new)),
            (None, Some(place), Some(old)) => Some((place, old)),
            _ => None,
        };
        let Some((place, file)) = found else { return Ok(()) };
        line.resize(place.bytes, 0);
        file.read_exact_at(&mut line, place.begin)?;
        written.good += usize::from(place.good);
        if !place.good && written.refusal.is_none() {
            written.refusal = refusal(&line);
        }
        line.push(b'\n');
        Ok(to.write_all(&line)?)
    })?;
    to.into_inner()
        .map_err(|error| error.into_error())
        .and_then(|file| file.sync_all())
        .context("cannot write the answers")?;
    Ok(written)
}

/// What a line of answers says that is no good one.
fn refusal(line: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(line).ok()?;
    let errors = [&answer["response"]["body"]["error"], &answer["error"]];
    errors.iter().find_map(|error| error["message"].as_str()).map(str::to_owned)
}

/// 128 bits that nobody else draws.
fn name() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("no random bytes")?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Writes what is known of a batch under way to `state`, all of it or nothing.
fn remember(state: &Path, known: &Value) -> Result<()> {
    let new = Made(beside_of(state, ".new"));
    let written = fs::write(&new.0, known.to_string()).and_then(|()| fs::rename(&new.0, state));
    written.with_context(|| format!("cannot write {}", state.display()))
}

fn beside_of(path: &Path, end: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(end);
    path.with_file_name(name)
}

/// SHA-256 of a file, in hex.
fn digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (mut sum, mut piece) = (Sha256::new(), vec![0; PIECE_BYTES]);
    loop {
        match file.read(&mut piece).with_context(|| format!("cannot read {}", path.display()))? {
            0 => return Ok(sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => sum.update(&piece[..read]),
        }
    }
}
