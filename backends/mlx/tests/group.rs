//! Tensor parallelism over MLX's ring. A process is one rank of one group for its whole life, so every test here starts this
//! executable again, once per rank, as the ignored test `rank`.
#![cfg(feature = "mlx")]

#[path = "../../../models/tests/golden/compare.rs"]
#[allow(dead_code)]
mod compare;
#[path = "../../../models/tests/golden/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::net::SocketAddr;
use std::ops::Range;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use backend::conformance::{QUANTS, Suite, Tolerance};
use backend::{
    Backend, BackendError, Batch, DType, DeviceOptions, Group, KvSpec, Links, Out, Output as Done, SeqId,
    Step, TensorView, WeightSource,
};
use backend_mlx::MlxBackend;
use models::replay::Rank;
use socket2::{Domain, Socket, Type};

use crate::compare::{Limits, check};
use crate::fixture::{Fixture, Prompt};

/// What a rank is told: what to do, its number, and where all ranks are.
const TASK: &str = "TEST_GROUP_TASK";
const RANK: &str = "MLX_RANK";
const SPECIFICATION: &str = "TEST_GROUP_SPECIFICATION";

/// Ranks that have not ended by then never will.
const PATIENCE: Duration = Duration::from_secs(240);
/// How long the other ranks may take to end after one has failed; MLX lets them wait for it for ever.
const AFTER_A_FAILURE: Duration = Duration::from_secs(20);

/// Ports that the system gives nobody by itself: a stranger that still dials whoever had one before would be taken for a rank.
const PORTS: Range<u16> = 20_000..30_000;

/// A port of this machine for a rank. Held while the value lives: bound in the way in which MLX binds it, too, and not
/// listening.
fn held_port() -> Socket {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() as usize;
    let mut ports = PORTS.cycle().skip(seed % PORTS.len()).take(PORTS.len());
    ports.find_map(bound).expect("a free port")
}

fn bound(port: u16) -> Option<Socket> {
    let address = SocketAddr::from(([127, 0, 0, 1], port)).into();
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    // Shared with nobody until now.
    socket().bind(&address).ok()?;
    let shared = socket();
    shared.set_reuse_address(true).unwrap();
    shared.set_reuse_port(true).unwrap();
    shared.bind(&address).ok()?;
    Some(shared)
}

/// Runs `world` ranks that all do `task`, to their end. One group at a time: each keeps several cores busy with waiting.
fn run(task: &str, world: usize) -> Vec<Output> {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ports: Vec<Socket> = (0..world).map(|_| held_port()).collect();
    let address = |port: &Socket| port.local_addr().unwrap().as_socket().unwrap().to_string();
    let addresses: Vec<String> = ports.iter().map(address).collect();
    let specification = backend_mlx::specification(addresses.iter().map(|address| (address.as_str(), "")));
    let rank = |rank: usize| {
        let file = format!("{}/{task}-{}-{rank}.json", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rank", "--ignored", "--nocapture", "--test-threads=1"])
            .env(TASK, task)
            .env(RANK, rank.to_string())
            .env("MLX_HOSTFILE", &file)
            .env("MLX_IBV_DEVICES", &file)
            // Ranks of one machine would compile into the same files at the same time.
            .env("MLX_DISABLE_COMPILE", "1")
            .env(SPECIFICATION, &specification)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut ranks: Vec<Child> = (0..world).map(rank).collect();
    let (begun, mut failed) = (Instant::now(), None);
    loop {
        let ends: Vec<_> = ranks.iter_mut().map(|rank| rank.try_wait().unwrap()).collect();
        if ends.iter().flatten().any(|status| !status.success()) {
            failed.get_or_insert_with(Instant::now);
        }
        let hopeless = failed.is_some_and(|failed| failed.elapsed() > AFTER_A_FAILURE);
        if ends.iter().all(Option::is_some) {
            break;
        }
        if hopeless || begun.elapsed() > PATIENCE {
            ranks.iter_mut().for_each(|rank| rank.kill().unwrap());
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect()
}

/// What a rank said.
fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}:\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

fn all_succeed(task: &str, world: usize) {
    let outputs = run(task, world);
    // One rank's failure is the others': all of them are shown.
    let all: Vec<String> = outputs.iter().map(said).collect();
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
    let outputs = run("lose", 2);
    assert!(!outputs[1].status.success(), "rank 1 ended by itself");
    assert!(outputs[0].status.success(), "{}", said(&outputs[0]));
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

/// Prompts and generated tokens of a model split in two, against the logits of Hugging Face transformers. All prompts of a
/// model are computed side by side: a third of the steps, and rows of several lengths.
fn is_the_reference() {
    for (case, dtype) in [
        ("llama-base-s1", DType::F32),
        ("qwen3-base-s1", DType::F32),
        ("deepseek_v3-mscale", DType::F32),
        ("minimax_m2-base", DType::F32),
        ("qwen3_moe-mlx", DType::F32),
        ("llama-gqa_tied-s1", DType::BF16),
    ] {
        let (begun, fixture) = (Instant::now(), Fixture::open(case));
        let options = DeviceOptions { dtype, threads: 1, block_tokens: 16, ..DeviceOptions::default() };
        let room = fixture.prompts.iter().map(|prompt| (prompt.prompt.len() + prompt.greedy.len()).max(64));
        let mut rank =
            Rank::<MlxBackend>::open(&options, group(), &fixture.checkpoint, 2 * room.sum::<usize>())
                .unwrap();
        let got = side_by_side(&mut rank, &fixture.prompts);
        println!("{case}, {dtype}: {:.1?}", begun.elapsed());
        if group().rank > 0 {
            assert!(got.iter().all(Vec::is_empty));
            continue;
        }
        for (i, (prompt, got)) in fixture.prompts.iter().zip(&got).enumerate() {
            let limits = match dtype {
                DType::F32 => Limits::f32(),
                _ => Limits::bf16(prompt.bf16_kl_median),
            };
            let what = format!("{case} {dtype} p{i} on two ranks");
            check(&what, &fixture.logits(i), got, fixture.vocab(), &limits);
        }
    }
}

/// Per prompt the logits after it and after every id of its answer but the last; nothing on other ranks than 0.
fn side_by_side(rank: &mut Rank<MlxBackend>, prompts: &[Prompt]) -> Vec<Vec<f32>> {
    for (i, prompt) in prompts.iter().enumerate() {
        rank.begin(SeqId(i as u64), prompt.prompt.len() + prompt.greedy.len()).unwrap();
    }
    let mut logits = vec![Vec::new(); prompts.len()];
    for step in 0..prompts.iter().map(|prompt| prompt.greedy.len()).max().unwrap() {
        let (mut batch, mut fed) = (Batch::default(), Vec::new());
        for (i, prompt) in prompts.iter().enumerate().filter(|(_, prompt)| step < prompt.greedy.len()) {
            fed.push(i);
            match step {
                0 => batch.push(SeqId(i as u64), 0, &prompt.prompt),
                _ => {
                    let at = (prompt.prompt.len() + step - 1) as u32;
                    batch.push(SeqId(i as u64), at, &[prompt.greedy[step - 1]]);
                }
            }
        }
        let mut step = rank.backend.step(&mut rank.kv, &batch);
        let rows = rank.model.forward(&mut step, &batch.last_rows(), &mut |_, _| {});
        if let Done::Logits(rows) = step.submit(Out::Logits(rows)).wait().unwrap() {
            let each = rows.len() / fed.len();
            fed.iter().zip(rows.chunks_exact(each)).for_each(|(i, row)| logits[*i].extend_from_slice(row));
        }
    }
    logits
}

/// Rank 1 kills itself after some steps; rank 0 must be told so by the first sum in which it is missing. One sum a step: after
/// the first that fails, MLX goes on to the next ones of the step, and where only one of its two sockets is closed by then,
/// that waits for ever for the thread of the other. (Serving survives it: the engine's watchdog starts such a rank anew.)
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
        step.submit(Out::Hidden(x)).wait().map(drop)
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
