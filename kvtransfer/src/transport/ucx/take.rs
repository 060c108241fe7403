//! The receiver's end: answers an offer of a proven sender, then reads payloads where they lie, straight into their places.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ucx_sys::Posted;

use super::device::{Reader, RemoteKey, context};
use super::offer::{Fetch, Offer, host};
use super::{Way, WayCell, Ways};
use crate::crc;
use crate::frame::{FrameError, Head, Kind};
use crate::sync::lock;
use crate::wire::{Control, FrameSink, FrameSource, Incoming, Wire, WireError, control_payload};

/// Longest time for one payload: beyond it the connection is lost, and the lane comes back without UCX.
const FETCH_MAX: Duration = Duration::from_secs(5);

/// Read at once, so that its checksum finds it in the cache.
const PART_BYTES: usize = 256 << 10;

/// Reads under way at once.
const READS_MAX: usize = 64;

/// How payloads are read.
#[derive(Clone, Copy)]
pub(super) struct Pace {
    /// Reads under way at once.
    most: usize,
    /// What is under way is waited for even where the connection is over.
    patient: bool,
}

impl Pace {
    /// Over TCP the peer's UCX answers reads itself, and ends its process when it comes upon one of somebody who has gone meanwhile
    /// (`ucp_get_req_handler`, 1.22): there is one at a time, and nobody goes before its end.
    pub(super) fn of(way: Way) -> Pace {
        let tcp = way == Way::Tcp;
        Pace { most: if tcp { 1 } else { READS_MAX }, patient: tcp }
    }
}

/// Payloads read before the sender hears of it even without a word of the session.
const UNTOLD_MAX: u64 = 4;

type SharedSink = Arc<Mutex<Box<dyn FrameSink>>>;

/// The same connection, whose peer may offer to let its payloads be read; without `ways` it hears that they are not.
pub(crate) fn take(wire: Wire, ways: Ways) -> Wire {
    let ways = ways.here();
    let Wire { sink, source, control, peer, way } = wire;
    let sink: SharedSink = Arc::new(Mutex::new(sink));
    let told = Arc::new(Told::default());
    let closed = Arc::new(AtomicBool::new(false));
    let source = TakeSource {
        inner: source,
        sink: sink.clone(),
        ways,
        way: way.clone(),
        told: told.clone(),
        closed: closed.clone(),
        proven: false,
        chosen: Way::Stream,
        reader: None,
        pending: None,
        broken: false,
    };
    Wire {
        sink: Box::new(TakeSink { inner: sink, told }),
        source: Box::new(source),
        control: Arc::new(TakeControl { inner: control, closed }),
        peer,
        way,
    }
}

/// Payloads that were read, and of how many the sender has heard.
#[derive(Default)]
struct Told {
    fetched: AtomicU64,
    told: AtomicU64,
}

impl Told {
    /// Tells the sender what it may let go of, if it does not know.
    fn tell(&self, sink: &mut dyn FrameSink) -> io::Result<()> {
        let fetched = self.fetched.load(Ordering::Acquire);
        if self.told.swap(fetched, Ordering::AcqRel) == fetched {
            return Ok(());
        }
        let payload = fetched.to_le_bytes();
        sink.send(&Head::control(Kind::Fetched, 0, 0, &payload), &[IoSlice::new(&payload)])
    }
}

struct TakeSink {
    inner: SharedSink,
    told: Arc<Told>,
}

impl FrameSink for TakeSink {
    fn send(&mut self, head: &Head, payload: &[IoSlice<'_>]) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        // Before the session's own word of what has landed, so that leases end with it.
        self.told.tell(&mut **inner)?;
        inner.send(head, payload)
    }

    fn set_stall(&mut self, stall: Duration) -> io::Result<()> {
        lock(&self.inner).set_stall(stall)
    }
}

struct TakeControl {
    inner: Arc<dyn Control>,
    closed: Arc<AtomicBool>,
}

impl Control for TakeControl {
    fn close(&self, how: Shutdown) {
        if how != Shutdown::Write {
            self.closed.store(true, Ordering::Release);
        }
        self.inner.close(how);
    }

    fn idle(&self) -> bool {
        self.inner.idle()
    }
}

struct TakeSource {
    inner: Box<dyn FrameSource>,
    sink: SharedSink,
    ways: Ways,
    way: Arc<WayCell>,
    told: Arc<Told>,
    closed: Arc<AtomicBool>,
    proven: bool,
    chosen: Way,
    reader: Option<Reader>,
    /// Of the head that was handed out last.
    pending: Option<Fetch>,
    /// A payload could not be read: the connection is over, whatever else comes on it.
    broken: bool,
}

impl TakeSource {
    /// A frame of the transport's own. The head to hand out, if it is one of a payload.
    fn own(&mut self, head: &Head, until: Option<Instant>) -> Result<Option<Head>, WireError> {
        let stray = |words| Err(WireError::Frame(FrameError::Message(words)));
        if !self.proven {
            return stray("is too early");
        }
        let (payload, got) = control_payload(&mut *self.inner, head, until)?;
        head.check_payload(got)?;
        match (head.kind, self.chosen) {
            (Kind::Offer, Way::Stream) => {
                let offer = Offer::decode(&payload)?;
                let way = offer.choose(self.ways, &host());
                // A way whose context cannot be made is none.
                let made = way == Way::Stream || context(way).inspect_err(|words| debug(way, words)).is_ok();
                self.chosen = if made { way } else { Way::Stream };
                let answer = [self.chosen as u8];
                lock(&self.sink)
                    .send(&Head::control(Kind::Choose, 0, 0, &answer), &[IoSlice::new(&answer)])?;
                Ok(None)
            }
            (Kind::Address, way) if way != Way::Stream && self.reader.is_none() => {
                // A sender that has just given up is not there any more, and says so with its next frame.
                let reader = context(way).and_then(|context| Reader::new(context, &payload));
                self.reader = reader.inspect_err(|words| debug(way, words)).ok();
                self.way.set(if self.reader.is_some() { way } else { Way::Stream });
                Ok(None)
            }
            (Kind::Fetch, way) if way != Way::Stream => {
                let fetch = Fetch::decode(&payload)?;
                let bytes = fetch.bytes();
                let head = Head {
                    kind: Kind::Data,
                    payload_bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
                    payload_crc: fetch.payload_crc,
                    ..head.clone()
                };
                let head = head.check()?;
                self.pending = Some(fetch);
                Ok(Some(head))
            }
            _ => stray("is out of turn"),
        }
    }

    fn fetch(&mut self, fetch: &Fetch, into: &mut [IoSliceMut<'_>]) -> Result<u32, WireError> {
        let places: u64 = into.iter().map(|place| place.len() as u64).sum();
        if fetch.bytes() != places {
            return Err(FrameError::Message("is of another length than its place").into());
        }
        let Some(reader) = &self.reader else {
            self.broken = true;
            return Err(failed(self.chosen, "its sender is not there").into());
        };
        let closed = &*self.closed;
        let pace = Pace::of(self.chosen);
        let until = Instant::now() + FETCH_MAX;
        let read = read(reader, fetch, into, pace, until, || closed.load(Ordering::Acquire));
        match read {
            Ok(crc) => {
                self.told.fetched.fetch_add(1, Ordering::AcqRel);
                let untold =
                    self.told.fetched.load(Ordering::Acquire) - self.told.told.load(Ordering::Acquire);
                if untold >= UNTOLD_MAX {
                    self.told.tell(&mut **lock(&self.sink))?;
                }
                Ok(crc)
            }
            Err(words) => {
                // With the worker goes whatever was under way: nothing writes to the places after this.
                self.reader = None;
                self.broken = true;
                Err(failed(self.chosen, &words).into())
            }
        }
    }
}

impl FrameSource for TakeSource {
    fn head(&mut self, until: Option<Instant>) -> Result<Incoming, WireError> {
        if self.broken {
            return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
        }
        loop {
            match self.inner.head(until)? {
                Incoming::Head(head) if head.kind.is_transports() => {
                    if let Some(head) = self.own(&head, until)? {
                        return Ok(Incoming::Head(head));
                    }
                }
                other => return Ok(other),
            }
        }
    }

    fn payload(&mut self, into: &mut [IoSliceMut<'_>], until: Option<Instant>) -> Result<u32, WireError> {
        match self.pending.take() {
            Some(fetch) => self.fetch(&fetch, into),
            None => self.inner.payload(into, until),
        }
    }

    fn proven(&mut self) {
        self.proven = true;
        self.inner.proven();
    }

    fn drain(&mut self, until: Instant) {
        self.inner.drain(until);
    }
}

/// Reads all runs into all places, and returns the checksum. On an error reads may be under way still: the reader has to go.
pub(super) fn read(
    reader: &Reader,
    fetch: &Fetch,
    into: &mut [IoSliceMut<'_>],
    pace: Pace,
    until: Instant,
    over: impl Fn() -> bool,
) -> Result<u32, String> {
    let mut crc = 0;
    let mut under_way: VecDeque<(Posted, *mut u8, usize)> = VecDeque::new();
    let mut land = |(posted, at, bytes): (Posted, *mut u8, usize)| {
        let ended = reader.finish(posted, until, || !pace.patient && over());
        ended.ok_or("nothing came in time")??;
        // SAFETY: a part of a place, which the read has filled and nobody else touches.
        crc = crc::append(crc, unsafe { std::slice::from_raw_parts(at, bytes) });
        Ok::<(), String>(())
    };
    let mut places = into.iter_mut().map(|place| (place.as_mut_ptr(), place.len()));
    let mut place = (std::ptr::null_mut::<u8>(), 0);
    let mut last: Option<(&[u8], RemoteKey)> = None;
    for run in &fetch.runs {
        let key = match last {
            Some((packed, key)) if packed == run.key => key,
            _ => {
                while let Some(part) = under_way.pop_front() {
                    land(part)?;
                }
                if let Some((_, old)) = last.take() {
                    // SAFETY: of this reader, all reads with it have landed.
                    unsafe { reader.forget(old) };
                }
                let key = reader.key(&run.key)?;
                last = Some((&run.key, key));
                key
            }
        };
        let (mut address, mut left) = (run.address, run.bytes);
        while left > 0 {
            while place.1 == 0 {
                place = places.next().ok_or("more than its place")?;
            }
            let bytes = left.min(place.1).min(PART_BYTES);
            if reader.lost() {
                return Err("its sender is gone".into());
            }
            if over() {
                return Err("the connection is over".into());
            }
            // SAFETY: the part is within a place that is borrowed until this returns; after an error the reader is dropped
            // before the borrow ends.
            let posted = unsafe { reader.get(place.0, bytes, address, key) };
            under_way.push_back((posted, place.0, bytes));
            // SAFETY: within the place, or one past its end.
            place = (unsafe { place.0.add(bytes) }, place.1 - bytes);
            (address, left) = (address + bytes as u64, left - bytes);
            while under_way.front().is_some_and(|(posted, ..)| *posted == Posted::Done)
                || under_way.len() >= pace.most
            {
                if let Some(part) = under_way.pop_front() {
                    land(part)?;
                }
            }
        }
    }
    while let Some(part) = under_way.pop_front() {
        land(part)?;
    }
    if let Some((_, key)) = last {
        // SAFETY: of this reader, all reads with it have landed.
        unsafe { reader.forget(key) };
    }
    Ok(crc)
}

fn debug(way: Way, words: &str) {
    tracing::debug!(way = way.name(), words, "UCX way not to be had");
}

fn failed(way: Way, words: &str) -> io::Error {
    io::Error::other(format!("payload not read over {}: {words}", way.name()))
}
