//! The arithmetic contract: for backends that are exact, results are compared bit by bit across batches, chunks, threads,
//! block sizes and tensor-parallel ranks. Groups are tested for others too, within tolerance.

use std::time::{Duration, Instant};

use super::attention::{Layer, ids, small};
use super::reference::Attention;
use super::{Case, MakeGroup, Suite, Tensor, rows_batch};
use crate::{
    Attend, Backend, BackendError, Batch, DType, DeviceOptions, Glu, Group, KSum, KvSpec, Linear, MatrixView,
    Output, Rope, RopeStyle, SeqId, Step, WeightSource,
};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("exact, rows of a product", product_rows),
        ("exact, attention by chunks, blocks, threads and company", attention),
        ("exact, tensor parallel", tensor_parallel),
        ("group, large sums", large_sums),
        ("group, a lost rank", lost_rank),
    ]
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub(super) fn is_exact<B: Backend>(suite: &Suite<'_, B>, dtype: DType) -> bool {
    (suite.open)(&suite.options(dtype), Group::alone()).is_ok_and(|backend| backend.caps().exact)
}

/// A row of a product has the same bits alone and among others, on any number of threads.
fn product_rows<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    if !is_exact(suite, dtype) {
        return;
    }
    for (weights, sum) in [
        (DType::F32, KSum::Ascending),
        (DType::BF16, KSum::Ascending),
        (DType::BF16, KSum::Tree { ranges: 8 }),
    ] {
        let x = Tensor::random(1, dtype, 203, 616, 1.0);
        let w = Tensor::random(2, weights, 300, 616, 0.1);
        let run = |threads: usize, rows: std::ops::Range<usize>| {
            let mut rig = suite.rig_with(
                &DeviceOptions { threads, ..suite.options(dtype) },
                Group::alone(),
                &KvSpec::gqa(1, 1, 0..1, 8, dtype),
                64,
            );
            let weight = rig.linear(&[&w], sum);
            let x = Tensor::new(dtype, rows.len(), 616, rows.flat_map(|row| x.row(row).iter().copied()));
            rig.rows(&x, |step, x| step.linear(&x, &weight))
        };
        let all = bits(&run(2, 0..203));
        for (threads, rows) in [(1, 0..203), (3, 0..1), (2, 7..9), (1, 20..31), (4, 100..203), (1, 190..203)]
        {
            let part = bits(&run(threads, rows.clone()));
            let same = all[rows.start * 300..rows.end * 300] == part;
            assert!(same, "{weights} {sum:?}: rows {rows:?} on {threads} threads differ from rows among 203");
        }
    }
}

/// A row of attention has the same bits prefilled or decoded, in any chunks, blocks and company.
fn attention<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    if !is_exact(suite, dtype) {
        return;
    }
    const LEN: usize = 700;
    let scale = Tensor::random(4, dtype, 1, 16, 1.0).values;
    for window in [None, Some(270)] {
        let attention =
            Attention { q_norm: Some(scale.clone()), k_norm: Some(scale.clone()), window, ..small() };
        let (text, other) = (ids(5, LEN, 50), ids(6, LEN, 50));
        // (threads, tokens of a block, chunk of the other sequence beside each, chunks of ours, the last repeated)
        let ways: [(usize, u32, usize, &[usize]); 6] = [
            (2, 16, 0, &[LEN]),
            (1, 64, 0, &[100]),
            (3, 256, 5, &[13, 243, 1]),
            (2, 8, 11, &[61]),
            (4, 512, 0, &[650, 1]),
            (2, 16, 1, &[255, 2, 254, 2, 187]),
        ];
        let mut first: Option<Vec<u32>> = None;
        for (threads, block_tokens, company, chunks) in ways {
            let options = DeviceOptions { threads, block_tokens, ..suite.options(dtype) };
            let mut layer = Layer::with_options(suite, &options, attention.clone(), 50, 2048);
            layer.rig.open(SeqId(1), LEN as u32);
            layer.rig.open(SeqId(2), LEN as u32);
            let (mut got, mut at, mut beside) = (Vec::new(), 0, 0);
            let sizes = chunks.iter().copied().chain(std::iter::repeat(chunks[chunks.len() - 1]));
            for size in sizes {
                let end = LEN.min(at + size);
                let mut batch = Batch::default();
                let next = LEN.min(beside + company);
                if next > beside {
                    batch.push(SeqId(2), beside as u32, &other[beside..next]);
                }
                batch.push(SeqId(1), at as u32, &text[at..end]);
                let out = layer.run(&batch);
                got.extend_from_slice(&out[(next - beside) * 64..]);
                (at, beside) = (end, next);
                if at == LEN {
                    break;
                }
            }
            let got = bits(&got);
            match &first {
                None => first = Some(got),
                Some(first) => {
                    let row = first.chunks(64).zip(got.chunks(64)).position(|(a, b)| a != b);
                    assert_eq!(
                        row, None,
                        "window {window:?}: a row differs with {threads} threads, blocks of {block_tokens}, \
                         {company} rows of another sequence, chunks {chunks:?}"
                    );
                }
            }
        }
    }
}

/// Runs `body` as every rank of a group that lives in this process, each on its own thread; with the number of each.
pub(super) fn ranks<T: Send>(
    group: MakeGroup,
    world: usize,
    body: impl Fn(usize, Group) -> T + Sync,
) -> Vec<(usize, T)> {
    let groups = group(world).unwrap_or_else(|error| panic!("group of {world}: {error}"));
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .map(|group| (group.rank, scope.spawn(move || body(group.rank, group))))
            .collect();
        threads
            .into_iter()
            .map(|(rank, thread)| {
                (rank, thread.join().unwrap_or_else(|_| panic!("rank {rank} of {world} failed")))
            })
            .collect()
    })
}

const HIDDEN: usize = 48;
const INTER: usize = 80;
const VOCABULARY: usize = 72;

/// A decoder layer with 8 query and 4 KV heads of 16, and a head of 72 tokens: every rank's share of it.
struct Block {
    embedding: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Block {
    fn new(dtype: DType) -> Self {
        let random = |seed, rows, cols| Tensor::random(seed, DType::BF16, rows, cols, 0.15);
        Block {
            embedding: Tensor::random(1, dtype, VOCABULARY, HIDDEN, 1.0),
            norm: Tensor::random(2, dtype, 1, HIDDEN, 1.0),
            q: random(3, 128, HIDDEN),
            k: random(4, 64, HIDDEN),
            v: random(5, 64, HIDDEN),
            o: random(6, HIDDEN, 128),
            gate: random(7, INTER, HIDDEN),
            up: random(8, INTER, HIDDEN),
            down: random(9, HIDDEN, INTER),
        }
    }

    /// Logits of every row of a prompt of `tokens` and of some decoded tokens, as rank `group.rank` of `group.world`.
    fn run<B: Backend>(&self, suite: &Suite<'_, B>, dtype: DType, group: Group, tokens: &[u32]) -> Vec<f32> {
        let (rank, world) = (group.rank, group.world);
        // Rank r's share of n things in a row.
        let share = |n: usize| rank * n / world..(rank + 1) * n / world;
        let heads = share(4);
        let spec = KvSpec::gqa(1, 4, heads.clone(), 16, dtype);
        let options = DeviceOptions { threads: 1 + rank % 2, ..suite.options(dtype) };
        let mut rig = suite.rig_with(&options, group, &spec, 128);
        let (q, kv, inter, vocabulary) = (share(128), share(64), share(INTER), share(VOCABULARY));
        let linear = |parts, sum| WeightSource::Linear(Linear { parts, bias: None, sum });
        let tree = KSum::Tree { ranges: 8 / world };
        let embedding = rig.embedding(&self.embedding);
        let norm = rig.norm(&self.norm);
        let qkv = rig.load(&linear(
            [self.q.part(q.start, q.end), self.k.part(kv.start, kv.end), self.v.part(kv.start, kv.end)]
                .map(MatrixView::from)
                .to_vec(),
            KSum::Ascending,
        ));
        let o = rig.load(&linear(vec![self.o.columns(q.start, q.end).into()], tree));
        let gate_up = rig.load(&linear(
            vec![self.gate.part(inter.start, inter.end).into(), self.up.part(inter.start, inter.end).into()],
            KSum::Ascending,
        ));
        let down = rig.load(&linear(vec![self.down.columns(inter.start, inter.end).into()], tree));
        let head = rig.load(&linear(
            vec![self.embedding.part(vocabulary.start, vocabulary.end).into()],
            KSum::Ascending,
        ));
        let rope = Rope { inv_freq: small().inv_freq.into(), factor: 1.0, style: RopeStyle::HalfSplit };
        let attend = Attend {
            heads: 2 * heads.len(),
            kv_heads: heads.len(),
            head_dim: 16,
            scale: 0.25,
            rope: &rope,
            qk_norm: None,
            window: None,
            sinks: None,
        };
        rig.open(SeqId(1), tokens.len() as u32);
        let mut logits = Vec::new();
        let prompt = tokens.len() - 5;
        for range in std::iter::once(0..prompt).chain((prompt..tokens.len()).map(|at| at..at + 1)) {
            let mut batch = Batch::default();
            batch.push(SeqId(1), range.start as u32, &tokens[range]);
            logits.extend(rig.step(&batch, |step| {
                let x = step.embed(&embedding);
                let normed = step.norm(&x, &norm, 1e-6);
                let qkv = step.linear(&normed, &qkv);
                let attended = step.attend(0, qkv, &attend);
                let partial = step.linear(&attended, &o);
                let joined = step.all_reduce(partial);
                let x = step.add(x, joined);
                let normed = step.norm(&x, &norm, 1e-6);
                let both = step.linear(&normed, &gate_up);
                let gated = step.glu(both, Glu::Silu);
                let partial = step.linear(&gated, &down);
                let joined = step.all_reduce(partial);
                let x = step.add(x, joined);
                step.linear(&x, &head)
            }));
        }
        logits
    }
}

/// Two and four ranks give the logits of one.
fn tensor_parallel<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let Some(group) = suite.group else { return };
    let block = Block::new(dtype);
    let tokens = ids(3, 60, VOCABULARY);
    let alone = block.run(suite, dtype, Group::alone(), &tokens);
    assert_eq!(alone.len(), tokens.len() * VOCABULARY);
    let exact = is_exact(suite, dtype);
    for world in [2, 4] {
        let all = ranks(group, world, |_, group| block.run(suite, dtype, group, &tokens));
        for (rank, logits) in all {
            if rank > 0 {
                assert!(logits.is_empty(), "logits belong to rank 0");
            } else if exact {
                assert_eq!(bits(&logits), bits(&alone), "{world} ranks");
            } else {
                let want: Vec<f64> = alone.iter().map(|x| f64::from(*x)).collect();
                suite.close(dtype, &format!("{world} ranks"), &logits, &want);
            }
        }
    }
}

/// Payloads far beyond what sockets buffer: every rank sends before it has received. Three ranks: no power of two.
fn large_sums<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let Some(group) = suite.group else { return };
    // 2000 rows x 768 x 4 B = 6 MB per rank
    let (rows, width) = (2000, 768);
    let all = ranks(group, 3, |rank, group| {
        let mut rig = suite.rig_with(&suite.options(dtype), group, &KvSpec::gqa(1, 1, 0..1, 8, dtype), 64);
        let x = Tensor::new(dtype, rows, width, (0..rows * width).map(|at| ((at % 61) * (rank + 1)) as f64));
        let table = rig.embedding(&x);
        let batch = rows_batch(rows);
        rig.step(&batch, |step| {
            let x = step.embed(&table);
            let sum = step.all_reduce(x);
            step.rows(sum, &[0, 1999])
        })
    });
    // Every rank shows its own sum; rank 0 sees all of them side by side.
    let value = |row: usize, column: usize| (((row * width + column) % 61) * 6) as f64;
    let want: Vec<f64> =
        [0, 1999].iter().flat_map(|row| (0..3 * width).map(|at| value(*row, at % width))).collect();
    for (_, sums) in all.iter().filter(|(rank, _)| *rank == 0) {
        suite.close(dtype, "sums over three ranks", sums, &want);
    }
}

/// A rank that goes away ends the steps of the others with an error, quickly, and so does every later step; with new
/// links the group works again.
fn lost_rank<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let Some(group) = suite.group else { return };
    let again = group(2).unwrap_or_else(|error| panic!("group of 2: {error}"));
    if again.len() < 2 {
        // The other rank is another process: the backend's own tests end it.
        return;
    }
    let again = std::sync::Mutex::new(again.into_iter().map(Some).collect::<Vec<_>>());
    let next = |rank: usize| again.lock().ok().and_then(|mut groups| groups[rank].take());
    let met = std::sync::Barrier::new(2);
    ranks(group, 2, |rank, group| {
        let mut rig = suite.rig_with(&suite.options(dtype), group, &KvSpec::gqa(1, 1, 0..1, 8, dtype), 64);
        let x = Tensor::random(1, dtype, 4, 16, 1.0);
        let table = rig.embedding(&x);
        let batch = rows_batch(4);
        let sum = |rig: &mut super::Rig<B>| {
            rig.try_step(&batch, |step| {
                let x = step.embed(&table);
                step.all_reduce(x)
            })
        };
        assert!(sum(&mut rig).is_ok(), "a first sum");
        let links = next(rank).unwrap_or_else(|| panic!("links of rank {rank}"));
        if rank == 1 {
            // Without links of its own left, this rank looks dead to the other.
            drop(rig);
            met.wait();
            let mut rig =
                suite.rig_with(&suite.options(dtype), links, &KvSpec::gqa(1, 1, 0..1, 8, dtype), 64);
            let table = rig.embedding(&x);
            let joined = rig.try_step(&batch, |step| {
                let x = step.embed(&table);
                step.all_reduce(x)
            });
            assert!(joined.is_ok(), "a sum with new links");
            return;
        }
        let begun = Instant::now();
        for attempt in 0..2 {
            match sum(&mut rig) {
                Err(BackendError::Group { .. }) => {}
                Err(error) => panic!("attempt {attempt}: {error} instead of a lost group"),
                Ok(_) => panic!("attempt {attempt}: a sum without the other rank"),
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(8), "noticed after {:?}", begun.elapsed());
        rig.backend.regroup(links).unwrap_or_else(|error| panic!("regroup: {error}"));
        met.wait();
        match sum(&mut rig) {
            Ok(Output::Logits(logits)) => assert_eq!(logits.len(), 2 * 4 * 16),
            Ok(_) => panic!("rank 0 got no logits"),
            Err(error) => panic!("a sum with new links: {error}"),
        }
    });
}
