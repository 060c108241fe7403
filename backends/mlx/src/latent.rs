//! Multi-head latent attention. Tokens and short chunks attend in the absorbed form: keys are the cached latents themselves,
//! which all heads share. Long chunks expand keys and values of every head first, which is less work from a number of rows on
//! ([`is_expanded`]).

use backend::{BackendError, KvStore, Mla};
use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops;
use mlx_rs::{Array, Dtype};

use crate::device::MlxBackend;
use crate::graph::{Recorded, int, last, mlx_type};
use crate::plan::Call;
use crate::ready::{Attention, Ready, Seen, Sighted};
use crate::step::{MlxAct, MlxStep};

/// Whether `rows` of one sequence cost less expanded: per key, `rows` dot products of `2 latent` elements against `rows` of
/// `nope + value` and one expansion.
fn is_expanded(rows: usize, mla: &Mla<'_, MlxBackend>) -> bool {
    let (head, latent) = (mla.nope_dim + mla.value_dim, mla.latent_dim);
    rows * (2 * latent).saturating_sub(head) > latent * head
}

impl MlxStep<'_> {
    /// [`backend::Step::attend_mla`].
    pub(crate) fn latent_attention(
        &mut self,
        layer: usize,
        q: &MlxAct,
        kv: &MlxAct,
        mla: &Mla<'_, MlxBackend>,
    ) -> Result<Array, BackendError> {
        self.check_latent(layer, q, kv, mla).map_err(BackendError::Device)?;
        let attention = self.prepared(layer, None)?;
        let out = self.latent_calls(layer, q, kv, mla, &attention);
        self.attention = Some(attention);
        Ok(out?)
    }

    fn latent_calls(
        &mut self,
        layer: usize,
        q: &MlxAct,
        kv: &MlxAct,
        mla: &Mla<'_, MlxBackend>,
        attention: &Attention,
    ) -> Recorded {
        let Mla { heads, nope_dim: nope, rope_dim, latent_dim, .. } = *mla;
        let rows = int(self.batch.rows());
        let q = q.0.reshape(&[rows, int(heads), int(nope + rope_dim)])?;
        let turned = self.rotated(&last(&q, nope..nope + rope_dim)?, mla.rope, &attention.positions)?;
        let q = last(&q, 0..nope)?;
        // Per head: [heads, rows, nope] x [heads, nope, latent]
        let to_latent = mla.q_to_latent.heads(heads, nope, latent_dim)?;
        let absorbed = q.swap_axes(0, 1)?.matmul(to_latent)?.swap_axes(0, 1)?;
        let latent = fast::rms_norm(
            last(&kv.0, 0..latent_dim)?,
            Some(mla.latent_norm.vector(latent_dim)?),
            mla.norm_eps,
        )?;
        let key = last(&kv.0, latent_dim..latent_dim + rope_dim)?.expand_dims(1)?;
        let key = self.rotated(&key, mla.rope, &attention.positions)?;
        let types: Vec<Dtype> = self.kv.spec().planes.iter().map(|plane| mlx_type(plane.dtype)).collect();
        let values = [latent.expand_dims(1)?.as_dtype(types[0])?, key.as_dtype(types[1])?];
        let mut outs = Vec::with_capacity(attention.calls.len());
        for (ready, seen) in attention.calls.iter().zip(attention.seen(None)) {
            let views = self.written(layer, &values, ready, seen)?;
            let turned = ready.rows_of(&turned)?;
            outs.push(match &ready.call {
                Call::Chunk { rows, .. } if is_expanded(rows.len(), mla) => {
                    expanded(&ready.rows_of(&q)?, &turned, &views, seen, mla)?
                }
                _ => {
                    let absorbed = ready.rows_of(&absorbed)?;
                    ready.held(absorbed_call(&absorbed, &turned, &views, ready, seen, mla)?)?
                }
            });
        }
        let out = attention.in_order(outs)?;
        Ok(out.as_dtype(mlx_type(self.device.dtype))?)
    }

    fn check_latent(
        &self,
        layer: usize,
        q: &MlxAct,
        kv: &MlxAct,
        mla: &Mla<'_, MlxBackend>,
    ) -> Result<(), String> {
        let Mla { heads, nope_dim, rope_dim, latent_dim, rope, .. } = *mla;
        let (rows, spec) = (self.batch.rows(), self.kv.spec());
        if heads == 0 || rope_dim % 2 != 0 || rope.inv_freq.len() * 2 > rope_dim {
            return Err(format!("{heads} heads, {rope_dim} elements with {} pairs", rope.inv_freq.len()));
        }
        let wanted = [(rows, heads * (nope_dim + rope_dim)), (rows, latent_dim + rope_dim)];
        let got = [(q.rows(), q.width()), (kv.rows(), kv.width())];
        if wanted != got {
            return Err(format!("q and kv of {got:?}, {wanted:?} needed"));
        }
        let planes: Vec<_> = spec.planes.iter().map(|plane| (plane.heads().len(), plane.dim)).collect();
        if planes != [(1, latent_dim), (1, rope_dim)] || layer >= spec.layers {
            return Err(format!("a cache of planes {planes:?}, layer {layer} of {}", spec.layers));
        }
        Ok(())
    }
}

/// `q [n, heads, rows, latent]` and its rotated part against the cache: `[rows of the call, heads * value]`.
fn absorbed_call(
    q: &Array,
    turned: &Array,
    views: &[Array; 2],
    ready: &Ready,
    seen: &Seen,
    mla: &Mla<'_, MlxBackend>,
) -> Recorded {
    let (n, heads, rows) = (q.dim(0), q.dim(1), q.dim(2));
    let keys = views[0].dim(2);
    // All heads read the same keys: they are rows of one product, [n, heads * rows, dim] x [n, dim, keys].
    let product = |q: &Array, keys: &Array| -> Recorded {
        let q = q.reshape(&[n, heads * rows, -1])?;
        Ok(q.matmul(keys.squeeze_axes(&[1])?.swap_axes(1, 2)?)?.as_dtype(Dtype::Float32)?)
    };
    let scores = product(q, &views[0])?.add(product(turned, &views[1])?)?;
    let mut scores = scores.multiply(Array::from_f32(mla.scale))?.reshape(&[n, heads, rows, keys])?;
    if let Some(mask) = seen.mask(&ready.call)? {
        scores = ops::select(&mask, &scores, Array::from_f32(f32::NEG_INFINITY))?;
    }
    let weights = ops::softmax_axis(&scores, -1, true)?.as_dtype(views[0].dtype())?;
    let out = weights.reshape(&[n, heads * rows, keys])?.matmul(views[0].squeeze_axes(&[1])?)?;
    // Per head to its values: [heads, n * rows, latent] x [heads, latent, value]
    let out =
        out.reshape(&[n, heads, rows, -1])?.transpose_axes(&[1, 0, 2, 3])?.reshape(&[heads, n * rows, -1])?;
    let to_value = mla.latent_to_value.heads(mla.heads, mla.latent_dim, mla.value_dim)?;
    let out = out.as_dtype(to_value.dtype())?.matmul(to_value)?;
    Ok(out.swap_axes(0, 1)?.reshape(&[n * rows, -1])?)
}

/// The same with keys and values of every head, for `q [1, heads, rows, nope]`.
fn expanded(
    q: &Array,
    turned: &Array,
    views: &[Array; 2],
    seen: &Seen,
    mla: &Mla<'_, MlxBackend>,
) -> Recorded {
    let Mla { heads, nope_dim, value_dim, latent_dim, .. } = *mla;
    let (rows, keys) = (q.dim(2), views[0].dim(2));
    let to_latent = mla.q_to_latent.heads(heads, nope_dim, latent_dim)?;
    let to_value = mla.latent_to_value.heads(heads, latent_dim, value_dim)?;
    // [1, 1, keys, latent] x [heads, latent, ..]
    let k = views[0].matmul(to_latent.swap_axes(1, 2)?)?;
    let v = views[0].matmul(to_value)?;
    let rope = ops::broadcast_to(&views[1], &[1, int(heads), keys, int(mla.rope_dim)])?;
    let k = ops::concatenate(&[k, rope.as_dtype(views[0].dtype())?], -1)?;
    let q = ops::concatenate(&[q, turned], -1)?.as_dtype(k.dtype())?;
    let out = match &seen.mask {
        Sighted::All => fast::scaled_dot_product_attention(&q, &k, &v, mla.scale, None, None)?,
        Sighted::Causal => fast::scaled_dot_product_attention(&q, &k, &v, mla.scale, Mask::Causal, None)?,
        Sighted::Mask(mask) => fast::scaled_dot_product_attention(&q, &k, &v, mla.scale, mask, None)?,
    };
    Ok(out.transpose_axes(&[0, 2, 1, 3])?.reshape(&[rows, int(heads * value_dim)])?)
}
