//! Latent attention (MLA) as a step's operation.

use backend::{KvStore, Mla, RopeStyle};

use super::CpuStep;
use crate::act::CpuAct;
use crate::attend::{Attention, Planes, PrepareLatent};
use crate::device::CpuBackend;
use crate::heads::HeadsProduct;
use crate::lists::emptied;
use crate::packed::Kind;

/// Heads share the latent cache; in groups of at most this many, several threads take part in one row.
const LATENT_GROUP_MAX: usize = 32;

/// Groups of equal size that `heads` are attended in.
fn latent_groups(heads: usize) -> usize {
    (1..=heads)
        .find(|groups| heads.is_multiple_of(*groups) && heads / groups <= LATENT_GROUP_MAX)
        .unwrap_or(heads)
}

impl CpuStep<'_> {
    /// [`backend::Step::attend_mla`], always in the absorbed form, for prompts too: so a row's bits do not depend on who
    /// computes it. What lies between the products is not rounded.
    pub(super) fn attend_latent(
        &mut self,
        layer: usize,
        mut q: CpuAct,
        mut kv: CpuAct,
        mla: &Mla<'_, CpuBackend>,
    ) -> CpuAct {
        let (rows, width) = (q.rows, mla.heads * mla.value_dim);
        if self.fault.is_some() {
            return self.blank(rows, width);
        }
        if let Err(reason) = self.check_mla(layer, &q, &kv, mla) {
            return self.refuse(reason, rows, width);
        }
        let (Kind::Heads(to_latent), Kind::Heads(to_value)) = (&mla.q_to_latent.0, &mla.latent_to_value.0)
        else {
            return self.refuse("latent attention without products of heads".to_owned(), rows, width);
        };
        let Some(norm) = self.vector(mla.latent_norm, mla.latent_dim, "the latent norm's scale") else {
            return self.blank(rows, width);
        };
        self.enter(layer, None);
        if self.fault.is_some() {
            return self.blank(rows, width);
        }
        let angles = self.device.angles.of(mla.rope, self.batch);
        let key = mla.latent_dim + mla.rope_dim;
        let q_head = mla.nope_dim + mla.rope_dim;
        let mut absorbed = self.act(rows, mla.heads * key);
        let mut latents = self.act(rows, mla.heads * mla.latent_dim);
        let mut out = self.act(rows, width);
        let (runs, mut plan) =
            (std::mem::take(&mut self.device.lists.runs), std::mem::take(&mut self.device.lists.plan));
        let runs = self.tables(runs);
        let prepare = PrepareLatent {
            kernels: self.device.kernels,
            slab: self.kv.slab(),
            layer,
            heads: mla.heads,
            nope_dim: mla.nope_dim,
            rope_dim: mla.rope_dim,
            latent_dim: mla.latent_dim,
            bf16: self.device.bf16(),
            angles: self.device.angles.at(angles),
            interleaved: mla.rope.style == RopeStyle::Interleaved,
            norm,
            eps: mla.norm_eps,
            q: q.floats.as_mut_ptr(),
            kv: kv.floats.as_mut_ptr(),
            absorbed: absorbed.floats.as_mut_ptr(),
        };
        let product = |weight, x, x_strides, out, out_strides| HeadsProduct {
            kernels: self.device.kernels,
            weight,
            x,
            x_strides,
            out,
            out_strides,
            rows,
        };
        let into_latent = product(
            to_latent,
            q.floats.as_ptr(),
            (q.width, q_head),
            absorbed.floats.as_mut_ptr(),
            (absorbed.width, key),
        );
        // SAFETY: shapes were checked; `enter` has made sure that nobody else holds the positions written or writes those
        // read; sequences of one batch are different, so their rows do not meet.
        unsafe {
            prepare.run(&runs, &self.device.pool);
            into_latent.run(&self.device.pool);
        }
        let attention = Attention {
            kernels: self.device.kernels,
            pairs: self.pair_kernels(),
            slab: self.kv.slab(),
            layer,
            runs: &runs,
            planes: Planes::Latent,
            heads: mla.heads,
            groups: latent_groups(mla.heads),
            key_dim: key,
            value_dim: mla.latent_dim,
            scale: mla.scale,
            window: None,
            sinks: None,
            bf16: false,
            q: absorbed.floats.as_ptr(),
            q_stride: absorbed.width,
            out: latents.floats.as_mut_ptr(),
        };
        let into_values = product(
            to_value,
            latents.floats.as_ptr(),
            (latents.width, mla.latent_dim),
            out.floats.as_mut_ptr(),
            (width, mla.value_dim),
        );
        // SAFETY: as above, and the cache holds the rows' positions now.
        unsafe {
            attention.run(&self.device.pool, &self.device.arena, &mut plan);
            into_values.run(&self.device.pool);
        }
        let runs = emptied(runs);
        self.device.lists.runs = runs;
        self.device.lists.plan = plan;
        out.rounded = !self.device.bf16();
        self.round(&mut out);
        out
    }

    fn check_mla(
        &self,
        layer: usize,
        q: &CpuAct,
        kv: &CpuAct,
        mla: &Mla<'_, CpuBackend>,
    ) -> Result<(), String> {
        let Mla { heads, nope_dim, rope_dim, value_dim, latent_dim, rope, .. } = mla;
        let spec = self.kv.spec();
        let rows = self.batch.rows();
        if *heads == 0 || rope_dim % 2 != 0 || latent_dim % 2 != 0 || rope.inv_freq.len() * 2 != *rope_dim {
            let pairs = rope.inv_freq.len();
            return Err(format!(
                "{heads} heads, latent of {latent_dim}, rope of {rope_dim} with {pairs} pairs"
            ));
        }
        if (q.rows, q.width) != (rows, heads * (nope_dim + rope_dim)) {
            return Err(format!(
                "q of {} x {} for {heads} heads of {nope_dim} + {rope_dim}",
                q.rows, q.width
            ));
        }
        if (kv.rows, kv.width) != (rows, latent_dim + rope_dim) {
            return Err(format!("kv of {} x {} for {latent_dim} + {rope_dim}", kv.rows, kv.width));
        }
        let planes = || spec.planes.iter().map(|plane| (plane.heads().len(), plane.dim));
        if layer >= spec.layers || !planes().eq([(1, *latent_dim), (1, *rope_dim)]) {
            let planes: Vec<(usize, usize)> = planes().collect();
            return Err(format!("layer {layer} of a cache of {} with planes {planes:?}", spec.layers));
        }
        let shapes = [mla.q_to_latent, mla.latent_to_value].map(|weight| match &weight.0 {
            Kind::Heads(w) => (w.heads(), w.inputs, w.outputs),
            _ => (0, 0, 0),
        });
        if shapes != [(*heads, *nope_dim, *latent_dim), (*heads, *latent_dim, *value_dim)] {
            return Err(format!(
                "products of heads {shapes:?} for {nope_dim} -> {latent_dim} -> {value_dim}"
            ));
        }
        Ok(())
    }
}
