//! What steps queue, on its way to the device. It goes there at once; or, in a step that generates, it is written down until
//! the step is complete. Such a list often is word by word that of the step before, and is one graph then
//! ([`crate::graphs`]): so what changes from step to step lies in memory, which is filled before the list is done. In a group
//! all ranks say first what they could do with theirs ([`crate::ballot`]), once a step and at the same place of it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use backend::BackendError;

use crate::args::{Args, Words};
use crate::ballot::Ballot;
use crate::driver::{Dense, Driver, Lane, Launch};
use crate::graphs::Graphs;
use crate::nccl::Sum;

/// Least memory for what steps send, and the multiple at which a piece of it begins.
const CHUNK_BYTES: usize = 64 << 10;
const PIECE_BYTES: usize = 256;

/// A device's lanes.
pub(crate) struct Queue<D: Driver> {
    pub(crate) driver: D,
    /// What is written down.
    open: RefCell<Option<List>>,
    /// Of the step that is written down, in a group, until its vote is over.
    ballot: RefCell<Option<Rc<Ballot>>>,
    sent: RefCell<Sent<D>>,
    graphs: RefCell<Graphs<D>>,
    /// Whether steps are written down at all.
    writes: Cell<bool>,
}

/// Kernels, products and sums over ranks in order. Lists are equal when a device would do the same.
#[derive(Default, PartialEq)]
pub(crate) struct List {
    calls: Vec<Call>,
    /// Arguments of the kernels, one after the other.
    words: Vec<u64>,
}

#[derive(PartialEq)]
enum Call {
    /// With so many words.
    Kernel(Launch, usize),
    Dense(Dense),
    /// Memory and its bytes, see [`Driver::forget`].
    Forget(u64, usize),
    /// Memory and its bytes that become zero.
    Clear(u64, usize),
    Sum(Sum),
}

impl List {
    pub(crate) fn len(&self) -> usize {
        self.calls.len()
    }

    /// Queues everything, call by call.
    pub(crate) fn queue<D: Driver>(&self, driver: &D) -> Result<(), BackendError> {
        let mut words = &self.words[..];
        for call in &self.calls {
            match call {
                Call::Kernel(launch, count) => {
                    let (own, rest) = words.split_at(*count);
                    words = rest;
                    driver.launch(*launch, own)?;
                }
                Call::Dense(product) => driver.dense(product)?,
                Call::Forget(at, bytes) => driver.forget(*at, *bytes),
                Call::Clear(at, bytes) => driver.clear(*at, *bytes)?,
                Call::Sum(sum) => driver.sum(sum)?,
            }
        }
        Ok(())
    }

    /// Tells apart lists that sum different things; equal on ranks that sum the same, whatever else they do.
    pub(crate) fn sums(&self) -> u64 {
        // FNV-1a, 64 bits.
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for call in &self.calls {
            if let Call::Sum(sum) = call {
                for byte in sum.shape().iter().flat_map(|word| word.to_le_bytes()) {
                    hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                }
            }
        }
        hash
    }
}

/// What lists read and steps send: the same places for equal steps, filled by one copy before the list is done.
struct Sent<D: Driver> {
    chunks: Vec<Chunk<D>>,
    /// Host memory, its bytes, and the copy that reads it.
    stages: Vec<(D::Host, usize, D::Event)>,
}

struct Chunk<D: Driver> {
    _memory: D::Memory,
    address: u64,
    bytes: usize,
    filled: Vec<u8>,
}

impl<D: Driver> Sent<D> {
    /// A place for `words`, which are there once the list is done.
    fn put(&mut self, driver: &D, words: &[u32]) -> Result<u64, BackendError> {
        let bytes = size_of_val(words).max(1);
        let room = |chunk: &Chunk<D>| chunk.bytes - chunk.filled.len() >= bytes;
        let at = match self.chunks.iter().position(room) {
            Some(at) => at,
            None => {
                let bytes = bytes.next_power_of_two().max(CHUNK_BYTES);
                let memory = driver.alloc(bytes)?;
                let address = driver.address(&memory);
                self.chunks.push(Chunk { _memory: memory, address, bytes, filled: Vec::new() });
                self.chunks.len() - 1
            }
        };
        let chunk = &mut self.chunks[at];
        let address = chunk.address + chunk.filled.len() as u64;
        words.iter().for_each(|word| chunk.filled.extend(word.to_le_bytes()));
        chunk.filled.resize(chunk.filled.len().next_multiple_of(PIECE_BYTES).min(chunk.bytes), 0);
        Ok(address)
    }

    /// Queues the copies.
    fn send(&mut self, driver: &D) -> Result<(), BackendError> {
        for chunk in &mut self.chunks {
            if chunk.filled.is_empty() {
                continue;
            }
            let fits = |(_, bytes, read): &(_, usize, _)| *bytes >= chunk.filled.len() && driver.passed(read);
            let (mut host, bytes) = match self.stages.iter().position(fits) {
                Some(at) => {
                    let (host, bytes, _) = self.stages.swap_remove(at);
                    (host, bytes)
                }
                None => (driver.host(chunk.bytes)?, chunk.bytes),
            };
            host.as_mut()[..chunk.filled.len()].copy_from_slice(&chunk.filled);
            driver.to_device(Lane::Compute, chunk.address, &host, 0, chunk.filled.len())?;
            self.stages.push((host, bytes, driver.record(Lane::Compute)?));
            chunk.filled.clear();
        }
        Ok(())
    }
}

impl<D: Driver> Drop for Sent<D> {
    fn drop(&mut self) {
        for (_, _, read) in &self.stages {
            // The host memory goes after the copies; a device that failed copies nothing more.
            let _ = D::wait(read);
        }
    }
}

impl<D: Driver> Queue<D> {
    pub(crate) fn new(driver: D) -> Self {
        Queue {
            driver,
            open: RefCell::default(),
            ballot: RefCell::default(),
            sent: RefCell::new(Sent { chunks: Vec::new(), stages: Vec::new() }),
            graphs: RefCell::new(Graphs::new()),
            writes: Cell::new(true),
        }
    }

    /// Whether steps that generate are written down from now on.
    pub(crate) fn write_down(&self, on: bool) {
        self.writes.set(on);
    }

    /// Whether they are.
    pub(crate) fn writes_down(&self) -> bool {
        self.writes.get()
    }

    /// Graphs that were replayed so far.
    pub(crate) fn replayed(&self) -> u64 {
        self.graphs.borrow().replayed()
    }

    /// Gives the memory of graphs back; whether there were any.
    pub(crate) fn forget_graphs(&self) -> bool {
        self.graphs.borrow_mut().clear()
    }

    /// Writes down what is queued from now on, until something else than kernels, products and sums comes; in a group that
    /// votes on its steps all ranks do.
    pub(crate) fn begin(&self, ballot: Option<Rc<Ballot>>) -> Result<(), BackendError> {
        self.finish()?;
        if let Some(ballot) = &ballot {
            ballot.open();
            if !self.writes.get() {
                ballot.decline(&self.driver)?;
            }
        }
        *self.ballot.borrow_mut() = ballot;
        if self.writes.get() {
            self.sent.borrow_mut().chunks.iter_mut().for_each(|chunk| chunk.filled.clear());
            *self.open.borrow_mut() = Some(List::default());
        }
        Ok(())
    }

    /// Whether what is queued is written down.
    pub(crate) fn is_open(&self) -> bool {
        self.open.borrow().is_some()
    }

    /// Queues what has been written down. In a group that is not the whole step: call by call, then, on all ranks.
    pub(crate) fn close(&self) -> Result<(), BackendError> {
        let Some(list) = self.open.take() else { return Ok(()) };
        let ballot = self.ballot.borrow().clone();
        if let Some(ballot) = &ballot {
            ballot.decline(&self.driver)?;
        }
        self.sent.borrow_mut().send(&self.driver)?;
        match ballot {
            None => self.graphs.borrow_mut().run(&self.driver, list),
            Some(_) => list.queue(&self.driver),
        }
    }

    /// Queues what has been written down: all of a step's work that ranks do together, which is where all ranks call this.
    pub(crate) fn finish(&self) -> Result<(), BackendError> {
        let Some(ballot) = self.ballot.take() else { return self.close() };
        match self.open.take() {
            None => ballot.settle(&self.driver),
            Some(list) => {
                self.sent.borrow_mut().send(&self.driver)?;
                self.graphs.borrow_mut().run_together(&self.driver, list, &ballot)
            }
        }
    }

    /// Forgets what has been written down, with the graphs: this rank's group is over.
    pub(crate) fn discard(&self) {
        self.open.take();
        self.ballot.take();
        self.forget_graphs();
    }

    /// Before work that cannot be written down.
    fn plainly(&self, lane: Lane) -> Result<&D, BackendError> {
        if lane == Lane::Compute {
            self.close()?;
        }
        Ok(&self.driver)
    }

    /// The place of `words` for the list that is written down.
    pub(crate) fn send(&self, words: &[u32]) -> Result<u64, BackendError> {
        self.sent.borrow_mut().put(&self.driver, words)
    }

    pub(crate) fn launch<A: Args>(&self, launch: Launch, args: &A) -> Result<(), BackendError> {
        let words = Words::of(args);
        match &mut *self.open.borrow_mut() {
            None => self.driver.launch(launch, &words),
            Some(list) => {
                list.calls.push(Call::Kernel(launch, words.len()));
                list.words.extend_from_slice(&words);
                Ok(())
            }
        }
    }

    /// `false`: this device has no library for it.
    pub(crate) fn dense(&self, product: &Dense) -> Result<bool, BackendError> {
        if !self.driver.takes(product) {
            return Ok(false);
        }
        match &mut *self.open.borrow_mut() {
            None => self.driver.dense(product)?,
            Some(list) => list.calls.push(Call::Dense(*product)),
        }
        Ok(true)
    }

    /// See [`Driver::forget`].
    pub(crate) fn forget(&self, at: u64, bytes: usize) {
        match &mut *self.open.borrow_mut() {
            None => self.driver.forget(at, bytes),
            Some(list) => list.calls.push(Call::Forget(at, bytes)),
        }
    }

    pub(crate) fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), BackendError> {
        self.plainly(Lane::Compute)?.upload(to, bytes)
    }

    pub(crate) fn clear(&self, at: u64, bytes: usize) -> Result<(), BackendError> {
        match &mut *self.open.borrow_mut() {
            None => self.driver.clear(at, bytes)?,
            Some(list) => list.calls.push(Call::Clear(at, bytes)),
        }
        Ok(())
    }

    pub(crate) fn to_host(
        &self,
        lane: Lane,
        host: &mut D::Host,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.plainly(lane)?.to_host(lane, host, at, from, bytes)
    }

    pub(crate) fn to_device(
        &self,
        lane: Lane,
        to: u64,
        host: &D::Host,
        at: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.plainly(lane)?.to_device(lane, to, host, at, bytes)
    }

    pub(crate) fn sum(&self, sum: Sum) -> Result<(), BackendError> {
        match &mut *self.open.borrow_mut() {
            None => self.driver.sum(&sum)?,
            Some(list) => list.calls.push(Call::Sum(sum)),
        }
        Ok(())
    }

    pub(crate) fn record(&self, lane: Lane) -> Result<D::Event, BackendError> {
        self.plainly(lane)?.record(lane)
    }

    pub(crate) fn after(&self, lane: Lane, event: &D::Event) -> Result<(), BackendError> {
        self.plainly(lane)?.after(lane, event)
    }
}
