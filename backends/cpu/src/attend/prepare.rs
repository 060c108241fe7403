//! What happens to q, k and v before they meet: head norms, rope, and K and V into the cache.

use backend::DType;

use super::{Attention, Rows, TASKS_PER_THREAD};
use crate::pool::{Pool, Scratch};
use crate::rope::Angles;

/// What is done to q and k before they meet.
pub(crate) struct Prepare<'a> {
    pub(crate) angles: &'a Angles,
    pub(crate) frequencies: usize,
    pub(crate) interleaved: bool,
    pub(crate) q_norm: Option<&'a [f32]>,
    pub(crate) k_norm: Option<&'a [f32]>,
    pub(crate) eps: f32,
}

impl Attention<'_> {
    /// Norm and rope of q (in place) and k, and K and V into the cache.
    ///
    /// # Safety
    /// `qkv` is valid, and the cache of every run's rows is for this step alone to write.
    pub(crate) unsafe fn prepare(&self, prepare: &Prepare<'_>, pool: &Pool) {
        let rows: usize = self.runs.iter().map(|run| run.len).sum();
        let block = rows.div_ceil(pool.threads() * TASKS_PER_THREAD).max(4);
        pool.run(rows.div_ceil(block), rows * self.stride() * 16, |task, scratch| {
            for row in task * block..rows.min((task + 1) * block) {
                let at = self.runs.partition_point(|run| run.row + run.len <= row);
                // SAFETY: each row is prepared by one task; its qkv row and cache positions are its own.
                unsafe { self.prepare_row(prepare, &self.runs[at], row, scratch) };
            }
        });
    }

    unsafe fn prepare_row(&self, prepare: &Prepare<'_>, run: &Rows<'_>, row: usize, scratch: &Scratch<'_>) {
        let position = run.start + row - run.row;
        let (k, dim) = (self.kernels, self.dim);
        let rotary = row * prepare.frequencies..(row + 1) * prepare.frequencies;
        let (cos, sin) = (&prepare.angles.cos[rotary.clone()], &prepare.angles.sin[rotary]);
        // SAFETY: the row has heads + 2 kv_heads heads of dim floats.
        unsafe {
            let base = self.qkv.add(row * self.stride());
            for head in 0..self.heads + self.kv_heads {
                let x = base.add(head * dim);
                let norm = if head < self.heads { prepare.q_norm } else { prepare.k_norm };
                match norm {
                    Some(weight) => (k.norm)(x, weight.as_ptr(), x, dim, prepare.eps, self.bf16),
                    None => (k.round)(x, x, dim, self.bf16),
                }
                if prepare.interleaved {
                    deinterleave(x, prepare.frequencies, scratch.floats(dim));
                }
                (k.rotate)(x, cos.as_ptr(), sin.as_ptr(), prepare.frequencies, self.bf16);
            }
            for kv_head in 0..self.kv_heads {
                for plane in 0..2 {
                    let x = base.add((self.heads + plane * self.kv_heads + kv_head) * dim);
                    let place = self.place(run, plane, position, kv_head);
                    match self.dtype(plane) {
                        DType::F32 => (k.round)(x, place.cast(), dim, self.bf16),
                        _ => (k.narrow)(x, place.cast(), dim),
                    }
                }
            }
        }
    }
}

/// `(2 i, 2 i + 1)` pairs to `(i, i + n)`.
///
/// # Safety
/// 2 n floats at `x` and at `held`.
unsafe fn deinterleave(x: *mut f32, n: usize, held: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..n {
            *held.add(i) = *x.add(2 * i);
            *held.add(n + i) = *x.add(2 * i + 1);
        }
        std::ptr::copy_nonoverlapping(held, x, 2 * n);
    }
}
