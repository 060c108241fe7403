//! Activations of a step: device memory, or a product that waits until somebody needs it: logits are then computed in f32
//! where an ordinary result is rounded to the step's dtype.

use std::rc::Rc;

use backend::BackendError;

use crate::device::Device;
use crate::driver::Driver;
use crate::memory::Buffer;
use crate::weight::Kind;

/// An activation `[rows, width]`.
pub struct CudaAct<D: Driver> {
    pub(crate) rows: usize,
    /// Of the rows, those that were asked for: the others are padding.
    pub(crate) asked: usize,
    pub(crate) width: usize,
    pub(crate) state: State<D>,
}

pub(crate) enum State<D: Driver> {
    /// Elements of the step's dtype.
    Ready(Rc<Buffer<D>>),
    /// This rank's partial sums, f32.
    Partial(Rc<Buffer<D>>),
    /// `x W^T` with the weight, a [`Kind::Product`], of this many inputs.
    Product { x: Rc<Buffer<D>>, weight: Rc<Kind<D>> },
    /// Stands in for the result of an operation that failed.
    Blank,
}

impl<D: Driver> CudaAct<D> {
    pub(crate) fn blank(rows: usize, width: usize) -> Self {
        CudaAct { rows, asked: rows, width, state: State::Blank }
    }

    /// With so many rows that are no padding.
    pub(crate) fn asked(self, asked: usize) -> Self {
        CudaAct { asked, ..self }
    }

    /// In the step's dtype.
    pub(crate) fn buffer(&self, device: &Device<D>) -> Result<Rc<Buffer<D>>, BackendError> {
        match &self.state {
            State::Ready(buffer) => Ok(buffer.clone()),
            State::Product { x, weight } => {
                let out = device.elements(self.rows * self.width)?;
                if let Kind::Product(matrix) = &**weight {
                    device.product(matrix, x.address, self.rows, out.address, false)?;
                }
                Ok(Rc::new(out))
            }
            State::Partial(sums) if !device.bf16() => Ok(sums.clone()),
            State::Partial(sums) => {
                let out = device.elements(self.rows * self.width)?;
                device.narrow(sums.address, out.address, self.rows * self.width)?;
                Ok(Rc::new(out))
            }
            State::Blank => {
                Err(BackendError::Device("an operation on the result of one that failed".to_owned()))
            }
        }
    }

    /// In f32.
    pub(crate) fn floats(&self, device: &Device<D>) -> Result<Rc<Buffer<D>>, BackendError> {
        if let State::Partial(sums) = &self.state {
            return Ok(sums.clone());
        }
        if !device.bf16() {
            return self.buffer(device);
        }
        let out = device.pool.take(self.rows * self.width * 4)?;
        match &self.state {
            State::Product { x, weight } => {
                if let Kind::Product(matrix) = &**weight {
                    device.product(matrix, x.address, self.rows, out.address, true)?;
                }
            }
            _ => device.widen(self.buffer(device)?.address, out.address, self.rows * self.width)?,
        }
        Ok(Rc::new(out))
    }
}
