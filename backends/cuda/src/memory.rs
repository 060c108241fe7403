//! Memory of steps. Device buffers go back to a pool when dropped and are handed out again at once: all work that uses
//! them is in one lane, so a later use runs after an earlier one. Pinned host memory is pooled too, since getting it and
//! giving it back stops the device; whoever drops it knows that no copy uses it any more.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use backend::BackendError;

use crate::driver::{Driver, Lane};

/// Pinned memory that is kept for later: the exports of a long prompt. What comes back beyond is freed.
const PINNED_KEPT_BYTES_MAX: usize = 4 << 30;
/// Least pinned memory of one piece.
const PINNED_BYTES_MIN: usize = 4096;

/// Free memory by size, and host memory that queued copies still read.
pub(crate) struct Pool<D: Driver> {
    pub(crate) driver: D,
    free: RefCell<BTreeMap<usize, Vec<D::Memory>>>,
    sent: RefCell<Vec<(D::Event, Pinned<D>)>>,
    pinned: Arc<Kept<D>>,
}

/// Free pinned memory by size.
struct Kept<D: Driver>(Mutex<Free<D::Host>>);

struct Free<H> {
    bytes: usize,
    by_size: BTreeMap<usize, Vec<H>>,
}

/// Pinned host memory; goes back to its pool when dropped, on any thread.
pub struct Pinned<D: Driver> {
    kept: Arc<Kept<D>>,
    size: usize,
    memory: Option<D::Host>,
}

/// Some device memory.
pub(crate) struct Buffer<D: Driver> {
    pool: Rc<Pool<D>>,
    size: usize,
    memory: Option<D::Memory>,
    pub(crate) address: u64,
}

/// Sizes are rounded up to a quarter of a power of two, so that few kinds of sizes are kept.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.max(1).next_multiple_of(step)
}

impl<D: Driver> Pool<D> {
    pub(crate) fn new(driver: D) -> Rc<Self> {
        let kept = Kept(Mutex::new(Free { bytes: 0, by_size: BTreeMap::new() }));
        Rc::new(Pool { driver, free: RefCell::default(), sent: RefCell::default(), pinned: Arc::new(kept) })
    }

    /// At least `bytes`, contents arbitrary.
    pub(crate) fn take(self: &Rc<Self>, bytes: usize) -> Result<Buffer<D>, BackendError> {
        let size = size_class(bytes);
        let free = self.free.borrow_mut().get_mut(&size).and_then(Vec::pop);
        let memory = match free {
            Some(memory) => memory,
            None => match self.driver.alloc(size) {
                Ok(memory) => memory,
                // What is kept for other sizes may be enough.
                Err(_) if !self.free.borrow().is_empty() => {
                    self.free.borrow_mut().clear();
                    self.driver.alloc(size)?
                }
                Err(error) => return Err(error),
            },
        };
        let address = self.driver.address(&memory);
        self.driver.forget(address, size);
        Ok(Buffer { pool: self.clone(), size, memory: Some(memory), address })
    }

    /// `words` on the device; the copy is queued.
    pub(crate) fn send(self: &Rc<Self>, words: &[u32]) -> Result<Buffer<D>, BackendError> {
        let bytes = size_of_val(words);
        let buffer = self.take(bytes)?;
        self.sent.borrow_mut().retain(|(event, _)| !self.driver.passed(event));
        let mut host = self.pinned(bytes)?;
        for (to, word) in host.as_mut().chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.driver.to_device(Lane::Compute, buffer.address, &host, 0, bytes)?;
        let event = self.driver.record(Lane::Compute)?;
        self.sent.borrow_mut().push((event, host));
        Ok(buffer)
    }

    /// At least `bytes` of pinned host memory, contents arbitrary.
    pub(crate) fn pinned(&self, bytes: usize) -> Result<Pinned<D>, BackendError> {
        let size = size_class(bytes.max(PINNED_BYTES_MIN));
        let mut free = self.pinned.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = free.by_size.get_mut(&size).and_then(Vec::pop);
        if found.is_some() {
            free.bytes -= size;
        }
        drop(free);
        let memory = match found {
            Some(memory) => memory,
            None => self.driver.host(size)?,
        };
        Ok(Pinned { kept: self.pinned.clone(), size, memory: Some(memory) })
    }

    /// Keeps `host` until the copies that were queued in [`Lane::Compute`] so far have read it.
    pub(crate) fn keep(&self, host: Pinned<D>) -> Result<(), BackendError> {
        let event = self.driver.record(Lane::Compute)?;
        self.sent.borrow_mut().push((event, host));
        Ok(())
    }
}

impl<D: Driver> Drop for Buffer<D> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.free.borrow_mut().entry(self.size).or_default().push(memory);
        }
    }
}

impl<D: Driver> Deref for Pinned<D> {
    type Target = D::Host;

    fn deref(&self) -> &D::Host {
        self.memory.as_ref().expect("held until dropped")
    }
}

impl<D: Driver> DerefMut for Pinned<D> {
    fn deref_mut(&mut self) -> &mut D::Host {
        self.memory.as_mut().expect("held until dropped")
    }
}

impl<D: Driver> Drop for Pinned<D> {
    fn drop(&mut self) {
        let mut free = self.kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + self.size <= PINNED_KEPT_BYTES_MAX
            && let Some(memory) = self.memory.take()
        {
            free.bytes += self.size;
            free.by_size.entry(self.size).or_default().push(memory);
        }
    }
}

impl<D: Driver> Drop for Pool<D> {
    fn drop(&mut self) {
        for (event, _) in self.sent.get_mut().drain(..) {
            // The host memory goes after the copies; a device that failed copies nothing more.
            let _ = D::wait(&event);
        }
    }
}
