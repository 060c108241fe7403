//! A step on the CPU: every operation runs at once; the first failure comes out of [`Pending::wait`].

mod attend;
mod latent;

use std::ops::Range;

use backend::{
    Attend, BackendError, Batch, Glu, KvError, KvStore, Mla, Moe, Out, Output, Pending, SeqId, Step,
};

use crate::act::{CpuAct, Raw};
use crate::device::CpuBackend;
use crate::kv::CpuKv;
use crate::lease::CpuExport;
use crate::packed::{CpuWeight, Kind, Packed};
use crate::product::Product;

/// A step of the CPU backend.
#[derive(Debug)]
pub struct CpuStep<'a> {
    pub(crate) device: &'a mut CpuBackend,
    pub(crate) kv: &'a mut CpuKv,
    pub(crate) batch: &'a Batch,
    fault: Option<BackendError>,
}

/// Floats that one task of an elementwise operation handles at least.
const FLOATS_PER_TASK: usize = 8 * 1024;

impl<'a> CpuStep<'a> {
    pub(crate) fn new(device: &'a mut CpuBackend, kv: &'a mut CpuKv, batch: &'a Batch) -> Self {
        let fault = check(batch, &mut device.lists.sequences).err().map(BackendError::Device);
        device.angles.begin();
        CpuStep { device, kv, batch, fault }
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

    /// The gated unit of `[rows, gate | up]`.
    pub(crate) fn gated(&self, x: &CpuAct, kind: Glu) -> CpuAct {
        let (rows, width) = (x.rows, x.width / 2);
        let mut out = self.act(rows, width);
        let (kernels, bf16, to) = (self.device.kernels, self.device.bf16(), Raw(out.floats.as_mut_ptr()));
        let from = x.floats.as_slice();
        self.each_row(rows, width, |row| {
            let (gate, up) = from[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            let (gate, up, out) = (gate.as_ptr(), up.as_ptr(), to.row(row, width));
            // SAFETY: the row's floats, of which only this task writes.
            unsafe {
                match kind {
                    Glu::Silu => (kernels.silu)(gate, up, out, width, bf16),
                    Glu::Clamped { limit, slope } => {
                        (kernels.clamped)(gate, up, out, width, limit, slope, bf16);
                    }
                }
            }
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
        self.device.lists.ids = ids;
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
        let (rows, width) = (x.rows, x.width / 2);
        if !x.width.is_multiple_of(2) {
            return self.refuse(format!("a gated unit of odd width {}", x.width), rows, width);
        }
        self.gated(&x, kind)
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

    fn attend(&mut self, layer: usize, qkv: CpuAct, attend: &Attend<'_, CpuBackend>) -> CpuAct {
        self.attend_heads(layer, qkv, attend)
    }

    fn attend_mla(&mut self, layer: usize, q: CpuAct, kv: CpuAct, mla: &Mla<'_, CpuBackend>) -> CpuAct {
        self.attend_latent(layer, q, kv, mla)
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

/// What the runs of a batch must be for their rows to be apart in the cache.
fn check(batch: &Batch, sequences: &mut Vec<SeqId>) -> Result<(), String> {
    let rows: usize = batch.runs.iter().map(|run| run.len as usize).sum();
    if rows != batch.ids.len() {
        return Err(format!("{} token ids for {rows} rows", batch.ids.len()));
    }
    if let Some(run) = batch.runs.iter().find(|run| run.start.checked_add(run.len).is_none()) {
        return Err(format!("{} rows of sequence {} from {}", run.len, run.seq, run.start));
    }
    sequences.clear();
    sequences.extend(batch.runs.iter().map(|run| run.seq));
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
