//! A mixture of experts: routing on the device, as [`backend::Routing`] says, and the experts of every row with one gathered
//! product per matrix.

use backend::{Moe, Routing, Score};
use mlx_rs::ops;
use mlx_rs::ops::indexing::topk_axis;
use mlx_rs::{Array, Dtype};

use crate::device::MlxBackend;
use crate::fused::Fused;
use crate::graph::{Failure, Recorded, int, last};
use crate::part::Part;
use crate::step::MlxAct;

/// Rows times experts from which rows are put in the order of their experts first, so that an expert's weight is read once.
const SORTED_MIN: usize = 64;

/// [`backend::Step::moe`]: `[rows, hidden]` in f32.
pub(crate) fn experts(fused: &mut Fused, x: &MlxAct, moe: &Moe<'_, MlxBackend>) -> Recorded {
    let routing = moe.routing;
    check(routing).map_err(Failure)?;
    let (gate_up, down) = (moe.gate_up.experts(routing.experts)?, moe.down.experts(routing.experts)?);
    let products = moe.router.product()?.of_wide(&x.0)?;
    if products.dim(-1) != int(routing.experts) {
        return Err(Failure(format!("{} scores for {} experts", products.dim(-1), routing.experts)));
    }
    let bias = moe.choice_bias.map(|bias| bias.vector(routing.experts)).transpose()?;
    let (chosen, weights) = route(&products, routing, bias)?;
    let rows = x.rows();
    let mut out = if rows * routing.top_k >= SORTED_MIN {
        // Row `i` of expert `j` is at `i * top_k + j`.
        let flat = chosen.reshape(&[-1])?;
        let order = ops::argsort(&flat)?;
        let back = ops::argsort(&order)?;
        let experts = flat.take_axis(&order, 0)?;
        let from =
            order.floor_divide(Array::from_slice(&[routing.top_k as u32], &[1]).as_dtype(order.dtype())?)?;
        let x = x.0.take_axis(&from, 0)?.expand_dims(1)?;
        let out = through(fused, &x, [gate_up, down], moe, &experts, true)?;
        out.squeeze_axes(&[1])?.take_axis(&back, 0)?.reshape(&[int(rows), int(routing.top_k), -1])?
    } else {
        let x = x.0.expand_dims(1)?.expand_dims(1)?;
        through(fused, &x, [gate_up, down], moe, &chosen, false)?.squeeze_axes(&[2])?
    };
    out = out.as_dtype(Dtype::Float32)?.multiply(&weights.expand_dims(-1)?)?.sum_axis(1, false)?;
    if let Some((gate_up, down)) = moe.shared {
        let inner = fused.gated(&gate_up.product()?.of(&x.0)?, moe.glu)?;
        out = out.add(down.product()?.of(&inner)?.as_dtype(Dtype::Float32)?)?;
    }
    Ok(out)
}

/// The products of all experts, and their biases.
type Experts<'e> = (&'e [Part], Option<&'e Array>);

/// Rows `[.., 1, hidden]` through the experts of each.
fn through(
    fused: &mut Fused,
    x: &Array,
    [gate_up, down]: [Experts<'_>; 2],
    moe: &Moe<'_, MlxBackend>,
    experts: &Array,
    sorted: bool,
) -> Recorded {
    let product = |x: &Array, (parts, bias): Experts<'_>| -> Recorded {
        let mut outs =
            parts.iter().map(|part| part.gathered(x, experts, sorted)).collect::<Result<Vec<_>, _>>()?;
        let out = match outs.len() {
            1 => outs.swap_remove(0),
            _ => ops::concatenate(&outs, -1)?,
        };
        match bias {
            Some(bias) => Ok(out.add(bias.take_axis(experts, 0)?.expand_dims(-2)?)?),
            None => Ok(out),
        }
    };
    product(&fused.gated(&product(x, gate_up)?, moe.glu)?, down)
}

/// The experts of every row and their weights, `[rows, top_k]`, from the router's products `[rows, experts]` in f32.
fn route(products: &Array, routing: &Routing, bias: Option<&Array>) -> Result<(Array, Array), Failure> {
    let scores = match routing.score {
        Score::Softmax => ops::softmax_axis(products, -1, true)?,
        Score::Sigmoid => ops::sigmoid(products)?,
    };
    let mut choice = match bias {
        Some(bias) => scores.add(bias)?,
        None => scores.clone(),
    };
    if let Some((groups, used)) = routing.groups.filter(|(groups, used)| used < groups) {
        let size = routing.experts / groups;
        let grouped = choice.reshape(&[-1, int(groups), int(size)])?;
        let sums = topk_axis(&grouped, int(size.min(2)), -1)?.sum_axis(-1, false)?;
        // The place of each group in the order of sums; those past `used` are left out.
        let places = ops::argsort_axis(best_first(&sums)?, -1)?;
        let left_out = places.ge(Array::from_slice(&[used as u32], &[1]).as_dtype(places.dtype())?)?;
        let hidden = Array::from_f32(f32::NEG_INFINITY);
        choice = ops::select(&left_out.expand_dims(-1)?, &hidden, &grouped)?;
        choice = choice.reshape(&[-1, int(routing.experts)])?;
    }
    let chosen = last(&best_first(&choice)?, 0..routing.top_k)?;
    let mut weights = scores.take_along_axis(&chosen, -1)?;
    if routing.normalise {
        let sum = weights.sum_axis(-1, true)?.add(Array::from_f32(routing.normalise_eps))?;
        weights = weights.divide(&sum)?;
    }
    if routing.scale != 1.0 {
        weights = weights.multiply(Array::from_f32(routing.scale))?;
    }
    Ok((chosen, weights))
}

/// Indices along the last axis, largest first; of equals the lower index.
fn best_first(x: &Array) -> Recorded {
    Ok(ops::argsort_axis(x.negative()?, -1)?)
}

fn check(routing: &Routing) -> Result<(), String> {
    let Routing { experts, top_k, groups, .. } = *routing;
    let (count, used) = groups.unwrap_or((1, 1));
    let fits = count > 0 && used > 0 && used <= count && experts % count == 0;
    if top_k == 0 || !fits || top_k > experts / count * used {
        return Err(format!("{top_k} of {experts} experts in {groups:?} groups"));
    }
    Ok(())
}
