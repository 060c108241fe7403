//! Attention of a step: norm and rope of all rows at once, then per call (see `plan`) the cache update and MLX's
//! scaled-dot-product attention over it.

use std::ops::Range;

use backend::{Attend, BackendError, KvStore};
use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops;
use mlx_rs::{Array, Dtype};

use crate::device::{MlxBackend, interleaved};
use crate::graph::{
    Failure, Recorded, first, indices, int, last, mlx_type, put_run, put_tokens, second, window,
};
use crate::plan::{Call, Sight, calls};
use crate::step::{MlxAct, MlxStep};
use crate::weight::MlxWeight;

/// The attention of a step, prepared when its first layer asks.
#[derive(Debug)]
pub(crate) struct Attention {
    calls: Vec<Ready>,
    /// Position of each row: `[rows]`.
    positions: Array,
    /// Where each row of the batch is among the calls' rows; `None`: there already.
    order: Option<Array>,
    /// Per window that a layer asked for, what each call sees.
    sights: Vec<(Option<u32>, Vec<Seen>)>,
}

/// A call with its indices on the device.
#[derive(Debug)]
struct Ready {
    call: Call,
    /// Of tokens: rows `[n]`, slots and positions `[n, 1]`.
    tokens: Option<[Array; 3]>,
}

#[derive(Debug)]
struct Seen {
    keys: Range<usize>,
    mask: Sighted,
}

#[derive(Debug)]
enum Sighted {
    All,
    Causal,
    /// `[rows, keys]` of a chunk, `[slots, 1, 1, keys]` of tokens: true where seen.
    Mask(Array),
}

impl Attention {
    fn new(calls: Vec<Call>) -> Self {
        let rows: Vec<usize> = calls.iter().flat_map(Call::rows).collect();
        let mut positions = vec![0; rows.len()];
        let mut order = vec![0; rows.len()];
        let all = calls.iter().flat_map(Call::positions);
        for (at, (row, position)) in rows.iter().zip(all).enumerate() {
            positions[*row] = position as usize;
            order[*row] = at;
        }
        let flat = |values: Vec<usize>| {
            let shape = [int(values.len())];
            indices(values, &shape)
        };
        let sorted = rows.is_sorted();
        Attention {
            calls: calls.into_iter().map(Ready::new).collect(),
            positions: flat(positions),
            order: (!sorted).then(|| flat(order)),
            sights: Vec::new(),
        }
    }

    /// Makes what the calls see through `window`; returns its index.
    fn sight(&mut self, window: Option<u32>) -> Result<usize, Failure> {
        if let Some(known) = self.sights.iter().position(|(known, _)| *known == window) {
            return Ok(known);
        }
        let seen = self.calls.iter().map(|ready| Seen::new(&ready.call, window)).collect::<Result<_, _>>()?;
        self.sights.push((window, seen));
        Ok(self.sights.len() - 1)
    }
}

impl Ready {
    fn new(call: Call) -> Self {
        let tokens = match &call {
            Call::Chunk { .. } => None,
            Call::Tokens { slots, rows, positions, .. } => {
                let n = int(rows.len());
                Some([
                    indices(rows.iter().copied(), &[n]),
                    indices(slots.clone(), &[n, 1]),
                    indices(positions.iter().map(|position| *position as usize), &[n, 1]),
                ])
            }
        };
        Ready { call, tokens }
    }
}

impl Seen {
    fn new(call: &Call, window: Option<u32>) -> Result<Self, Failure> {
        let (keys, sight) = call.sight(window);
        let mask = match sight {
            Sight::All => Sighted::All,
            Sight::Causal => Sighted::Causal,
            Sight::Masked => {
                let positions = call.positions();
                let rows = int(positions.len());
                let shape =
                    if matches!(call, Call::Tokens { .. }) { vec![rows, 1, 1, 1] } else { vec![rows, 1] };
                let at = indices(positions.into_iter().map(|position| position as usize), &shape);
                let key = ops::arange::<i32, i32>(int(keys.start as usize), int(keys.end as usize), 1)?;
                let mut seen = key.le(&at)?;
                if let Some(window) = window {
                    let hidden = at.subtract(Array::from_int(int(window as usize)))?;
                    seen = seen.logical_and(key.gt(&hidden)?)?;
                }
                Sighted::Mask(seen)
            }
        };
        Ok(Seen { keys: keys.start as usize..keys.end as usize, mask })
    }
}

impl MlxStep<'_> {
    /// [`backend::Step::attend`].
    pub(crate) fn attention(
        &mut self,
        layer: usize,
        qkv: &MlxAct,
        attend: &Attend<'_, MlxBackend>,
    ) -> Result<Array, BackendError> {
        self.check_attend(layer, qkv, attend).map_err(BackendError::Device)?;
        for run in &self.batch.runs {
            let first = attend.window.map_or(0, |window| (run.start + 1).saturating_sub(window));
            self.kv.enter(run.seq, layer, first, run.start..run.start + run.len)?;
        }
        // A step's sequences stay where they are.
        let mut attention = match self.attention.take() {
            Some(attention) => attention,
            None => Attention::new(calls(self.batch, |seq| self.kv.place(seq))?),
        };
        let sight = attention.sight(attend.window)?;
        let out = self.calls(layer, &qkv.0, attend, &attention, sight);
        self.attention = Some(attention);
        Ok(out?)
    }

    fn calls(
        &mut self,
        layer: usize,
        qkv: &Array,
        attend: &Attend<'_, MlxBackend>,
        attention: &Attention,
        sight: usize,
    ) -> Recorded {
        let Attend { heads, kv_heads, head_dim, .. } = *attend;
        let rows = int(self.batch.rows());
        // [rows, q heads | k heads | v heads, dim]
        let qkv = qkv.reshape(&[rows, -1, int(head_dim)])?;
        let positions = &attention.positions;
        let q = self.turned(
            &second(&qkv, 0..heads)?,
            attend.qk_norm.as_ref().map(|norm| norm.q),
            attend,
            positions,
        )?;
        let k = self.turned(
            &second(&qkv, heads..heads + kv_heads)?,
            attend.qk_norm.as_ref().map(|norm| norm.k),
            attend,
            positions,
        )?;
        let v = second(&qkv, heads + kv_heads..heads + 2 * kv_heads)?;
        let types: Vec<Dtype> = self.kv.spec().planes.iter().map(|plane| mlx_type(plane.dtype)).collect();
        let kv = [k.as_dtype(types[0])?, v.as_dtype(types[1])?];
        let mut outs = Vec::with_capacity(attention.calls.len());
        for (ready, seen) in attention.calls.iter().zip(&attention.sights[sight].1) {
            outs.push(self.call(layer, &q, &kv, attend, ready, seen)?);
        }
        let out = match outs.len() {
            1 => outs.swap_remove(0),
            _ => ops::concatenate(&outs, 0)?,
        };
        let out = match &attention.order {
            Some(order) => out.take_axis(order, 0)?,
            None => out,
        };
        Ok(out.as_dtype(mlx_type(self.device.dtype))?)
    }

    /// Writes a call's K and V and attends: `[rows of the call, q heads * dim]`.
    fn call(
        &mut self,
        layer: usize,
        q: &Array,
        kv: &[Array; 2],
        attend: &Attend<'_, MlxBackend>,
        ready: &Ready,
        seen: &Seen,
    ) -> Recorded {
        let (bank, slots) = match &ready.call {
            Call::Tokens { bank, slots, .. } => (*bank, slots.clone()),
            Call::Chunk { place, .. } => (place.bank, place.slot..place.slot + 1),
        };
        let mut views = Vec::with_capacity(2);
        for (plane, values) in kv.iter().enumerate() {
            let cache = self.kv.array(bank, layer, plane);
            let cache = match (&ready.call, &ready.tokens) {
                (Call::Chunk { rows, start, place }, _) => {
                    let values = first(values, rows.clone())?.transpose_axes(&[1, 0, 2])?.expand_dims(0)?;
                    put_run(cache, place.slot, *start as usize..*start as usize + rows.len(), &values)?
                }
                (Call::Tokens { .. }, Some([rows, slots, positions])) => {
                    let heads = indices(0..attend.kv_heads, &[1, int(attend.kv_heads)]);
                    put_tokens(cache, slots, &heads, positions, &values.take_axis(rows, 0)?)?
                }
                (Call::Tokens { .. }, None) => return Err(Failure("tokens without indices".to_owned())),
            };
            views.push(window(&cache, slots.clone(), seen.keys.clone())?);
            self.kv.replace(bank, layer, plane, cache);
        }
        // [n, heads, rows of each, dim]
        let q = match (&ready.call, &ready.tokens) {
            (Call::Chunk { rows, .. }, _) => {
                first(q, rows.clone())?.transpose_axes(&[1, 0, 2])?.expand_dims(0)?
            }
            (_, Some([rows, ..])) => q.take_axis(rows, 0)?.expand_dims(2)?,
            (_, None) => return Err(Failure("tokens without indices".to_owned())),
        };
        let (k, v, scale) = (&views[0], &views[1], attend.scale);
        let out = match &seen.mask {
            Sighted::All => fast::scaled_dot_product_attention(&q, k, v, scale, None, None)?,
            Sighted::Causal => fast::scaled_dot_product_attention(&q, k, v, scale, Mask::Causal, None)?,
            Sighted::Mask(mask) => fast::scaled_dot_product_attention(&q, k, v, scale, mask, None)?,
        };
        // [n, rows of each, heads, dim]: one of the two is 1.
        let out = out.transpose_axes(&[0, 2, 1, 3])?;
        Ok(out.reshape(&[-1, int(attend.heads * attend.head_dim)])?)
    }

    /// Norm and rope of heads `[rows, heads, dim]`; the result is in half-split order.
    fn turned(
        &mut self,
        x: &Array,
        norm: Option<&MlxWeight>,
        attend: &Attend<'_, MlxBackend>,
        positions: &Array,
    ) -> Recorded {
        let (heads, dim, rope) = (x.dim(1), attend.head_dim, attend.rope);
        let mut x = match norm {
            Some(weight) => fast::rms_norm(
                x,
                Some(weight.vector(dim)?),
                attend.qk_norm.as_ref().map_or(0.0, |norm| norm.eps),
            )?,
            None => x.clone(),
        };
        let turned = 2 * rope.inv_freq.len();
        if turned == 0 {
            return Ok(x);
        }
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
