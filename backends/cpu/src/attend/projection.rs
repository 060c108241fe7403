//! The norm of q and k over whole projections: square sums by head, which ranks exchange, then the scaling.

use std::ops::Range;

use crate::kernel::Kernels;

/// Running sums of a head's squares: lanes of a fixed order.
const SUMS: usize = 16;

/// Widths of one call; see [`backend::NormSpan::Projection`].
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    /// Query heads of this rank within those of the model.
    pub(crate) heads: Range<usize>,
    pub(crate) heads_total: usize,
    /// KV heads of this rank within those of the model.
    pub(crate) kv_heads: Range<usize>,
    pub(crate) kv_heads_total: usize,
    /// Those of this rank's KV heads (by index here) that it tells the others.
    pub(crate) kv_heads_own: Range<usize>,
    pub(crate) dim: usize,
    pub(crate) eps: f32,
    pub(crate) bf16: bool,
}

impl Projection {
    /// Places of a row's vector of square sums: the model's query heads, then its KV heads.
    pub(crate) fn places(&self) -> usize {
        self.heads_total + self.kv_heads_total
    }

    /// Rounds q and k of one row and writes the square sums of this rank's heads to their places in `sums` (zeros
    /// elsewhere).
    pub(crate) fn squares(&self, kernels: &Kernels, row: &mut [f32], sums: &mut [f32]) {
        let own = (self.heads.len() + self.kv_heads.len()) * self.dim;
        // SAFETY: in place on the row's own floats.
        unsafe { (kernels.round)(row.as_ptr(), row.as_mut_ptr(), own, self.bf16) };
        sums.fill(0.0);
        for (head, x) in row[..own].chunks_exact(self.dim).enumerate() {
            let kv = head.checked_sub(self.heads.len());
            let place = match kv {
                None => self.heads.start + head,
                Some(kv) if self.kv_heads_own.contains(&kv) => self.heads_total + self.kv_heads.start + kv,
                Some(_) => continue,
            };
            sums[place] = square_sum(x);
        }
    }

    /// Norms q and k of one row with the square sums of all heads of the model.
    pub(crate) fn scale(&self, kernels: &Kernels, row: &mut [f32], sums: &[f32], q: &[f32], k: &[f32]) {
        let (q_sums, k_sums) = sums.split_at(self.heads_total);
        let (q_row, rest) = row.split_at_mut(q.len());
        for (x, weight, sums) in [(q_row, q, q_sums), (&mut rest[..k.len()], k, k_sums)] {
            let mean = sums.iter().sum::<f32>() / (sums.len() * self.dim) as f32;
            let factor = 1.0 / (mean + self.eps).sqrt();
            x.iter_mut().for_each(|x| *x *= factor);
            // SAFETY: in place on the row's own floats.
            unsafe { (kernels.round)(x.as_ptr(), x.as_mut_ptr(), x.len(), self.bf16) };
            x.iter_mut().zip(weight).for_each(|(x, w)| *x *= w);
        }
    }
}

fn square_sum(x: &[f32]) -> f32 {
    let mut sums = [0f32; SUMS];
    for chunk in x.chunks(SUMS) {
        chunk.iter().zip(&mut sums).for_each(|(x, sum)| *sum += x * x);
    }
    sums.iter().sum()
}
