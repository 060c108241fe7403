//! Tokens that the device draws: [`backend::draw`] as a graph over all rows of a step, whose ids the next step's graph takes
//! before the host has seen them.

use backend::{Draw, Drawn, Input, Noise, Rule};
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis};
use mlx_rs::{Array, Dtype, Stream, ops};
use mlx_sys::{mlx_array, mlx_stream};

use crate::calls::raw;
use crate::fabric::Fabric;
use crate::fused::Fused;
use crate::graph::{Failure, Recorded, first, indices, int, last};
use crate::step::MlxStep;

/// Greatest random number below 1 that f32 has.
const BELOW_ONE: f32 = 1.0 - f32::EPSILON / 2.0;

/// What the rows of the step before drew: `[rows]` int32, -1 where some logit was no number.
#[derive(Debug)]
pub(crate) struct Flight {
    ids: Array,
    /// Whether a row drew at all.
    drew: Vec<bool>,
}

/// Results of a step that draws, before they are evaluated.
#[derive(Debug)]
pub(crate) struct Draws {
    pub(crate) ids: Array,
    /// `[rows of them, vocabulary]` f32 for the rows whose logits the host gets.
    pub(crate) logits: Option<Array>,
    drew: Vec<bool>,
    /// `[rows, vocabulary]`, to find the logit that is no number. On rank 0.
    all: Option<Array>,
}

impl MlxStep<'_> {
    /// Token ids of the batch, `[rows]`. `count`: rows of the embedding table.
    pub(crate) fn ids(&self, count: usize) -> Recorded {
        let known = |input: &Input| match *input {
            Input::Id(id) => id as usize,
            Input::Drawn(_) => 0,
        };
        let inputs = &self.batch.ids;
        if let Some(id) = inputs.iter().map(known).find(|id| *id >= count) {
            return Err(Failure(format!("token {id} in an embedding table of {count}")));
        }
        let ids = indices(inputs.iter().map(known), &[int(inputs.len())]);
        if !self.batch.in_flight() {
            return Ok(ids);
        }
        let rows: Vec<Option<usize>> = inputs
            .iter()
            .map(|input| match *input {
                Input::Id(_) => None,
                Input::Drawn(row) => Some(row as usize),
            })
            .collect();
        let flight = self.device.flight.as_ref();
        let drew = flight.map_or(&[][..], |flight| &flight.drew);
        if let Some(row) = rows.iter().flatten().find(|row| !drew.get(**row).is_some_and(|drew| *drew)) {
            return Err(Failure(format!("row {row} of the step before drew no token")));
        }
        let Some(flight) = flight else { return Ok(ids) };
        // Row by row, as in most steps: nothing to bring together. What drew no number is -1, which MLX takes for the last row
        // of a table: it computes what nobody looks at.
        let in_order = rows.iter().enumerate().all(|(at, row)| *row == Some(at));
        if in_order && flight.drew.len() == rows.len() {
            return Ok(flight.ids.clone());
        }
        let from = indices(rows.iter().map(|row| row.unwrap_or(0)), &[int(rows.len())]);
        let flying: Vec<bool> = rows.iter().map(Option::is_some).collect();
        let flying = Array::from_slice(&flying, &[int(rows.len())]);
        Ok(ops::select(&flying, &flight.ids.take_axis(&from, 0)?, &ids)?)
    }
}

impl Draws {
    /// Records what becomes of the rows of `x = [rows, vocabulary]`, of any type.
    pub(crate) fn record(x: &Array, draws: &[Draw], fused: &mut Fused) -> Result<Self, Failure> {
        let rows = x.dim(0) as usize;
        if draws.len() != rows {
            return Err(Failure(format!("{} draws for {rows} rows of logits", draws.len())));
        }
        let drew: Vec<bool> = draws.iter().map(|draw| matches!(draw, Draw::Token(_))).collect();
        let shown = (0..rows).filter(|row| !drew[*row]);
        let logits = match drew.iter().filter(|drew| !**drew).count() {
            0 => None,
            all if all == rows => Some(x.as_dtype(Dtype::Float32)?.contiguous()?),
            count => Some(x.take_axis(indices(shown, &[int(count)]), 0)?.as_dtype(Dtype::Float32)?),
        };
        let rules: Vec<Rule> = draws
            .iter()
            .map(|draw| match draw {
                Draw::Token(rule) => *rule,
                Draw::Logits => Rule::GREEDY,
            })
            .collect();
        let ids = if drew.contains(&true) {
            ids(x, &rules, fused)?
        } else {
            Array::from_slice(&vec![0i32; rows], &[int(rows)])
        };
        Ok(Draws { ids, logits, drew, all: Some(x.clone()) })
    }

    /// The same in a group, `x` being the logits of all ranks side by side: rank 0 draws, and every rank has its ids.
    pub(crate) fn in_group(
        x: &Array,
        draws: &[Draw],
        fused: &mut Fused,
        fabric: &Fabric,
    ) -> Result<Self, Failure> {
        let mut own = if fabric.rank() == 0 {
            Draws::record(x, draws, fused)?
        } else {
            // Zeros that come after the logits are there: every rank takes part in the same sums in the same order.
            let zeros = last(x, 0..1)?.is_finite()?.as_dtype(Dtype::Int32)?.multiply(Array::from_int(0))?;
            let drew = draws.iter().map(|draw| matches!(draw, Draw::Token(_))).collect();
            Draws { ids: zeros.reshape(&[-1])?, logits: None, drew, all: None }
        };
        if own.drew.contains(&true) {
            own.ids = fabric.sum(&own.ids)?;
        }
        Ok(own)
    }

    /// For the next step.
    pub(crate) fn flight(&self) -> Flight {
        Flight { ids: self.ids.clone(), drew: self.drew.clone() }
    }

    /// What to evaluate.
    pub(crate) fn arrays(&self) -> Vec<Array> {
        self.logits.iter().chain([&self.ids]).cloned().collect()
    }

    /// The results, evaluated by now.
    pub(crate) fn read(&self) -> Result<Vec<Drawn>, Failure> {
        let slice = |error: mlx_rs::error::AsSliceError| Failure(error.to_string());
        if self.drew.is_empty() {
            return Ok(Vec::new());
        }
        let ids = self.ids.try_as_slice::<i32>().map_err(slice)?;
        let logits = match &self.logits {
            Some(logits) => logits.try_as_slice::<f32>().map_err(slice)?,
            None => &[],
        };
        let shown = self.drew.iter().filter(|drew| !**drew).count();
        let mut logits = logits.chunks_exact((logits.len() / shown.max(1)).max(1));
        let row = |(row, (drew, id)): (usize, (&bool, &i32))| {
            Ok(match (drew, *id) {
                (false, _) => Drawn::Logits(logits.next().unwrap_or_default().to_vec()),
                (true, id @ 0..) => Drawn::Token(id as u32),
                (true, _) => Drawn::NotFinite { id: self.not_finite(row)? },
            })
        };
        self.drew.iter().zip(ids).enumerate().map(row).collect()
    }

    /// The first logit of `row` that is no number.
    fn not_finite(&self, row: usize) -> Result<u32, Failure> {
        let Some(all) = &self.all else { return Ok(0) };
        let row = first(all, row..row + 1)?.as_dtype(Dtype::Float32)?.contiguous()?;
        row.eval()?;
        let row = row.try_as_slice::<f32>().map_err(|error| Failure(error.to_string()))?;
        Ok(backend::draw::not_finite(row).map_or(0, |(id, _)| id as u32))
    }
}

/// `[rows]` int32 as [`Flight`] has them. `x = [rows, vocabulary]`.
fn ids(x: &Array, rules: &[Rule], fused: &mut Fused) -> Recorded {
    let mut ids = argmax_axis(x, -1, true)?;
    // The greatest as comparisons find it, which pass over NaN; the least is NaN where any logit is. Two passes, not three.
    let (greatest, least) = (take_along_axis(x, &ids, -1)?, x.min_axis(-1, true)?);
    if !rules.iter().all(Rule::is_greedy) {
        let warm: Vec<bool> = rules.iter().map(|rule| !rule.is_greedy()).collect();
        let wide = x.as_dtype(Dtype::Float32)?;
        let drawn = warm_ids(&wide.subtract(&greatest)?, rules)?;
        ids = ops::select(Array::from_slice(&warm, &[int(warm.len()), 1]), &drawn, &ids)?;
    }
    Ok(fused.judged(&ids, &greatest, &least)?.reshape(&[int(rules.len())])?)
}

/// `[rows, 1]` ids of rows drawn by noise; rows of greedy rules give anything. `x`: logits less the greatest of the row.
fn warm_ids(x: &Array, rules: &[Rule]) -> Recorded {
    let temperature = |rule: &Rule| if rule.is_greedy() { 1.0 } else { rule.temperature };
    let z = x.divide(column(rules, temperature))?;
    let score = z.add(&noise(rules, x.dim(-1))?)?;
    let score = match edges(&z, rules)? {
        Some(edges) => ops::select(&z.ge(&edges)?, &score, Array::from_f32(f32::NEG_INFINITY))?,
        None => score,
    };
    Ok(argmax_axis(&score, -1, true)?)
}

/// `[rows, 1]`: the least value of `z` that each row's filters keep. `None`: no row has any.
fn edges(z: &Array, rules: &[Rule]) -> Result<Option<Array>, Failure> {
    if !rules.iter().any(Rule::filters) {
        return Ok(None);
    }
    let mut edge = column(rules, |rule| rule.min_p.ln());
    let by_rank = |rule: &Rule| rule.top_k > 0 || rule.top_p < 1.0;
    if !rules.iter().any(by_rank) {
        return Ok(Some(edge));
    }
    let vocabulary = z.dim(-1);
    let sorted = ops::sort_axis(&z.negative()?, -1)?.negative()?;
    let last: Vec<i32> = rules
        .iter()
        .map(|rule| match i32::try_from(rule.top_k) {
            Ok(0) | Err(_) => vocabulary - 1,
            Ok(top_k) => top_k.min(vocabulary) - 1,
        })
        .collect();
    let last = Array::from_slice(&last, &[int(rules.len()), 1]);
    edge = ops::maximum(&edge, &take_along_axis(&sorted, &last, -1)?)?;
    if rules.iter().any(|rule| rule.top_p < 1.0) {
        let kept = sorted.ge(&edge)?;
        let mass = ops::select(&kept, &sorted.exp()?, Array::from_f32(0.0))?;
        // Rows without a nucleus keep all whatever rounding makes of their sum.
        let share = column(rules, |rule| if rule.top_p < 1.0 { rule.top_p } else { 2.0 });
        let target = mass.sum_axis(-1, true)?.multiply(&share)?;
        let before = mass.cumsum(-1, false, false)?;
        // The last whose predecessors do not reach the target; the first always is one.
        let count = before.lt(&target)?.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
        let last = ops::maximum(&count.subtract(Array::from_int(1))?, Array::from_int(0))?;
        edge = ops::maximum(&edge, &take_along_axis(&sorted, &last, -1)?)?;
    }
    Ok(Some(edge))
}

/// `[rows, vocabulary]` Gumbel variables, see [`Noise`].
fn noise(rules: &[Rule], vocabulary: i32) -> Recorded {
    let keys: Vec<[u32; 2]> = rules.iter().map(|rule| Noise::new(rule.seed, rule.position).keys).collect();
    let key = |word: usize| {
        let words: Vec<u32> = keys.iter().map(|keys| keys[word]).collect();
        Array::from_slice(&words, &[int(words.len()), 1])
    };
    let ids = Array::arange::<i32, u32>(None, vocabulary, None)?.reshape(&[1, vocabulary])?;
    let bits = round(&round(&xor(&ids, &key(0))?)?.add(key(1))?)?;
    let w = bits.as_dtype(Dtype::Float32)?.add(Array::from_f32(0.5))?;
    let w = ops::minimum(&w.multiply(Array::from_f32(1.0 / 4_294_967_296.0))?, Array::from_f32(BELOW_ONE))?;
    Ok(w.negative()?.log1p()?.negative()?.log()?.negative()?)
}

/// A round of [`Noise::bits`].
fn round(x: &Array) -> Recorded {
    let word = |word: u32| Array::from_slice(&[word], &[1, 1]);
    let mut x = x.clone();
    for (step, shift) in Noise::SHIFTS.into_iter().enumerate() {
        x = xor(&x, &shifted(&x, &word(shift))?)?;
        if let Some(factor) = Noise::FACTORS.get(step) {
            x = x.multiply(word(*factor))?;
        }
    }
    Ok(x)
}

/// `[rows, 1]` of a number per rule.
fn column(rules: &[Rule], number: impl Fn(&Rule) -> f32) -> Array {
    let numbers: Vec<f32> = rules.iter().map(number).collect();
    Array::from_slice(&numbers, &[int(numbers.len()), 1])
}

fn xor(a: &Array, b: &Array) -> Recorded {
    words(mlx_sys::mlx_bitwise_xor, a, b)
}

fn shifted(a: &Array, b: &Array) -> Recorded {
    words(mlx_sys::mlx_right_shift, a, b)
}

/// An operation on words, which mlx-rs has no call for.
fn words(
    operation: unsafe extern "C" fn(*mut mlx_array, mlx_array, mlx_array, mlx_stream) -> i32,
    a: &Array,
    b: &Array,
) -> Recorded {
    let stream = Stream::thread_local_or_default();
    // SAFETY: live handles; the result is a fresh array.
    raw(|result| unsafe { operation(result, a.as_ptr(), b.as_ptr(), stream.as_ptr()) })
}
