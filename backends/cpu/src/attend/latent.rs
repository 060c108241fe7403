//! Latent attention before q and the cache meet: the latent's norm, rope, latent and rope key into the cache, and the
//! rotated part of q to its place behind the absorbed one.

use super::Rows;
use super::prepare::{deinterleave, each_row, store};
use crate::kernel::Kernels;
use crate::kv::Slab;
use crate::pool::{Pool, Scratch};
use crate::rope::Angles;

/// What is done to q and kv of one layer before they meet.
pub(crate) struct PrepareLatent<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) slab: &'a Slab,
    pub(crate) layer: usize,
    pub(crate) heads: usize,
    pub(crate) nope_dim: usize,
    pub(crate) rope_dim: usize,
    pub(crate) latent_dim: usize,
    pub(crate) bf16: bool,
    pub(crate) angles: &'a Angles,
    pub(crate) interleaved: bool,
    pub(crate) norm: &'a [f32],
    pub(crate) eps: f32,
    /// `[rows, heads, nope | rope]`: rounded in place.
    pub(crate) q: *mut f32,
    /// `[rows, latent | rope]`: normed and rotated in place.
    pub(crate) kv: *mut f32,
    /// `[rows, heads, latent | rope]`: gets the rotated part.
    pub(crate) absorbed: *mut f32,
}

// SAFETY: each row is one task's.
unsafe impl Sync for PrepareLatent<'_> {}

impl PrepareLatent<'_> {
    /// Does it for every row.
    ///
    /// # Safety
    /// `q`, `kv` and `absorbed` are valid, and the cache of every run's rows is for this step alone to write.
    pub(crate) unsafe fn run(&self, runs: &[Rows<'_>], pool: &Pool) {
        let work = (self.heads * (self.nope_dim + self.rope_dim) + self.latent_dim) * 16;
        each_row(runs, work, pool, |run, row, scratch| {
            // SAFETY: each row is prepared by one task; its floats and cache positions are its own.
            unsafe { self.row(run, row, scratch) }
        });
    }

    unsafe fn row(&self, run: &Rows<'_>, row: usize, scratch: &Scratch<'_>) {
        let position = run.start + row - run.row;
        let (k, bf16) = (self.kernels, self.bf16);
        let (nope, rope, latent) = (self.nope_dim, self.rope_dim, self.latent_dim);
        let held = scratch.floats(rope);
        // SAFETY: the row's floats, of the widths that the fields say.
        unsafe {
            let kv = self.kv.add(row * (latent + rope));
            (k.norm)(kv, self.norm.as_ptr(), kv, latent, self.eps, bf16);
            self.rotate(kv.add(latent), row, held);
            store(k, self.slab, run, self.layer, 0, position, kv, latent, bf16);
            store(k, self.slab, run, self.layer, 1, position, kv.add(latent), rope, bf16);
            for head in 0..self.heads {
                let q = self.q.add((row * self.heads + head) * (nope + rope));
                (k.round)(q, q, nope, bf16);
                self.rotate(q.add(nope), row, held);
                let to = self.absorbed.add((row * self.heads + head) * (latent + rope) + latent);
                std::ptr::copy_nonoverlapping(q.add(nope), to, rope);
            }
        }
    }

    unsafe fn rotate(&self, x: *mut f32, row: usize, held: *mut f32) {
        let frequencies = self.rope_dim / 2;
        let (cos, sin) = self.angles.of(row, frequencies);
        // SAFETY: x and held have rope_dim floats.
        unsafe {
            (self.kernels.round)(x, x, self.rope_dim, self.bf16);
            if self.interleaved {
                deinterleave(x, frequencies, held);
            }
            (self.kernels.rotate)(x, cos.as_ptr(), sin.as_ptr(), frequencies, self.bf16);
        }
    }
}
