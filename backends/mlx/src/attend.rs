//! Attention of a step: norm and rope of all rows at once, then per call (see `plan`) the cache update and MLX's
//! scaled-dot-product attention over it. What latent attention shares with it (`latent`) is here too.

use std::ops::Range;

use backend::{Attend, BackendError, KvStore, NormSpan, Rope};
use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops;
use mlx_rs::{Array, Dtype};

use crate::device::{MlxBackend, interleaved};
use crate::graph::{Failure, Recorded, int, last, mlx_type, put_column, put_run, put_tokens, second, window};
use crate::plan::calls;
use crate::ready::{Attention, Put, Ready, Seen, Sighted};
use crate::step::{MlxAct, MlxStep};
use crate::weight::MlxWeight;

impl MlxStep<'_> {
    /// [`backend::Step::attend`].
    pub(crate) fn attention(
        &mut self,
        layer: usize,
        qkv: &MlxAct,
        attend: &Attend<'_, MlxBackend>,
    ) -> Result<Array, BackendError> {
        self.check_attend(layer, qkv, attend).map_err(BackendError::Device)?;
        let attention = self.prepared(layer, attend.window)?;
        let out = self.calls(layer, &qkv.0, attend, &attention);
        self.attention = Some(attention);
        Ok(out?)
    }

    /// Enters the rows' tokens of `layer` in the books, and hands out the step's attention with what its calls see.
    pub(crate) fn prepared(&mut self, layer: usize, window: Option<u32>) -> Result<Attention, BackendError> {
        for run in &self.batch.runs {
            let first = window.map_or(0, |window| (run.start + 1).saturating_sub(window));
            self.kv.enter(run.seq, layer, first, run.start..run.start + run.len)?;
        }
        // A step's sequences stay where they are.
        let mut attention = match self.attention.take() {
            Some(attention) => attention,
            None => Attention::new(calls(self.batch, |seq| self.kv.place(seq))?),
        };
        attention.look(window)?;
        Ok(attention)
    }

    fn calls(
        &mut self,
        layer: usize,
        qkv: &Array,
        attend: &Attend<'_, MlxBackend>,
        attention: &Attention,
    ) -> Recorded {
        let Attend { heads, kv_heads, head_dim, .. } = *attend;
        let rows = int(self.batch.rows());
        // [rows, q heads | k heads | v heads, dim]
        let qkv = qkv.reshape(&[rows, -1, int(head_dim)])?;
        // One norm and one rope for both: a head is a head to them.
        let mut qk = second(&qkv, 0..heads + kv_heads)?;
        if let Some(norm) = &attend.qk_norm {
            qk = match &norm.span {
                NormSpan::Head => {
                    let scale = norm.q.with_heads(heads, norm.k, kv_heads, head_dim)?;
                    fast::rms_norm(&qk, None, norm.eps)?.multiply(scale)?
                }
                span @ NormSpan::Projection { .. } => self.over_projection(&qk, heads, norm, span)?,
            };
        }
        let qk = self.rotated(&qk, attend.rope, &attention.positions)?;
        let (q, k) = (second(&qk, 0..heads)?, second(&qk, heads..heads + kv_heads)?);
        let v = second(&qkv, heads + kv_heads..heads + 2 * kv_heads)?;
        let types: Vec<Dtype> = self.kv.spec().planes.iter().map(|plane| mlx_type(plane.dtype)).collect();
        let kv = [k.as_dtype(types[0])?, v.as_dtype(types[1])?];
        let mut outs = Vec::with_capacity(attention.calls.len());
        for (ready, seen) in attention.calls.iter().zip(attention.seen(attend.window)) {
            let [k, v] = self.written(layer, &kv, ready, seen)?;
            let (q, scale) = (ready.rows_of(&q)?, attend.scale);
            let sinks = attend.sinks.map(|sinks| sinks.vector_in(heads, q.dtype())).transpose()?;
            let out = match &seen.mask {
                Sighted::All => fast::scaled_dot_product_attention(&q, &k, &v, scale, None, sinks)?,
                Sighted::Causal => {
                    fast::scaled_dot_product_attention(&q, &k, &v, scale, Mask::Causal, sinks)?
                }
                Sighted::Mask(mask) => fast::scaled_dot_product_attention(&q, &k, &v, scale, mask, sinks)?,
            };
            // [n, rows of each, heads, dim]: one of the first two is 1.
            let out = out.transpose_axes(&[0, 2, 1, 3])?.reshape(&[-1, int(heads * head_dim)])?;
            outs.push(ready.held(out)?);
        }
        Ok(attention.in_order(outs)?.as_dtype(mlx_type(self.device.dtype))?)
    }

    /// Writes a call's rows of both planes, `[rows, heads, dim]`; returns what it sees of them, `[n, heads, keys, dim]`.
    pub(crate) fn written(
        &mut self,
        layer: usize,
        values: &[Array; 2],
        ready: &Ready,
        seen: &Seen,
    ) -> Result<[Array; 2], Failure> {
        let (bank, slots) = ready.slots();
        let mut write = |plane: usize| -> Recorded {
            let values = ready.written(&values[plane])?;
            let cache = self.kv.array(bank, layer, plane);
            let cache = match &ready.put {
                Put::Run(tokens) => put_run(cache, slots.start, tokens.clone(), &values)?,
                Put::Column(token) => put_column(cache, slots.clone(), *token, &values)?,
                Put::Each { slots, positions } => put_tokens(cache, slots, positions, &values)?,
            };
            let view = window(&cache, slots.clone(), seen.keys.clone())?;
            self.kv.replace(bank, layer, plane, cache);
            Ok(view)
        };
        Ok([write(0)?, write(1)?])
    }

    /// Norm of q and k, `[rows, heads of q | heads of k, dim]`, each over all its heads of all ranks.
    fn over_projection(
        &mut self,
        qk: &Array,
        heads: usize,
        norm: &backend::QkNorm<'_, MlxBackend>,
        span: &NormSpan,
    ) -> Recorded {
        let NormSpan::Projection { heads_total, kv_heads_total, head_first, kv_head_first, kv_heads_own } =
            span
        else {
            return Err(Failure("a norm per head".to_owned()));
        };
        let (both, dim) = (qk.dim(1) as usize, qk.dim(2));
        let kv_heads = both - heads;
        let (q, k) = (&second(qk, 0..heads)?, &second(qk, heads..both)?);
        if head_first + heads > *heads_total
            || kv_head_first + kv_heads > *kv_heads_total
            || kv_heads_own.end > kv_heads
        {
            return Err(Failure(format!("{heads} and {kv_heads} heads for a norm over {span:?}")));
        }
        let squares = |x: &Array, own: Range<usize>, before: usize, total: usize| -> Recorded {
            let x = second(x, own.clone())?.as_dtype(Dtype::Float32)?;
            let squares = x.square()?.sum_axis(-1, false)?;
            let after = total - before - own.len();
            Ok(ops::pad(&squares, &[(0, 0), (int(before), int(after))][..], None, None)?)
        };
        // A place for every head of the model; each is told by one rank.
        let all = ops::concatenate(
            &[
                squares(q, 0..heads, *head_first, *heads_total)?,
                squares(k, kv_heads_own.clone(), kv_head_first + kv_heads_own.start, *kv_heads_total)?,
            ],
            -1,
        )?;
        let all = self.device.joined(&all)?;
        let normed = |x: &Array, places: Range<usize>, weight: &MlxWeight| -> Recorded {
            let count = int(places.len()) * dim;
            let mean = last(&all, places)?.sum_axis(-1, true)?.divide(Array::from_f32(count as f32))?;
            let factor = mean.add(Array::from_f32(norm.eps))?.rsqrt()?;
            let wide = x.as_dtype(Dtype::Float32)?.reshape(&[x.dim(0), -1])?;
            let rounded = wide.multiply(&factor)?.as_dtype(x.dtype())?;
            let scale = weight.vector(x.dim(1) as usize * dim as usize)?;
            Ok(rounded.multiply(scale)?.reshape(x.shape())?)
        };
        let end = heads_total + kv_heads_total;
        let normed = [normed(q, 0..*heads_total, norm.q)?, normed(k, *heads_total..end, norm.k)?];
        Ok(ops::concatenate(&normed, 1)?)
    }

    /// Rope of heads `[rows, heads, dim]`; the result is in half-split order.
    pub(crate) fn rotated(&mut self, x: &Array, rope: &Rope, positions: &Array) -> Recorded {
        let (heads, dim) = (x.dim(1), x.dim(2) as usize);
        let turned = 2 * rope.inv_freq.len();
        if turned == 0 {
            return Ok(x.clone());
        }
        let mut x = x.clone();
        if interleaved(rope) || rope.factor != 1.0 {
            let mut leading = last(&x, 0..turned)?;
            if interleaved(rope) {
                // Pairs (2 i, 2 i + 1) become (i, i + n).
                let pairs = leading.reshape(&[-1, heads, int(turned / 2), 2])?;
                leading = pairs.swap_axes(2, 3)?.reshape(&[-1, heads, int(turned)])?;
            }
            if rope.factor != 1.0 {
                leading = leading.multiply(Array::from_f32(rope.factor).as_dtype(leading.dtype())?)?;
            }
            x = match dim - turned {
                0 => leading,
                _ => ops::concatenate(&[leading, last(&x, turned..dim)?], -1)?,
            };
        }
        let periods = self.device.periods(rope);
        // Every row is a batch of its own, with its own position.
        let rows = x.expand_dims(2)?;
        let rows = fast::rope_dynamic(&rows, int(turned), false, None, 1.0, positions, Some(&periods))?;
        Ok(rows.reshape(&[-1, heads, int(dim)])?)
    }

    fn check_attend(
        &self,
        layer: usize,
        qkv: &MlxAct,
        attend: &Attend<'_, MlxBackend>,
    ) -> Result<(), String> {
        let Attend { heads, kv_heads, head_dim: dim, rope, window, .. } = *attend;
        let spec = self.kv.spec();
        if kv_heads == 0 || heads == 0 || heads % kv_heads != 0 {
            return Err(format!("{heads} query heads over {kv_heads} KV heads"));
        }
        if dim == 0 || dim % 2 != 0 || rope.inv_freq.len() * 2 > dim {
            return Err(format!("heads of {dim} with {} rotary pairs", rope.inv_freq.len()));
        }
        if qkv.width() != (heads + 2 * kv_heads) * dim || qkv.rows() != self.batch.rows() {
            let (rows, width) = (qkv.rows(), qkv.width());
            return Err(format!("qkv of {rows} x {width} for {heads} + 2 * {kv_heads} heads of {dim}"));
        }
        let fits = |plane: &backend::Plane| plane.heads().len() == kv_heads && plane.dim == dim;
        if spec.planes.len() != 2 || !spec.planes.iter().all(fits) {
            return Err(format!("a cache whose planes are not {kv_heads} heads of {dim}"));
        }
        if layer >= spec.layers || window == Some(0) {
            return Err(format!("layer {layer} of {}, window {window:?}", spec.layers));
        }
        Ok(())
    }
}
