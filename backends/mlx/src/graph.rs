//! What calls of MLX have in common: element types, errors, and the few shapes of indexing that the backend uses. All
//! record only; operators of mlx-rs that panic are not used.

use std::ops::Range;

use backend::{BackendError, DType};
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{IndexUpdateError, TryIndexOp, TryIndexUpdateOp, UpdateMode};
use mlx_rs::{Array, Dtype};

/// What a recorded operation gives. Errors are MLX's, in its words.
pub(crate) type Recorded = Result<Array, Failure>;

/// A refusal of MLX.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl From<Exception> for Failure {
    fn from(error: Exception) -> Self {
        Failure(one_line(error.what()))
    }
}

impl From<IndexUpdateError> for Failure {
    fn from(error: IndexUpdateError) -> Self {
        Failure(one_line(&error.to_string()))
    }
}

impl From<Failure> for BackendError {
    fn from(failure: Failure) -> Self {
        BackendError::Device(failure.0)
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// MLX's name of an element type.
pub(crate) fn mlx_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::Float32,
        DType::F16 => Dtype::Float16,
        DType::BF16 => Dtype::Bfloat16,
    }
}

/// A size or index as MLX takes it. Everything in a step is far below the limit; what a user chooses is checked when a
/// weight or a store is made.
pub(crate) fn int(size: usize) -> i32 {
    i32::try_from(size).unwrap_or(i32::MAX)
}

/// Whether `x` is computed. False where MLX does not say.
pub(crate) fn available(x: &Array) -> bool {
    let mut available = false;
    // SAFETY: both live during the call.
    let status = unsafe { mlx_sys::_mlx_array_is_available(&mut available, x.as_ptr()) };
    status == 0 && available
}

/// Indices as an array of `shape`.
pub(crate) fn indices(values: impl IntoIterator<Item = usize>, shape: &[i32]) -> Array {
    let values: Vec<i32> = values.into_iter().map(int).collect();
    Array::from_slice(&values, shape)
}

/// `range` of axis 0.
pub(crate) fn first(x: &Array, range: Range<usize>) -> Recorded {
    Ok(x.try_index(int(range.start)..int(range.end))?)
}

/// `range` of axis 1.
pub(crate) fn second(x: &Array, range: Range<usize>) -> Recorded {
    Ok(x.try_index((.., int(range.start)..int(range.end)))?)
}

/// `range` of the last axis.
pub(crate) fn last(x: &Array, range: Range<usize>) -> Recorded {
    use mlx_rs::ops::indexing::Ellipsis;
    Ok(x.try_index((Ellipsis, int(range.start)..int(range.end)))?)
}

/// Tokens of some slots of a cache array `[slots, heads, capacity, dim]`.
pub(crate) fn window(cache: &Array, slots: Range<usize>, tokens: Range<usize>) -> Recorded {
    Ok(cache.try_index((int(slots.start)..int(slots.end), .., int(tokens.start)..int(tokens.end)))?)
}

/// The cache with `values = [1, heads, tokens, dim]` at `tokens` of `slot`. In place when nobody else holds `cache`.
pub(crate) fn put_run(cache: &Array, slot: usize, tokens: Range<usize>, values: &Array) -> Recorded {
    let at = (int(slot)..int(slot + 1), .., int(tokens.start)..int(tokens.end));
    Ok(cache.try_index_update(at, values, UpdateMode::Replace)?)
}

/// The cache with `values = [slots, heads, 1, dim]` at one token of neighbouring slots. In place as above.
pub(crate) fn put_column(cache: &Array, slots: Range<usize>, token: usize, values: &Array) -> Recorded {
    let at = (int(slots.start)..int(slots.end), .., int(token)..int(token + 1));
    Ok(cache.try_index_update(at, values, UpdateMode::Replace)?)
}

/// The cache with `values = [n, heads, 1, dim]` at token `tokens[i]` of slot `slots[i]`, both `[n, 1]`. In place as above.
pub(crate) fn put_tokens(cache: &Array, slots: &Array, tokens: &Array, values: &Array) -> Recorded {
    let count = values.dim(1) as usize;
    let heads = indices(0..count, &[1, int(count)]);
    Ok(cache.try_index_update((slots, &heads, tokens), values.squeeze_axes(&[2])?, UpdateMode::Replace)?)
}
