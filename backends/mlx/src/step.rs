//! A step on MLX: operations record a lazy graph, [`Step::submit`] puts it in line (see `line`), [`Pending::wait`] reads the
//! result. The first refusal stops the recording and comes out at the end.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use backend::{
    Attend, BackendError, Batch, Draw, Glu, KvError, KvStore, Mla, Moe, Out, Output, Pending, SeqId, Step,
};
use mlx_rs::{Array, Dtype, fast, transforms};

use crate::device::MlxBackend;
use crate::draw::Draws;
use crate::fabric::Fabric;
use crate::graph::{Failure, Recorded, available, indices, int, mlx_type};
use crate::kv::MlxKv;
use crate::lease::MlxExport;
use crate::line::{Line, Ticket};
use crate::ready::Attention;
use crate::weight::MlxWeight;

/// An activation `[rows, width]` of the step's dtype: a node of the graph.
#[derive(Debug)]
pub struct MlxAct(pub(crate) Array);

impl MlxAct {
    pub(crate) fn rows(&self) -> usize {
        self.0.shape().first().map_or(0, |rows| *rows as usize)
    }

    pub(crate) fn width(&self) -> usize {
        self.0.shape().last().map_or(0, |width| *width as usize)
    }
}

/// A step of the MLX backend.
#[derive(Debug)]
pub struct MlxStep<'a> {
    pub(crate) device: &'a mut MlxBackend,
    pub(crate) kv: &'a mut MlxKv,
    pub(crate) batch: &'a Batch,
    pub(crate) attention: Option<Attention>,
    /// The last layer of the first half, and its attention: behind all that the half reads and writes of the cache.
    half: Option<(usize, Array)>,
    /// Whether everything before this step has ended.
    calm: bool,
    fault: Option<BackendError>,
}

impl<'a> MlxStep<'a> {
    pub(crate) fn new(device: &'a mut MlxBackend, kv: &'a mut MlxKv, batch: &'a Batch) -> Self {
        let rows: usize = batch.runs.iter().map(|run| run.len as usize).sum();
        let fault = (rows != batch.ids.len())
            .then(|| BackendError::Device(format!("{} token ids for {rows} rows", batch.ids.len())));
        MlxStep { device, kv, batch, attention: None, half: None, calm: false, fault }
    }

    /// Before a part of this step is evaluated while the rest is recorded: the step before has to end.
    fn calm(&mut self) {
        if !std::mem::replace(&mut self.calm, true)
            && let Err(failure) = self.kv.calm()
        {
            let fabric = self.device.fabric().ok().flatten().cloned();
            self.fault.get_or_insert(failed(fabric.as_deref(), failure));
        }
    }

    /// Records an operation; after a fault nothing is recorded any more and zeros stand in.
    fn record<E: Into<BackendError>>(
        &mut self,
        operation: impl FnOnce(&mut Self) -> Result<Array, E>,
    ) -> MlxAct {
        if self.fault.is_none() {
            match operation(self) {
                Ok(array) => return MlxAct(array),
                Err(error) => self.fault = Some(error.into()),
            }
        }
        MlxAct(Array::from_slice(&[0f32], &[1, 1]))
    }
}

impl MlxStep<'_> {
    /// Records the attention of a layer. A step that is evaluated at once is so in two halves (see `line`).
    fn attended(
        &mut self,
        layer: usize,
        operation: impl FnOnce(&mut Self) -> Result<Array, BackendError>,
    ) -> MlxAct {
        let act = self.record(operation);
        if layer + 1 == self.kv.spec().layers / 2 && self.fault.is_none() {
            self.half = Some((layer, act.0.clone()));
        }
        act
    }
}

impl Step for MlxStep<'_> {
    type Backend = MlxBackend;

    fn embed(&mut self, table: &MlxWeight) -> MlxAct {
        self.record(|step| {
            let table = table.product()?;
            let ids = step.ids(table.rows())?;
            table.take(&ids, mlx_type(step.device.dtype))
        })
    }

    fn resume(&mut self, hidden: MlxAct) -> MlxAct {
        hidden
    }

    fn norm(&mut self, x: &MlxAct, weight: &MlxWeight, eps: f32) -> MlxAct {
        self.record(|_| -> Recorded { Ok(fast::rms_norm(&x.0, Some(weight.vector(x.width())?), eps)?) })
    }

    fn linear(&mut self, x: &MlxAct, weight: &MlxWeight) -> MlxAct {
        self.record(|step| -> Recorded {
            Ok(weight.product()?.of(&x.0)?.as_dtype(mlx_type(step.device.dtype))?)
        })
    }

    fn add(&mut self, x: MlxAct, y: MlxAct) -> MlxAct {
        self.record(|_| -> Recorded { Ok(x.0.add(&y.0)?) })
    }

    fn glu(&mut self, x: MlxAct, kind: Glu) -> MlxAct {
        self.record(|step| step.device.fused.gated(&x.0, kind))
    }

    fn rows(&mut self, x: MlxAct, rows: &[u32]) -> MlxAct {
        self.record(|_| -> Recorded {
            if let Some(row) = rows.iter().find(|row| **row as usize >= x.rows()) {
                return Err(Failure(format!("row {row} of {}", x.rows())));
            }
            if rows.iter().map(|row| *row as usize).eq(0..x.rows()) {
                return Ok(x.0.clone());
            }
            let rows = indices(rows.iter().map(|row| *row as usize), &[int(rows.len())]);
            Ok(x.0.take_axis(&rows, 0)?)
        })
    }

    /// In the step's dtype: what travels is half of what f32 would be.
    fn all_reduce(&mut self, x: MlxAct) -> MlxAct {
        self.record(|step| step.device.joined(&x.0.as_dtype(mlx_type(step.device.dtype))?))
    }

    fn bias(&mut self, x: MlxAct, bias: &MlxWeight) -> MlxAct {
        self.record(|_| -> Recorded { Ok(x.0.add(bias.vector(x.width())?)?) })
    }

    fn attend(&mut self, layer: usize, qkv: MlxAct, attend: &Attend<'_, MlxBackend>) -> MlxAct {
        self.attended(layer, |step| step.attention(layer, &qkv, attend))
    }

    fn attend_mla(&mut self, layer: usize, q: MlxAct, kv: MlxAct, mla: &Mla<'_, MlxBackend>) -> MlxAct {
        self.attended(layer, |step| step.latent_attention(layer, &q, &kv, mla))
    }

    fn moe(&mut self, x: &MlxAct, moe: &Moe<'_, MlxBackend>) -> MlxAct {
        self.record(|step| crate::moe::experts(&mut step.device.fused, x, moe))
    }

    /// Evaluation of the graph up to here begins.
    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<MlxExport, KvError> {
        self.calm();
        self.kv.export(seq, layer, tokens)
    }

    /// Returns without waiting; evaluation begins when the step before has ended.
    fn submit(mut self, out: Out<MlxAct>) -> Box<dyn Pending<MlxAct>> {
        self.device.flight = None;
        let fabric = self.device.fabric().ok().flatten().cloned();
        let line = self.kv.line();
        // The cache is evaluated whatever happens, or its graph would grow from step to step.
        if let Some(fault) = self.fault.take() {
            let _ = self.kv.submit(&[], None);
            return Box::new(Running { asked: Err(fault), fabric: None, line });
        }
        let asked = match out {
            Out::Nothing => Ok(Asked::Nothing(Vec::new())),
            Out::Logits(act) => self.logits(&act.0),
            Out::Draw(act, draws) => self.draws(&act.0, &draws),
            Out::Hidden(act) => Ok(Asked::Hidden(act.0)),
        };
        if let Ok(Asked::Draws(draws)) = &asked {
            self.device.flight = Some(draws.flight());
        }
        let half = self.half.take().filter(|_| !self.calm);
        let submitted = asked.and_then(|asked| {
            let (ticket, ends) = self.kv.submit(&asked.arrays(), half)?;
            Ok((ticket, if let Asked::Nothing(_) = asked { Asked::Nothing(ends) } else { asked }))
        });
        let asked = submitted.map_err(|failure| failed(fabric.as_deref(), failure));
        Box::new(Running { asked, fabric, line })
    }
}

impl MlxStep<'_> {
    /// The whole rows in f32 on rank 0; the others have them made only.
    fn logits(&self, x: &Array) -> Result<Asked, Failure> {
        let fabric = self.device.fabric()?;
        let all = match fabric {
            Some(fabric) => &fabric.side_by_side(x)?,
            None => x,
        };
        let all = all.as_dtype(Dtype::Float32)?.contiguous()?;
        Ok(if fabric.is_none_or(|fabric| fabric.rank() == 0) { Asked::Logits(all) } else { Asked::Done(all) })
    }

    /// What becomes of the rows: rank 0 draws, and every rank has its ids for the next step.
    fn draws(&mut self, x: &Array, draws: &[Draw]) -> Result<Asked, Failure> {
        let fabric = self.device.fabric()?.cloned();
        let fused = &mut self.device.fused;
        match fabric {
            None => Ok(Asked::Draws(Draws::record(x, draws, fused)?)),
            Some(fabric) => {
                let all = fabric.side_by_side(x)?;
                Ok(Asked::Draws(Draws::in_group(&all, draws, fused, &fabric)?))
            }
        }
    }
}

/// An error of a rank of several is the group's: what reaches the others reaches this one.
fn failed(fabric: Option<&Fabric>, failure: Failure) -> BackendError {
    match fabric {
        Some(fabric) => fabric.lost(failure.0),
        None => failure.into(),
    }
}

/// What a running step is asked for.
enum Asked {
    /// Only to be done, which these arrays tell.
    Nothing(Vec<Array>),
    Logits(Array),
    Draws(Draws),
    Hidden(Array),
    /// To be evaluated; the result is another rank's.
    Done(Array),
}

impl Asked {
    fn arrays(&self) -> Vec<Array> {
        match self {
            Asked::Nothing(ends) => ends.clone(),
            Asked::Logits(array) | Asked::Hidden(array) | Asked::Done(array) => vec![array.clone()],
            Asked::Draws(draws) => draws.arrays(),
        }
    }
}

/// A step under way.
struct Running {
    asked: Result<(Ticket, Asked), BackendError>,
    fabric: Option<Rc<Fabric>>,
    line: Rc<RefCell<Line>>,
}

impl Pending<MlxAct> for Running {
    fn ready(&self) -> bool {
        self.line.borrow_mut().look();
        self.asked.as_ref().map_or(true, |(_, asked)| asked.arrays().iter().all(available))
    }

    fn wait(self: Box<Self>) -> Result<Output<MlxAct>, BackendError> {
        let (ticket, asked) = self.asked?;
        let reached = self.line.borrow_mut().reach(ticket);
        // The next step begins beside the second half of this one.
        let reached = reached.and_then(|()| self.line.borrow_mut().ahead());
        let ended = reached.and_then(|()| Ok(transforms::eval(&asked.arrays())?));
        // The next step, if it is there already, begins before anybody looks at the result.
        self.line.borrow_mut().look();
        ended.map_err(|failure| failed(self.fabric.as_deref(), failure))?;
        match asked {
            Asked::Nothing(_) | Asked::Done(_) => Ok(Output::Nothing),
            Asked::Hidden(array) => Ok(Output::Hidden(MlxAct(array))),
            Asked::Draws(_) if self.fabric.is_some_and(|fabric| fabric.rank() > 0) => Ok(Output::Nothing),
            Asked::Draws(draws) => Ok(Output::Drawn(draws.read()?)),
            // No rows, no data.
            Asked::Logits(array) if array.size() == 0 => Ok(Output::Logits(Vec::new())),
            Asked::Logits(array) => match array.try_as_slice::<f32>() {
                Ok(logits) => Ok(Output::Logits(logits.to_vec())),
                Err(error) => Err(BackendError::Device(error.to_string())),
            },
        }
    }
}
