//! Memory of steps. Device buffers go back to a pool when dropped and are handed out again at once: all work that uses
//! them is in one lane, so a later use runs after an earlier one. Steps that are written down have buffers of their own,
//! the oldest first, so that equal steps get equal ones whatever comes between. What leases hold, pinned host memory and some of the
//! device's, is pooled too, since getting it and giving it back stops the device, and so that transports register it once; whoever drops
//! it knows that nothing uses it any more.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backend::{BackendError, Place, Region};

use crate::driver::{Driver, Lane};
use crate::queue::Queue;

/// Pinned memory that is kept for later: the exports of a long prompt. What comes back beyond is freed.
const PINNED_KEPT_BYTES_MAX: usize = 4 << 30;
/// Least pinned memory of one piece.
const PINNED_BYTES_MIN: usize = 4096;
/// Device memory that leases hold or may hold again: some tens of milliseconds of a fast link. What leaves beyond it goes by the host.
const LASTING_BYTES_MAX: usize = 256 << 20;

/// Free memory by size, and host memory that queued copies still read.
pub(crate) struct Pool<D: Driver> {
    pub(crate) queue: Queue<D>,
    free: RefCell<BTreeMap<usize, Vec<D::Memory>>>,
    /// Of steps that are written down, by age.
    steady: RefCell<BTreeMap<usize, BTreeMap<u64, D::Memory>>>,
    /// Buffers of such steps so far.
    ages: Cell<u64>,
    sent: RefCell<Vec<(D::Event, Pinned<D>)>>,
    pinned: Arc<Kept<D::Host>>,
    lasting: Arc<Kept<D::Lasting>>,
}

/// Free memory by size, of which so many bytes are kept.
struct Kept<M> {
    free: Mutex<Free<M>>,
    bytes_max: usize,
}

struct Free<M> {
    /// What is kept, and what there is in all.
    bytes: usize,
    all_bytes: usize,
    by_size: BTreeMap<usize, Vec<Known<M>>>,
}

/// Memory, and what transports have tied to it: that goes first.
struct Known<M> {
    region: Region,
    memory: M,
}

/// Memory that leases hold; goes back to its pool when dropped, on any thread.
pub struct Parked<M> {
    kept: Arc<Kept<M>>,
    size: usize,
    known: Option<Known<M>>,
}

/// Pinned memory of the host.
pub type Pinned<D> = Parked<<D as Driver>::Host>;

/// Memory of the device.
pub(crate) type Lasting<D> = Parked<<D as Driver>::Lasting>;

/// Some device memory.
pub(crate) struct Buffer<D: Driver> {
    pool: Rc<Pool<D>>,
    size: usize,
    /// Of a step that was written down.
    age: Option<u64>,
    /// `None`: of what such a step sends.
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
        Rc::new(Pool {
            queue: Queue::new(driver),
            free: RefCell::default(),
            steady: RefCell::default(),
            ages: Cell::new(0),
            sent: RefCell::default(),
            pinned: Kept::new(PINNED_KEPT_BYTES_MAX),
            lasting: Kept::new(LASTING_BYTES_MAX),
        })
    }

    /// At least `bytes`, contents arbitrary.
    pub(crate) fn take(self: &Rc<Self>, bytes: usize) -> Result<Buffer<D>, BackendError> {
        let size = size_class(bytes);
        let steady = self.queue.is_open();
        let found = if steady {
            self.steady.borrow_mut().get_mut(&size).and_then(BTreeMap::pop_first)
        } else {
            self.free.borrow_mut().get_mut(&size).and_then(Vec::pop).map(|memory| (0, memory))
        };
        let (age, memory) = match found {
            Some(found) => found,
            None => {
                let age = self.ages.get();
                self.ages.set(age + u64::from(steady));
                let driver = &self.queue.driver;
                let memory = match driver.alloc(size) {
                    // What is kept for other sizes may be enough.
                    Err(BackendError::OutOfMemory { .. }) if self.give_back()? => driver.alloc(size)?,
                    other => other?,
                };
                (age, memory)
            }
        };
        let address = self.queue.driver.address(&memory);
        self.queue.forget(address, size);
        let age = steady.then_some(age);
        Ok(Buffer { pool: self.clone(), size, age, memory: Some(memory), address })
    }

    /// Frees what nobody holds; whether there was anything.
    pub(crate) fn give_back(&self) -> Result<bool, BackendError> {
        // What has been written down may use it.
        self.queue.close()?;
        // First: NCCL may have registered memory that they sum.
        let graphs = self.queue.forget_graphs();
        let (free, steady) = (self.free.take(), self.steady.take());
        let any = free.values().any(|kept| !kept.is_empty()) || steady.values().any(|kept| !kept.is_empty());
        let lasting = self.lasting.clear();
        Ok(graphs || any || lasting)
    }

    /// `words` on the device; the copy is queued.
    pub(crate) fn send(self: &Rc<Self>, words: &[u32]) -> Result<Buffer<D>, BackendError> {
        if self.queue.is_open() {
            match self.queue.send(words) {
                Ok(address) => {
                    return Ok(Buffer { pool: self.clone(), size: 0, age: None, memory: None, address });
                }
                // The rest of this step is not written down.
                Err(BackendError::OutOfMemory { .. }) => {
                    self.give_back()?;
                }
                Err(error) => return Err(error),
            }
        }
        let buffer = self.take(size_of_val(words))?;
        self.put(words, &buffer)?;
        Ok(buffer)
    }

    /// Queues a copy of `words` into `buffer`.
    pub(crate) fn put(&self, words: &[u32], buffer: &Buffer<D>) -> Result<(), BackendError> {
        let bytes = size_of_val(words);
        self.sent.borrow_mut().retain(|(event, _)| !self.queue.driver.passed(event));
        let mut host = self.pinned(bytes)?;
        for (to, word) in host.as_mut().chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.queue.to_device(Lane::Compute, buffer.address, &host, 0, bytes)?;
        self.keep(host)
    }

    /// At least `bytes` of pinned host memory, contents arbitrary.
    pub(crate) fn pinned(&self, bytes: usize) -> Result<Pinned<D>, BackendError> {
        let size = size_class(bytes.max(PINNED_BYTES_MIN));
        if let Some(pinned) = self.pinned.take(size) {
            return Ok(pinned);
        }
        let memory = self.queue.driver.host(size)?;
        let bytes = memory.as_ref();
        let region = Region::new(bytes.as_ptr() as u64, bytes.len(), Place::Host);
        Ok(self.pinned.add(size, Known { region, memory }))
    }

    /// At least `bytes` of device memory that a lease may hold, contents arbitrary. `None`: there is no room for it.
    pub(crate) fn lasting(&self, bytes: usize) -> Result<Option<Lasting<D>>, BackendError> {
        let (size, driver) = (size_class(bytes), &self.queue.driver);
        let parked = match self.lasting.take(size) {
            Some(parked) => parked,
            None => {
                if !self.lasting.fits(size) {
                    return Ok(None);
                }
                let memory = match driver.lasting(size) {
                    // What is kept of other sizes may be enough.
                    Err(BackendError::OutOfMemory { .. }) if self.lasting.clear() => driver.lasting(size),
                    other => other,
                };
                let memory = match memory {
                    Ok(memory) => memory,
                    Err(BackendError::OutOfMemory { .. }) => return Ok(None),
                    Err(error) => return Err(error),
                };
                let region = Region::new(driver.lasting_address(&memory), size, driver.place());
                self.lasting.add(size, Known { region, memory })
            }
        };
        self.queue.forget(parked.region().address(), size);
        Ok(Some(parked))
    }

    /// Keeps `host` until the copies that were queued in [`Lane::Compute`] so far have read it.
    pub(crate) fn keep(&self, host: Pinned<D>) -> Result<(), BackendError> {
        let event = self.queue.record(Lane::Compute)?;
        self.sent.borrow_mut().push((event, host));
        Ok(())
    }
}

impl<D: Driver> Buffer<D> {
    /// Bytes that it has.
    pub(crate) fn bytes(&self) -> usize {
        self.size
    }
}

impl<D: Driver> Drop for Buffer<D> {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        match self.age {
            Some(age) => {
                self.pool.steady.borrow_mut().entry(self.size).or_default().insert(age, memory);
            }
            None => self.pool.free.borrow_mut().entry(self.size).or_default().push(memory),
        }
    }
}

impl<M> Kept<M> {
    fn new(bytes_max: usize) -> Arc<Self> {
        let free = Mutex::new(Free { bytes: 0, all_bytes: 0, by_size: BTreeMap::new() });
        Arc::new(Kept { free, bytes_max })
    }

    fn free(&self) -> MutexGuard<'_, Free<M>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept of this size.
    fn take(self: &Arc<Self>, size: usize) -> Option<Parked<M>> {
        let mut free = self.free();
        let known = free.by_size.get_mut(&size).and_then(Vec::pop)?;
        free.bytes -= size;
        drop(free);
        Some(Parked { kept: self.clone(), size, known: Some(known) })
    }

    /// New memory of this size.
    fn add(self: &Arc<Self>, size: usize, known: Known<M>) -> Parked<M> {
        self.free().all_bytes += size;
        Parked { kept: self.clone(), size, known: Some(known) }
    }

    /// Whether there may be so much more, with what is held; what is kept of other sizes makes room.
    fn fits(&self, size: usize) -> bool {
        let fits = || self.free().all_bytes + size <= self.bytes_max;
        fits() || (self.clear() && fits())
    }

    /// Frees what nobody holds; whether there was anything.
    fn clear(&self) -> bool {
        let mut free = self.free();
        let cleared = std::mem::take(&mut free.by_size);
        free.all_bytes -= free.bytes;
        free.bytes = 0;
        drop(free);
        cleared.values().any(|kept| !kept.is_empty())
    }
}

impl<M> Parked<M> {
    /// Where it is.
    pub(crate) fn region(&self) -> &Region {
        &self.known.as_ref().expect("held until dropped").region
    }
}

impl<M> Deref for Parked<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.known.as_ref().expect("held until dropped").memory
    }
}

impl<M> DerefMut for Parked<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.known.as_mut().expect("held until dropped").memory
    }
}

impl<M> Drop for Parked<M> {
    fn drop(&mut self) {
        let mut free = self.kept.free();
        if free.bytes + self.size > self.kept.bytes_max {
            free.all_bytes -= self.size;
        } else if let Some(known) = self.known.take() {
            free.bytes += self.size;
            free.by_size.entry(self.size).or_default().push(known);
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

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use backend::{
        Backend, Batch, DType, DeviceOptions, Group, KSum, KvSpec, KvStore, Linear, Out, SeqId, Step,
        TensorView, WeightSource,
    };

    use super::*;
    use crate::device::{Device, Open};
    use crate::emulator::Emulated;

    const WIDTH: usize = 256;

    fn open(driver: &Emulated) -> Device<Emulated> {
        let options = DeviceOptions { dtype: DType::F32, block_tokens: 16, ..DeviceOptions::default() };
        Device::over(driver.clone(), &options, Group::alone()).unwrap()
    }

    fn numbers(bytes: &[u8], rows: usize) -> TensorView<'_> {
        let row_stride_bytes = WIDTH * 4;
        TensorView { name: "test", dtype: DType::F32, rows, cols: WIDTH, row_stride_bytes, bytes }
    }

    /// A weight or a cache that does not fit says how much it wants and how much there is, and leaves nothing behind.
    #[test]
    fn what_does_not_fit_says_so_and_leaves_nothing() {
        // Room for one matrix of 256 KiB, not for two.
        let driver = Emulated::open(0, None).unwrap().limited(400 << 10);
        let mut device = open(&driver);
        let bytes = vec![0; WIDTH * WIDTH * 4];
        let parts = vec![numbers(&bytes, WIDTH).into()];
        let linear = Linear { parts, bias: None, sum: KSum::Ascending };
        assert_eq!(device.free_bytes(), Some(400 << 10));
        let first = device.load(&WeightSource::Linear(linear.clone())).unwrap();
        assert_eq!(device.free_bytes(), Some(144 << 10));
        let said = device.load(&WeightSource::Linear(linear.clone())).map(|_| ()).unwrap_err().to_string();
        assert_eq!(said, format!("out of memory: {} bytes wanted, {} free", 256 << 10, 144 << 10));
        // 256 tokens of 1 KiB, and the places of padding.
        let spec = KvSpec::gqa(1, 1, 0..1, WIDTH / 2, DType::F32);
        let said = device.kv(&spec, 256 << 10).map(|_| ()).unwrap_err().to_string();
        assert_eq!(said, format!("out of memory: {} bytes wanted, {} free", (256 + 16) << 10, 144 << 10));
        // Of experts the room for all is taken first: 4 matrices.
        let experts = vec![linear; 4];
        let said = device.load(&WeightSource::Experts(&&experts[..])).map(|_| ()).unwrap_err().to_string();
        assert_eq!(said, format!("out of memory: {} bytes wanted, {} free", 1 << 20, 144 << 10));
        drop(first);
        assert_eq!(driver.free_bytes(), 400 << 10);
        device.load(&WeightSource::Experts(&&experts[..1])).unwrap();
        drop(device);
        assert_eq!(driver.free_bytes(), 400 << 10);
    }

    /// A device that is opened beside another has the same memory, and goes on when that has gone.
    #[test]
    fn what_is_beside_shares_memory_and_stays() {
        let driver = Emulated::open(0, None).unwrap().limited(400 << 10);
        let mut first = open(&driver);
        let options = DeviceOptions { dtype: DType::F32, block_tokens: 16, ..DeviceOptions::default() };
        let mut second = first.beside(&options, Group::alone()).unwrap();
        let bytes = vec![0; WIDTH * WIDTH * 4];
        let parts = vec![numbers(&bytes, WIDTH).into()];
        let source = WeightSource::Linear(Linear { parts, bias: None, sum: KSum::Ascending });
        let held = first.load(&source).unwrap();
        let said = second.load(&source).map(|_| ()).unwrap_err().to_string();
        assert_eq!(said, format!("out of memory: {} bytes wanted, {} free", 256 << 10, 144 << 10));
        drop((first, held));
        second.load(&source).unwrap();
    }

    /// Memory that leases hold is bounded, and what nobody holds makes room for other leases and for steps.
    #[test]
    fn what_leases_hold_is_bounded_and_gives_way() {
        let driver = Emulated::open(0, None).unwrap().limited(1 << 20);
        let pool = open(&driver).pool.clone();
        let held = pool.lasting(400 << 10).unwrap().unwrap();
        assert!(pool.lasting(800 << 10).unwrap().is_none(), "more than the device has");
        let address = held.region().address();
        drop(held);
        let again = pool.lasting(400 << 10).unwrap().unwrap();
        assert_eq!(again.region().address(), address);
        drop(again);
        let other = pool.lasting(800 << 10).unwrap().unwrap();
        drop(other);
        let step = pool.take(800 << 10).unwrap();
        assert!(pool.lasting(400 << 10).unwrap().is_none());
        drop(step);
        assert!(pool.lasting(LASTING_BYTES_MAX + 1).unwrap().is_none());
        drop(pool);
        assert_eq!(driver.free_bytes(), 1 << 20);
    }

    /// A step whose scratch memory does not fit fails with the sum; one that fits goes on after it, with what the pool had
    /// kept for other sizes, and nothing is lost.
    #[test]
    fn scratch_memory_that_does_not_fit_fails_one_step() {
        let driver = Emulated::open(0, None).unwrap().limited(160 << 10);
        let mut device = open(&driver);
        let spec = KvSpec::gqa(1, 1, 0..1, 8, DType::F32);
        let mut kv = device.kv(&spec, 16 * spec.token_bytes() as u64).unwrap();
        kv.open(SeqId(1), 1).unwrap();
        let bytes = vec![0; 2 * WIDTH * 4];
        let table = device.load(&WeightSource::Embedding(numbers(&bytes, 2).into())).unwrap();
        let mut step = |rows: usize| {
            let mut batch = Batch::default();
            batch.push(SeqId(1), 0, &vec![1; rows]);
            let mut step = device.step(&mut kv, &batch);
            let x = step.embed(&table);
            step.submit(Out::Logits(x)).wait().map(|_| ()).map_err(|error| error.to_string())
        };
        // 1 KiB a row: some sizes that each fit, together not.
        for rows in [40, 60, 90, 100, 110] {
            assert_eq!(step(rows), Ok(()), "{rows} rows");
        }
        let said = step(200).unwrap_err();
        assert!(said.starts_with(&format!("out of memory: {} bytes wanted, ", 224 << 10)), "{said}");
        assert_eq!(step(100), Ok(()));
        // A row for each sequence: steps that are written down, the first until it needs what the pool keeps.
        assert_eq!([step(1), step(1), step(1)], [Ok(()), Ok(()), Ok(())]);
        drop((kv, table));
        drop(device);
        assert_eq!(driver.free_bytes(), 160 << 10);
    }
}
