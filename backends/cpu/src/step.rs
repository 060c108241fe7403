//! A step on the CPU: every operation runs at once; the first failure comes out of [`Pending::wait`].

use std::ops::Range;

use backend::{
    Attend, BackendError, Batch, DType, Glu, KvError, KvStore, Mla, Moe, NormSpan, Out, Output, Pending,
    QkNorm, Rope, RopeStyle, Run, SeqId, Step,
};

use crate::attend::{Attention, Planes, Prepare, PrepareLatent, Projection, Rows};
use crate::device::CpuBackend;
use crate::heads::HeadsProduct;
use crate::kernel::PairKernels;
use crate::kv::CpuKv;
use crate::lease::CpuExport;
use crate::memory::Floats;
use crate::packed::{CpuWeight, Kind, Packed};
use crate::product::Product;
use crate::rope::Angles;

/// An activation `[rows, width]`: f32 in memory, each value one of the step's dtype unless a product just made it.
#[derive(Debug)]
pub struct CpuAct {
    pub(crate) floats: Floats,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    /// Whether values are those of the step's dtype. A product's are not yet: the next operation rounds as it reads,
    /// and logits stay as they are.
    pub(crate) rounded: bool,
}

/// A step of the CPU backend.
#[derive(Debug)]
pub struct CpuStep<'a> {
    pub(crate) device: &'a mut CpuBackend,
    pub(crate) kv: &'a mut CpuKv,
    pub(crate) batch: &'a Batch,
    angles: Vec<Angles>,
    fault: Option<BackendError>,
}

/// Floats that one task of an elementwise operation handles at least.
const FLOATS_PER_TASK: usize = 8 * 1024;

/// Raw rows that tasks use disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Raw(pub(crate) *mut f32);
// SAFETY: every task uses its own rows, see `each_row`.
unsafe impl Sync for Raw {}
// SAFETY: as above.
unsafe impl Send for Raw {}

impl Raw {
    pub(crate) fn row(self, row: usize, width: usize) -> *mut f32 {
        self.0.wrapping_add(row * width)
    }
}

impl<'a> CpuStep<'a> {
    pub(crate) fn new(device: &'a mut CpuBackend, kv: &'a mut CpuKv, batch: &'a Batch) -> Self {
        let fault = check(batch).err().map(BackendError::Device);
        CpuStep { device, kv, batch, angles: Vec::new(), fault }
    }

    fn fail(&mut self, error: impl Into<BackendError>) {
        self.fault.get_or_insert(error.into());
    }

    pub(crate) fn act(&self, rows: usize, width: usize) -> CpuAct {
        CpuAct { floats: self.device.arena.floats(rows * width), rows, width, rounded: true }
    }

    /// Stands in for the result of an operation that failed.
    fn blank(&self, rows: usize, width: usize) -> CpuAct {
        let mut act = self.act(rows, width);
        act.floats.as_mut_slice().fill(0.0);
        act
    }

    fn refuse(&mut self, reason: String, rows: usize, width: usize) -> CpuAct {
        self.fail(BackendError::Device(reason));
        self.blank(rows, width)
    }

    /// Calls `f` for every row, on all threads when there is enough to do.
    pub(crate) fn each_row(&self, rows: usize, width: usize, f: impl Fn(usize) + Sync) {
        let block = FLOATS_PER_TASK.div_ceil(width.max(1)).max(1);
        // A float of an elementwise operation takes about as long as 8 multiply-adds of a product.
        self.device.pool.run(rows.div_ceil(block), rows * width * 8, |task, _| {
            (task * block..rows.min((task + 1) * block)).for_each(&f);
        });
    }

    fn round(&self, x: &mut CpuAct) {
        let (bf16, kernels) = (self.device.bf16(), self.device.kernels);
        if bf16 && !x.rounded {
            let (raw, width) = (Raw(x.floats.as_mut_ptr()), x.width);
            self.each_row(x.rows, width, |row| {
                let at = raw.row(row, width);
                // SAFETY: the row's floats, used by this task only.
                unsafe { (kernels.round)(at, at, width, bf16) };
            });
        }
        x.rounded = true;
    }

    fn vector<'w>(&mut self, weight: &'w CpuWeight, width: usize, what: &str) -> Option<&'w [f32]> {
        match &weight.0 {
            Kind::Vector(vector) if vector.len() == width => return Some(vector),
            Kind::Vector(vector) => {
                self.fail(BackendError::Device(format!("{what} of {} for width {width}", vector.len())));
            }
            _ => self.fail(BackendError::Device(format!("{what} is not a vector"))),
        }
        None
    }

    /// `x` rounded to the step's dtype, where it is not yet.
    fn rounded_copy(&self, x: &CpuAct) -> Option<CpuAct> {
        if x.rounded {
            return None;
        }
        let mut copy = self.act(x.rows, x.width);
        copy.floats.as_mut_slice().copy_from_slice(x.floats.as_slice());
        copy.rounded = false;
        self.round(&mut copy);
        Some(copy)
    }

    /// `silu(gate) * up` of `[rows, gate | up]`.
    pub(crate) fn silu(&self, x: &CpuAct) -> CpuAct {
        let (rows, width) = (x.rows, x.width / 2);
        let mut out = self.act(rows, width);
        let (kernels, bf16, to) = (self.device.kernels, self.device.bf16(), Raw(out.floats.as_mut_ptr()));
        let from = x.floats.as_slice();
        self.each_row(rows, width, |row| {
            let (gate, up) = from[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: the row's floats, of which only this task writes.
            unsafe { (kernels.silu)(gate.as_ptr(), up.as_ptr(), to.row(row, width), width, bf16) };
        });
        out
    }

    pub(crate) fn product(&self, x: &CpuAct, weight: &Packed) -> CpuAct {
        let mut out = self.act(x.rows, weight.outputs);
        out.rounded = !self.device.bf16();
        let kernels = self.device.kernels;
        let operands = self.operands(x, weight);
        let product = Product {
            kernels,
            weight,
            x: operands.of(x, weight),
            out: out.floats.as_mut_ptr(),
            rows: x.rows,
        };
        // SAFETY: x is [rows, inputs], out [rows, outputs], both alive until the product is done.
        unsafe { product.run(&self.device.pool) };
        out
    }

    /// How attention multiplies bf16, where the step and its cache are of it.
    fn pair_kernels(&self) -> Option<PairKernels> {
        let bf16 = self.device.bf16() && self.kv.spec().planes.iter().all(|plane| plane.dtype == DType::BF16);
        self.device.kernels.attend.filter(|_| bf16)
    }

    /// The angles of this step's rows; computed at the first layer that asks.
    fn angles(&mut self, rope: &Rope) -> usize {
        if let Some(at) = self.angles.iter().position(|angles| angles.are_of(rope)) {
            return at;
        }
        self.angles.push(Angles::new(rope, self.batch));
        self.angles.len() - 1
    }

    /// Asks for the cache of every run: its positions to be written, those before to be read. A failure is this step's.
    fn enter(&mut self, layer: usize, window: Option<u32>) {
        for run in &self.batch.runs {
            let first = window.map_or(0, |window| (run.start + 1).saturating_sub(window));
            if let Err(error) = self.kv.enter(run.seq, layer, first, run.start..run.start + run.len) {
                return self.fail(error);
            }
        }
    }

    /// The runs of the batch with their blocks.
    fn tables(&self) -> Vec<Rows<'_>> {
        let mut row = 0;
        let place = |run: &Run| {
            let len = run.len as usize;
            row += len;
            // `enter` has found the sequence: without it there would be a fault.
            Rows {
                table: self.kv.table(run.seq).unwrap_or(&[]),
                row: row - len,
                start: run.start as usize,
                len,
            }
        };
        self.batch.runs.iter().map(place).collect()
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
        let planes: Vec<(usize, usize)> =
            spec.planes.iter().map(|plane| (plane.heads().len(), plane.dim)).collect();
        if layer >= spec.layers || planes != [(1, *latent_dim), (1, *rope_dim)] {
            return Err(format!("layer {layer} of a cache of {} with planes {planes:?}", spec.layers));
        }
        let shapes = [mla.q_to_latent, mla.latent_to_value].map(|weight| match &weight.0 {
            Kind::Heads(w) => (w.heads, w.inputs, w.outputs),
            _ => (0, 0, 0),
        });
        if shapes != [(*heads, *nope_dim, *latent_dim), (*heads, *latent_dim, *value_dim)] {
            return Err(format!(
                "products of heads {shapes:?} for {nope_dim} -> {latent_dim} -> {value_dim}"
            ));
        }
        Ok(())
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
}

impl Step for CpuStep<'_> {
    type Backend = CpuBackend;

    fn embed(&mut self, table: &CpuWeight) -> CpuAct {
        let rows = self.batch.rows();
        let (count, width) = match &table.0 {
            Kind::Product(packed) => (packed.outputs, packed.inputs),
            Kind::Table(table) => (table.rows, table.cols),
            Kind::Vector(_) | Kind::Heads(_) | Kind::Experts(_) => {
                return self.refuse("this weight is not an embedding table".to_owned(), rows, 1);
            }
        };
        let ids = match self.ids() {
            Ok(ids) => ids,
            Err(error) => {
                self.fail(error);
                return self.blank(rows, width);
            }
        };
        if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
            return self.refuse(format!("token {id} in an embedding table of {count}"), rows, width);
        }
        let mut out = self.act(rows, width);
        let (kernels, to) = (self.device.kernels, Raw(out.floats.as_mut_ptr()));
        self.each_row(rows, width, |row| {
            // SAFETY: the row's floats, which only this task uses.
            let to = unsafe { std::slice::from_raw_parts_mut(to.row(row, width), width) };
            match &table.0 {
                Kind::Product(packed) => packed.output(kernels, ids[row] as usize, to),
                Kind::Table(table) => table.row(ids[row] as usize, to),
                Kind::Vector(_) | Kind::Heads(_) | Kind::Experts(_) => {}
            }
        });
        out.rounded = false;
        self.round(&mut out);
        out
    }

    fn resume(&mut self, hidden: CpuAct) -> CpuAct {
        hidden
    }

    fn norm(&mut self, x: &CpuAct, weight: &CpuWeight, eps: f32) -> CpuAct {
        let (rows, width) = (x.rows, x.width);
        let Some(weight) = self.vector(weight, width, "a norm's scale") else {
            return self.blank(rows, width);
        };
        let mut out = self.act(rows, width);
        let (kernels, bf16, to) = (self.device.kernels, self.device.bf16(), Raw(out.floats.as_mut_ptr()));
        let from = x.floats.as_slice();
        self.each_row(rows, width, |row| {
            // SAFETY: the row's floats of x, the weight and the output, which only this task writes.
            unsafe {
                let x = from[row * width..].as_ptr();
                (kernels.norm)(x, weight.as_ptr(), to.row(row, width), width, eps, bf16);
            }
        });
        out
    }

    fn linear(&mut self, x: &CpuAct, weight: &CpuWeight) -> CpuAct {
        let Kind::Product(packed) = &weight.0 else {
            return self.refuse("a product with a weight that is not one".to_owned(), x.rows, 1);
        };
        if packed.inputs != x.width {
            let reason = format!("a product of {} inputs with width {}", packed.inputs, x.width);
            return self.refuse(reason, x.rows, packed.outputs);
        }
        match self.rounded_copy(x) {
            None => self.product(x, packed),
            Some(copy) => self.product(&copy, packed),
        }
    }

    fn add(&mut self, mut x: CpuAct, y: CpuAct) -> CpuAct {
        let (rows, width) = (x.rows, x.width);
        if (rows, width) != (y.rows, y.width) {
            let reason = format!("a sum of {rows} x {width} and {} x {}", y.rows, y.width);
            return self.refuse(reason, rows, width);
        }
        let (kernels, bf16, to, from) =
            (self.device.kernels, self.device.bf16(), Raw(x.floats.as_mut_ptr()), y.floats.as_slice());
        self.each_row(rows, width, |row| {
            // SAFETY: the row's floats of both, which only this task uses.
            unsafe { (kernels.add)(to.row(row, width), from[row * width..].as_ptr(), width, bf16) };
        });
        x.rounded = true;
        x
    }

    fn bias(&mut self, mut x: CpuAct, bias: &CpuWeight) -> CpuAct {
        let (rows, width) = (x.rows, x.width);
        let Some(bias) = self.vector(bias, width, "a bias") else { return self.blank(rows, width) };
        let (kernels, bf16, to) = (self.device.kernels, self.device.bf16(), Raw(x.floats.as_mut_ptr()));
        self.each_row(rows, width, |row| {
            // SAFETY: the row's floats, which only this task uses.
            unsafe { (kernels.add)(to.row(row, width), bias.as_ptr(), width, bf16) };
        });
        x.rounded = true;
        x
    }

    fn glu(&mut self, x: CpuAct, kind: Glu) -> CpuAct {
        let Glu::Silu = kind;
        let (rows, width) = (x.rows, x.width / 2);
        if !x.width.is_multiple_of(2) {
            return self.refuse(format!("a gated unit of odd width {}", x.width), rows, width);
        }
        self.silu(&x)
    }

    fn rows(&mut self, x: CpuAct, rows: &[u32]) -> CpuAct {
        let width = x.width;
        if let Some(row) = rows.iter().find(|row| **row as usize >= x.rows) {
            return self.refuse(format!("row {row} of {}", x.rows), rows.len(), width);
        }
        let mut out = self.act(rows.len(), width);
        out.rounded = x.rounded;
        for (row, to) in rows.iter().zip(out.floats.as_mut_slice().chunks_exact_mut(width.max(1))) {
            to.copy_from_slice(&x.floats.as_slice()[*row as usize * width..][..width]);
        }
        out
    }

    fn all_reduce(&mut self, mut x: CpuAct) -> CpuAct {
        if self.device.peers.world() > 1 {
            if let Some(fault) = &self.fault {
                // The other ranks would wait for a sum that never comes.
                self.device.peers.leave(&fault.to_string());
                return x;
            }
            if let Err(error) = self.join(&mut x) {
                self.fail(error);
            }
        }
        self.round(&mut x);
        x
    }

    fn attend(&mut self, layer: usize, mut qkv: CpuAct, attend: &Attend<'_, CpuBackend>) -> CpuAct {
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
        self.enter(layer, attend.window);
        if self.fault.is_some() {
            return self.blank(rows, width);
        }
        let angles = self.angles(attend.rope);
        let mut out = self.act(rows, width);
        let runs = self.tables();
        let prepare = Prepare {
            kernels: self.device.kernels,
            slab: self.kv.slab(),
            layer,
            heads: attend.heads,
            kv_heads: attend.kv_heads,
            dim: attend.head_dim,
            bf16: self.device.bf16(),
            angles: &self.angles[angles],
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
            runs,
            planes: Planes::Heads,
            heads: attend.heads,
            groups: attend.kv_heads,
            key_dim: attend.head_dim,
            value_dim: attend.head_dim,
            scale: attend.scale,
            window: attend.window,
            bf16: self.device.bf16(),
            q: qkv.floats.as_ptr(),
            q_stride: qkv.width,
            out: out.floats.as_mut_ptr(),
        };
        // SAFETY: as above, and the cache holds the rows' positions now.
        unsafe { attention.run(&self.device.pool, &self.device.arena) };
        out
    }

    /// Always in the absorbed form, for prompts too: so a row's bits do not depend on who computes it. What lies between
    /// the products is not rounded.
    fn attend_mla(
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
        let angles = self.angles(mla.rope);
        let key = mla.latent_dim + mla.rope_dim;
        let q_head = mla.nope_dim + mla.rope_dim;
        let mut absorbed = self.act(rows, mla.heads * key);
        let mut latents = self.act(rows, mla.heads * mla.latent_dim);
        let mut out = self.act(rows, width);
        let runs = self.tables();
        let prepare = PrepareLatent {
            kernels: self.device.kernels,
            slab: self.kv.slab(),
            layer,
            heads: mla.heads,
            nope_dim: mla.nope_dim,
            rope_dim: mla.rope_dim,
            latent_dim: mla.latent_dim,
            bf16: self.device.bf16(),
            angles: &self.angles[angles],
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
            runs,
            planes: Planes::Latent,
            heads: mla.heads,
            groups: latent_groups(mla.heads),
            key_dim: key,
            value_dim: mla.latent_dim,
            scale: mla.scale,
            window: None,
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
            attention.run(&self.device.pool, &self.device.arena);
            into_values.run(&self.device.pool);
        }
        out.rounded = !self.device.bf16();
        self.round(&mut out);
        out
    }

    fn moe(&mut self, x: &CpuAct, moe: &Moe<'_, CpuBackend>) -> CpuAct {
        let copy = self.rounded_copy(x);
        match self.mixture(copy.as_ref().unwrap_or(x), moe) {
            Ok(out) => out,
            Err(reason) => self.refuse(reason, x.rows, x.width),
        }
    }

    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<CpuExport, KvError> {
        self.kv.export(seq, layer, tokens)
    }

    fn submit(mut self, out: Out<CpuAct>) -> Box<dyn Pending<CpuAct>> {
        let grouped = self.device.peers.world() > 1;
        self.device.drawn.clear();
        if let Some(fault) = self.fault.take() {
            if grouped {
                self.device.peers.leave(&fault.to_string());
            }
            return Box::new(Done(Err(fault)));
        }
        Box::new(Done(match out {
            Out::Nothing => Ok(Output::Nothing),
            Out::Hidden(act) => Ok(Output::Hidden(act)),
            Out::Logits(act) => self.gather(act).map(|all| all.map_or(Output::Nothing, Output::Logits)),
            Out::Draw(act, draws) => self.draw(act, &draws),
        }))
    }
}

/// Heads share the latent cache; in groups of at most this many, several threads take part in one row.
const LATENT_GROUP_MAX: usize = 32;

/// Groups of equal size that `heads` are attended in.
fn latent_groups(heads: usize) -> usize {
    (1..=heads)
        .find(|groups| heads.is_multiple_of(*groups) && heads / groups <= LATENT_GROUP_MAX)
        .unwrap_or(heads)
}

/// What the runs of a batch must be for their rows to be apart in the cache.
fn check(batch: &Batch) -> Result<(), String> {
    let rows: usize = batch.runs.iter().map(|run| run.len as usize).sum();
    if rows != batch.ids.len() {
        return Err(format!("{} token ids for {rows} rows", batch.ids.len()));
    }
    if let Some(run) = batch.runs.iter().find(|run| run.start.checked_add(run.len).is_none()) {
        return Err(format!("{} rows of sequence {} from {}", run.len, run.seq, run.start));
    }
    let mut sequences: Vec<SeqId> = batch.runs.iter().map(|run| run.seq).collect();
    sequences.sort_unstable();
    match sequences.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two runs of sequence {} in one step", pair[0])),
        None => Ok(()),
    }
}

/// A step that has run.
struct Done(Result<Output<CpuAct>, BackendError>);

impl Pending<CpuAct> for Done {
    fn ready(&self) -> bool {
        true
    }

    fn wait(self: Box<Self>) -> Result<Output<CpuAct>, BackendError> {
        self.0
    }
}
