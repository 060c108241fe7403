//! Experts on their way into MLX: a stack `[experts, ..]` of every array, filled in place, so that a load holds one expert
//! besides what it leaves. Called by `weight`.

use backend::{BackendError, DType, ExpertSource, KSum, MatrixView};
use mlx_rs::ops;
use mlx_rs::ops::indexing::{TryIndexUpdateOp, UpdateMode};
use mlx_rs::{Array, transforms};

use crate::graph::{Failure, int, mlx_type};
use crate::part::{Part, merged};
use crate::platform;
use crate::weight::{Kind, array, biases as biases_of, check, decoded, refused};

/// Puts the experts one by one where they stay. Experts differ in format so seldom that all are decoded then.
pub(crate) fn loaded(source: &dyn ExpertSource, dtype: DType) -> Result<Kind, BackendError> {
    match alike(source, dtype, false)? {
        Some(kind) => Ok(kind),
        None => {
            alike(source, dtype, true)?.ok_or_else(|| refused("", "experts of different formats".to_owned()))
        }
    }
}

/// `None`: they are not of one kind.
fn alike(source: &dyn ExpertSource, dtype: DType, decode: bool) -> Result<Option<Kind>, BackendError> {
    let of_biases = dtype;
    let dtype = if platform::GATHERS_NARROW { dtype } else { DType::F32 };
    let experts = source.count();
    let mut biases: Vec<Array> = Vec::new();
    let mut first: Option<(Vec<(usize, usize)>, KSum)> = None;
    let mut stacks: Vec<Stack> = Vec::new();
    let (mut taken, mut same) = (0, true);
    let each = source.each(&mut |expert| {
        let rows = check(expert)?;
        let name = expert.parts[0].name();
        let named = |failure: Failure| refused(name, failure.0);
        let own: Vec<(usize, usize)> = expert.parts.iter().map(|part| (part.rows(), part.cols())).collect();
        let (shape, sum) = first.get_or_insert_with(|| (own.clone(), expert.sum));
        if own != *shape || expert.sum != *sum {
            return Err(refused(name, format!("{own:?} beside {shape:?}")));
        }
        let bias = biases_of(expert, rows, of_biases)?;
        if bias.is_some() != (biases.len() == taken) && taken > 0 {
            return Err(refused(name, "biases of some experts".to_owned()));
        }
        biases.extend(bias);
        let one = |view: &MatrixView<'_>| -> Result<Part, BackendError> {
            match view {
                MatrixView::Plain(view) => Ok(Part::plain(array(view, dtype)?)),
                MatrixView::Quantised(quant) => {
                    view.check()?;
                    let part = match Part::coded(quant).filter(|_| !decode) {
                        Some(part) => part,
                        None => decoded(view, dtype).map(Part::plain),
                    };
                    part.map_err(|failure| refused(view.name(), failure.0))
                }
            }
        };
        let parts = expert.parts.iter().map(one).collect::<Result<Vec<_>, _>>()?;
        let parts = merged(parts).map_err(named)?;
        if taken == 0 {
            let all = parts.iter().map(|part| Stack::new(experts, part).map_err(named));
            stacks = all.collect::<Result<_, _>>()?;
        }
        same =
            parts.len() == stacks.len() && stacks.iter().zip(&parts).all(|(stack, part)| stack.takes(part));
        if !same {
            return Err(refused(name, "an expert of another format".to_owned()));
        }
        for (stack, part) in stacks.iter_mut().zip(&parts) {
            stack.put(taken, part).map_err(named)?;
        }
        taken += 1;
        Ok(())
    });
    if !same && !decode {
        return Ok(None);
    }
    each?;
    if taken != experts || experts == 0 {
        return Err(refused("", format!("{taken} experts in a mixture of {experts}")));
    }
    let whole = |stack: Stack| stack.whole()?.narrowed(mlx_type(dtype));
    let parts = stacks.into_iter().map(whole).collect::<Result<Vec<_>, _>>();
    let parts = parts.map_err(|failure| refused("", failure.0))?;
    let bias = if biases.is_empty() { None } else { Some(ops::stack(&biases, 0).map_err(Failure::from)?) };
    Ok(Some(Kind::Experts { parts, bias, experts }))
}

/// One part of every expert.
struct Stack {
    /// The first expert's.
    like: Part,
    /// Its arrays, for all experts. Nobody else holds them: else every expert would copy all.
    arrays: Vec<Array>,
}

impl Stack {
    /// Room for `experts` parts as `like`.
    fn new(experts: usize, like: &Part) -> Result<Self, Failure> {
        let room = |array: &&Array| {
            let shape: Vec<i32> =
                std::iter::once(int(experts)).chain(array.shape().iter().copied()).collect();
            ops::zeros_dtype(&shape, array.dtype())
        };
        let columns = like.columns();
        let arrays = columns.iter().map(room).collect::<Result<_, _>>()?;
        Ok(Stack { like: like.with(columns.into_iter().cloned().collect())?, arrays })
    }

    /// Whether `part` can lie among the others.
    fn takes(&self, part: &Part) -> bool {
        let shapes =
            |part: &Part| part.columns().iter().map(|array| array.shape().to_vec()).collect::<Vec<_>>();
        self.like.alike(part) && shapes(&self.like) == shapes(part)
    }

    /// Puts expert `at` in its place.
    fn put(&mut self, at: usize, part: &Part) -> Result<(), Failure> {
        let place = int(at)..int(at + 1);
        for (stack, own) in self.arrays.iter_mut().zip(part.columns()) {
            *stack = stack.try_index_update(place.clone(), own.expand_dims(0)?, UpdateMode::Replace)?;
        }
        // Now: the expert's bytes may go, and the stack is written where it is.
        Ok(transforms::eval(&self.arrays)?)
    }

    /// All experts as one part.
    fn whole(self) -> Result<Part, Failure> {
        self.like.with(self.arrays)
    }
}
