//! What a transport gives: one connection as frames out, frames in, and a handle to end it from elsewhere. [`split`] makes
//! one of any pair of byte streams (TCP, TLS, memory); UCX wraps
//! both halves of one.

use std::any::Any;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::Within;

use crate::crc;
use crate::frame::{FrameError, Head};
use crate::limits::HEADER_BYTES;
use crate::spin::Spin;
use crate::transport::ucx::WayCell;

/// One connection with its peer.
pub struct Wire {
    /// Frames to the peer.
    pub sink: Box<dyn FrameSink>,
    /// Frames from the peer.
    pub source: Box<dyn FrameSource>,
    /// Ends the connection from any thread.
    pub control: Arc<dyn Control>,
    /// The peer, for messages.
    pub peer: String,
    /// What carries its payloads.
    pub way: Arc<WayCell>,
}

/// Keeps bytes where they are for as long as it lives.
pub type Hold = Arc<dyn Any + Send + Sync>;

/// The sending half. Calls block until the bytes are handed to the transport.
pub trait FrameSink: Send {
    /// Sends one frame whole. An error leaves the connection unusable.
    fn send(&mut self, head: &Head, payload: &[IoSlice<'_>]) -> io::Result<()>;

    /// As [`FrameSink::send`], of a payload that stays where it is, unchanged, while `hold` lives: a transport whose peer reads
    /// it later keeps it until then.
    fn send_held(&mut self, head: &Head, payload: &[IoSlice<'_>], hold: &Hold) -> io::Result<()> {
        let _ = hold;
        self.send(head, payload)
    }

    /// Whether the peer can read bytes where they lie in memory that lives longer than their lease; once it can, it can as long as the
    /// connection lives.
    fn reads(&mut self, within: &Within<'_>) -> bool {
        let _ = within;
        false
    }

    /// As [`FrameSink::send_held`], of a payload that the peer [`FrameSink::reads`].
    fn send_within(&mut self, head: &Head, within: &Within<'_>, hold: &Hold) -> io::Result<()> {
        let _ = (head, within, hold);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Longest time for the transport to take a byte; beyond it `send` fails with [`io::ErrorKind::TimedOut`].
    fn set_stall(&mut self, stall: Duration) -> io::Result<()>;
}

/// The receiving half.
pub trait FrameSource: Send {
    /// Waits for the next head until `until` (for ever without). A timeout loses nothing: the next call goes on.
    fn head(&mut self, until: Option<Instant>) -> Result<Incoming, WireError>;

    /// Reads a payload into `into`, filling it, and returns its CRC32C.
    fn payload(&mut self, into: &mut [IoSliceMut<'_>], until: Option<Instant>) -> Result<u32, WireError>;

    /// The peer has proved its ticket.
    fn proven(&mut self) {}

    /// Reads and forgets until the peer closes or `until`, so that what was sent to it last is not cut off.
    fn drain(&mut self, until: Instant);
}

/// Ends a connection, or looks whether it is still there.
pub trait Control: Send + Sync {
    /// Closes one direction or both; whoever waits there is woken.
    fn close(&self, how: Shutdown);

    /// Whether an idle connection may be used again: open, and nothing has come.
    fn idle(&self) -> bool;

    /// What the system knows of the bytes on their way to the peer; `None`: it does not tell.
    fn underway(&self) -> Option<Underway> {
        None
    }

    /// Ends a connection whose path is not used any more: what is still on its way is dropped where that is possible.
    fn abandon(&self) {
        self.close(Shutdown::Both);
    }
}

/// Bytes handed to a transport and not taken by the peer's system, whoever reads there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Underway {
    /// Not acknowledged by the peer's system.
    pub bytes: u64,
    /// Acknowledged since the connection began, where the system counts them.
    pub taken_bytes: Option<u64>,
    /// For how long nothing has come back although it was sent again; `None`: something does, or the system does not tell.
    pub unanswered: Option<Duration>,
}

/// What came instead of, or as, a head.
#[derive(Debug)]
pub enum Incoming {
    /// The next frame's head; its payload must be read next.
    Head(Head),
    /// Nothing until the deadline.
    Timeout,
    /// The peer closed between frames.
    End,
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The bytes are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A byte stream whose reads can be given up on.
pub trait ReadTimeout {
    /// Longest wait of one read; `None`: for ever. A read beyond it fails with `WouldBlock` or `TimedOut`.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// Reads wait until so many bytes are there, where that can be had. There have to be twice as many to come: the system counts
    /// those that wait, not those that a read has taken already.
    fn set_least(&self, bytes: usize) {
        let _ = bytes;
    }

    /// Whether the other end is on this machine, and [`ReadTimeout::read_now`] works.
    fn near(&self) -> bool {
        false
    }

    /// Reads what is there; `None`: nothing yet.
    fn read_now(&mut self, into: &mut [IoSliceMut<'_>]) -> Option<io::Result<usize>> {
        let _ = into;
        None
    }
}

/// A byte stream whose writes can be given up on.
pub trait WriteTimeout {
    /// Longest wait of one write.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// Whether [`WriteTimeout::lend`] may be had for such slices.
    fn lends(&self, slices: &[IoSlice<'_>]) -> bool {
        let _ = slices;
        false
    }

    /// As a write of `head`, of which more is to come.
    fn write_ahead(&mut self, head: &[u8]) -> io::Result<usize> {
        let _ = head;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As a vectored write, of bytes that the other end takes from where they lie, some time later. `Ok(None)`: not of these; they
    /// are to be written.
    fn lend(&mut self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let _ = slices;
        Ok(None)
    }
}

/// Frames over byte streams.
pub fn split<R, W>(reader: R, writer: W, control: Arc<dyn Control>, peer: String) -> Wire
where
    R: Read + ReadTimeout + Send + 'static,
    W: Write + WriteTimeout + Send + 'static,
{
    Wire {
        sink: Box::new(StreamSink { writer }),
        source: Box::new(StreamSource::new(reader)),
        control,
        peer,
        way: Arc::default(),
    }
}

struct StreamSink<W> {
    writer: W,
}

impl<W: Write + WriteTimeout> StreamSink<W> {
    /// Writes everything by `write`.
    fn all(
        &mut self,
        slices: &mut [IoSlice<'_>],
        mut write: impl FnMut(&mut W, &[IoSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut left = slices;
        IoSlice::advance_slices(&mut left, 0); // leading empty slices would look like a closed peer
        while !left.is_empty() {
            match write(&mut self.writer, left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl<W: Write + WriteTimeout + Send> FrameSink for StreamSink<W> {
    fn send(&mut self, head: &Head, payload: &[IoSlice<'_>]) -> io::Result<()> {
        let head = head.encode();
        let mut slices = Vec::with_capacity(1 + payload.len());
        slices.push(IoSlice::new(&head));
        slices.extend_from_slice(payload);
        self.all(&mut slices, |writer, left| writer.write_vectored(left))?;
        self.writer.flush()
    }

    fn send_held(&mut self, head: &Head, payload: &[IoSlice<'_>], _: &Hold) -> io::Result<()> {
        if !self.writer.lends(payload) {
            return self.send(head, payload);
        }
        self.all(&mut [IoSlice::new(&head.encode())], |writer, left| writer.write_ahead(&left[0]))?;
        self.all(&mut payload.to_vec(), |writer, left| match writer.lend(left)? {
            Some(lent) => Ok(lent),
            None => writer.write_vectored(left),
        })?;
        self.writer.flush()
    }

    fn set_stall(&mut self, stall: Duration) -> io::Result<()> {
        self.writer.set_write_timeout(Some(stall.max(Duration::from_millis(1))))
    }
}

/// A reader of payloads is woken when so much has come: a wake-up costs as much as some tens of KiB do, and a core's cache holds this
/// much while the rest is on its way.
const LEAST_BYTES: usize = 128 << 10;

/// Below this a reader is woken at once.
const LEAST_BYTES_MIN: usize = 32 << 10;

/// A sender whose last frame is no older is taken to be sending.
const SENDING: Duration = Duration::from_millis(1);

/// What a read waits for, of `missing` bytes that are sure to come, see [`ReadTimeout::set_least`]. Few values: each change is a
/// system call.
fn least(missing: usize) -> usize {
    let most = (missing / 2).min(LEAST_BYTES);
    if most < LEAST_BYTES_MIN { 1 } else { 1 << most.ilog2() }
}

struct StreamSource<R> {
    reader: R,
    spin: Spin,
    /// The other end sends payloads, and when the last frame came.
    sender: bool,
    last: Option<Instant>,
    head: [u8; HEADER_BYTES],
    /// Bytes of `head` that have come.
    filled: usize,
    /// Whether the stream has a timeout set.
    timed: bool,
    /// Bytes that a read waits for.
    least: usize,
}

enum Got {
    Bytes(usize),
    Timeout,
    End,
}

impl<R: Read + ReadTimeout> StreamSource<R> {
    fn new(reader: R) -> Self {
        let spin = Spin::new(reader.near());
        let head = [0; HEADER_BYTES];
        StreamSource { reader, spin, sender: false, last: None, head, filled: 0, timed: false, least: 1 }
    }

    fn wait_for(&mut self, bytes: usize) {
        if self.least != bytes {
            self.reader.set_least(bytes);
            self.least = bytes;
        }
    }

    /// As [`StreamSource::read`], of what a sender on this machine is about to send: without sleeping at first.
    fn read_soon(&mut self, into: &mut [IoSliceMut<'_>], until: Option<Instant>) -> io::Result<Got> {
        let reader = &mut self.reader;
        loop {
            match self.spin.until(|| reader.read_now(into)) {
                Some(Ok(0)) => return Ok(Got::End),
                Some(Ok(bytes)) => return Ok(Got::Bytes(bytes)),
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Err(error)) => return Err(error),
                None => return self.read(into, until),
            }
        }
    }

    /// One read; a system call for the timeout only where there is one.
    fn read(&mut self, into: &mut [IoSliceMut<'_>], until: Option<Instant>) -> io::Result<Got> {
        loop {
            match until {
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Got::Timeout);
                    }
                    // Rounded up: a timeout of nothing would mean to wait for ever.
                    // Refused where the peer is gone already (macOS): then the read says so at once.
                    let _ = self.reader.set_read_timeout(Some(left.max(Duration::from_millis(1))));
                    self.timed = true;
                }
                None if self.timed => {
                    let _ = self.reader.set_read_timeout(None);
                    self.timed = false;
                }
                None => {}
            }
            match self.reader.read_vectored(into) {
                Ok(0) => return Ok(Got::End),
                Ok(bytes) => return Ok(Got::Bytes(bytes)),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl<R: Read + ReadTimeout + Send> FrameSource for StreamSource<R> {
    fn head(&mut self, until: Option<Instant>) -> Result<Incoming, WireError> {
        self.wait_for(1);
        let soon = self.sender && self.last.is_some_and(|at| at.elapsed() < SENDING);
        while self.filled < HEADER_BYTES {
            let mut head = self.head;
            let into = &mut [IoSliceMut::new(&mut head[self.filled..])];
            let got = if soon { self.read_soon(into, until)? } else { self.read(into, until)? };
            match got {
                Got::Bytes(bytes) => {
                    self.head = head;
                    self.filled += bytes;
                }
                Got::Timeout => return Ok(Incoming::Timeout),
                Got::End if self.filled == 0 => return Ok(Incoming::End),
                Got::End => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            }
        }
        self.filled = 0;
        if self.sender && self.spin.is_on() {
            self.last = Some(Instant::now());
        }
        Ok(Incoming::Head(Head::decode(&self.head)?))
    }

    fn payload(&mut self, into: &mut [IoSliceMut<'_>], until: Option<Instant>) -> Result<u32, WireError> {
        let mut crc = 0;
        let mut left = into;
        IoSliceMut::advance_slices(&mut left, 0);
        let mut missing: usize = left.iter().map(|slice| slice.len()).sum();
        while !left.is_empty() {
            self.wait_for(least(missing));
            match self.read_soon(left, until)? {
                Got::Bytes(bytes) => {
                    missing -= bytes;
                    // The checksum while the bytes are still in the cache of this core.
                    let mut fresh = bytes;
                    for slice in left.iter() {
                        let part = slice.len().min(fresh);
                        crc = crc::append(crc, &slice[..part]);
                        fresh -= part;
                        if fresh == 0 {
                            break;
                        }
                    }
                    IoSliceMut::advance_slices(&mut left, bytes);
                }
                Got::Timeout => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
                Got::End => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            }
        }
        Ok(crc)
    }

    fn proven(&mut self) {
        self.sender = true;
    }

    fn drain(&mut self, until: Instant) {
        self.wait_for(1);
        let mut scratch = vec![0; 64 << 10];
        while let Ok(Got::Bytes(_)) = self.read(&mut [IoSliceMut::new(&mut scratch)], Some(until)) {}
    }
}

/// Reads the small payload of a control frame.
pub(crate) fn control_payload(
    source: &mut dyn FrameSource,
    head: &Head,
    until: Option<Instant>,
) -> Result<(Vec<u8>, u32), WireError> {
    let mut payload = vec![0; head.payload_bytes as usize];
    let crc = source.payload(&mut [IoSliceMut::new(&mut payload)], until)?;
    Ok((payload, crc))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a read that waits for more than can still come would never return. What it has taken itself does not count as waiting.
    #[test]
    fn a_read_waits_for_no_more_than_is_sure_to_come() {
        for missing in (0..=4 << 20).step_by(1000) {
            let least = least(missing);
            // Up to `least - 1` bytes may have been taken when the wait begins.
            assert!(least == 1 || missing >= 2 * least - 1, "{least} of {missing}");
            assert!(least <= LEAST_BYTES);
        }
        assert_eq!((least(1 << 20), least(100 << 10), least(10 << 10)), (128 << 10, 32 << 10, 1));
    }
}
