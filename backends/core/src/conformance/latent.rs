//! Cases of multi-head latent attention, against its expanded form in f64: keys and values of every head are made from
//! the latent, and attention is the ordinary one.

use super::attention::ids;
use super::coded::Coded;
use super::{Case, Rig, Suite, Tensor, reference};
use crate::{
    Backend, Batch, DType, GgufBlock, Group, Heads, KvExport, KvLanding, KvSpec, KvStore, Mla, Piece, Quant,
    Rope, RopeStyle, SeqId, Step, WeightSource,
};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("latent attention", shapes),
        ("latent attention, sequences and chunks", chunked),
        ("latent attention, long", long),
        ("latent attention, over what was guessed wrong", guessed),
        ("latent attention, the cache in wire order", cache),
        ("latent attention, exact", exact),
        ("latent attention, weights of wrong shape", refused),
    ]
}

/// Numbers of a test.
#[derive(Clone, Debug)]
struct Latent {
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    latent: usize,
    style: RopeStyle,
    /// Whether the weights are of the step's dtype or bf16.
    weights: DType,
    /// Whether heads' matrices have latents as rows, unlike those of `kv_b_proj`.
    turned: bool,
    /// The format of heads' matrices that are quantised, each along its inputs.
    format: Option<Quant>,
}

fn small() -> Latent {
    Latent {
        heads: 3,
        nope: 10,
        rope: 8,
        value: 12,
        latent: 24,
        style: RopeStyle::Interleaved,
        weights: DType::BF16,
        turned: false,
        format: None,
    }
}

/// Heads' matrices as GGUF and MLX have them, in those of some formats that the backend has.
fn quantised<B: Backend>(suite: &Suite<'_, B>) -> impl Iterator<Item = Latent> {
    let formats = [Quant::Gguf(GgufBlock::Q8_0), Quant::Affine { bits: 4, group: 64 }];
    let known: Vec<Quant> = formats.into_iter().filter(|format| suite.quants.contains(format)).collect();
    known.into_iter().map(|format| Latent { nope: 64, latent: 64, format: Some(format), ..small() })
}

/// A layer over tables whose rows are q and kv: token id `i` brings row `i` of both.
struct Layer<B: Backend> {
    rig: Rig<B>,
    numbers: Latent,
    q: Tensor,
    kv: Tensor,
    norm: Tensor,
    /// Per head: nope rows, then value rows, of `latent` columns, as a checkpoint's `kv_b_proj` has them.
    up: Vec<Tensor>,
    tables: [B::Weight; 2],
    weights: [B::Weight; 3],
    table: Rope,
}

const EPS: f64 = 1e-6;

impl<B: Backend> Layer<B> {
    fn new(
        suite: &Suite<'_, B>,
        options: &crate::DeviceOptions,
        numbers: Latent,
        ids: usize,
        tokens: u32,
    ) -> Self {
        let Latent { heads, nope, rope, value, latent, style, weights, turned, format } = numbers;
        let dtype = options.dtype;
        // Two layers, of which the second is used: a wrong layer shows.
        let spec = KvSpec::mla(2, latent, rope, dtype);
        let mut rig = suite.rig_with(options, Group::alone(), &spec, tokens);
        let q = Tensor::random(21, dtype, ids, heads * (nope + rope), 1.0);
        let kv = Tensor::random(22, dtype, ids, latent + rope, 1.0);
        let norm = Tensor::random(23, dtype, 1, latent, 1.0);
        let scale = (latent as f64).powf(-0.5);
        let random =
            |seed, rows, cols| format.map(|format| Coded::random(seed, format, DType::F16, rows, cols));
        let coded: Vec<[Option<Coded>; 2]> = (0..heads as u64)
            .map(|head| [random(30 + 2 * head, latent, nope), random(31 + 2 * head, value, latent)])
            .collect();
        let up = |(head, coded): (u64, &[Option<Coded>; 2])| match coded {
            [Some(keys), Some(values)] => {
                let keys = (0..nope * latent).map(|at| keys.values[at % latent * nope + at / latent]);
                Tensor::new(DType::F32, nope + value, latent, keys.chain(values.values.iter().copied()))
            }
            _ => Tensor::random(30 + head, weights, nope + value, latent, scale),
        };
        let up: Vec<Tensor> = (0..).zip(&coded).map(up).collect();
        let tables = [rig.embedding(&q), rig.embedding(&kv)];
        let mut product = |rows: std::ops::Range<usize>, to_latent: bool| {
            let part = |up: &Tensor| {
                let value = |row: usize, col: usize| up.row(rows.start + row)[col];
                let (high, wide) = if turned { (latent, rows.len()) } else { (rows.len(), latent) };
                let at = |i: usize| if turned { (i % wide, i / wide) } else { (i / wide, i % wide) };
                Tensor::new(weights, high, wide, (0..high * wide).map(at).map(|(row, col)| value(row, col)))
            };
            let parts: Vec<Tensor> = up.iter().map(part).collect();
            let views = parts.iter().zip(&coded).map(|(part, coded)| match &coded[usize::from(!to_latent)] {
                Some(coded) => coded.view().into(),
                None => part.view().into(),
            });
            let heads = views.collect();
            let transposed = format.is_none() && to_latent != turned;
            rig.load(&WeightSource::Heads(Heads { heads, transposed, to_latent }))
        };
        let (q_to_latent, latent_to_value) = (product(0..nope, true), product(nope..nope + value, false));
        let weights = [rig.norm(&norm), q_to_latent, latent_to_value];
        let half = rope / 2;
        let inv_freq = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        let table = Rope { inv_freq, factor: 1.25, style };
        Layer { rig, numbers, q, kv, norm, up, tables, weights, table }
    }

    fn scale(&self) -> f32 {
        ((self.numbers.nope + self.numbers.rope) as f32).powf(-0.5) * 1.1
    }

    fn run(&mut self, batch: &Batch) -> Vec<f32> {
        let scale = self.scale();
        let Latent { heads, nope, rope, value, latent, .. } = self.numbers;
        let ([q, kv], [latent_norm, q_to_latent, latent_to_value]) = (&self.tables, &self.weights);
        let mla = Mla {
            heads,
            nope_dim: nope,
            rope_dim: rope,
            value_dim: value,
            latent_dim: latent,
            scale,
            rope: &self.table,
            latent_norm,
            norm_eps: EPS as f32,
            q_to_latent,
            latent_to_value,
        };
        self.rig.step(batch, |step| {
            let (q, kv) = (step.embed(q), step.embed(kv));
            step.attend_mla(1, q, kv, &mla)
        })
    }

    /// A part of `n` elements after the rotation at `position`, in half-split order.
    fn rotated(&self, x: &[f64], position: usize) -> Vec<f64> {
        let n = x.len() / 2;
        let mut out = vec![0.0; 2 * n];
        for (i, frequency) in self.table.inv_freq.iter().enumerate() {
            let (a, b) = match self.table.style {
                RopeStyle::HalfSplit => (x[i], x[i + n]),
                RopeStyle::Interleaved => (x[2 * i], x[2 * i + 1]),
            };
            let angle = f64::from(frequency * position as f32);
            let factor = f64::from(self.table.factor);
            out[i] = (a * angle.cos() - b * angle.sin()) * factor;
            out[i + n] = (b * angle.cos() + a * angle.sin()) * factor;
        }
        out
    }

    /// What the cache holds of the token with id `id` at `position`: latent and rope key.
    fn cached(&self, id: u32, position: usize) -> (Vec<f64>, Vec<f64>) {
        let row = self.kv.row(id as usize);
        let latent = reference::norm(&row[..self.numbers.latent], &self.norm.values, EPS);
        (latent, self.rotated(&row[self.numbers.latent..], position))
    }

    /// Outputs of every row of the sequence of these ids.
    fn expected(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let Latent { heads, nope, rope, value, .. } = self.numbers;
        let cache: Vec<_> = ids.iter().enumerate().map(|(position, id)| self.cached(*id, position)).collect();
        // [head][position]: nope key and value
        let expanded: Vec<Vec<Vec<f64>>> = self
            .up
            .iter()
            .map(|up| cache.iter().map(|(latent, _)| reference::linear(latent, &up.values, None)).collect())
            .collect();
        let scale = f64::from(self.scale());
        let output = |(position, id): (usize, &u32)| {
            let row = self.q.row(*id as usize);
            let mut out = Vec::with_capacity(heads * value);
            for (head, expanded) in expanded.iter().enumerate() {
                let q = &row[head * (nope + rope)..(head + 1) * (nope + rope)];
                let rotated = self.rotated(&q[nope..], position);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let scores: Vec<f64> = (0..=position)
                    .map(|p| (dot(&q[..nope], &expanded[p][..nope]) + dot(&rotated, &cache[p].1)) * scale)
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in nope..nope + value {
                    out.push(weights.iter().zip(expanded).map(|(w, e)| w * e[d]).sum::<f64>() / total);
                }
            }
            out
        };
        ids.iter().enumerate().map(output).collect()
    }
}

fn whole<B: Backend>(suite: &Suite<'_, B>, dtype: DType, numbers: Latent, tokens: usize) {
    let options = suite.options(dtype);
    let mut layer = Layer::new(suite, &options, numbers, 40, tokens as u32);
    let ids = ids(5, tokens, 40);
    layer.rig.open(SeqId(1), tokens as u32);
    let mut batch = Batch::default();
    batch.push(SeqId(1), 0, &ids);
    let got = layer.run(&batch);
    let Latent { heads, nope, rope, value, latent, .. } = layer.numbers;
    let what = format!("{heads} heads of {nope} + {rope} over {latent} to {value}, {tokens} tokens");
    suite.close(dtype, &what, &got, &layer.expected(&ids).concat());
}

fn shapes<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    whole(suite, dtype, small(), 21);
    whole(suite, dtype, Latent { style: RopeStyle::HalfSplit, weights: dtype, ..small() }, 9);
    whole(suite, dtype, Latent { heads: 1, nope: 16, rope: 16, value: 16, latent: 32, ..small() }, 5);
    whole(suite, dtype, Latent { turned: true, ..small() }, 7);
    whole(suite, dtype, Latent { nope: 8, value: 16, latent: 16, turned: true, ..small() }, 3);
    // More heads than one task takes.
    whole(suite, dtype, Latent { heads: 40, nope: 8, rope: 4, value: 8, latent: 16, ..small() }, 3);
    // Rows that share decoded weights, and more.
    for numbers in quantised(suite) {
        whole(suite, dtype, numbers.clone(), 3);
        whole(suite, dtype, numbers, 19);
    }
}

fn long<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    whole(suite, dtype, small(), 560);
}

/// Two sequences, prompts in chunks and tokens one by one, all in one batch.
fn chunked<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut layer = Layer::new(suite, &suite.options(dtype), small(), 40, 96);
    let (a, b) = (ids(6, 37, 40), ids(7, 30, 40));
    let (want_a, want_b) = (layer.expected(&a), layer.expected(&b));
    layer.rig.open(SeqId(1), 37);
    layer.rig.open(SeqId(2), 30);
    let steps = [(0..20, 0..0), (20..35, 0..28), (35..36, 28..29), (36..37, 29..30)];
    for (of_a, of_b) in steps {
        let mut batch = Batch::default();
        batch.push(SeqId(1), of_a.start as u32, &a[of_a.clone()]);
        if !of_b.is_empty() {
            batch.push(SeqId(2), of_b.start as u32, &b[of_b.clone()]);
        }
        let got = layer.run(&batch);
        let want = [&want_a[of_a.clone()], &want_b[of_b.clone()]].concat().concat();
        suite.close(dtype, &format!("{of_a:?} and {of_b:?}"), &got, &want);
    }
}

/// Rows behind the last true token are computed and given up: the next step begins before them.
fn guessed<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut layer = Layer::new(suite, &suite.options(dtype), small(), 40, 96);
    let (text, wrong) = (ids(6, 37, 40), ids(7, 37, 40));
    let want = layer.expected(&text);
    layer.rig.open(SeqId(1), 60);
    let mut at = 0;
    for (len, guesses) in [(14, 4), (1, 9), (1, 16), (2, 1), (1, 0), (18, 2)] {
        let mut batch = Batch::default();
        batch.push(SeqId(1), at as u32, &[&text[at..at + len], &wrong[at..at + guesses]].concat());
        let (got, known) = (layer.run(&batch), want[at..at + len].concat());
        suite.close(dtype, &format!("{len} from {at}, {guesses} guesses"), &got[..known.len()], &known);
        at += len;
    }
    assert_eq!(at, text.len());
}

/// The planes are latent and rope key in canonical order, and a cache that lands elsewhere goes on there.
fn cache<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let options = suite.options(dtype);
    let ids = ids(8, 30, 40);
    let mut layer = Layer::new(suite, &options, small(), 40, 32);
    let want = layer.expected(&ids);
    layer.rig.open(SeqId(1), 29);
    let mut batch = Batch::default();
    batch.push(SeqId(1), 0, &ids[..29]);
    layer.run(&batch);
    let mut other = Layer::new(suite, &options, small(), 40, 32);
    other.rig.open(SeqId(9), 30);
    let mut landing = other.rig.kv.land(SeqId(9), 0..29).unwrap_or_else(|error| panic!("land: {error}"));
    let export = layer.rig.kv.export(SeqId(1), 1, 0..29).unwrap_or_else(|error| panic!("export: {error}"));
    export.wait().unwrap_or_else(|error| panic!("wait: {error}"));
    for (plane, width) in [(0, layer.numbers.latent), (1, layer.numbers.rope)] {
        let piece = Piece { layer: 1, plane, heads: 0..1, tokens: 0..29 };
        let mut bytes = Vec::new();
        export.read(&piece, &mut bytes).unwrap_or_else(|error| panic!("read: {error}"));
        assert_eq!(bytes.len(), 29 * width * dtype.bytes(), "plane {plane}");
        let mut got = vec![0.0; 29 * width];
        crate::weight::widen(dtype, &bytes, &mut got);
        let row = |(position, id): (usize, &u32)| {
            let (latent, rope) = layer.cached(*id, position);
            if plane == 0 { latent } else { rope }
        };
        let want: Vec<f64> = ids[..29].iter().enumerate().flat_map(row).collect();
        suite.close(dtype, &format!("plane {plane}"), &got, &want);
        for (piece, bytes) in [(Piece { layer: 0, ..piece.clone() }, vec![0; bytes.len()]), (piece, bytes)] {
            landing.write(&piece, &bytes).unwrap_or_else(|error| panic!("write: {error}"));
        }
    }
    other.rig.kv.commit(landing).unwrap_or_else(|error| panic!("commit: {error}"));
    let mut batch = Batch::default();
    batch.push(SeqId(9), 29, &ids[29..]);
    let got = other.run(&batch);
    suite.close(dtype, "after the landing", &got, &want[29]);
}

/// On exact backends a row has the same bits prefilled or decoded, in any chunks, blocks and threads.
fn exact<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let open = (suite.open)(&suite.options(dtype), Group::alone());
    if !open.is_ok_and(|backend| backend.caps().exact) {
        return;
    }
    let ids = ids(9, 300, 40);
    let run = |numbers: &Latent, threads: usize, block_tokens: u32, chunks: &[usize]| {
        let options = crate::DeviceOptions { threads, block_tokens, ..suite.options(dtype) };
        let mut layer = Layer::new(suite, &options, Latent { heads: 6, ..numbers.clone() }, 40, 320);
        layer.rig.open(SeqId(1), 300);
        let (mut at, mut all) = (0, Vec::new());
        for chunk in chunks.iter().copied().chain(std::iter::repeat(1)) {
            if at == ids.len() {
                break;
            }
            let mut batch = Batch::default();
            batch.push(SeqId(1), at as u32, &ids[at..at + chunk]);
            all.extend(layer.run(&batch).into_iter().map(f32::to_bits));
            at += chunk;
        }
        all
    };
    for numbers in std::iter::once(small()).chain(quantised(suite)) {
        let want = run(&numbers, 2, 16, &[300]);
        for (threads, block_tokens, chunks) in
            [(1, 16, &[290][..]), (3, 64, &[1, 255, 20, 22]), (2, 32, &[100; 2])]
        {
            assert!(
                run(&numbers, threads, block_tokens, chunks) == want,
                "{numbers:?}, {threads} threads, {block_tokens} a block, {chunks:?}"
            );
        }
    }
}

fn refused<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let (a, b) = (Tensor::random(1, dtype, 4, 8, 1.0), Tensor::random(1, dtype, 4, 7, 1.0));
    for heads in [vec![a.view().into(), b.view().into()], Vec::new()] {
        let source = WeightSource::Heads(Heads { heads, transposed: false, to_latent: true });
        assert!(rig.backend.load(&source).is_err(), "accepted {source:?}");
    }
}
