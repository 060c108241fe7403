//! Cases of attention: grouped heads, norms, rope kinds, windows, ragged batches, long contexts.

use super::reference::Attention;
use super::{Case, Rig, Suite, Tensor};
use crate::{
    Attend, Backend, Batch, DType, Group, KvSpec, KvStore, NormSpan, QkNorm, Rope, RopeStyle, SeqId, Step,
    WeightSource,
};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("attend, plain", plain),
        ("attend, grouped heads with norms", grouped),
        ("attend, interleaved and partial rope", ropes),
        ("attend, sliding window", window),
        ("attend, sinks", sinks),
        ("attend, head sizes", sizes),
        ("attend, ragged batch", ragged),
        ("attend, chunks and tokens", chunked),
        ("attend, long", long),
        ("attend, over what was guessed wrong", guessed),
        ("attend, without room", no_room),
    ]
}

/// Four query heads over two KV heads of 16.
pub(super) fn small() -> Attention {
    Attention {
        heads: 4,
        kv_heads: 2,
        dim: 16,
        inv_freq: (0..8).map(|i| 10_000f32.powf(-(i as f32) / 8.0)).collect(),
        factor: 1.0,
        style: RopeStyle::HalfSplit,
        q_norm: None,
        k_norm: None,
        eps: 1e-6,
        window: None,
        sinks: None,
    }
}

/// An attention layer over a table whose rows are q, k and v: token id `i` brings row `i`.
pub(super) struct Layer<B: Backend> {
    pub(super) rig: Rig<B>,
    pub(super) attention: Attention,
    pub(super) inputs: Tensor,
    table: B::Weight,
    norms: [Option<B::Weight>; 2],
    sinks: Option<B::Weight>,
    rope: Rope,
}

impl<B: Backend> Layer<B> {
    /// Room for `tokens` tokens, inputs for ids below `ids`.
    pub(super) fn new(
        suite: &Suite<'_, B>,
        dtype: DType,
        attention: Attention,
        ids: usize,
        tokens: u32,
    ) -> Self {
        Self::with_options(suite, &suite.options(dtype), attention, ids, tokens)
    }

    pub(super) fn with_options(
        suite: &Suite<'_, B>,
        options: &crate::DeviceOptions,
        attention: Attention,
        ids: usize,
        tokens: u32,
    ) -> Self {
        let Attention { kv_heads, dim, .. } = attention;
        // Two layers, of which the second is used: a wrong layer shows.
        let spec = KvSpec::gqa(2, kv_heads, 0..kv_heads, dim, options.dtype);
        let mut rig = suite.rig_with(options, Group::alone(), &spec, tokens);
        let inputs = Tensor::random(77, options.dtype, ids, attention.width(), 1.0);
        let table = rig.embedding(&inputs);
        let norms = [&attention.q_norm, &attention.k_norm].map(|norm| {
            norm.as_ref().map(|values| rig.norm(&Tensor::new(options.dtype, 1, dim, values.iter().copied())))
        });
        let sinks = attention.sinks.as_ref().map(|sinks| {
            let sinks = Tensor::new(DType::F32, 1, sinks.len(), sinks.iter().copied());
            rig.load(&WeightSource::Exact(sinks.view()))
        });
        let rope = Rope {
            inv_freq: attention.inv_freq.clone().into(),
            factor: attention.factor,
            style: attention.style,
        };
        Layer { rig, attention, inputs, table, norms, sinks, rope }
    }

    pub(super) fn run(&mut self, batch: &Batch) -> Vec<f32> {
        let Attention { heads, kv_heads, dim, window, eps, .. } = self.attention;
        let scale = self.attention.scale();
        let (table, rope) = (&self.table, &self.rope);
        let [q, k] = &self.norms;
        let norms = q.as_ref().zip(k.as_ref());
        let qk_norm = norms.map(|(q, k)| QkNorm { q, k, eps: eps as f32, span: NormSpan::Head });
        let sinks = self.sinks.as_ref();
        let attend = Attend { heads, kv_heads, head_dim: dim, scale, rope, qk_norm, window, sinks };
        self.rig.step(batch, |step| {
            let qkv = step.embed(table);
            step.attend(1, qkv, &attend)
        })
    }

    /// What the sequence of these ids gives, row after row.
    pub(super) fn expected(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let rows: Vec<&[f64]> = ids.iter().map(|id| self.inputs.row(*id as usize)).collect();
        self.attention.outputs(&rows)
    }
}

/// `len` ids below `below`, different for every seed.
pub(super) fn ids(seed: u64, len: usize, below: usize) -> Vec<u32> {
    let mut random = super::Random(seed * 2 + 1);
    (0..len).map(|_| (random.next() % below as u64) as u32).collect()
}

/// A prompt of `len` tokens in one run.
fn prompt<B: Backend>(suite: &Suite<'_, B>, dtype: DType, what: &str, attention: Attention, len: usize) {
    let mut layer = Layer::new(suite, dtype, attention, 50, len as u32);
    let ids = ids(3, len, 50);
    layer.rig.open(SeqId(9), len as u32);
    let mut batch = Batch::default();
    batch.push(SeqId(9), 0, &ids);
    let (got, want) = (layer.run(&batch), layer.expected(&ids).concat());
    suite.close(dtype, what, &got, &want);
}

fn plain<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let attention = Attention { heads: 2, kv_heads: 2, ..small() };
    prompt(suite, dtype, "one head per KV head", attention, 40);
}

fn grouped<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let scale = |seed| Tensor::random(seed, dtype, 1, 16, 1.0).values;
    let attention =
        Attention { heads: 6, kv_heads: 2, q_norm: Some(scale(4)), k_norm: Some(scale(5)), ..small() };
    prompt(suite, dtype, "three heads per KV head", attention, 40);
    prompt(suite, dtype, "all heads on one", Attention { heads: 5, kv_heads: 1, ..small() }, 40);
}

fn ropes<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let interleaved = Attention { style: RopeStyle::Interleaved, ..small() };
    prompt(suite, dtype, "interleaved", interleaved.clone(), 40);
    let partial = interleaved.inv_freq[..3].to_vec();
    let half = Attention { inv_freq: partial.clone(), ..small() };
    prompt(suite, dtype, "partial, half-split", half, 40);
    let interleaved = Attention { inv_freq: partial, factor: 1.25, ..interleaved };
    prompt(suite, dtype, "partial, interleaved, with a factor", interleaved, 40);
}

fn window<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for window in [1, 5, 300] {
        let attention = Attention { window: Some(window), ..small() };
        prompt(suite, dtype, &format!("window {window}"), attention, 560);
    }
}

/// Sinks far above and far below all scores, and among them: of prompts and of single tokens, with and without a window.
fn sinks<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for window in [None, Some(40)] {
        // f32 holds these exactly.
        let sinks = Some(vec![1.5, -0.25, 200.0, -200.0]);
        let mut layer = Layer::new(suite, dtype, Attention { window, sinks, ..small() }, 50, 600);
        let ids = ids(8, 560, 50);
        let want = layer.expected(&ids);
        layer.rig.open(SeqId(1), 560);
        let mut at = 0;
        for len in [1, 2, 30, 1, 250, 1, 270, 1, 4] {
            let mut batch = Batch::default();
            batch.push(SeqId(1), at as u32, &ids[at..at + len]);
            let got = layer.run(&batch);
            suite.close(dtype, &format!("{len} from {at}"), &got, &want[at..at + len].concat());
            at += len;
        }
    }
    let dim = 64;
    let inv_freq = (0..dim / 2).map(|i| 500f32.powf(-(i as f32) * 2.0 / dim as f32)).collect();
    let sinks = Some((0..8).map(|head| f64::from(head) - 2.0).collect());
    let attention = Attention { heads: 8, kv_heads: 1, dim, inv_freq, sinks, ..small() };
    prompt(suite, dtype, "eight heads on one, of 64", attention, 130);
}

fn sizes<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for dim in [8, 20, 64, 128] {
        let inv_freq = (0..dim / 2).map(|i| 500f32.powf(-(i as f32) * 2.0 / dim as f32)).collect();
        prompt(suite, dtype, &format!("heads of {dim}"), Attention { dim, inv_freq, ..small() }, 50);
    }
}

fn ragged<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 400);
    let texts: Vec<Vec<u32>> = [70, 33, 16, 100].iter().zip(1..).map(|(len, s)| ids(s, *len, 50)).collect();
    // Sequences come in at different steps and go on in chunks of different size, some by single tokens.
    let steps: [&[(usize, usize)]; 4] =
        [&[(0, 31)], &[(1, 32), (0, 1), (3, 40)], &[(2, 16), (0, 1), (1, 1), (3, 59)], &[(3, 1), (0, 37)]];
    for (seq, text) in texts.iter().enumerate() {
        layer.rig.open(SeqId(seq as u64), text.len() as u32);
    }
    let want: Vec<Vec<Vec<f64>>> = texts.iter().map(|text| layer.expected(text)).collect();
    let mut done = [0; 4];
    for runs in steps {
        let (mut batch, mut expected) = (Batch::default(), Vec::new());
        for (seq, len) in runs {
            let range = done[*seq]..done[*seq] + len;
            batch.push(SeqId(*seq as u64), range.start as u32, &texts[*seq][range.clone()]);
            expected.extend(want[*seq][range.clone()].concat());
            done[*seq] = range.end;
        }
        let got = layer.run(&batch);
        suite.close(dtype, &format!("{runs:?}"), &got, &expected);
    }
}

fn chunked<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 600);
    let ids = ids(8, 290, 50);
    let want = layer.expected(&ids).concat();
    for (seq, chunk) in [(1, 7), (2, 64)] {
        layer.rig.open(SeqId(seq), 290);
        let mut got = Vec::new();
        for (at, part) in ids.chunks(chunk).enumerate() {
            let mut batch = Batch::default();
            batch.push(SeqId(seq), (at * chunk) as u32, part);
            got.extend(layer.run(&batch));
        }
        suite.close(dtype, &format!("chunks of {chunk}"), &got, &want);
        layer.rig.kv.close(SeqId(seq)).unwrap_or_else(|error| panic!("close: {error}"));
    }
}

fn long<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 800);
    let ids = ids(8, 800, 50);
    let want = layer.expected(&ids);
    layer.rig.open(SeqId(1), 800);
    let mut at = 0;
    // The ends of the second and third span of 256 are crossed by chunks and by single tokens.
    for len in [250, 1, 1, 1, 1, 1, 1, 1, 254, 2, 287] {
        let mut batch = Batch::default();
        batch.push(SeqId(1), at as u32, &ids[at..at + len]);
        let got = layer.run(&batch);
        suite.close(dtype, &format!("{len} from {at}"), &got, &want[at..at + len].concat());
        at += len;
    }
}

/// Rows behind the last true token are computed and given up, step after step: the next step begins before them.
fn guessed<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    // (rows that are true, rows that are not): ends of blocks and of a span are crossed by both.
    let steps = [(240, 3), (1, 0), (1, 20), (1, 7), (12, 14), (1, 5), (1, 5), (1, 1), (3, 5), (9, 0)];
    for window in [None, Some(40)] {
        let mut layer = Layer::new(suite, dtype, Attention { window, ..small() }, 50, 600);
        let (text, wrong) = (ids(8, 270, 50), ids(9, 270, 50));
        let want = layer.expected(&text);
        layer.rig.open(SeqId(1), 290);
        layer.rig.open(SeqId(2), 290);
        let mut at = 0;
        for (beside, (len, guesses)) in steps.into_iter().enumerate() {
            let mut batch = Batch::default();
            batch.push(SeqId(2), beside as u32, &text[beside..beside + 1]);
            batch.push(SeqId(1), at as u32, &[&text[at..at + len], &wrong[at..at + guesses]].concat());
            let got = layer.run(&batch);
            let known = [&want[beside..beside + 1], &want[at..at + len]].concat().concat();
            suite.close(dtype, &format!("{len} from {at}, {guesses} guesses"), &got[..known.len()], &known);
            at += len;
        }
        assert_eq!(at, text.len());
    }
}

fn no_room<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut layer = Layer::new(suite, dtype, small(), 50, 64);
    layer.rig.open(SeqId(1), 16);
    let mut batch = Batch::default();
    batch.push(SeqId(1), 0, &ids(1, 17, 50));
    let Layer { rig, table, rope, .. } = &mut layer;
    let (qk_norm, window, sinks) = (None, None, None);
    let attend = Attend { heads: 4, kv_heads: 2, head_dim: 16, scale: 0.25, rope, qk_norm, window, sinks };
    let ran = rig.try_step(&batch, |step| {
        let qkv = step.embed(table);
        step.attend(1, qkv, &attend)
    });
    assert!(ran.is_err(), "17 tokens written to a sequence with room for 16");
}
