//! What guessing ahead brings, and what it costs where nothing can be guessed: one engine with it and one without answer the same
//! prompts by turns, in this process, on the CPU.
//!
//! `draft --model M.gguf`, `draft --config benches/configs/llama-3.2-1b.json`, `draft --model M.gguf --draft-model S.gguf`
//!
//! First what steps of several rows take beside steps of one, which is what there is to win. Then answers, held to few tokens by a
//! bias: one token over and over, all of which is guessed; one of two by chance, where passages agree and go on otherwise; and
//! drawn from all, which repeat nothing. A real model's lie between them. With a draft model the engine that guesses has it beside
//! what repeats; of random weights it is one that is always wrong, but for `--draft-seed`, where it may be the model itself.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use backend::draw::Rule;
use backend::{Backend, Batch, DType, DeviceOptions, Draw, Group, Out, SeqId, Step};
use backend_cpu::CpuBackend;
use clap::Parser;
use engine::tp::{Trust, unmet};
use engine::{DraftModel, Engine, EngineOptions, Event, Job, Place, Request, Runner, Sampling, Terms};
use models::replay::Rank;
use models::{Checkpoint, Model};

/// Seed of dummy weights and of prompts.
const SEED: u64 = 7;

/// Makes an id likelier than all that has none.
const BIAS: f32 = 1e4;

/// Rows of the steps that are measured.
const ROWS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

#[derive(Parser)]
#[command(about = "Measures generation with tokens guessed ahead beside generation without")]
struct Args {
    /// A model: a directory or a GGUF file
    #[arg(long)]
    model: Option<PathBuf>,
    /// A config.json: seeded random weights of its shape
    #[arg(long, conflicts_with = "model")]
    config: Option<PathBuf>,
    /// CPU threads; 0: one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 64)]
    prompt: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Sequences at once
    #[arg(long, default_value_t = 1)]
    sequences: usize,
    /// Tokens guessed ahead per sequence and step, at most
    #[arg(long, default_value_t = 16)]
    draft_max: usize,
    /// A model that guesses, too: a directory, a GGUF file, or a config.json for random weights of its shape
    #[arg(long)]
    draft_model: Option<PathBuf>,
    /// Seed of its random weights; those of the model have 7
    #[arg(long, default_value_t = SEED + 1)]
    draft_seed: u64,
    /// Answers of each kind; the median counts
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

/// An engine on its thread.
struct Node {
    engine: Engine,
    thread: Option<JoinHandle<Result<(), engine::EngineError>>>,
    vocabulary: usize,
}

/// Of all answers of one kind.
#[derive(Default)]
struct Measured {
    /// Tokens per second, a run each.
    rates: Vec<f64>,
    ids: Vec<Vec<u32>>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.runs > 0 && args.sequences > 0 && args.prompt > 0,
        "runs, sequences and prompt must be positive"
    );
    ensure!(args.tokens > 1, "an answer of {} tokens has no rate", args.tokens);
    let checkpoint = match (&args.model, &args.config) {
        (Some(path), _) => Checkpoint::open(path)?,
        (None, Some(path)) => dummy(path, SEED)?,
        (None, None) => bail!("--model or --config is needed"),
    };
    let draft = match &args.draft_model {
        Some(path) if path.extension().is_some_and(|end| end == "json") => {
            Some(dummy(path, args.draft_seed)?)
        }
        Some(path) => Some(Checkpoint::open(path)?),
        None => None,
    };
    steps(&args, &checkpoint)?;
    let plain = Node::start(&args, &checkpoint, 0, None)?;
    let nodes = [plain, Node::start(&args, &checkpoint, args.draft_max, draft.as_ref())?];
    println!(
        "| what is said | without, tok/s | with | ratio | guessed tokens that held | the draft model's |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, ids) in
        [("one token over and over", 1), ("one of two by chance", 2), ("what repeats nothing", 0)]
    {
        let before = nodes[1].engine.report().counters;
        let mut measured = [Measured::default(), Measured::default()];
        for run in 0..args.runs as u64 {
            // By turns, and each first as often as the other.
            for at in 0..2 {
                let which = (at + run as usize) % 2;
                nodes[which].answer(&args, run, ids, &mut measured[which])?;
            }
        }
        let [without, with] = measured;
        ensure!(without.ids == with.ids, "answers differ, which must never be");
        let after = nodes[1].engine.report().counters;
        let (guessed, held) =
            (after.draft_tokens - before.draft_tokens, after.accepted_tokens - before.accepted_tokens);
        let by_model = after.model_draft_tokens - before.model_draft_tokens;
        let held_by_model = after.model_accepted_tokens - before.model_accepted_tokens;
        let (without, with) = (median(without.rates), median(with.rates));
        println!(
            "| {name} | {without:.1} | {with:.1} | {:.2} | {held} of {guessed} | {held_by_model} of {by_model} |",
            with / without
        );
    }
    Ok(())
}

/// Seeded random weights for a config.json.
fn dummy(config: &Path, seed: u64) -> Result<Checkpoint> {
    let dir = tempfile::tempdir()?;
    std::fs::copy(config, dir.path().join("config.json")).with_context(|| config.display().to_string())?;
    Ok(Checkpoint::dummy(dir.path(), seed)?)
}

/// What steps of some rows of one sequence take, all rows giving a token.
fn steps(args: &Args, checkpoint: &Checkpoint) -> Result<()> {
    let (depth, most) = (args.prompt, ROWS[ROWS.len() - 1]);
    let mut rank = Rank::<CpuBackend>::open(&device(args), Group::alone(), checkpoint, depth + most)?;
    let seq = SeqId(1);
    rank.begin(seq, depth + most)?;
    rank.feed(seq, 0, &prompt(0, depth, rank.model.vocab_size()), 512)?;
    let mut times = [const { Vec::new() }; ROWS.len()];
    for run in 0..=4 * args.runs {
        for (rows, times) in ROWS.into_iter().zip(&mut times) {
            let mut batch = Batch::default();
            batch.push(seq, depth as u32, &prompt(run as u64, rows, rank.model.vocab_size()));
            let begun = Instant::now();
            let Rank { backend, model, kv } = &mut rank;
            let mut step = backend.step(kv, &batch);
            let all: Vec<u32> = (0..rows as u32).collect();
            let logits = model.forward(&mut step, &all, &mut |_, _| {});
            step.submit(Out::Draw(logits, vec![Draw::Token(Rule::GREEDY); rows])).wait()?;
            if run > 0 {
                times.push(begun.elapsed().as_secs_f64());
            }
        }
    }
    println!("| rows | step, ms | of one row's | tok/s if every guess holds |");
    println!("|---|---|---|---|");
    let times = times.map(median);
    for (rows, time) in ROWS.into_iter().zip(times) {
        println!("| {rows} | {:.1} | {:.2} | {:.1} |", time * 1e3, time / times[0], rows as f64 / time);
    }
    println!();
    Ok(())
}

fn device(args: &Args) -> DeviceOptions {
    DeviceOptions { dtype: DType::BF16, threads: args.threads, ..DeviceOptions::default() }
}

impl Node {
    fn start(
        args: &Args,
        checkpoint: &Checkpoint,
        draft_max: usize,
        draft: Option<&Checkpoint>,
    ) -> Result<Node> {
        let device = device(args);
        let mut backend = CpuBackend::open(&device, unmet(0, 1)?)?;
        let model = Model::load(&mut backend, checkpoint, 0, 1, device.dtype, &mut |_| {})?;
        let (context, vocabulary) = (args.prompt + args.tokens, model.vocab_size());
        let room = (context as u64).next_multiple_of(64) * (args.sequences as u64 + 1);
        let options = EngineOptions {
            kv_bytes: room * model.kv_spec().token_bytes() as u64,
            context_tokens: context as u32,
            prefix_cache: false,
            draft_max,
            ..EngineOptions::default()
        };
        let mut runner = Runner::new(backend, model, options)?;
        if let Some(draft) = draft {
            let mut backend = CpuBackend::open(&device, unmet(0, 1)?)?;
            let model = Model::load(&mut backend, draft, 0, 1, device.dtype, &mut |_| {})?;
            let kv_bytes = room * model.kv_spec().token_bytes() as u64;
            runner.draft_with(DraftModel::new(backend, model, kv_bytes)?);
        }
        let (engine, commands) = engine::engine();
        let terms = Terms {
            trust: Trust::in_clear(Vec::new()),
            version: String::new(),
            identity: String::new(),
            first_epoch: 1,
            native: None,
        };
        let thread = std::thread::spawn(move || engine::serve(&mut runner, &Place::Alone, &terms, &commands));
        while !engine.ready() {
            ensure!(!thread.is_finished(), "the engine has ended");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Node { engine, thread: Some(thread), vocabulary })
    }

    /// All sequences of one run, held to so many ids (0: to none): tokens per second from the first on.
    fn answer(&self, args: &Args, run: u64, ids: u32, measured: &mut Measured) -> Result<()> {
        let request = |sequence: u64| Request {
            tokens: prompt(run << 32 | sequence, args.prompt, self.vocabulary),
            output_start: args.prompt,
            max_tokens: args.tokens,
            ignore_eos: true,
            sampling: Sampling {
                temperature: 1.0,
                seed: run << 32 | sequence,
                logit_bias: (0..ids).map(|id| (id, BIAS)).collect(),
                ..Sampling::default()
            },
            ..Request::default()
        };
        let events: Result<Vec<_>, _> = (0..args.sequences as u64)
            .map(|sequence| self.engine.submit(Job::Generate(request(sequence))))
            .collect();
        let threads = events?.into_iter().map(|mut events| {
            std::thread::spawn(move || {
                let (mut ids, mut first) = (Vec::new(), None);
                while let Some(event) = events.blocking_recv() {
                    match event {
                        Event::Token(token) => {
                            first.get_or_insert_with(Instant::now);
                            ids.push(token.id);
                        }
                        Event::Failed(error) => bail!("{error}"),
                        _ => {}
                    }
                }
                Ok((ids, first.context("no token")?, Instant::now()))
            })
        });
        let threads: Vec<_> = threads.collect();
        let mut answers = Vec::new();
        for thread in threads {
            answers.push(thread.join().map_err(|_| anyhow::anyhow!("a reader has panicked"))??);
        }
        let first = answers.iter().map(|answer| answer.1).min().context("no answer")?;
        let last = answers.iter().map(|answer| answer.2).max().context("no answer")?;
        let tokens: usize = answers.iter().map(|answer| answer.0.len() - 1).sum();
        measured.rates.push(tokens as f64 / (last - first).as_secs_f64());
        measured.ids.extend(answers.into_iter().map(|answer| answer.0));
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.engine.stop();
        if let Some(thread) = self.thread.take() {
            // What it had to say has been said.
            _ = thread.join();
        }
    }
}

/// Token ids that hardly repeat.
fn prompt(seed: u64, len: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = (seed ^ SEED).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocabulary as u64) as u32
    };
    (0..len).map(|_| next()).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
