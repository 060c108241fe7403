//! `baton logits`: the logits of a golden file's prompts and teacher-forced ids, computed through the cache, for
//! comparison with another implementation. Over several ranks (threads here), and with `--handoff` from one prefill rank
//! over the KV wire into the decode ranks.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use backend::{Backend, BackendError, DType, DeviceOptions, Group, KvSpec, KvStore, SeqId};
use kvtransfer::{
    Close, Codec, CodecPolicy, Expect, Landed, Limits, Peers, PushSpec, Receiver, Sender, SessionId,
    TargetSpec, Ticket,
};
use models::golden::Case;
use models::replay::Rank;
use models::{Checkpoint, ModelError};
use node::LoadFormat;
use safetensors::tensor::{Dtype, TensorView};

use crate::config::Value;

/// The one sequence of a run.
const SEQ: SeqId = SeqId(0);

/// Longest silence on the KV wire; nothing is computed while it is in use.
const SILENCE: Duration = Duration::from_secs(30);

/// Prompt tokens per step where the user does not say.
const CHUNK: usize = 512;

/// Flags of `baton logits`.
#[derive(clap::Args, Debug)]
pub struct LogitsArgs {
    /// Model directory or GGUF file; with `--load-format dummy` its config.json is enough
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// JSON file with `cases`, each of `prompt` ids and `greedy` ids to feed after it
    #[arg(long, value_name = "FILE")]
    golden: PathBuf,
    /// Where to write `p<i>.logits`, `[ids, vocabulary]` in f32: row 0 after the prompt, row s after feeding id s - 1
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tensor-parallel ranks (of the decode side, with `--handoff`)
    #[arg(long, value_name = "N", default_value_t = 1)]
    tp: usize,
    /// Type of activations and cache: f32, bf16 or f16; sums are always f32
    #[arg(long, default_value = "f32")]
    dtype: DType,
    /// Device to compute on
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    backend: String,
    /// Compute prompts on a rank of their own and send their KV cache to the ranks that go on
    #[arg(long)]
    handoff: bool,
    /// How KV travels with --handoff: exact, fp8, int8 or int4; another than exact is compared with it, as the
    /// divergence (KL) of the probabilities after each id
    #[arg(long, value_name = "NAME", default_value = "exact")]
    kv_codec: CodecPolicy,
    /// Prompt tokens per step
    #[arg(long, value_name = "TOKENS", default_value_t = CHUNK)]
    chunk: usize,
    /// Weights: files, or dummy (seeded random numbers)
    #[arg(long, value_name = "FORMAT", default_value = "files", value_parser = as_nodes_have_it::<LoadFormat>)]
    load_format: LoadFormat,
}

/// A word of the nodes' settings.
fn as_nodes_have_it<T: Value>(text: &str) -> Result<T, String> {
    T::from_raw(Some(&[text.to_owned()]))
}

/// Logits per case, `[ids, vocabulary]`.
type Rows = Vec<Vec<f32>>;

/// Bit for bit.
const EXACT: CodecPolicy = CodecPolicy::Always(Codec::Exact);

/// What this build computes on.
const BACKENDS: &str = if cfg!(feature = "mlx") { "cpu, cuda, mlx" } else { "cpu, cuda" };

/// Reads the golden file and the model, computes, writes.
pub fn run(args: &LogitsArgs) -> Result<()> {
    ensure!(args.tp > 0 && args.chunk > 0, "--tp and --chunk are at least 1");
    let checkpoint = match args.load_format {
        LoadFormat::Files => Checkpoint::open(&args.model)?,
        LoadFormat::Dummy { seed } => Checkpoint::dummy(&args.model, seed)?,
    };
    let vocab = checkpoint.config().vocab_size;
    let cases = Case::read(&args.golden, checkpoint.config())?;
    let rows = match args.backend.as_str() {
        "cpu" => compute::<backend_cpu::CpuBackend>(args, &checkpoint, &cases)?,
        "cuda" => compute::<backend_cuda::CudaBackend>(args, &checkpoint, &cases)?,
        #[cfg(feature = "mlx")]
        "mlx" => compute::<backend_mlx::MlxBackend>(args, &checkpoint, &cases)?,
        other => bail!("no backend {other:?} in this build (it has: {BACKENDS})"),
    };
    write(args, vocab, &rows)
}

fn write(args: &LogitsArgs, vocab: usize, rows: &Rows) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        rows.iter().map(|rows| rows.iter().flat_map(|logit| logit.to_le_bytes()).collect()).collect();
    let mut tensors = HashMap::new();
    for (i, bytes) in bytes.iter().enumerate() {
        let shape = vec![bytes.len() / 4 / vocab, vocab];
        tensors.insert(format!("p{i}.logits"), TensorView::new(Dtype::F32, shape, bytes)?);
    }
    safetensors::serialize_to_file(tensors, None, &args.out)
        .with_context(|| format!("{}", args.out.display()))
}

fn compute<B: Backend>(args: &LogitsArgs, checkpoint: &Checkpoint, cases: &[Case]) -> Result<Rows> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    let ranks_at_once = args.tp + usize::from(args.handoff);
    let work = Work {
        checkpoint,
        cases,
        chunk: args.chunk,
        tokens: cases.iter().map(Case::tokens).max().unwrap_or(1),
        codec: args.kv_codec,
        options: DeviceOptions {
            dtype: args.dtype,
            threads: (cores / ranks_at_once).max(1),
            ..DeviceOptions::default()
        },
    };
    if args.handoff {
        let rows = handed_over::<B>(&work, args.tp)?;
        if args.kv_codec != EXACT {
            let exact = handed_over::<B>(&Work { codec: EXACT, ..work }, args.tp)?;
            crate::print(&divergence(&args.kv_codec, &exact, &rows, checkpoint.config().vocab_size));
        }
        return Ok(rows);
    }
    ensure!(args.kv_codec == EXACT, "--kv-codec needs --handoff");
    ranks(args.tp, |group| {
        let mut rank: Rank<B> = work.open(group)?;
        cases.iter().map(|case| Ok(rank.replay(SEQ, case, args.chunk)?)).collect()
    })
}

/// What every rank is given.
struct Work<'w> {
    checkpoint: &'w Checkpoint,
    cases: &'w [Case],
    chunk: usize,
    /// Room in the cache.
    tokens: usize,
    codec: CodecPolicy,
    options: DeviceOptions,
}

impl Work<'_> {
    fn open<B: Backend>(&self, group: Group) -> Result<Rank<B>> {
        Ok(Rank::open(&self.options, group, self.checkpoint, self.tokens)?)
    }
}

/// Runs `each` for `world` ranks at once; returns what rank 0 returned, or the cause of a failure.
fn ranks(world: usize, each: impl Fn(Group) -> Result<Rows> + Sync) -> Result<Rows> {
    let groups = Group::local(world).context("sockets between ranks")?;
    let mut results: Vec<Result<Rows>> = thread::scope(|scope| {
        let each = &each;
        let ranks: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || each(group))).collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().unwrap_or_else(|_| Err(anyhow!("a rank panicked"))))
            .collect()
    });
    let cause = results.iter().position(|result| result.as_ref().is_err_and(|error| !saw_another_go(error)));
    let cause = cause.or(results.iter().position(Result::is_err));
    results.swap_remove(cause.unwrap_or(0))
}

/// How far `rows` are from `exact`: KL divergence of the probabilities after each id, mean and largest in nats, and how
/// often the likeliest id is the same.
fn divergence(codec: &CodecPolicy, exact: &Rows, rows: &Rows, vocab: usize) -> String {
    let (mut count, mut sum, mut most, mut same) = (0u32, 0.0, 0.0f64, 0u32);
    for (exact, rows) in exact.iter().zip(rows) {
        for (p, q) in exact.chunks(vocab).zip(rows.chunks(vocab)) {
            let (log_p, log_q) = (log_softmax(p), log_softmax(q));
            let kl: f64 = log_p.iter().zip(&log_q).map(|(p, q)| p.exp() * (p - q)).sum();
            let top = |logits: &[f32]| (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            (count, sum, most) = (count + 1, sum + kl.max(0.0), most.max(kl));
            same += u32::from(top(p) == top(q));
        }
    }
    let mean = sum / f64::from(count.max(1));
    format!(
        "{codec} against exact: KL mean {mean:.3e}, most {most:.3e}; same likeliest id {same} of {count}\n"
    )
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = logits.iter().map(|logit| f64::from(logit - most));
    let log_sum = shifted.clone().map(f64::exp).sum::<f64>().ln();
    shifted.map(|logit| logit - log_sum).collect()
}

/// Whether an error only says that another rank is gone, and is not the cause.
fn saw_another_go(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ModelError::Backend(BackendError::Group { .. })))
        || error.is::<mpsc::RecvError>()
        || error.is::<mpsc::SendError<()>>()
}

/// A decode rank's word to the prefill rank: this is where the next session may come.
type Ready = mpsc::Sender<TargetSpec>;

/// Prompts on one rank, the rest on `world` others.
fn handed_over<B: Backend>(work: &Work<'_>, world: usize) -> Result<Rows> {
    let sessions: Vec<(SessionId, Ticket)> =
        work.cases.iter().map(|_| (SessionId::random(), Ticket::random())).collect();
    let (ready, targets) = mpsc::channel();
    // The decode ranks expect a session when its prompt is computed, so that the wire's patience is not the compute's.
    let (go, started): (Vec<_>, Vec<_>) = (0..world).map(|_| mpsc::channel::<()>()).unzip();
    let signals: Vec<_> =
        started.into_iter().map(|started| Mutex::new(Some((started, ready.clone())))).collect();
    drop(ready);
    let bind = || Receiver::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Limits::default());
    let receivers = (0..world).map(|_| bind()).collect::<Result<Vec<_>, _>>()?;
    let specs = models::kv_specs(work.checkpoint.config(), work.options.dtype, world)?;
    let target = |(rank, (receiver, spec)): (usize, (&Receiver, KvSpec))| TargetSpec {
        rank,
        addresses: vec![receiver.local_addr().to_string()],
        spec,
    };
    let all: Vec<TargetSpec> = receivers.iter().zip(specs).enumerate().map(target).collect();
    thread::scope(|scope| {
        let prefill = scope.spawn(|| prefill::<B>(work, &sessions, go, targets));
        let decoded = ranks(world, |group| {
            // Owned here, so that a rank that ends in whatever way releases the prefill rank.
            let signals = signals[group.rank].lock().map(|mut signals| signals.take());
            let (started, ready) = signals.ok().flatten().context("a rank ran twice")?;
            let peers =
                Peers { rank: group.rank, targets: all.clone(), sender: Sender::new(Limits::default()) };
            decode::<B>(work, &sessions, group, receivers[peers.rank].clone(), peers, started, ready)
        });
        let prompts = prefill.join().unwrap_or_else(|_| Err(anyhow!("the prefill rank panicked")));
        match (prompts, decoded) {
            (Ok(mut rows), Ok(decoded)) => {
                rows.iter_mut().zip(decoded).for_each(|(rows, more)| rows.extend(more));
                Ok(rows)
            }
            (Err(error), Err(cause)) if saw_another_go(&error) => Err(cause),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    })
}

/// Computes the prompts and pushes their cache. Returns the logits after each prompt.
fn prefill<B: Backend>(
    work: &Work<'_>,
    sessions: &[(SessionId, Ticket)],
    go: Vec<mpsc::Sender<()>>,
    targets: mpsc::Receiver<TargetSpec>,
) -> Result<Rows> {
    let mut rank: Rank<B> = work.open(Group::alone())?;
    let sender = Sender::new(Limits { codec: work.codec, ..Limits::default() });
    let mut all = Rows::new();
    for (case, (session, ticket)) in work.cases.iter().zip(sessions) {
        let len = case.prompt.len() as u32;
        rank.begin(SEQ, case.prompt.len())?;
        let row = rank.feed(SEQ, 0, &case.prompt, work.chunk)?.context("no logits")?;
        let mut to: Vec<TargetSpec> = Vec::new();
        for go in &go {
            go.send(()).context("a decode rank ended")?;
        }
        for _ in &go {
            to.push(targets.recv().context("a decode rank ended")?);
        }
        // They answer in any order; what each gets of a replicated plane goes by its number.
        to.sort_by_key(|target| target.rank);
        let (done, pushed) = mpsc::channel();
        let push = PushSpec {
            session: *session,
            ticket: ticket.clone(),
            request: "logits".into(),
            attempt: 0,
            epoch: 0,
            from: vec![rank.model.kv_spec().clone()],
            from_rank: 0,
            to,
            tokens: 0..len,
            deadline: SILENCE,
            compute_bytes_per_s: None,
            chunk_tokens: 512,
        };
        let push = sender.open(push, move |result| drop(done.send(result)));
        for layer in 0..rank.model.kv_spec().layers {
            push.layer(rank.kv.export(SEQ, layer, 0..len)?);
        }
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or(0);
        push.close(Close { token: best as u32, finish: 0 });
        pushed.recv().context("the push ended without a result")??;
        rank.end(SEQ)?;
        all.push(row);
    }
    Ok(all)
}

/// Lands each prompt's cache and goes on from it. Returns the logits after each id that is fed.
fn decode<B: Backend>(
    work: &Work<'_>,
    sessions: &[(SessionId, Ticket)],
    group: Group,
    receiver: Receiver,
    peers: Peers,
    started: mpsc::Receiver<()>,
    ready: Ready,
) -> Result<Rows> {
    let mut rank: Rank<B> = work.open(group)?;
    let spec = rank.model.kv_spec().clone();
    let mut all = Rows::new();
    for (case, (session, ticket)) in work.cases.iter().zip(sessions) {
        started.recv().context("the prefill rank ended")?;
        rank.begin(SEQ, case.tokens())?;
        let tokens = 0..case.prompt.len() as u32;
        let expect = Expect {
            session: *session,
            ticket: ticket.clone(),
            request: "logits".into(),
            attempt: 0,
            epoch: 0,
            spec: spec.clone(),
            tokens: tokens.clone(),
            deadline: SILENCE,
            peers: Some(peers.clone()),
        };
        let (done, landed) = mpsc::channel();
        let landing = rank.kv.land(SEQ, tokens)?;
        receiver
            .expect(expect, landing, move |landed| drop(done.send(landed)))
            .map_err(|refused| anyhow!("{refused}"))?;
        ready.send(peers.targets[peers.rank].clone())?;
        let Landed { landing, result, .. } = landed.recv().context("the session ended without a result")?;
        result?;
        rank.kv.commit(landing)?;
        all.push(rank.follow(SEQ, case)?);
        rank.end(SEQ)?;
    }
    receiver.stop();
    Ok(all)
}
