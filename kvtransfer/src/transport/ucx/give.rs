//! The sender's end: offers, and once the receiver has chosen lets it read payloads where they lie (shared memory, bytes that
//! stay; memory that outlives its leases, of the host or a device) or in a ring that they are copied to (everything else). What a frame
//! lies in stays until the receiver has read it.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use backend::{Place, Within};

use super::device::{Context, Known, Memory, Reader, Waker, Worker, context};
use super::offer::{Fetch, Offer, RUNS_MAX, Run, host};
use super::take::{Pace, read};
use super::{Way, WayCell, Ways};
use crate::SessionId;
use crate::crc;
use crate::frame::{FrameError, Head, Kind};
use crate::limits::FETCH_BYTES_MAX;
use crate::sync::lock;
use crate::wire::{FrameSink, FrameSource, Hold, Incoming, Wire, WireError, control_payload};

/// Copies of payloads that wait to be read: two windows of a receiver with the default limits.
const RING_BYTES: usize = 32 << 20;

/// Longest time for the first payload in a device's memory to be read from outside; beyond it none is.
const PROOF_MAX: Duration = Duration::from_secs(2);

/// Longest wait of the worker's thread, which looks up when it is told to end.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The same connection, which offers `ways` to its receiver.
pub(crate) fn give(wire: Wire, ways: Ways) -> Wire {
    let ways = ways.here();
    if !ways.any() {
        return wire;
    }
    let Wire { sink, source, control, peer, way } = wire;
    let shared = Arc::new(Shared {
        ways,
        way: way.clone(),
        sink: Mutex::new(Sink { inner: sink, phase: Phase::Fresh }),
    });
    Wire {
        sink: Box::new(GiveSink(shared.clone())),
        source: Box::new(GiveSource { inner: source, shared }),
        control,
        peer,
        way,
    }
}

struct Shared {
    ways: Ways,
    way: Arc<WayCell>,
    sink: Mutex<Sink>,
}

struct Sink {
    inner: Box<dyn FrameSink>,
    phase: Phase,
}

enum Phase {
    /// The connection has not proved itself yet.
    Fresh,
    /// The receiver has been asked.
    Offered,
    /// Payloads are read by the receiver.
    Giving(Giver),
    /// They are not.
    Off,
}

impl Sink {
    fn own(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.inner.send(&Head::control(kind, 0, 0, payload), &[IoSlice::new(payload)])
    }

    fn frame(&mut self, head: &Head, payload: &[IoSlice<'_>], hold: Option<&Hold>) -> io::Result<()> {
        if let (Kind::Data, Phase::Giving(giver)) = (head.kind, &mut self.phase)
            && let Some(fetch) = giver.lend(head, payload, hold)
        {
            return self.fetch(head, &fetch);
        }
        self.inner.send(head, payload)
    }

    /// Sends the place of a payload instead of it.
    fn fetch(&mut self, head: &Head, fetch: &Fetch) -> io::Result<()> {
        let place = fetch.encode();
        let head = Head {
            kind: Kind::Fetch,
            payload_bytes: place.len() as u32,
            payload_crc: crc32c::crc32c(&place),
            ..head.clone()
        };
        self.inner.send(&head, &[IoSlice::new(&place)])
    }
}

struct GiveSink(Arc<Shared>);

impl FrameSink for GiveSink {
    fn send(&mut self, head: &Head, payload: &[IoSlice<'_>]) -> io::Result<()> {
        let mut sink = lock(&self.0.sink);
        sink.frame(head, payload, None)?;
        // The receiver reads this after the proof; of a probe it is not asked.
        if head.kind == Kind::Proof
            && head.tag != SessionId::PROBE.tag()
            && matches!(sink.phase, Phase::Fresh)
        {
            sink.phase = Phase::Offered;
            sink.own(Kind::Offer, &Offer { ways: self.0.ways, host: host() }.encode())?;
        }
        Ok(())
    }

    fn send_held(&mut self, head: &Head, payload: &[IoSlice<'_>], hold: &Hold) -> io::Result<()> {
        lock(&self.0.sink).frame(head, payload, Some(hold))
    }

    fn reads(&mut self, within: &Within<'_>) -> bool {
        let unstaged = within.sums.is_some();
        if unstaged && !self.0.way.reads(within.region.place()) {
            return false;
        }
        let reads = match &lock(&self.0.sink).phase {
            Phase::Giving(giver) => giver.reads(within),
            _ => false,
        };
        if unstaged && !reads {
            self.0.way.set_reads(within.region.place(), false);
        }
        reads
    }

    fn send_within(&mut self, head: &Head, within: &Within<'_>, hold: &Hold) -> io::Result<()> {
        let mut sink = lock(&self.0.sink);
        let Phase::Giving(giver) = &mut sink.phase else { return Err(io::ErrorKind::Unsupported.into()) };
        let fetch = giver.lend_within(head, within, hold).map_err(io::Error::other)?;
        sink.fetch(head, &fetch)
    }

    fn set_stall(&mut self, stall: Duration) -> io::Result<()> {
        lock(&self.0.sink).inner.set_stall(stall)
    }
}

struct GiveSource {
    inner: Box<dyn FrameSource>,
    shared: Arc<Shared>,
}

impl GiveSource {
    fn own(&mut self, head: &Head, until: Option<Instant>) -> Result<(), WireError> {
        let (payload, got) = control_payload(&mut *self.inner, head, until)?;
        head.check_payload(got)?;
        let stray = || WireError::Frame(FrameError::Message("is out of turn"));
        match (head.kind, &payload[..]) {
            (Kind::Choose, [number]) => {
                let way = Way::from_number(*number).ok_or_else(stray)?;
                // Takes its time where the library is used for the first time: not under the lock.
                let giver = match way {
                    Way::Stream => None,
                    way => Giver::new(way)
                        .inspect_err(|words| {
                            tracing::debug!(way = way.name(), words, "UCX way not to be had")
                        })
                        .ok(),
                };
                let mut sink = lock(&self.shared.sink);
                if !matches!(sink.phase, Phase::Offered) {
                    return Err(stray());
                }
                sink.phase = Phase::Off;
                if let Some((giver, address)) = giver {
                    sink.own(Kind::Address, &address)?;
                    let places = [Place::Host, Place::Cuda].map(|place| (place, giver.may_read(place)));
                    sink.phase = Phase::Giving(giver);
                    self.shared.way.set(way);
                    for (place, may) in places {
                        self.shared.way.set_reads(place, may && self.shared.ways.device);
                    }
                }
                Ok(())
            }
            (Kind::Fetched, count) => {
                let count = u64::from_le_bytes(count.try_into().map_err(|_| stray())?);
                let released = match &mut lock(&self.shared.sink).phase {
                    Phase::Giving(giver) => giver.fetched(count).ok_or_else(stray)?,
                    _ => return Err(stray()),
                };
                // Leases may take locks of their own when they end.
                drop(released);
                Ok(())
            }
            _ => Err(stray()),
        }
    }
}

impl FrameSource for GiveSource {
    fn head(&mut self, until: Option<Instant>) -> Result<Incoming, WireError> {
        loop {
            match self.inner.head(until)? {
                Incoming::Head(head) if head.kind.is_transports() => self.own(&head, until)?,
                other => return Ok(other),
            }
        }
    }

    fn payload(&mut self, into: &mut [IoSliceMut<'_>], until: Option<Instant>) -> Result<u32, WireError> {
        self.inner.payload(into, until)
    }

    fn drain(&mut self, until: Instant) {
        self.inner.drain(until);
    }
}

/// What one frame lies in until the receiver has read it.
struct Lent {
    // In this order: memory is taken back before its bytes may go.
    _memory: Vec<Memory>,
    _hold: Option<Hold>,
    ring_bytes: usize,
}

/// A worker that lets its one peer read. The order of the fields is that of their end: nobody reads any more when memory goes.
struct Giver {
    _serving: Serving,
    context: &'static Context,
    way: Way,
    address: Vec<u8>,
    lent: VecDeque<Lent>,
    fetched: u64,
    ring: Option<Ring>,
}

impl Giver {
    /// With the worker's address.
    fn new(way: Way) -> Result<(Self, Vec<u8>), String> {
        let context = context(way)?;
        let worker = Worker::new(context)?;
        let address = worker.address()?;
        let serving = Serving::new(worker)?;
        let lent = VecDeque::new();
        let own = address.clone();
        Ok((Giver { _serving: serving, context, way, address: own, lent, fetched: 0, ring: None }, address))
    }

    /// Whether the receiver might read payloads that are in `place` alone.
    fn may_read(&self, place: Place) -> bool {
        let could = match place {
            Place::Host => true,
            // Nothing but a network card reads a GPU's memory.
            Place::Cuda => self.way == Way::Rdma && self.context.knows(place),
        };
        could && self.context.proof(place).get() != Some(&false)
    }

    /// Whether the receiver can read payloads in this memory. That of a device is read by this process first, as a peer reads it: such
    /// memory takes a network card, a GPU and drivers that get along.
    fn reads(&self, within: &Within<'_>) -> bool {
        let known = Known::of(self.context, within.region);
        match (known.key(), within.sums) {
            (Ok(key), Some(sums)) => {
                self.context.proven(within.region.place(), || self.prove(run(within, key), sums))
            }
            (Ok(_), None) => true,
            (Err(words), _) => {
                tracing::debug!(words, region = ?within.region, "UCX does not take memory");
                false
            }
        }
    }

    fn prove(&self, run: Run, sums: &[u32]) -> Result<(), String> {
        let mut bytes = vec![0; run.bytes];
        // Declared after its place, so that it ends before.
        let reader = Reader::new(self.context, &self.address)?;
        let want = crc::of_rows(sums, run.bytes / sums.len().max(1));
        let (fetch, until) = (Fetch { payload_crc: want, runs: vec![run] }, Instant::now() + PROOF_MAX);
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let got = read(&reader, &fetch, into, Pace::of(self.way), until, || false)?;
        if got == want {
            Ok(())
        } else {
            Err(format!("checksum {got:08x} was read, the device has {want:08x}"))
        }
    }

    /// Makes a payload readable that lies where the receiver [`Giver::reads`].
    fn lend_within(&mut self, head: &Head, within: &Within<'_>, hold: &Hold) -> Result<Fetch, String> {
        let known = Known::of(self.context, within.region);
        let runs = vec![run(within, known.key()?)];
        self.lent.push_back(Lent { _memory: Vec::new(), _hold: Some(hold.clone()), ring_bytes: 0 });
        Ok(Fetch { payload_crc: head.payload_crc, runs })
    }

    /// Makes a payload readable. `None`: it goes over the connection.
    fn lend(&mut self, head: &Head, payload: &[IoSlice<'_>], hold: Option<&Hold>) -> Option<Fetch> {
        // Registering costs nothing in shared memory; network cards pin pages for it, so there payloads go through the ring.
        let lent = match hold.filter(|_| self.way == Way::Shm && payload.len() <= RUNS_MAX) {
            Some(hold) => self.held(payload, hold),
            None => self.copied(payload),
        };
        let (lent, runs) =
            lent.inspect_err(|words| tracing::debug!(words, "payload goes over the connection")).ok()?;
        let fetch = Fetch { payload_crc: head.payload_crc, runs };
        if fetch.runs.iter().map(|run| run.key.len() + 14).sum::<usize>() + 6 > FETCH_BYTES_MAX {
            if let Some(ring) = &mut self.ring {
                ring.untake(lent.ring_bytes);
            }
            return None;
        }
        self.lent.push_back(lent);
        Some(fetch)
    }

    fn held(&self, payload: &[IoSlice<'_>], hold: &Hold) -> Result<(Lent, Vec<Run>), String> {
        let (mut memory, mut runs) = (Vec::with_capacity(payload.len()), Vec::with_capacity(payload.len()));
        for slice in payload.iter().filter(|slice| !slice.is_empty()) {
            let registered = self.context.register(slice.as_ptr() as u64, slice.len(), Place::Host)?;
            runs.push(Run { address: slice.as_ptr() as u64, bytes: slice.len(), key: registered.key()? });
            memory.push(registered);
        }
        Ok((Lent { _memory: memory, _hold: Some(hold.clone()), ring_bytes: 0 }, runs))
    }

    fn copied(&mut self, payload: &[IoSlice<'_>]) -> Result<(Lent, Vec<Run>), String> {
        if self.ring.is_none() {
            self.ring = Some(Ring::new(self.context)?);
        }
        let ring = self.ring.as_mut().ok_or("no ring")?;
        let runs = ring.put(payload).ok_or("the ring is full")?;
        let ring_bytes = payload.iter().map(|slice| slice.len()).sum();
        Ok((Lent { _memory: Vec::new(), _hold: None, ring_bytes }, runs))
    }

    /// The receiver has read `count` payloads in all: what they lay in, to be dropped. `None`: more than there were.
    fn fetched(&mut self, count: u64) -> Option<Vec<Lent>> {
        let more = usize::try_from(count.checked_sub(self.fetched)?).ok()?;
        if more > self.lent.len() {
            return None;
        }
        self.fetched = count;
        let released: Vec<Lent> = self.lent.drain(..more).collect();
        if let Some(ring) = &mut self.ring {
            ring.take(released.iter().map(|lent| lent.ring_bytes).sum());
        }
        Some(released)
    }
}

fn run(within: &Within<'_>, key: &[u8]) -> Run {
    Run { address: within.region.address() + within.at as u64, bytes: within.bytes, key: key.to_vec() }
}

/// Registered memory that payloads are copied to, in the order in which they are read.
struct Ring {
    // In this order: taken back before it goes.
    _memory: Memory,
    key: Vec<u8>,
    bytes: Box<[u8]>,
    /// Where the next payload begins.
    head: usize,
    used: usize,
}

impl Ring {
    fn new(context: &'static Context) -> Result<Self, String> {
        let bytes = vec![0; RING_BYTES].into_boxed_slice();
        let memory = context.register(bytes.as_ptr() as u64, bytes.len(), Place::Host)?;
        Ok(Ring { key: memory.key()?, _memory: memory, bytes, head: 0, used: 0 })
    }

    fn put(&mut self, payload: &[IoSlice<'_>]) -> Option<Vec<Run>> {
        let total: usize = payload.iter().map(|slice| slice.len()).sum();
        if total > self.bytes.len() - self.used {
            return None;
        }
        let (start, size) = (self.head, self.bytes.len());
        for slice in payload {
            let first = slice.len().min(size - self.head);
            self.bytes[self.head..self.head + first].copy_from_slice(&slice[..first]);
            self.bytes[..slice.len() - first].copy_from_slice(&slice[first..]);
            self.head = (self.head + slice.len()) % size;
        }
        self.used += total;
        let first = total.min(size - start);
        let run = |at: usize, bytes| Run {
            address: self.bytes[at..].as_ptr() as u64,
            bytes,
            key: self.key.clone(),
        };
        let runs = [run(start, first), run(0, total - first)];
        Some(runs.into_iter().filter(|run| run.bytes > 0).collect())
    }

    /// The oldest `bytes` were read.
    fn take(&mut self, bytes: usize) {
        self.used -= bytes;
    }

    /// The youngest `bytes` will not be.
    fn untake(&mut self, bytes: usize) {
        self.used -= bytes;
        self.head = (self.head + self.bytes.len() - bytes) % self.bytes.len();
    }
}

/// A worker and the thread that serves its peer where the device does not do so by itself.
struct Serving {
    stop: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<Worker>>,
}

impl Serving {
    fn new(worker: Worker) -> Result<Self, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let (waker, told) = (worker.waker(), stop.clone());
        let serve = move || {
            while !told.load(Ordering::Acquire) {
                if !worker.progress() {
                    worker.wait(LOOK_EVERY);
                }
            }
            worker
        };
        let thread =
            thread::Builder::new().name("kv-ucx".into()).spawn(serve).map_err(|error| error.to_string())?;
        Ok(Serving { stop, waker, thread: Some(thread) })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // SAFETY: the thread hands the worker back, so it lives.
        unsafe { self.waker.wake() };
        // The worker ends here, and with it whatever its peer had begun.
        drop(self.thread.take().map(JoinHandle::join));
    }
}
