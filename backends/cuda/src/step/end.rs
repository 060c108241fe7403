//! What a step ends with, and the wait for it.

use backend::{BackendError, Out, Output, Pending};

use super::draw::Drawing;
use super::{CudaStep, Fetched};
use crate::act::{CudaAct, State};
use crate::driver::{Driver, Lane};
use crate::ranks::{Logits, Lost};

impl<D: Driver> CudaStep<'_, D> {
    /// Queues what the step is asked for, and tells the other ranks when that cannot be.
    pub(super) fn end(mut self, out: Out<CudaAct<D>>) -> Box<dyn Pending<CudaAct<D>>> {
        if self.fault.is_some() {
            self.device.drawn = None;
        }
        let outcome = match (self.fault.take(), out) {
            (Some(fault), _) => Outcome::Failed(fault),
            (None, out) => self
                .ending(out)
                .and_then(|outcome| self.device.queue().finish().map(|()| outcome))
                .unwrap_or_else(Outcome::Failed),
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
                self.device.queue().finish()?;
                Outcome::Logits(Fetched::of(self.device, logits.address, act.asked * width * 4)?)
            }
            Out::Draw(act, draws) => self.draw(&act, &draws)?.map_or(Outcome::Nothing, Outcome::Drawing),
        })
    }

    /// Logits of the whole vocabulary in f32, with its size; on rank 0 only.
    pub(super) fn logits(&self, act: &CudaAct<D>) -> Result<Option<Logits<D>>, BackendError> {
        let mine = act.floats(self.device)?;
        let Some(ranks) = &self.device.ranks else { return Ok(Some((mine, act.width))) };
        let all = ranks.side_by_side(self.device, &mine, act.rows, act.width)?;
        Ok(all.filter(|_| ranks.rank() == 0))
    }

    /// Tells the other ranks that this step goes no further here.
    fn leave(&self, fault: &BackendError) {
        if let Some(ranks) = &self.device.ranks {
            self.device.queue().discard();
            ranks.leave(&fault.to_string());
        }
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
            Outcome::Drawing(drawing) => Ok(Output::Drawn(drawing.rows()?)),
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
