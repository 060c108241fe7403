//! Tensor parallelism over MLX's ring. A process is one rank of one group for its whole life, so every test here starts this
//! executable again, once per rank, as the ignored test `rank`.
#![cfg(feature = "mlx")]

#[path = "../../../models/tests/golden/compare.rs"]
#[allow(dead_code)]
mod compare;
#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{
    Backend, BackendError, Batch, DType, DeviceOptions, Group, KvSpec, Links, Out, SeqId, Step, TensorView,
    WeightSource,
};
use backend_mlx::MlxBackend;
use models::replay::Rank;

use crate::compare::{Limits, check};
use crate::fixture::Fixture;

/// What a rank is told: what to do, its number, and where all ranks are.
const TASK: &str = "TEST_GROUP_TASK";
const RANK: &str = "MLX_RANK";
const SPECIFICATION: &str = "TEST_GROUP_SPECIFICATION";

/// A rank that does not end by then never will.
const PATIENCE: Duration = Duration::from_secs(240);

/// Starts `world` ranks that all do `task`.
fn start(task: &str, world: usize) -> Vec<Child> {
    let listeners: Vec<TcpListener> = (0..world).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<String> =
        listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    drop(listeners);
    let specification = backend_mlx::specification(addresses.iter().map(|address| (address.as_str(), "")));
    let rank = |rank: usize| {
        let file = format!("{}/{task}-{}-{rank}.json", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rank", "--ignored", "--nocapture", "--test-threads=1"])
            .env(TASK, task)
            .env(RANK, rank.to_string())
            .env("MLX_HOSTFILE", &file)
            .env("MLX_IBV_DEVICES", &file)
            .env(SPECIFICATION, &specification)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    (0..world).map(rank).collect()
}

/// Waits for a rank; whatever is left after [`PATIENCE`] is killed.
fn end(mut child: Child, begun: Instant) -> Output {
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn all_succeed(task: &str, world: usize) {
    let begun = Instant::now();
    let outputs: Vec<Output> = start(task, world).into_iter().map(|child| end(child, begun)).collect();
    // One rank's failure is the others': all of them are shown.
    let said = |(rank, output): (usize, &Output)| {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        format!("rank {rank}, {}:\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
    };
    let all: Vec<String> = outputs.iter().enumerate().map(said).collect();
    assert!(outputs.iter().all(|output| output.status.success()), "{task}\n{}", all.join("\n"));
}

#[test]
fn two_ranks_conform() {
    all_succeed("conformance", 2);
}

/// More than two: sums in several hops, and neighbours that differ.
#[test]
fn three_ranks_conform() {
    all_succeed("conformance", 3);
}

#[test]
fn two_ranks_are_the_reference() {
    all_succeed("golden", 2);
}

/// The rank that is left gets an error instead of numbers.
#[test]
fn a_lost_rank_ends_the_steps_of_the_other() {
    let begun = Instant::now();
    let mut ranks = start("lose", 2);
    let (last, first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    assert!(!end(last, begun).status.success(), "rank 1 ended by itself");
    let output = end(first, begun);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// One rank; only as a process of its own.
#[test]
#[ignore = "started by the others"]
fn rank() {
    let Ok(task) = std::env::var(TASK) else { return };
    match task.as_str() {
        "conformance" => conforms(),
        "golden" => is_the_reference(),
        "lose" => loses(),
        other => panic!("no task {other}"),
    }
}

/// This process's place in its group.
fn group() -> Group {
    let rank = std::env::var(RANK).unwrap().parse().unwrap();
    let specification = std::env::var(SPECIFICATION).unwrap();
    Group { rank, world: specification.lines().count(), links: Links::Native(specification) }
}

fn conforms() {
    let open = |options: &DeviceOptions, group: Group| MlxBackend::open(options, group);
    let make = |world: usize| {
        let ours = group();
        Ok(if ours.world == world { vec![ours] } else { Vec::new() })
    };
    let tolerance = Tolerance { f32: 1e-5, bf16: 2e-2 };
    let dtypes = &[DType::F32, DType::BF16];
    let suite =
        Suite { open: &open, tolerance, dtypes, group: Some(make), quants: QUANTS, plain_experts: dtypes };
    for dtype in suite.dtypes {
        for (name, case) in suite.cases() {
            // The others are the same for a rank of several.
            if name.contains("group") || name.contains("parallel") || name.contains("ranks") {
                println!("{name}, {dtype}");
                case(&suite, *dtype);
            }
        }
    }
}

/// Prompt and generated tokens of a model split in two, against the logits of Hugging Face transformers.
fn is_the_reference() {
    for (case, dtype) in [
        ("llama-base-s1", DType::F32),
        ("qwen3-base-s1", DType::F32),
        ("deepseek_v3-mscale", DType::F32),
        ("minimax_m2-base", DType::F32),
        ("qwen3_moe-mlx", DType::F32),
        ("llama-gqa_tied-s1", DType::BF16),
    ] {
        let fixture = Fixture::open(case);
        let options = DeviceOptions { dtype, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
        for (i, prompt) in fixture.prompts.iter().enumerate() {
            let (seq, len) = (SeqId(1), prompt.prompt.len());
            let tokens = len + prompt.greedy.len();
            let mut rank = Rank::<MlxBackend>::open(&options, group(), &fixture.checkpoint, tokens).unwrap();
            rank.begin(seq, tokens).unwrap();
            let mut logits: Vec<f32> =
                rank.feed(seq, 0, &prompt.prompt, 64).unwrap().into_iter().flatten().collect();
            for (at, id) in (len as u32..).zip(&prompt.greedy[..prompt.greedy.len() - 1]) {
                logits.extend(rank.feed(seq, at, &[*id], 1).unwrap().into_iter().flatten());
            }
            if group().rank > 0 {
                assert!(logits.is_empty());
                continue;
            }
            let limits = match dtype {
                DType::F32 => Limits::f32(),
                _ => Limits::bf16(prompt.bf16_kl_median),
            };
            let what = format!("{case} {dtype} p{i} on two ranks");
            check(&what, &fixture.logits(i), &logits, fixture.vocab(), &limits);
        }
    }
}

/// Rank 1 kills itself after some steps; rank 0 must be told so by the step in which it is missing.
fn loses() {
    let group = group();
    let rank = group.rank;
    let options =
        DeviceOptions { dtype: DType::F32, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
    let mut backend = MlxBackend::open(&options, group).unwrap();
    let mut kv = backend.kv(&KvSpec::gqa(1, 1, 0..1, 8, DType::F32), 1 << 16).unwrap();
    let bytes: Vec<u8> = (0..64).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let view =
        TensorView { name: "x", dtype: DType::F32, rows: 4, cols: 16, row_stride_bytes: 64, bytes: &bytes };
    let table = backend.load(&WeightSource::Embedding(view.into())).unwrap();
    let mut batch = Batch::default();
    batch.push(SeqId(1), 0, &[3]);
    let mut step = || -> Result<(), BackendError> {
        let mut step = backend.step(&mut kv, &batch);
        let x = step.embed(&table);
        let x = step.all_reduce(x);
        step.submit(Out::Logits(x)).wait().map(drop)
    };
    for _ in 0..3 {
        step().unwrap();
    }
    if rank == 1 {
        std::process::abort();
    }
    let begun = Instant::now();
    match step() {
        Err(BackendError::Group { rank: 1, reason }) => println!("after {:?}: {reason}", begun.elapsed()),
        other => panic!("{other:?} instead of a lost group"),
    }
}
