//! Experts on their way into MLX: a stack `[experts, ..]` of every array, filled in place, so that a load holds one expert
//! besides what it leaves. Called by `weight`.

use mlx_rs::ops;
use mlx_rs::ops::indexing::{TryIndexUpdateOp, UpdateMode};
use mlx_rs::{Array, transforms};

use crate::graph::{Failure, int};
use crate::part::Part;

/// One part of every expert.
pub(crate) struct Stack {
    /// The first expert's.
    like: Part,
    /// Its arrays, for all experts. Nobody else holds them: else every expert would copy all.
    arrays: Vec<Array>,
}

impl Stack {
    /// Room for `experts` parts as `like`.
    pub(crate) fn new(experts: usize, like: &Part) -> Result<Self, Failure> {
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
    pub(crate) fn takes(&self, part: &Part) -> bool {
        let shapes =
            |part: &Part| part.columns().iter().map(|array| array.shape().to_vec()).collect::<Vec<_>>();
        self.like.alike(part) && shapes(&self.like) == shapes(part)
    }

    /// Puts expert `at` in its place.
    pub(crate) fn put(&mut self, at: usize, part: &Part) -> Result<(), Failure> {
        let place = int(at)..int(at + 1);
        for (stack, own) in self.arrays.iter_mut().zip(part.columns()) {
            *stack = stack.try_index_update(place.clone(), own.expand_dims(0)?, UpdateMode::Replace)?;
        }
        // Now: the expert's bytes may go, and the stack is written where it is.
        Ok(transforms::eval(&self.arrays)?)
    }

    /// All experts as one part.
    pub(crate) fn whole(self) -> Result<Part, Failure> {
        self.like.with(self.arrays)
    }
}
