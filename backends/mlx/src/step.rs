//! A step on MLX: operations record a lazy graph, [`Step::submit`] starts it, [`Pending::wait`] reads the result. The first
//! refusal stops the recording and comes out at the end.

use std::ops::Range;

use backend::{
    Attend, BackendError, Batch, Glu, KvError, KvStore, Mla, Moe, Out, Output, Pending, SeqId, Step,
};
use mlx_rs::{Array, Dtype, fast, ops, transforms};

use crate::attend::Attention;
use crate::device::MlxBackend;
use crate::draw::Draws;
use crate::graph::{Failure, Recorded, available, indices, int, last, mlx_type};
use crate::kv::MlxKv;
use crate::lease::MlxExport;
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
    /// Whether everything before this step has ended.
    calm: bool,
    fault: Option<BackendError>,
}

impl<'a> MlxStep<'a> {
    pub(crate) fn new(device: &'a mut MlxBackend, kv: &'a mut MlxKv, batch: &'a Batch) -> Self {
        let rows: usize = batch.runs.iter().map(|run| run.len as usize).sum();
        let fault = (rows != batch.ids.len())
            .then(|| BackendError::Device(format!("{} token ids for {rows} rows", batch.ids.len())));
        MlxStep { device, kv, batch, attention: None, calm: false, fault }
    }

    /// Before the first evaluation of this step: the one before has to end. It was recorded meanwhile.
    fn calm(&mut self) {
        if !std::mem::replace(&mut self.calm, true)
            && let Err(failure) = self.kv.calm()
        {
            self.fault.get_or_insert(failure.into());
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
        self.record(|_| gated(&x.0, kind))
    }

    fn rows(&mut self, x: MlxAct, rows: &[u32]) -> MlxAct {
        self.record(|_| -> Recorded {
            if let Some(row) = rows.iter().find(|row| **row as usize >= x.rows()) {
                return Err(Failure(format!("row {row} of {}", x.rows())));
            }
            let rows = indices(rows.iter().map(|row| *row as usize), &[int(rows.len())]);
            Ok(x.0.take_axis(&rows, 0)?)
        })
    }

    /// A group has one rank: its sum is the sum.
    fn all_reduce(&mut self, x: MlxAct) -> MlxAct {
        self.record(|step| -> Recorded { Ok(x.0.as_dtype(mlx_type(step.device.dtype))?) })
    }

    fn bias(&mut self, x: MlxAct, bias: &MlxWeight) -> MlxAct {
        self.record(|_| -> Recorded { Ok(x.0.add(bias.vector(x.width())?)?) })
    }

    fn attend(&mut self, layer: usize, qkv: MlxAct, attend: &Attend<'_, MlxBackend>) -> MlxAct {
        self.record(|step| step.attention(layer, &qkv, attend))
    }

    fn attend_mla(&mut self, layer: usize, q: MlxAct, kv: MlxAct, mla: &Mla<'_, MlxBackend>) -> MlxAct {
        self.record(|step| step.latent_attention(layer, &q, &kv, mla))
    }

    fn moe(&mut self, x: &MlxAct, moe: &Moe<'_, MlxBackend>) -> MlxAct {
        self.record(|_| crate::moe::experts(x, moe))
    }

    /// Evaluation of the graph up to here begins.
    fn export(&mut self, seq: SeqId, layer: usize, tokens: Range<u32>) -> Result<MlxExport, KvError> {
        self.calm();
        self.kv.export(seq, layer, tokens)
    }

    fn submit(mut self, out: Out<MlxAct>) -> Box<dyn Pending<MlxAct>> {
        self.calm();
        self.device.flight = None;
        // The cache is evaluated whatever happens, or its graph would grow from step to step.
        if let Some(fault) = self.fault.take() {
            let _ = self.kv.start(&[]);
            return Box::new(Running(Err(fault)));
        }
        let asked = match out {
            Out::Nothing => Ok(Asked::Nothing(None)),
            Out::Logits(act) => logits(&act.0).map(Asked::Logits),
            Out::Draw(act, draws) => Draws::record(&act.0, &draws).map(Asked::Draws),
            Out::Hidden(act) => Ok(Asked::Hidden(act.0)),
        };
        if let Ok(Asked::Draws(draws)) = &asked {
            self.device.flight = Some(draws.flight());
        }
        let begun = asked.and_then(|asked| match asked {
            Asked::Nothing(_) => {
                self.kv.start(&[])?;
                Ok(Asked::Nothing(self.kv.running()))
            }
            asked => {
                self.kv.start(&asked.arrays())?;
                Ok(asked)
            }
        });
        Box::new(Running(begun.map_err(BackendError::from)))
    }
}

/// `act(gate) * up` of `[.., gate | up]`.
pub(crate) fn gated(x: &Array, kind: Glu) -> Recorded {
    let half = x.dim(-1) as usize / 2;
    let (gate, up) = (last(x, 0..half)?, last(x, half..2 * half)?);
    let gate = match kind {
        Glu::Silu => gate.multiply(ops::sigmoid(&gate)?)?,
    };
    Ok(gate.multiply(&up)?)
}

fn logits(x: &Array) -> Recorded {
    Ok(x.as_dtype(Dtype::Float32)?.contiguous()?)
}

/// What a running step is asked for.
enum Asked {
    /// Only to be done, which this array tells.
    Nothing(Option<Array>),
    Logits(Array),
    Draws(Draws),
    Hidden(Array),
}

impl Asked {
    fn arrays(&self) -> Vec<Array> {
        match self {
            Asked::Nothing(array) => array.iter().cloned().collect(),
            Asked::Logits(array) | Asked::Hidden(array) => vec![array.clone()],
            Asked::Draws(draws) => draws.arrays(),
        }
    }
}

/// A step under way.
struct Running(Result<Asked, BackendError>);

impl Pending<MlxAct> for Running {
    fn ready(&self) -> bool {
        self.0.as_ref().map_or(true, |asked| asked.arrays().iter().all(available))
    }

    fn wait(self: Box<Self>) -> Result<Output<MlxAct>, BackendError> {
        let asked = self.0?;
        transforms::eval(&asked.arrays()).map_err(Failure::from)?;
        match asked {
            Asked::Nothing(_) => Ok(Output::Nothing),
            Asked::Hidden(array) => Ok(Output::Hidden(MlxAct(array))),
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
