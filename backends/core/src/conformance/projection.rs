//! Cases of the norm of q and k over whole projections, alone and spread over ranks with uneven and repeated KV heads.

use std::ops::Range;

use super::attention::ids;
use super::exact::ranks;
use super::reference::{self, Attention};
use super::{Case, Suite, Tensor};
use crate::{Attend, Backend, Batch, DType, Group, KvSpec, NormSpan, QkNorm, Rope, RopeStyle, SeqId, Step};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![("norm over the projection", alone), ("norm over the projection, ranks", spread)]
}

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const IDS: usize = 30;
const EPS: f64 = 1e-5;

struct Inputs {
    dtype: DType,
    /// `[IDS, q | k | v]` of the whole model.
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
}

impl Inputs {
    fn new(dtype: DType) -> Self {
        let random = |seed, rows, heads: usize| Tensor::random(seed, dtype, rows, heads * DIM, 1.0);
        let qkv = random(1, IDS, HEADS + 2 * KV_HEADS);
        Inputs { dtype, qkv, q_norm: random(2, 1, HEADS), k_norm: random(3, 1, KV_HEADS) }
    }

    fn rope() -> Rope {
        let inv_freq = (0..4).map(|i| 10_000f32.powf(-(i as f32) / 4.0)).collect();
        Rope { inv_freq, factor: 1.0, style: RopeStyle::HalfSplit }
    }

    /// Outputs `[rows, heads * DIM]` of a rank with these heads, for the prompt `tokens` in two chunks.
    fn run<B: Backend>(
        &self,
        suite: &Suite<'_, B>,
        group: Group,
        heads: Range<usize>,
        kv_heads: Range<usize>,
        own: Range<usize>,
        tokens: &[u32],
    ) -> Vec<f32> {
        let spec = KvSpec::gqa(1, KV_HEADS, kv_heads.clone(), DIM, self.dtype);
        let mut rig = suite.rig_with(&suite.options(self.dtype), group, &spec, 64);
        let elements = |x: &[f64], heads: &Range<usize>| x[heads.start * DIM..heads.end * DIM].to_vec();
        let rows = (0..IDS).flat_map(|row| {
            let (q, kv) = self.qkv.row(row).split_at(HEADS * DIM);
            let (k, v) = kv.split_at(KV_HEADS * DIM);
            [elements(q, &heads), elements(k, &kv_heads), elements(v, &kv_heads)].concat()
        });
        let width = (heads.len() + 2 * kv_heads.len()) * DIM;
        let table = rig.embedding(&Tensor::new(self.dtype, IDS, width, rows));
        let part = |norm: &Tensor, heads: &Range<usize>| {
            Tensor::new(self.dtype, 1, heads.len() * DIM, elements(&norm.values, heads).into_iter())
        };
        let (q, k) = (rig.norm(&part(&self.q_norm, &heads)), rig.norm(&part(&self.k_norm, &kv_heads)));
        let span = NormSpan::Projection {
            heads_total: HEADS,
            kv_heads_total: KV_HEADS,
            head_first: heads.start,
            kv_head_first: kv_heads.start,
            kv_heads_own: own,
        };
        let rope = Self::rope();
        let attend = Attend {
            heads: heads.len(),
            kv_heads: kv_heads.len(),
            head_dim: DIM,
            scale: 0.25,
            rope: &rope,
            qk_norm: Some(QkNorm { q: &q, k: &k, eps: EPS as f32, span }),
            window: None,
            sinks: None,
        };
        rig.open(SeqId(1), tokens.len() as u32);
        let mut out = Vec::new();
        for of in [0..tokens.len() - 1, tokens.len() - 1..tokens.len()] {
            let mut batch = Batch::default();
            batch.push(SeqId(1), of.start as u32, &tokens[of]);
            out.extend(rig.step(&batch, |step| {
                let qkv = step.embed(&table);
                step.attend(0, qkv, &attend)
            }));
        }
        out
    }

    fn expected(&self, tokens: &[u32]) -> Vec<f64> {
        let attention = Attention {
            heads: HEADS,
            kv_heads: KV_HEADS,
            dim: DIM,
            inv_freq: Self::rope().inv_freq.to_vec(),
            factor: 1.0,
            style: RopeStyle::HalfSplit,
            q_norm: None,
            k_norm: None,
            eps: EPS,
            window: None,
            sinks: None,
        };
        let normed: Vec<Vec<f64>> = tokens
            .iter()
            .map(|id| {
                let (q, kv) = self.qkv.row(*id as usize).split_at(HEADS * DIM);
                let (k, v) = kv.split_at(KV_HEADS * DIM);
                let q = reference::norm(q, &self.q_norm.values, EPS);
                [q, reference::norm(k, &self.k_norm.values, EPS), v.to_vec()].concat()
            })
            .collect();
        let rows: Vec<&[f64]> = normed.iter().map(Vec::as_slice).collect();
        attention.outputs(&rows).concat()
    }
}

fn alone<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let (inputs, tokens) = (Inputs::new(dtype), ids(2, 25, IDS));
    let got = inputs.run(suite, Group::alone(), 0..HEADS, 0..KV_HEADS, 0..KV_HEADS, &tokens);
    suite.close(dtype, "one rank", &got, &inputs.expected(&tokens));
}

/// Ranks agree with one rank: equal shares, and three ranks of which two hold the same KV head.
fn spread<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let Some(group) = suite.group else { return };
    let (inputs, tokens) = (Inputs::new(dtype), ids(2, 25, IDS));
    let expected = inputs.expected(&tokens);
    // (query heads, KV heads, of these its own)
    let two = vec![(0..3, 0..1, 0..1), (3..6, 1..2, 0..1)];
    let three = vec![(0..2, 0..1, 0..1), (2..3, 0..1, 0..0), (3..6, 1..2, 0..1)];
    for parts in [two, three] {
        let world = parts.len();
        let all = ranks(group, world, |rank, group| {
            let (heads, kv_heads, own) = parts[rank].clone();
            inputs.run(suite, group, heads, kv_heads, own, &tokens)
        });
        // Logits are the ranks' rows side by side: the heads of all of them in order.
        for (_, got) in all.iter().filter(|(rank, _)| *rank == 0) {
            suite.close(dtype, &format!("{world} ranks"), got, &expected);
        }
    }
}
