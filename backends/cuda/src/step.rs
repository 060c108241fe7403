//! A step on the GPU: operations queue kernels in order and return at once. The first failure comes out of
//! [`Pending::wait`].

mod draw;
mod end;
mod fetched;

use std::borrow::Cow;
use std::ops::Range;
use std::rc::Rc;

use backend::{Attend, BackendError, Batch, Cut, Glu, KvError, KvStore, Mla, Moe, Out, Pending, SeqId, Step};

use crate::act::{CudaAct, State};
use crate::args::{AddArgs, GatherArgs, GluArgs, NormArgs};
use crate::attend::Rows;
use crate::device::{Device, Open, THREADS};
use crate::driver::Driver;
use crate::kv::CudaKv;
use crate::lease::CudaExport;
use crate::memory::Buffer;
use crate::nccl::Element;
use crate::weight::{CudaWeight, Data, Kind};

pub(crate) use fetched::Fetched;

/// Rows of a step that generates are counted in so many, beyond the first of them: few kinds of steps come up then.
const ROWS_STEP: usize = 8;
/// Most rows of such a step.
const ROWS_MAX: usize = 256;
/// Rows of padding that a step may have.
pub(crate) const PADDING_MAX: usize = ROWS_STEP - 1;
/// Longest run of such a step: a token, and guesses of those behind it. Longer ones are pieces of prompts.
pub(crate) const RUN_ROWS_MAX: u32 = 32;

/// A step of the CUDA backend. One that generates, a row for each sequence and for each guess, is written down until it is
/// complete, so that it may be replayed ([`crate::queue`]). Which rows are of one sequence is data, but for how many tiles they make.
pub struct CudaStep<'a, D: Driver> {
    pub(crate) device: &'a mut Device<D>,
    pub(crate) kv: &'a mut CudaKv<D>,
    /// With a run of its own for every row of padding, at the end.
    pub(crate) batch: Cow<'a, Batch>,
    /// Rows and runs without padding.
    pub(crate) asked: usize,
    pub(crate) asked_runs: usize,
    pub(crate) generates: bool,
    /// Where the batch's rows lie in the cache; made when first asked for.
    pub(crate) rows: Option<Rc<Rows<D>>>,
    fault: Option<BackendError>,
}

/// So many rows, with padding.
pub(crate) fn padded(rows: usize) -> usize {
    if rows <= ROWS_STEP { rows } else { rows.next_multiple_of(ROWS_STEP) }
}

/// A step that generates, with padding: runs of nobody's at the first positions, each with one of its own.
fn with_padding(batch: &Batch) -> Batch {
    let mut batch = batch.clone();
    for (start, _) in (0..).zip(batch.rows()..padded(batch.rows())) {
        batch.push(SeqId(u64::MAX), start, &[0]);
    }
    batch
}

impl<D: Driver> Drop for CudaStep<'_, D> {
    fn drop(&mut self) {
        // What a step that was not submitted has queued is done all the same; what fails comes out of a later one.
        let _ = self.device.queue().finish();
    }
}

impl<'a, D: Driver> CudaStep<'a, D> {
    pub(crate) fn new(device: &'a mut Device<D>, kv: &'a mut CudaKv<D>, batch: &'a Batch) -> Self {
        let rows: usize = batch.runs.iter().map(|run| run.len as usize).sum();
        let mut sequences: Vec<SeqId> = batch.runs.iter().map(|run| run.seq).collect();
        sequences.sort_unstable();
        let fault = if rows != batch.ids.len() {
            Some(format!("{} token ids for {rows} rows", batch.ids.len()))
        } else {
            let twice = sequences.windows(2).find(|pair| pair[0] == pair[1]);
            twice.map(|pair| format!("two runs of sequence {} in one step", pair[0]))
        };
        // In a group the same on all ranks.
        let ballot = device.ranks.as_ref().and_then(|ranks| ranks.ballot());
        let written = fault.is_none() && (device.ranks.is_none() || ballot.is_some());
        let generates =
            written && (1..=ROWS_MAX).contains(&rows) && batch.runs.iter().all(|run| run.len <= RUN_ROWS_MAX);
        let queue = device.queue();
        let begun = if generates { queue.begin(ballot) } else { queue.finish() };
        CudaStep {
            device,
            kv,
            batch: if generates && padded(rows) > rows {
                Cow::Owned(with_padding(batch))
            } else {
                Cow::Borrowed(batch)
            },
            asked: rows,
            asked_runs: batch.runs.len(),
            generates,
            rows: None,
            fault: fault.map(BackendError::Device).or(begun.err()),
        }
    }

    /// Queues an operation that gives `[rows, width]`; after a fault nothing is queued any more.
    pub(crate) fn queue<R>(
        &mut self,
        rows: usize,
        width: usize,
        operation: impl FnOnce(&mut Self) -> Result<R, BackendError>,
    ) -> CudaAct<D>
    where
        R: Into<Rc<Buffer<D>>>,
    {
        if self.fault.is_none() {
            match operation(self) {
                Ok(buffer) => {
                    return CudaAct { rows, asked: rows, width, state: State::Ready(buffer.into()) };
                }
                Err(error) => self.fault = Some(error),
            }
        }
        CudaAct::blank(rows, width)
    }

    pub(crate) fn vector(
        &self,
        weight: &CudaWeight<D>,
        width: usize,
        what: &str,
    ) -> Result<u64, BackendError> {
        match &*weight.0 {
            Kind::Vector(memory, len) if *len == width => Ok(memory.address),
            Kind::Vector(_, len) => Err(BackendError::Device(format!("{what} of {len} for width {width}"))),
            _ => Err(BackendError::Device(format!("{what} is not a vector"))),
        }
    }
}

impl<D: Driver + Open> Step for CudaStep<'_, D> {
    type Backend = Device<D>;

    fn embed(&mut self, table: &CudaWeight<D>) -> CudaAct<D> {
        let rows = self.batch.rows();
        let width = match &*table.0 {
            Kind::Product(matrix) => matrix.inputs,
            _ => 1,
        };
        self.queue(rows, width, |step| {
            let Kind::Product(matrix) = &*table.0 else {
                return Err(BackendError::Device("this weight is not an embedding table".to_owned()));
            };
            let ids = step.ids(matrix.outputs)?;
            let [part] = &matrix.parts[..] else {
                return Err(BackendError::Device("an embedding table in several parts".to_owned()));
            };
            let out = step.device.elements(rows * width)?;
            match &part.data {
                Data::Plain(memory) => {
                    step.device.gather(memory.address, ids.address, rows, width, out.address)?
                }
                Data::Quantised { args, .. } => {
                    step.device.decode(*args, ids.address, rows, width, out.address)?;
                }
            }
            Ok(out)
        })
        .asked(self.asked)
    }

    fn resume(&mut self, hidden: CudaAct<D>) -> CudaAct<D> {
        hidden
    }

    fn norm(&mut self, x: &CudaAct<D>, weight: &CudaWeight<D>, eps: f32) -> CudaAct<D> {
        self.queue(x.rows, x.width, |step| {
            let weight = step.vector(weight, x.width, "a norm's scale")?;
            let from = x.buffer(step.device)?;
            let out = step.device.elements(x.rows * x.width)?;
            let args = NormArgs { x: from.address, weight, out: out.address, width: x.width as u32, eps };
            step.device.each(step.device.of_type("norm_f32", "norm_bf16"), x.rows, &args)?;
            Ok(out)
        })
        .asked(x.asked)
    }

    fn linear(&mut self, x: &CudaAct<D>, weight: &CudaWeight<D>) -> CudaAct<D> {
        let outputs = match &*weight.0 {
            Kind::Product(matrix) => matrix.outputs,
            _ => 1,
        };
        if self.fault.is_some() {
            return CudaAct::blank(x.rows, outputs).asked(x.asked);
        }
        let checked = match &*weight.0 {
            Kind::Product(matrix) if matrix.inputs == x.width => x.buffer(self.device),
            Kind::Product(matrix) => {
                let reason = format!("a product of {} inputs with width {}", matrix.inputs, x.width);
                Err(BackendError::Device(reason))
            }
            _ => Err(BackendError::Device("a product with a weight that is not one".to_owned())),
        };
        match checked {
            Ok(buffer) => CudaAct {
                rows: x.rows,
                asked: x.asked,
                width: outputs,
                state: State::Product { x: buffer, weight: weight.0.clone() },
            },
            Err(error) => {
                self.fault = Some(error);
                CudaAct::blank(x.rows, outputs).asked(x.asked)
            }
        }
    }

    fn add(&mut self, x: CudaAct<D>, y: CudaAct<D>) -> CudaAct<D> {
        self.queue(x.rows, x.width, |step| {
            if (x.rows, x.width) != (y.rows, y.width) {
                let reason = format!("a sum of {} x {} and {} x {}", x.rows, x.width, y.rows, y.width);
                return Err(BackendError::Device(reason));
            }
            let (left, right) = (x.buffer(step.device)?, y.buffer(step.device)?);
            step.device.add(left.address, right.address, x.rows, x.width, false)
        })
        .asked(x.asked)
    }

    fn glu(&mut self, x: CudaAct<D>, kind: Glu) -> CudaAct<D> {
        self.queue(x.rows, x.width / 2, |step| {
            if !x.width.is_multiple_of(2) {
                return Err(BackendError::Device(format!("a gated unit of odd width {}", x.width)));
            }
            let from = x.buffer(step.device)?;
            step.device.glu(from.address, x.rows, x.width / 2, kind)
        })
        .asked(x.asked)
    }

    fn rows(&mut self, x: CudaAct<D>, rows: &[u32]) -> CudaAct<D> {
        if let Some(row) = rows.iter().find(|row| **row as usize >= x.asked) {
            let reason = format!("row {row} of {}", x.asked);
            self.fault.get_or_insert(BackendError::Device(reason));
        }
        let mut which = rows.to_vec();
        if self.generates {
            which.resize(padded(rows.len()), 0);
        }
        self.queue(which.len(), x.width, |step| {
            let from = x.buffer(step.device)?;
            let sent = step.device.pool.send(&which)?;
            let out = step.device.elements(which.len() * x.width)?;
            step.device.gather(from.address, sent.address, which.len(), x.width, out.address)?;
            Ok(out)
        })
        .asked(rows.len())
    }

    fn all_reduce(&mut self, x: CudaAct<D>) -> CudaAct<D> {
        if self.device.ranks.is_none() {
            return x;
        }
        self.queue(x.rows, x.width, |step| {
            let device = &*step.device;
            let sums = x.floats(device)?;
            let count = x.rows * x.width;
            if let Some(ranks) = &device.ranks {
                ranks.sum(device, sums.address, count, Element::F32)?;
            }
            if device.bf16() {
                let out = device.elements(count)?;
                device.narrow(sums.address, out.address, count)?;
                return Ok(Rc::new(out));
            }
            Ok(sums)
        })
        .asked(x.asked)
    }

    fn bias(&mut self, x: CudaAct<D>, bias: &CudaWeight<D>) -> CudaAct<D> {
        self.queue(x.rows, x.width, |step| {
            let bias = step.vector(bias, x.width, "a bias")?;
            let from = x.buffer(step.device)?;
            step.device.add(from.address, bias, x.rows, x.width, true)
        })
        .asked(x.asked)
    }

    fn attend(&mut self, layer: usize, qkv: CudaAct<D>, attend: &Attend<'_, Device<D>>) -> CudaAct<D> {
        self.queue(qkv.rows, attend.heads * attend.head_dim, |step| step.attention(layer, &qkv, attend))
            .asked(qkv.asked)
    }

    /// Keys and values of all heads are made from the latents of the whole context.
    fn attend_mla(
        &mut self,
        layer: usize,
        q: CudaAct<D>,
        kv: CudaAct<D>,
        mla: &Mla<'_, Device<D>>,
    ) -> CudaAct<D> {
        self.queue(q.rows, mla.heads * mla.value_dim, |step| step.latent_attention(layer, &q, &kv, mla))
            .asked(q.asked)
    }

    fn moe(&mut self, x: &CudaAct<D>, moe: &Moe<'_, Device<D>>) -> CudaAct<D> {
        let act = self.queue(x.rows, x.width, |step| step.experts(x, moe)).asked(x.asked);
        match act.state {
            State::Ready(sums) if self.device.ranks.is_some() => {
                CudaAct { state: State::Partial(sums), ..act }
            }
            _ => act,
        }
    }

    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<CudaExport<D>, KvError> {
        self.kv.export(seq, layer, tokens)
    }

    fn export_there(
        &mut self,
        seq: SeqId,
        layer: usize,
        tokens: Range<u32>,
        cuts: &[Cut],
    ) -> Result<CudaExport<D>, KvError> {
        self.kv.export_there(seq, layer, tokens, cuts)
    }

    fn submit(self, out: Out<CudaAct<D>>) -> Box<dyn Pending<CudaAct<D>>> {
        self.end(out)
    }
}

impl<D: Driver> Device<D> {
    fn gather(
        &self,
        table: u64,
        rows: u64,
        count: usize,
        width: usize,
        out: u64,
    ) -> Result<(), BackendError> {
        let args = GatherArgs { table, rows, out, width: width as u32, count: count as u32 };
        self.launch(self.of_type("gather_f32", "gather_bf16"), [count as u32, 1, 1], THREADS, 0, &args)
    }

    fn add(
        &self,
        x: u64,
        y: u64,
        rows: usize,
        width: usize,
        broadcast: bool,
    ) -> Result<Buffer<D>, BackendError> {
        let out = self.elements(rows * width)?;
        let args = AddArgs { x, y, out: out.address, width: width as u32, broadcast: u32::from(broadcast) };
        self.by_columns(self.of_type("add_f32", "add_bf16"), rows, width, &args)?;
        Ok(out)
    }

    /// The gated unit, `[rows, width]`.
    pub(crate) fn glu(
        &self,
        x: u64,
        rows: usize,
        width: usize,
        kind: Glu,
    ) -> Result<Buffer<D>, BackendError> {
        let out = self.elements(rows * width)?;
        let (clamped, limit, slope) = match kind {
            Glu::Silu => (0, 0.0, 0.0),
            Glu::Clamped { limit, slope } => (1, limit, slope),
        };
        let args = GluArgs { x, out: out.address, width: width as u32, clamped, limit, slope };
        self.by_columns(self.of_type("glu_f32", "glu_bf16"), rows, width, &args)?;
        Ok(out)
    }
}
