//! Bytes on their way from the device to the host.

use backend::BackendError;

use crate::device::Device;
use crate::driver::{Driver, Lane};
use crate::memory::Pinned;

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

    /// As words.
    pub(super) fn words(&self) -> Result<impl Iterator<Item = u32>, BackendError> {
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
