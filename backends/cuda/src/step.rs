//! A step on the GPU: operations queue kernels in order and return at once. The first failure comes out of
//! [`Pending::wait`].

use std::borrow::Cow;
use std::ops::Range;
use std::rc::Rc;

use backend::draw::{Noise, drawn};
use backend::{
    Attend, BackendError, Batch, Draw, Drawn, Glu, Input, KvError, KvStore, Mla, Moe, Out, Output, Pending,
    SeqId, Step,
};

use crate::act::{CudaAct, State};
use crate::args::{AddArgs, DrawArgs, GatherArgs, GluArgs, NormArgs, ResolveArgs};
use crate::attend::Rows;
use crate::device::{Device, Open, THREADS};
use crate::driver::{Driver, Lane};
use crate::kv::CudaKv;
use crate::lease::CudaExport;
use crate::memory::{Buffer, Pinned};
use crate::nccl::Element;
use crate::ranks::{Logits, Lost};
use crate::weight::{CudaWeight, Data, Kind};

/// Marks an id in flight, as `resolve` in `kernels/draw.cu` reads it.
const IN_FLIGHT: u32 = 1 << 31;
/// Words of a rule and of a choice in `kernels/draw.cu`.
const RULE_WORDS: usize = 4;
const CHOICE_WORDS: usize = 2;
/// Threads of a block that draws.
const DRAW_THREADS: u32 = 1024;

/// Rows of a step that generates are counted in so many, beyond the first of them: few kinds of steps come up then.
const ROWS_STEP: usize = 8;
/// Most rows of such a step.
const ROWS_MAX: usize = 256;
/// Rows of padding that a step may have.
pub(crate) const PADDING_MAX: usize = ROWS_STEP - 1;

/// A step of the CUDA backend. One that generates, a row for each sequence, is written down until it is complete, so that it
/// may be replayed ([`crate::queue`]).
pub struct CudaStep<'a, D: Driver> {
    pub(crate) device: &'a mut Device<D>,
    pub(crate) kv: &'a mut CudaKv<D>,
    /// With a run of its own for every row of padding, at the end.
    pub(crate) batch: Cow<'a, Batch>,
    /// Rows without padding.
    pub(crate) asked: usize,
    pub(crate) generates: bool,
    /// Where the batch's rows lie in the cache; made when first asked for.
    pub(crate) rows: Option<Rc<Rows<D>>>,
    fault: Option<BackendError>,
}

/// So many rows, with padding.
fn padded(rows: usize) -> usize {
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
        let _ = self.device.queue().close();
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
        let alone = device.ranks.is_none() && fault.is_none();
        let generates = alone && (1..=ROWS_MAX).contains(&rows) && batch.runs.iter().all(|run| run.len == 1);
        let queue = device.queue();
        let begun = if generates { queue.begin() } else { queue.close() };
        CudaStep {
            device,
            kv,
            batch: if generates && padded(rows) > rows {
                Cow::Owned(with_padding(batch))
            } else {
                Cow::Borrowed(batch)
            },
            asked: rows,
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

    /// The batch's token ids on the device.
    fn ids(&self, count: usize) -> Result<Buffer<D>, BackendError> {
        let mut words = Vec::with_capacity(self.batch.ids.len());
        for input in &self.batch.ids {
            words.push(match *input {
                Input::Id(id) if (id as usize) < count => id,
                Input::Id(id) => {
                    return Err(BackendError::Device(format!("token {id} in an embedding table of {count}")));
                }
                Input::Drawn(row) => match &self.device.drawn {
                    Some((drew, _)) if drew.get(row as usize) == Some(&true) => row | IN_FLIGHT,
                    _ => {
                        let reason = format!("row {row} of the step before drew no token");
                        return Err(BackendError::Device(reason));
                    }
                },
            });
        }
        let inputs = self.device.pool.send(&words)?;
        let Some((_, drawn)) = self.device.drawn.as_ref().filter(|_| self.batch.in_flight()) else {
            return Ok(inputs);
        };
        if let Some(ranks) = &self.device.ranks {
            // The ids are rank 0's: the others add nothing.
            let words = self.device.drawn.as_ref().map_or(0, |(drew, _)| drew.len()) * CHOICE_WORDS;
            if ranks.rank() != 0 {
                self.device.queue().clear(drawn.address, words * 4)?;
            }
            ranks.sum(self.device, drawn.address, words, Element::U32)?;
        }
        let out = self.device.pool.take(words.len() * 4)?;
        let args = ResolveArgs {
            inputs: inputs.address,
            drawn: drawn.address,
            out: out.address,
            count: words.len() as u32,
        };
        self.device.each("resolve", 1, &args)?;
        Ok(out)
    }

    /// Queues the drawing of rows of logits. Rows with filters are drawn on the host, which waits for them here.
    fn draw(&mut self, act: &CudaAct<D>, draws: &[Draw]) -> Result<Option<Drawing<D>>, BackendError> {
        if draws.len() != act.asked {
            return Err(BackendError::Device(format!(
                "{} draws for {} rows of logits",
                draws.len(),
                act.asked
            )));
        }
        let choices = self.choices(act.rows)?;
        let Some((logits, width)) = self.logits(act)? else {
            // Room for what rank 0 draws.
            self.device.drawn = Some((drew(draws), choices));
            return Ok(None);
        };
        let mut words = Vec::with_capacity(act.rows * RULE_WORDS);
        for draw in draws {
            match draw {
                Draw::Token(rule) if rule.is_greedy() => words.extend([1, 0, 0, 0]),
                Draw::Token(rule) if !rule.filters() => {
                    let [low, high] = Noise::new(rule.seed, rule.position).keys;
                    words.extend([2, low, high, rule.temperature.to_bits()]);
                }
                _ => words.extend([0; RULE_WORDS]),
            }
        }
        words.resize(act.rows * RULE_WORDS, 0);
        let rules = self.device.pool.send(&words)?;
        let args = DrawArgs {
            logits: logits.address,
            rules: rules.address,
            out: choices.address,
            width: width as u32,
        };
        self.device.launch("draw_rows", [act.rows as u32, 1, 1], DRAW_THREADS, 0, &args)?;
        let on_host = |draw: &Draw| match draw {
            Draw::Logits => true,
            Draw::Token(rule) => !rule.is_greedy() && rule.filters(),
        };
        let rows = if draws.iter().any(on_host) {
            let fetched = Fetched::of(self.device, logits.address, act.asked * width * 4)?;
            Some(fetched)
        } else {
            None
        };
        let mut drawing = Drawing { draws: draws.to_vec(), width, logits: rows, choices: None };
        if draws.iter().any(|draw| on_host(draw) && matches!(draw, Draw::Token(_))) {
            // The next step may want these ids: they are drawn now and sent.
            drawing.choices =
                Some(Fetched::of(self.device, choices.address, draws.len() * CHOICE_WORDS * 4)?);
            let rows = drawing.finish_ref()?;
            let words: Vec<u32> = rows
                .iter()
                .flat_map(|row| match row {
                    Drawn::Token(id) => [*id, u32::MAX],
                    _ => [0, 0],
                })
                .collect();
            self.device.pool.put(&words, &choices)?;
            self.device.drawn = Some((drew(draws), choices));
            return Ok(Some(drawing));
        }
        drawing.choices = Some(Fetched::of(self.device, choices.address, draws.len() * CHOICE_WORDS * 4)?);
        self.device.drawn = Some((drew(draws), choices));
        Ok(Some(drawing))
    }

    /// Room for what so many rows draw.
    fn choices(&mut self, rows: usize) -> Result<Rc<Buffer<D>>, BackendError> {
        let bytes = rows.next_power_of_two().max(ROWS_MAX) * CHOICE_WORDS * 4;
        match &self.device.choices {
            Some(choices) if choices.bytes() >= bytes => Ok(choices.clone()),
            _ => Ok(self.device.choices.insert(Rc::new(self.device.pool.take(bytes)?)).clone()),
        }
    }

    /// Logits of the whole vocabulary in f32, with its size; on rank 0 only.
    fn logits(&self, act: &CudaAct<D>) -> Result<Option<Logits<D>>, BackendError> {
        let mine = act.floats(self.device)?;
        let Some(ranks) = &self.device.ranks else { return Ok(Some((mine, act.width))) };
        let all = ranks.side_by_side(self.device, &mine, act.rows, act.width)?;
        Ok(all.filter(|_| ranks.rank() == 0))
    }

    /// Tells the other ranks that this step goes no further here.
    fn leave(&self, fault: &BackendError) {
        if let Some(ranks) = &self.device.ranks {
            ranks.leave(&fault.to_string());
        }
    }
}

/// Which rows drew an id.
fn drew(draws: &[Draw]) -> Vec<bool> {
    draws.iter().map(|draw| matches!(draw, Draw::Token(_))).collect()
}

/// Bytes on their way to the host.
pub(crate) struct Fetched<D: Driver> {
    host: Pinned<D>,
    bytes: usize,
    arrived: D::Event,
}

impl<D: Driver> Fetched<D> {
    /// Queued behind all work so far; `from` may be reused by what is queued later.
    pub(crate) fn of(device: &Device<D>, from: u64, bytes: usize) -> Result<Self, BackendError> {
        let queue = device.queue();
        let mut host = device.pool.pinned(bytes)?;
        queue.to_host(Lane::Compute, &mut host, 0, from, bytes)?;
        Ok(Fetched { host, bytes, arrived: queue.record(Lane::Compute)? })
    }

    /// Waits for them.
    pub(crate) fn bytes(&self) -> Result<&[u8], BackendError> {
        D::wait(&self.arrived)?;
        let host: &D::Host = &self.host;
        Ok(&host.as_ref()[..self.bytes])
    }

    fn words(&self) -> Result<impl Iterator<Item = u32>, BackendError> {
        let (words, _) = self.bytes()?.as_chunks();
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)))
    }
}

impl<D: Driver> Drop for Fetched<D> {
    fn drop(&mut self) {
        // The copy writes to this memory until then; a device that failed writes no more.
        let _ = D::wait(&self.arrived);
    }
}

/// Rows that are being drawn.
struct Drawing<D: Driver> {
    draws: Vec<Draw>,
    width: usize,
    logits: Option<Fetched<D>>,
    choices: Option<Fetched<D>>,
}

impl<D: Driver> Drawing<D> {
    fn finish_ref(&self) -> Result<Vec<Drawn>, BackendError> {
        let choices: Vec<u32> = match &self.choices {
            Some(choices) => choices.words()?.collect(),
            None => Vec::new(),
        };
        let logits: Vec<f32> = match &self.logits {
            Some(logits) => logits.words()?.map(f32::from_bits).collect(),
            None => Vec::new(),
        };
        let row = |(at, draw): (usize, &Draw)| match draw {
            Draw::Token(rule) if rule.is_greedy() || !rule.filters() => {
                match choices[at * CHOICE_WORDS..(at + 1) * CHOICE_WORDS] {
                    [id, u32::MAX] => Drawn::Token(id),
                    [_, id] => Drawn::NotFinite { id },
                    _ => Drawn::NotFinite { id: 0 },
                }
            }
            _ => drawn(&logits[at * self.width..(at + 1) * self.width], draw),
        };
        Ok(self.draws.iter().enumerate().map(row).collect())
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
        let Glu::Silu = kind;
        self.queue(x.rows, x.width / 2, |step| {
            if !x.width.is_multiple_of(2) {
                return Err(BackendError::Device(format!("a gated unit of odd width {}", x.width)));
            }
            let from = x.buffer(step.device)?;
            step.device.glu(from.address, x.rows, x.width / 2)
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

    fn submit(mut self, out: Out<CudaAct<D>>) -> Box<dyn Pending<CudaAct<D>>> {
        if self.fault.is_some() {
            self.device.drawn = None;
        }
        let outcome = match (self.fault.take(), out) {
            (Some(fault), _) => Outcome::Failed(fault),
            (None, out) => self.ending(out).unwrap_or_else(Outcome::Failed),
        };
        if let Outcome::Failed(fault) = &outcome {
            self.leave(fault);
        }
        let lost = self.device.ranks.as_ref().map_or_else(Lost::never, |ranks| ranks.lost());
        let ended = self.device.queue().record(Lane::Compute);
        match ended {
            Ok(ended) => Box::new(Running { outcome, ended, lost, driver: self.device.driver().clone() }),
            Err(error) => Box::new(Failed(error)),
        }
    }
}

impl<D: Driver + Open> CudaStep<'_, D> {
    fn ending(&mut self, out: Out<CudaAct<D>>) -> Result<Outcome<D>, BackendError> {
        if !matches!(out, Out::Draw(..)) {
            self.device.drawn = None;
        }
        Ok(match out {
            Out::Nothing => Outcome::Nothing,
            Out::Hidden(act) => {
                let buffer = act.buffer(self.device)?;
                Outcome::Hidden(CudaAct { state: State::Ready(buffer), ..act })
            }
            Out::Logits(act) => {
                let Some((logits, width)) = self.logits(&act)? else { return Ok(Outcome::Nothing) };
                Outcome::Logits(Fetched::of(self.device, logits.address, act.asked * width * 4)?)
            }
            Out::Draw(act, draws) => self.draw(&act, &draws)?.map_or(Outcome::Nothing, Outcome::Drawing),
        })
    }
}

enum Outcome<D: Driver> {
    Nothing,
    Hidden(CudaAct<D>),
    Logits(Fetched<D>),
    Drawing(Drawing<D>),
    Failed(BackendError),
}

/// A step that is queued.
struct Running<D: Driver> {
    outcome: Outcome<D>,
    ended: D::Event,
    lost: Lost,
    driver: D,
}

impl<D: Driver> Pending<CudaAct<D>> for Running<D> {
    fn ready(&self) -> bool {
        self.driver.passed(&self.ended)
    }

    fn wait(self: Box<Self>) -> Result<Output<CudaAct<D>>, BackendError> {
        let ended = D::wait(&self.ended);
        // Sums of a group that was given up are none, whether the device complains or not.
        self.lost.check()?;
        if let Outcome::Failed(error) = self.outcome {
            return Err(error);
        }
        ended?;
        match self.outcome {
            Outcome::Nothing => Ok(Output::Nothing),
            Outcome::Hidden(act) => Ok(Output::Hidden(act)),
            Outcome::Logits(fetched) => Ok(Output::Logits(fetched.words()?.map(f32::from_bits).collect())),
            Outcome::Drawing(drawing) => Ok(Output::Drawn(drawing.finish_ref()?)),
            Outcome::Failed(error) => Err(error),
        }
    }
}

/// A step whose end could not even be queued.
struct Failed(BackendError);

impl<H> Pending<H> for Failed {
    fn ready(&self) -> bool {
        true
    }

    fn wait(self: Box<Self>) -> Result<Output<H>, BackendError> {
        Err(self.0)
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

    /// `silu(gate) * up`, `[rows, width]`.
    pub(crate) fn glu(&self, x: u64, rows: usize, width: usize) -> Result<Buffer<D>, BackendError> {
        let out = self.elements(rows * width)?;
        let args = GluArgs { x, out: out.address, width: width as u32 };
        self.by_columns(self.of_type("glu_f32", "glu_bf16"), rows, width, &args)?;
        Ok(out)
    }
}
