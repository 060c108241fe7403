//! Steps that are replayed are those that would have been queued, bit by bit, whatever changes from step to step.

mod group;
mod guesses;

use std::sync::Arc;

use backend::draw::Rule;
use backend::{
    Attend, Backend, BackendError, Batch, DType, DeviceOptions, Draw, Drawn, Glu, Group, KSum, KvExport,
    KvSpec, KvStore, Linear, Moe, Out, Output, Pending, Rope, RopeStyle, Routing, Score, SeqId, Step,
    TensorView, WeightSource,
};

use super::{CALLS_MIN, GRAPHS_MAX, Graphs, List};
use crate::act::CudaAct;
use crate::args::NormArgs;
use crate::device::{Device, Open};
use crate::driver::{Driver, Lane, Launch};
use crate::emulator::Emulated;
use crate::kv::CudaKv;
use crate::queue::Queue;
use crate::step::CudaStep;
use crate::weight::CudaWeight;

const HIDDEN: usize = 32;
const HEADS: usize = 4;
const DIM: usize = 16;
const EXPERTS: usize = 4;
/// Of one rank.
const VOCABULARY: usize = 96;
const LAYERS: usize = 2;
const BLOCK: u32 = 16;

type Act = CudaAct<Emulated>;
type Weight = CudaWeight<Emulated>;

/// A decoder of two layers, the second with experts.
struct Toy {
    device: Device<Emulated>,
    kv: CudaKv<Emulated>,
    rope: Rope,
    routing: Routing,
    embed: Weight,
    norm: Weight,
    qkv: Weight,
    o: Weight,
    gate_up: Weight,
    down: Weight,
    router: Weight,
    experts: (Weight, Weight),
    head: Weight,
}

fn numbers(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).flat_map(|_| (next() * 0.3).to_le_bytes()).collect()
}

fn matrix(bytes: &[u8], rows: usize) -> TensorView<'_> {
    let cols = bytes.len() / 4 / rows;
    TensorView { name: "test", dtype: DType::F32, rows, cols, row_stride_bytes: cols * 4, bytes }
}

impl Toy {
    fn new(driver: Emulated, dtype: DType) -> Result<Self, BackendError> {
        Self::in_group(driver, dtype, Group::alone())
    }

    /// One rank, whose heads, gates, experts and logits are its own.
    fn in_group(driver: Emulated, dtype: DType, group: Group) -> Result<Self, BackendError> {
        let options = DeviceOptions { dtype, block_tokens: BLOCK, ..DeviceOptions::default() };
        let (rank, world) = (group.rank as u64, group.world);
        let mut device = Device::over(driver, &options, group)?;
        let spec = KvSpec::gqa(LAYERS, HEADS / 2, 0..HEADS / 2, DIM, dtype);
        let kv = device.kv(&spec, 80 * u64::from(BLOCK) * spec.token_bytes() as u64)?;
        let mut seed = 0;
        let mut product = |device: &mut Device<Emulated>, outputs: usize, inputs: usize| {
            seed += 1;
            // The router is the same on all ranks.
            let own = if outputs == EXPERTS { 0 } else { rank * 1000 };
            let bytes = numbers(own + seed, outputs * inputs);
            let parts = vec![matrix(&bytes, outputs).into()];
            device.load(&WeightSource::Linear(Linear { parts, bias: None, sum: KSum::Ascending }))
        };
        let qkv = product(&mut device, 2 * HEADS * DIM, HIDDEN)?;
        let o = product(&mut device, HIDDEN, HEADS * DIM)?;
        let gate_up = product(&mut device, 2 * HIDDEN, HIDDEN)?;
        let down = product(&mut device, HIDDEN, HIDDEN)?;
        let router = product(&mut device, EXPERTS, HIDDEN)?;
        let head = product(&mut device, VOCABULARY, HIDDEN)?;
        let mut experts = |outputs: usize| {
            let seeds = (0..EXPERTS as u64).map(|seed| rank * 1000 + 50 + seed);
            let bytes: Vec<Vec<u8>> = seeds.map(|seed| numbers(seed, outputs * HIDDEN)).collect();
            let of = |bytes| Linear {
                parts: vec![matrix(bytes, outputs).into()],
                bias: None,
                sum: KSum::Ascending,
            };
            let linears: Vec<Linear<'_>> = bytes.iter().map(|bytes| of(bytes)).collect();
            device.load(&WeightSource::Experts(&&linears[..]))
        };
        let experts = (experts(2 * HIDDEN)?, experts(HIDDEN)?);
        let table = numbers(90, VOCABULARY * world * HIDDEN);
        let embed = device.load(&WeightSource::Embedding(matrix(&table, VOCABULARY * world).into()))?;
        let norm = device.load(&WeightSource::Norm(matrix(&numbers(91, HIDDEN), 1)))?;
        let inv_freq: Arc<[f32]> = (0..DIM / 2).map(|i| 0.5f32.powi(i as i32)).collect();
        let routing = Routing {
            experts: EXPERTS,
            top_k: 2,
            score: Score::Softmax,
            groups: None,
            normalise: true,
            normalise_eps: 0.0,
            scale: 1.0,
        };
        let rope = Rope { inv_freq, factor: 1.0, style: RopeStyle::HalfSplit };
        Ok(Toy { device, kv, rope, routing, embed, norm, qkv, o, gate_up, down, router, experts, head })
    }

    /// Submits a step that ends with a row for each run; its cache of `export`'s tokens leaves after the first layer.
    fn step(
        &mut self,
        batch: &Batch,
        export: Option<SeqId>,
        out: impl FnOnce(Act) -> Out<Act>,
    ) -> (Box<dyn Pending<Act>>, Vec<u8>) {
        self.step_of(batch, &batch.last_rows(), export, out)
    }

    /// The same with these rows.
    fn step_of(
        &mut self,
        batch: &Batch,
        rows: &[u32],
        export: Option<SeqId>,
        out: impl FnOnce(Act) -> Out<Act>,
    ) -> (Box<dyn Pending<Act>>, Vec<u8>) {
        let Toy { device, kv, rope, routing, embed, norm, qkv, o, gate_up, down, router, experts, head } =
            self;
        let mut step: CudaStep<'_, Emulated> = device.step(kv, batch);
        let mut left = None;
        let mut x = step.embed(embed);
        for layer in 0..LAYERS {
            let normed = step.norm(&x, norm, 1e-5);
            let attend = Attend {
                heads: HEADS,
                kv_heads: HEADS / 2,
                head_dim: DIM,
                scale: 0.25,
                rope,
                qk_norm: None,
                window: None,
                sinks: None,
            };
            let projected = step.linear(&normed, qkv);
            let attended = step.attend(layer, projected, &attend);
            if let Some(seq) = export.filter(|_| layer == 0) {
                left = Some(step.export(seq, layer, 0..4).unwrap());
            }
            let attended = step.linear(&attended, o);
            let attended = step.all_reduce(attended);
            x = step.add(x, attended);
            let normed = step.norm(&x, norm, 1e-5);
            let more = if layer == 0 {
                let both = step.linear(&normed, gate_up);
                let gated = step.glu(both, Glu::Silu);
                step.linear(&gated, down)
            } else {
                let moe = Moe {
                    router,
                    routing,
                    choice_bias: None,
                    gate_up: &experts.0,
                    down: &experts.1,
                    shared: None,
                    glu: Glu::Silu,
                };
                step.moe(&normed, &moe)
            };
            let more = step.all_reduce(more);
            x = step.add(x, more);
        }
        let x = step.rows(x, rows);
        let x = step.norm(&x, norm, 1e-5);
        let x = step.linear(&x, head);
        let pending = step.submit(out(x));
        let bytes = left.map_or_else(Vec::new, |lease| {
            lease.wait().unwrap();
            let piece = backend::Piece { layer: 0, plane: 0, heads: 0..HEADS / 2, tokens: 0..4 };
            let mut bytes = Vec::new();
            lease.read(&piece, &mut bytes).unwrap();
            bytes
        });
        (pending, bytes)
    }

    fn draw(&mut self, batch: &Batch, rule: Rule) -> Box<dyn Pending<Act>> {
        let draws = vec![Draw::Token(rule); batch.runs.len()];
        self.step(batch, None, |x| Out::Draw(x, draws)).0
    }

    /// Opens sequences with room for `tokens` and computes a prompt of 5 tokens and more for each.
    fn prompts(&mut self, count: usize, tokens: u32) -> Batch {
        let mut batch = Batch::default();
        for seq in 0..count {
            self.kv.open(SeqId(seq as u64), tokens).unwrap();
            let ids: Vec<u32> = (0..5 + seq % 3).map(|i| ((seq * 7 + i * 3) % VOCABULARY) as u32).collect();
            batch.push(SeqId(seq as u64), 0, &ids);
        }
        batch
    }
}

fn ids(output: Result<Output<Act>, BackendError>) -> Vec<Drawn> {
    match output {
        Ok(Output::Drawn(rows)) => rows,
        Ok(_) => panic!("the step drew nothing"),
        Err(error) => panic!("step: {error}"),
    }
}

/// Of a rank that is not told.
fn nothing(output: Result<Output<Act>, BackendError>) {
    match output {
        Ok(Output::Nothing) => {}
        Ok(_) => panic!("ids and logits are rank 0's"),
        Err(error) => panic!("step: {error}"),
    }
}

fn bits(output: Result<Output<Act>, BackendError>) -> Vec<u32> {
    match output {
        Ok(Output::Logits(logits)) => logits.iter().map(|x| x.to_bits()).collect(),
        Ok(_) => panic!("the step gave no logits"),
        Err(error) => panic!("step: {error}"),
    }
}

/// Of sequences that have come so far, the next token of each, on what its row of the step before drew.
fn next(positions: &[u32]) -> Batch {
    let mut batch = Batch::default();
    for (at, position) in positions.iter().enumerate() {
        batch.push_drawn(SeqId(at as u64), *position, at as u32);
    }
    batch
}

/// Ten sequences generate, with the next step begun before the last is waited for; some end, so that batches shrink across the
/// sizes that are alike; their tables grow; a step exports, and at the end there are logits.
fn story(toy: &mut Toy) -> (Vec<Vec<Drawn>>, Vec<u8>, Vec<u32>) {
    let batch = toy.prompts(10, 8);
    let mut lengths: Vec<u32> = batch.runs.iter().map(|run| run.len).collect();
    let mut last = toy.draw(&batch, Rule::GREEDY);
    let (mut told, mut left) = (Vec::new(), Vec::new());
    let noise = Rule { temperature: 0.9, seed: 5, ..Rule::GREEDY };
    // 9 and 10 rows are counted as 16, and 3 as they are.
    for (at, rows) in [10, 10, 10, 9, 9, 9, 9, 3, 3, 3, 3, 3, 3, 3].into_iter().enumerate() {
        let growing = next(&lengths[..rows]);
        for (seq, length) in lengths.iter_mut().enumerate().take(rows) {
            toy.kv.grow(SeqId(seq as u64), *length + 1).unwrap();
            *length += 1;
        }
        let rule = match at % 5 {
            3 => noise,
            // Drawn on the host.
            4 => Rule { top_k: 4, position: at as u64, ..noise },
            _ => Rule::GREEDY,
        };
        let export = (at == 9).then_some(SeqId(1));
        let draws = vec![Draw::Token(rule); rows];
        let (pending, bytes) = toy.step(&growing, export, |x| Out::Draw(x, draws));
        left.extend(bytes);
        told.push(ids(std::mem::replace(&mut last, pending).wait()));
    }
    told.push(ids(last.wait()));
    let batch = next(&lengths[..2]);
    let batch = Batch { ids: vec![backend::Input::Id(3), backend::Input::Id(9)], ..batch };
    (told, left, bits(toy.step(&batch, None, Out::Logits).0.wait()))
}

/// On every kind of device, with and without its host's memory, and with a library of products.
#[test]
fn replayed_steps_are_those_that_would_have_been_queued() {
    for (device, dtype) in [(0, DType::BF16), (3, DType::BF16)] {
        let told = [false, true].map(|replays| {
            let mut toy = Toy::new(Emulated::open(device, None).unwrap(), dtype).unwrap();
            toy.device.replay_steps(replays);
            let told = story(&mut toy);
            let replayed = toy.device.replayed_steps();
            assert!(if replays { replayed >= 7 } else { replayed == 0 }, "{replayed} steps were replayed");
            told
        });
        assert!(told[0] == told[1], "device {device}, {dtype}");
    }
}

/// Padding is nobody's: 9 rows are computed as with 7 more sequences beside them.
#[test]
fn padding_disturbs_nobody() {
    let logits = |count: usize| {
        let mut toy = Toy::new(Emulated::open(0, None).unwrap(), DType::BF16).unwrap();
        let batch = toy.prompts(count, 30);
        let mut rows = Vec::new();
        let prompts = bits(toy.step(&batch, None, Out::Logits).0.wait());
        rows.extend_from_slice(&prompts[..9 * VOCABULARY]);
        for at in 0..3 {
            let mut batch = Batch::default();
            for seq in 0..count {
                batch.push(SeqId(seq as u64), (5 + seq % 3 + at) as u32, &[(seq + at) as u32]);
            }
            let got = bits(toy.step(&batch, None, Out::Logits).0.wait());
            assert_eq!(got.len(), count * VOCABULARY);
            rows.extend_from_slice(&got[..9 * VOCABULARY]);
        }
        rows
    };
    assert!(logits(9) == logits(16));
}

/// Memory that graphs know is given back between two steps, and others take it: the next steps do not use them.
#[test]
fn memory_that_moves_is_not_replayed() {
    let run = |moves: bool| {
        let mut toy = Toy::new(Emulated::open(0, None).unwrap(), DType::BF16).unwrap();
        let batch = toy.prompts(3, 40);
        let mut last = toy.draw(&batch, Rule::GREEDY);
        let (mut told, mut taken, mut replayed) = (Vec::new(), Vec::new(), Vec::new());
        for at in 0..8 {
            if moves && at == 5 {
                assert!(toy.device.pool.give_back().unwrap());
                taken.extend((0..20).map(|_| toy.device.driver().alloc(4096).unwrap()));
            }
            let positions: Vec<u32> = batch.runs.iter().map(|run| run.len + at).collect();
            let pending = toy.draw(&next(&positions), Rule::GREEDY);
            told.push(ids(std::mem::replace(&mut last, pending).wait()));
            replayed.push(toy.device.replayed_steps());
        }
        (told, replayed)
    };
    let (still, moved) = (run(false), run(true));
    assert!(still.0 == moved.0);
    assert_eq!(still.1[4], moved.1[4]);
    assert!(moved.1[4] >= 2, "{:?}", moved.1);
    assert_eq!(moved.1[5], moved.1[4], "a graph of memory that is gone");
}

/// A device that captures nothing queues, and one that refuses a replay says so at the end of the step, once.
#[test]
fn what_a_device_refuses() {
    let run = |captures: bool| {
        let driver = Emulated::open(0, None).unwrap();
        driver.refuse(!captures, false);
        let mut toy = Toy::new(driver, DType::BF16).unwrap();
        let batch = toy.prompts(2, 40);
        let mut told = vec![ids(toy.draw(&batch, Rule::GREEDY).wait())];
        for at in 0..5 {
            let positions: Vec<u32> = batch.runs.iter().map(|run| run.len + at).collect();
            told.push(ids(toy.draw(&next(&positions), Rule::GREEDY).wait()));
        }
        assert_eq!(toy.device.replayed_steps() > 0, captures);
        (toy, told)
    };
    let (mut toy, told) = run(true);
    assert!(told == run(false).1);
    toy.device.driver().refuse(false, true);
    let more = |toy: &mut Toy| {
        let mut batch = Batch::default();
        batch.push(SeqId(0), 10, &[1]);
        batch.push(SeqId(1), 11, &[2]);
        toy.draw(&batch, Rule::GREEDY).wait().map(|_| ()).map_err(|error| error.to_string())
    };
    // These ids are not in flight, so the list is a new one: seen, captured, and replayed from then on.
    assert_eq!(more(&mut toy), Ok(()));
    let error = more(&mut toy).unwrap_err();
    assert!(error.contains("replaying a step") && error.contains("refused"), "{error}");
    assert_eq!(more(&mut toy), Ok(()));
}

/// A list of as many norms as make a graph, told apart by `eps`.
fn list(queue: &Queue<Emulated>, at: u64, eps: f32) {
    queue.begin(None).unwrap();
    for _ in 0..CALLS_MIN {
        let args = NormArgs { x: at, weight: at, out: at + 256, width: 8, eps };
        let launch = Launch { kernel: "norm_f32", grid: [1, 1, 1], threads: 32, shared_bytes: 0 };
        queue.launch(launch, &args).unwrap();
    }
    queue.close().unwrap();
}

/// There are so many graphs and no more: the one that was used longest ago goes.
#[test]
fn graphs_are_bounded() {
    let queue = Queue::new(Emulated::open(0, None).unwrap());
    let memory = queue.driver.alloc(512).unwrap();
    let at = queue.driver.address(&memory);
    queue.upload(at, &[0; 512]).unwrap();
    let run = |which: usize| {
        let before = queue.replayed();
        list(&queue, at, which as f32);
        queue.replayed() - before
    };
    for which in 0..GRAPHS_MAX {
        assert_eq!([run(which), run(which), run(which)], [0, 1, 1], "list {which}");
    }
    // The first is used again, so the second is the oldest when one more comes.
    assert_eq!(run(0), 1);
    assert_eq!([run(GRAPHS_MAX), run(GRAPHS_MAX)], [0, 1]);
    assert_eq!([run(0), run(2), run(1)], [1, 1, 0]);
    Emulated::wait(&queue.record(Lane::Compute).unwrap()).unwrap();
    // What comes once only is never captured, and what is short neither.
    let mut graphs = Graphs::<Emulated>::new();
    for _ in 0..3 {
        graphs.run(&queue.driver, List::default()).unwrap();
    }
    assert_eq!((graphs.known.len(), graphs.seen.len()), (0, 0));
    assert!(!graphs.clear());
}
