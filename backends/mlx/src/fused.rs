//! Chains of small operations that MLX makes one kernel of (its `compile`): the gate of an MLP, and what becomes of the
//! greatest logits. On the CPU library a compiler makes them when they are first used; `MLX_DISABLE_COMPILE=1` runs them one
//! by one.

use backend::Glu;
use mlx_rs::error::Exception;
use mlx_rs::transforms::compile::compile;
use mlx_rs::{Array, Dtype, ops};

use crate::graph::{Failure, Recorded, last};

/// A chain over two arrays, and one over three.
type Two = Box<dyn FnMut((&Array, &Array)) -> Result<Array, Exception>>;
type Three = Box<dyn FnMut((&Array, &Array, &Array)) -> Result<Array, Exception>>;

/// The chains of one device, for the thread that opened it.
pub(crate) struct Fused {
    silu: Two,
    /// With the limit and the slope that it was made for.
    clamped: Option<((f32, f32), Two)>,
    judge: Three,
}

impl Fused {
    pub(crate) fn new() -> Self {
        // Whatever the shapes are: they only broadcast.
        let (mut silu, mut judge) = (compile(silu, true), compile(judge, true));
        Fused {
            silu: Box::new(move |two: (&Array, &Array)| silu(two)),
            clamped: None,
            judge: Box::new(move |three: (&Array, &Array, &Array)| judge(three)),
        }
    }

    /// `act(gate) * up` of `[.., gate | up]`.
    pub(crate) fn gated(&mut self, x: &Array, kind: Glu) -> Recorded {
        let half = x.dim(-1) as usize / 2;
        let (gate, up) = (last(x, 0..half)?, last(x, half..2 * half)?);
        match kind {
            Glu::Silu => Ok((self.silu)((&gate, &up))?),
            Glu::Clamped { limit, slope } => {
                let own = (limit, slope);
                if self.clamped.as_ref().is_none_or(|(made, _)| *made != own) {
                    let mut chain = compile(move |two: (&Array, &Array)| clamped(two, limit, slope), true);
                    self.clamped = Some((own, Box::new(move |two: (&Array, &Array)| chain(two))));
                }
                match &mut self.clamped {
                    Some((_, chain)) => Ok(chain((&gate, &up))?),
                    None => Err(Failure("no gate".to_owned())),
                }
            }
        }
    }

    /// The ids `top` as int32 where the row's greatest and least logit are finite numbers, elsewhere -1. All `[rows, 1]`.
    pub(crate) fn judged(&mut self, top: &Array, greatest: &Array, least: &Array) -> Recorded {
        Ok((self.judge)((top, greatest, least))?)
    }
}

impl std::fmt::Debug for Fused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fused").finish_non_exhaustive()
    }
}

fn silu((gate, up): (&Array, &Array)) -> Result<Array, Exception> {
    gate.multiply(ops::sigmoid(gate)?)?.multiply(up)
}

fn clamped((gate, up): (&Array, &Array), limit: f32, slope: f32) -> Result<Array, Exception> {
    let number = |x: f32| Array::from_f32(x).as_dtype(gate.dtype());
    let gate = ops::minimum(gate, number(limit)?)?;
    let up = ops::clip(up, (number(-limit)?, number(limit)?))?;
    let opened = ops::sigmoid(gate.multiply(number(slope)?)?)?;
    gate.multiply(opened)?.multiply(up.add(number(1.0)?)?)
}

/// `least` is NaN where any logit is.
fn judge((top, greatest, least): (&Array, &Array, &Array)) -> Result<Array, Exception> {
    let [greatest, least] = [greatest.as_dtype(Dtype::Float32)?, least.as_dtype(Dtype::Float32)?];
    // Two finite numbers of f32 may be further apart than f32 goes: each is looked at by itself.
    let below = greatest.lt(Array::from_f32(f32::INFINITY))?;
    let finite = below.logical_and(least.gt(Array::from_f32(f32::NEG_INFINITY))?)?;
    ops::select(&finite, top.as_dtype(Dtype::Int32)?, Array::from_int(-1))
}
