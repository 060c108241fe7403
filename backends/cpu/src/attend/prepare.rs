//! What happens to q, k and v before they meet: head norms, rope, and K and V into the cache.

use backend::DType;

use super::{Rows, TASKS_PER_THREAD};
use crate::kernel::Kernels;
use crate::kv::Slab;
use crate::pool::{Pool, Scratch};
use crate::rope::Angles;

/// What is done to q, k and v of one layer before they meet.
pub(crate) struct Prepare<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) slab: &'a Slab,
    pub(crate) layer: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) bf16: bool,
    pub(crate) angles: &'a Angles,
    pub(crate) frequencies: usize,
    pub(crate) interleaved: bool,
    pub(crate) q_norm: Option<&'a [f32]>,
    pub(crate) k_norm: Option<&'a [f32]>,
    pub(crate) eps: f32,
    /// `[rows, heads + 2 kv_heads, dim]`.
    pub(crate) qkv: *mut f32,
}

// SAFETY: each row is one task's.
unsafe impl Sync for Prepare<'_> {}

impl Prepare<'_> {
    /// Norm and rope of q (in place) and k, and K and V into the cache.
    ///
    /// # Safety
    /// `qkv` is valid, and the cache of every run's rows is for this step alone to write.
    pub(crate) unsafe fn run(&self, runs: &[Rows<'_>], pool: &Pool) {
        let work = (self.heads + 2 * self.kv_heads) * self.dim * 16;
        each_row(runs, work, pool, |run, row, scratch| {
            // SAFETY: each row is prepared by one task; its qkv row and cache positions are its own.
            unsafe { self.row(run, row, scratch) }
        });
    }

    unsafe fn row(&self, run: &Rows<'_>, row: usize, scratch: &Scratch<'_>) {
        let position = run.start + row - run.row;
        let (k, dim) = (self.kernels, self.dim);
        let (cos, sin) = self.angles.of(row, self.frequencies);
        // SAFETY: the row has heads + 2 kv_heads heads of dim floats.
        unsafe {
            let base = self.qkv.add(row * (self.heads + 2 * self.kv_heads) * dim);
            for head in 0..self.heads + self.kv_heads {
                let x = base.add(head * dim);
                let norm = if head < self.heads { self.q_norm } else { self.k_norm };
                match norm {
                    Some(weight) => (k.norm)(x, weight.as_ptr(), x, dim, self.eps, self.bf16),
                    None => (k.round)(x, x, dim, self.bf16),
                }
                if self.interleaved {
                    deinterleave(x, self.frequencies, scratch.floats(dim));
                }
                (k.rotate)(x, cos.as_ptr(), sin.as_ptr(), self.frequencies, self.bf16);
            }
            for plane in 0..2 {
                let x = base.add((self.heads + plane * self.kv_heads) * dim);
                // All heads of a token's K or V follow each other, here and there.
                store(k, self.slab, run, self.layer, plane, position, x, self.kv_heads * dim, self.bf16);
            }
        }
    }
}

/// Calls `f` for every row of `runs`, with its run; `work` is the multiply-adds of a row, or what takes as long.
pub(super) fn each_row(
    runs: &[Rows<'_>],
    work: usize,
    pool: &Pool,
    f: impl Fn(&Rows<'_>, usize, &Scratch<'_>) + Sync,
) {
    let rows: usize = runs.iter().map(|run| run.len).sum();
    let block = rows.div_ceil(pool.threads() * TASKS_PER_THREAD).max(4);
    pool.run(rows.div_ceil(block), rows * work, |task, scratch| {
        for row in task * block..rows.min((task + 1) * block) {
            f(&runs[runs.partition_point(|run| run.row + run.len <= row)], row, scratch);
        }
    });
}

/// `n` floats into the plane's row of `position`, in its dtype.
///
/// # Safety
/// `x` is valid for `n` floats, and the row is for the caller alone to write and has `n` elements.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn store(
    kernels: &Kernels,
    slab: &Slab,
    run: &Rows<'_>,
    layer: usize,
    plane: usize,
    position: usize,
    x: *const f32,
    n: usize,
    bf16: bool,
) {
    let place = run.place(slab, layer, plane, position);
    // SAFETY: the caller's.
    unsafe {
        match slab.spec.planes[plane].dtype {
            DType::F32 => (kernels.round)(x, place.cast(), n, bf16),
            _ => (kernels.narrow)(x, place.cast(), n),
        }
    }
}

/// `(2 i, 2 i + 1)` pairs to `(i, i + n)`.
///
/// # Safety
/// 2 n floats at `x` and at `held`.
pub(super) unsafe fn deinterleave(x: *mut f32, n: usize, held: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..n {
            *held.add(i) = *x.add(2 * i);
            *held.add(n + i) = *x.add(2 * i + 1);
        }
        std::ptr::copy_nonoverlapping(held, x, 2 * n);
    }
}
