//! What the operations mean, in f64 and as plainly as possible.

use crate::{Glu, RopeStyle};

/// `x W^T + bias` of one row.
pub(super) fn linear(x: &[f64], w: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let product = |output: usize| x.iter().zip(&w[output * x.len()..]).map(|(a, b)| a * b).sum::<f64>();
    (0..w.len() / x.len()).map(|output| product(output) + bias.map_or(0.0, |bias| bias[output])).collect()
}

/// RMS norm of one row.
pub(super) fn norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

/// The gated unit of one row.
pub(super) fn glu(x: &[f64], kind: Glu) -> Vec<f64> {
    let (gate, up) = x.split_at(x.len() / 2);
    let gated = |(gate, up): (&f64, &f64)| match kind {
        Glu::Silu => gate / (1.0 + (-gate).exp()) * up,
        Glu::Clamped { limit, slope } => {
            let limit = f64::from(limit);
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate / (1.0 + (-gate * f64::from(slope)).exp()) * (up + 1.0)
        }
    };
    gate.iter().zip(up).map(gated).collect()
}

/// Attention as configured by a test.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) inv_freq: Vec<f32>,
    pub(super) factor: f32,
    pub(super) style: RopeStyle,
    pub(super) q_norm: Option<Vec<f64>>,
    pub(super) k_norm: Option<Vec<f64>>,
    pub(super) eps: f64,
    pub(super) window: Option<u32>,
    /// By query head.
    pub(super) sinks: Option<Vec<f64>>,
}

impl Attention {
    pub(super) fn scale(&self) -> f32 {
        (self.dim as f32).powf(-0.5)
    }

    pub(super) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// A head after norm and rope at `position`, in half-split order.
    fn head(&self, x: &[f64], weight: Option<&Vec<f64>>, position: usize) -> Vec<f64> {
        let normed = weight.map_or_else(|| x.to_vec(), |weight| norm(x, weight, self.eps));
        let n = self.inv_freq.len();
        let mut out = normed.clone();
        for (i, frequency) in self.inv_freq.iter().enumerate() {
            let (a, b) = match self.style {
                RopeStyle::HalfSplit => (normed[i], normed[i + n]),
                RopeStyle::Interleaved => (normed[2 * i], normed[2 * i + 1]),
            };
            let angle = f64::from(frequency * position as f32);
            let (s, c) = (angle.sin() * f64::from(self.factor), angle.cos() * f64::from(self.factor));
            out[i] = a * c - b * s;
            out[i + n] = b * c + a * s;
        }
        out
    }

    /// K (plane 0) or V (plane 1) of the row at `position`: `[kv_heads, dim]`.
    pub(super) fn cached(&self, row: &[f64], plane: usize, position: usize) -> Vec<f64> {
        let (q, kv) = (self.heads * self.dim, self.kv_heads * self.dim);
        match plane {
            0 => row[q..q + kv]
                .chunks(self.dim)
                .flat_map(|k| self.head(k, self.k_norm.as_ref(), position))
                .collect(),
            _ => row[q + kv..].to_vec(),
        }
    }

    /// The outputs of every row of a sequence whose q, k and v are `rows`.
    pub(super) fn outputs(&self, rows: &[&[f64]]) -> Vec<Vec<f64>> {
        let k: Vec<Vec<f64>> = rows.iter().enumerate().map(|(p, row)| self.cached(row, 0, p)).collect();
        let v: Vec<Vec<f64>> = rows.iter().enumerate().map(|(p, row)| self.cached(row, 1, p)).collect();
        let group = self.heads / self.kv_heads;
        let scale = f64::from(self.scale());
        let output = |(position, row): (usize, &&[f64])| {
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            let mut out = Vec::with_capacity(self.heads * self.dim);
            for head in 0..self.heads {
                let q = &row[head * self.dim..(head + 1) * self.dim];
                let q = self.head(q, self.q_norm.as_ref(), position);
                let at = head / group * self.dim..(head / group + 1) * self.dim;
                let dot = |p: usize| q.iter().zip(&k[p][at.clone()]).map(|(a, b)| a * b).sum::<f64>() * scale;
                let scores: Vec<f64> = (first..=position).map(dot).collect();
                let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks[head]);
                let max = scores.iter().copied().fold(sink, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total = weights.iter().sum::<f64>() + (sink - max).exp();
                for d in at {
                    let sum: f64 = weights.iter().zip(first..).map(|(w, p)| w * v[p][d]).sum();
                    out.push(sum / total);
                }
            }
            out
        };
        rows.iter().enumerate().map(output).collect()
    }
}
