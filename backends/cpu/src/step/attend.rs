//! Attention as a step's operation: checks, the cache asked for, norms and rope, and the sums of [`crate::attend`].

use backend::{Attend, BackendError, DType, KvStore, NormSpan, QkNorm, RopeStyle};

use super::CpuStep;
use crate::act::{CpuAct, Raw};
use crate::attend::{Attention, Planes, Prepare, Projection, Rows};
use crate::device::CpuBackend;
use crate::kernel::PairKernels;
use crate::lists::emptied;

impl CpuStep<'_> {
    /// How attention multiplies bf16, where the step and its cache are of it.
    pub(super) fn pair_kernels(&self) -> Option<PairKernels> {
        let bf16 = self.device.bf16() && self.kv.spec().planes.iter().all(|plane| plane.dtype == DType::BF16);
        self.device.kernels.attend.filter(|_| bf16)
    }

    /// Asks for the cache of every run: its positions to be written, those before to be read. A failure is this step's.
    pub(super) fn enter(&mut self, layer: usize, window: Option<u32>) {
        for run in &self.batch.runs {
            let first = window.map_or(0, |window| (run.start + 1).saturating_sub(window));
            if let Err(error) = self.kv.enter(run.seq, layer, first, run.start..run.start + run.len) {
                return self.fail(error);
            }
        }
    }

    /// The runs of the batch with their blocks, into an empty list.
    pub(super) fn tables<'s>(&'s self, mut runs: Vec<Rows<'s>>) -> Vec<Rows<'s>> {
        let mut row = 0;
        for run in &self.batch.runs {
            let len = run.len as usize;
            // `enter` has found the sequence: without it there would be a fault.
            let table = self.kv.table(run.seq).unwrap_or(&[]);
            runs.push(Rows { table, row, start: run.start as usize, len });
            row += len;
        }
        runs
    }

    /// The norm of q and k over all heads of all ranks.
    fn norm_projection(
        &mut self,
        qkv: &mut CpuAct,
        attend: &Attend<'_, CpuBackend>,
        norm: &QkNorm<'_, CpuBackend>,
    ) {
        let NormSpan::Projection { heads_total, kv_heads_total, head_first, kv_head_first, kv_heads_own } =
            &norm.span
        else {
            return;
        };
        let (heads, kv_heads, dim) = (attend.heads, attend.kv_heads, attend.head_dim);
        let projection = Projection {
            heads: *head_first..head_first + heads,
            heads_total: *heads_total,
            kv_heads: *kv_head_first..kv_head_first + kv_heads,
            kv_heads_total: *kv_heads_total,
            kv_heads_own: kv_heads_own.clone(),
            dim,
            eps: norm.eps,
            bf16: self.device.bf16(),
        };
        if projection.heads.end > *heads_total || projection.kv_heads.end > *kv_heads_total {
            return self.fail(BackendError::Device(format!("heads outside the projection: {projection:?}")));
        }
        let Some(q) = self.vector(norm.q, heads * dim, "the scale of q's norm") else { return };
        let Some(k) = self.vector(norm.k, kv_heads * dim, "the scale of k's norm") else { return };
        let (rows, width, places) = (qkv.rows, qkv.width, projection.places());
        let mut sums = self.act(rows, places);
        let kernels = self.device.kernels;
        let (from, to) = (Raw(qkv.floats.as_mut_ptr()), Raw(sums.floats.as_mut_ptr()));
        let of = |row: usize| {
            let (x, sums) = (from.row(row, width), to.row(row, places));
            // SAFETY: the floats of one row of each, which only its task uses.
            unsafe {
                (std::slice::from_raw_parts_mut(x, width), std::slice::from_raw_parts_mut(sums, places))
            }
        };
        self.each_row(rows, width, |row| {
            let (x, sums) = of(row);
            projection.squares(kernels, x, sums);
        });
        if self.device.peers.world() > 1
            && let Err(error) = self.join(&mut sums)
        {
            return self.fail(error);
        }
        self.each_row(rows, width, |row| {
            let (x, sums) = of(row);
            projection.scale(kernels, x, sums, q, k);
        });
    }

    fn check_attend(
        &self,
        layer: usize,
        qkv: &CpuAct,
        attend: &Attend<'_, CpuBackend>,
    ) -> Result<(), String> {
        let Attend { heads, kv_heads, head_dim, rope, window, .. } = attend;
        let (heads, kv_heads, dim) = (*heads, *kv_heads, *head_dim);
        let spec = self.kv.spec();
        if kv_heads == 0 || heads == 0 || heads % kv_heads != 0 {
            return Err(format!("{heads} query heads over {kv_heads} KV heads"));
        }
        if dim == 0 || dim % 2 != 0 || rope.inv_freq.len() * 2 > dim {
            return Err(format!("heads of {dim} with {} rotary pairs", rope.inv_freq.len()));
        }
        if qkv.width != (heads + 2 * kv_heads) * dim || qkv.rows != self.batch.rows() {
            let (rows, width) = (qkv.rows, qkv.width);
            return Err(format!("qkv of {rows} x {width} for {heads} + 2 * {kv_heads} heads of {dim}"));
        }
        if spec.planes.len() != 2
            || spec.planes.iter().any(|plane| plane.heads().len() != kv_heads || plane.dim != dim)
        {
            return Err(format!("a cache whose planes are not {kv_heads} heads of {dim}"));
        }
        if layer >= spec.layers || *window == Some(0) {
            return Err(format!("layer {layer} of {}, window {window:?}", spec.layers));
        }
        Ok(())
    }

    /// [`backend::Step::attend`].
    pub(super) fn attend_heads(
        &mut self,
        layer: usize,
        mut qkv: CpuAct,
        attend: &Attend<'_, CpuBackend>,
    ) -> CpuAct {
        let (rows, width) = (qkv.rows, attend.heads * attend.head_dim);
        if self.fault.is_some() {
            return self.blank(rows, width);
        }
        if let Err(reason) = self.check_attend(layer, &qkv, attend) {
            return self.refuse(reason, rows, width);
        }
        let mut norms = [None, None];
        if let Some(norm) = &attend.qk_norm {
            if norm.span != NormSpan::Head {
                self.norm_projection(&mut qkv, attend, norm);
            } else {
                for (to, weight) in norms.iter_mut().zip([norm.q, norm.k]) {
                    *to = self.vector(weight, attend.head_dim, "a head norm's scale");
                }
            }
        }
        let sinks =
            attend.sinks.and_then(|sinks| self.vector(sinks, attend.heads, "a sink for every query head"));
        self.enter(layer, attend.window);
        if self.fault.is_some() {
            return self.blank(rows, width);
        }
        let angles = self.device.angles.of(attend.rope, self.batch);
        let mut out = self.act(rows, width);
        let (runs, mut plan) =
            (std::mem::take(&mut self.device.lists.runs), std::mem::take(&mut self.device.lists.plan));
        let runs = self.tables(runs);
        let prepare = Prepare {
            kernels: self.device.kernels,
            slab: self.kv.slab(),
            layer,
            heads: attend.heads,
            kv_heads: attend.kv_heads,
            dim: attend.head_dim,
            bf16: self.device.bf16(),
            angles: self.device.angles.at(angles),
            frequencies: attend.rope.inv_freq.len(),
            interleaved: attend.rope.style == RopeStyle::Interleaved,
            q_norm: norms[0],
            k_norm: norms[1],
            eps: attend.qk_norm.as_ref().map_or(0.0, |norm| norm.eps),
            qkv: qkv.floats.as_mut_ptr(),
        };
        // SAFETY: shapes were checked; `enter` has made sure that nobody else holds the positions written or writes those
        // read; sequences of one batch are different, so their rows do not meet.
        unsafe { prepare.run(&runs, &self.device.pool) };
        let attention = Attention {
            kernels: self.device.kernels,
            pairs: self.pair_kernels(),
            slab: self.kv.slab(),
            layer,
            runs: &runs,
            planes: Planes::Heads,
            heads: attend.heads,
            groups: attend.kv_heads,
            key_dim: attend.head_dim,
            value_dim: attend.head_dim,
            scale: attend.scale,
            window: attend.window,
            sinks,
            bf16: self.device.bf16(),
            q: qkv.floats.as_ptr(),
            q_stride: qkv.width,
            out: out.floats.as_mut_ptr(),
        };
        // SAFETY: as above, and the cache holds the rows' positions now.
        unsafe { attention.run(&self.device.pool, &self.device.arena, &mut plan) };
        let runs = emptied(runs);
        self.device.lists.runs = runs;
        self.device.lists.plan = plan;
        out
    }
}
