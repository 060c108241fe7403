//! Blocking TCP: what saturates 10GbE with one stream (tokio's was a quarter slower for bulk).

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::transport::lend::{self, Lender};
use crate::transport::{Dialer, underway};
use crate::wire::{Control, ReadTimeout, Underway, Wire, WriteTimeout, split};

/// First keepalive probe after so much idleness: below the idle timers of common firewalls.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// What was sent and not acknowledged for so long was lost with its path: the connection ends, another may do.
#[cfg(any(target_os = "linux", target_os = "android"))]
const UNHEARD_MAX: Duration = Duration::from_secs(8);

/// Slices that the systems take at once.
const SLICES_MAX: usize = 1024;

/// Connects over TCP.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpDialer;

impl Dialer for TcpDialer {
    fn dial(&self, address: &str, timeout: Duration) -> io::Result<Wire> {
        wire(connect(address, timeout)?, address.to_owned())
    }
}

/// A socket to `address`, whichever of its addresses answers first in their order.
pub(crate) fn connect(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let until = Instant::now() + timeout;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no such host");
    for addr in address.to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&addr, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A connected socket as a wire: no delay, keepalive on.
pub fn wire(stream: TcpStream, peer: String) -> io::Result<Wire> {
    prepare(&stream)?;
    let (writer, control) = (TcpWriter::new(stream.try_clone()?), control(&stream)?);
    Ok(split(stream, writer, control, peer))
}

/// No delay, keepalive on.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(UNHEARD_MAX))?;
    Ok(())
}

/// Ends the socket, whatever is spoken on it.
pub(crate) fn control(stream: &TcpStream) -> io::Result<Arc<dyn Control>> {
    Ok(Arc::new(TcpControl(stream.try_clone()?)))
}

struct TcpControl(TcpStream);

impl Control for TcpControl {
    fn close(&self, how: Shutdown) {
        // Fails where the peer has closed already: nothing is left to do then.
        let _ = self.0.shutdown(how);
    }

    fn idle(&self) -> bool {
        if self.0.set_nonblocking(true).is_err() {
            return false;
        }
        let waits = matches!(self.0.peek(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        self.0.set_nonblocking(false).is_ok() && waits
    }

    fn underway(&self) -> Option<Underway> {
        underway::of(&self.0)
    }

    fn abandon(&self) {
        // Nothing lingers: the last handle's end resets the connection instead of sending on.
        let _ = SockRef::from(&self.0).set_linger(Some(Duration::ZERO));
        self.close(Shutdown::Both);
    }
}

impl ReadTimeout for TcpStream {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        TcpStream::set_read_timeout(self, timeout)
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn set_least(&self, bytes: usize) {
        let bytes = libc::c_int::try_from(bytes).unwrap_or(1);
        let (place, size) = ((&raw const bytes).cast(), size_of_val(&bytes) as libc::socklen_t);
        // SAFETY: a socket that is open, and a number of the size that is said. Where it is refused, reads wait for less.
        unsafe { libc::setsockopt(self.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, place, size) };
    }

    fn near(&self) -> bool {
        let ends = self.local_addr().ok().zip(self.peer_addr().ok());
        ends.is_some_and(|(own, peer)| own.ip() == peer.ip())
    }

    fn read_now(&mut self, into: &mut [IoSliceMut<'_>]) -> Option<io::Result<usize>> {
        // SAFETY: zeros are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = into.as_mut_ptr().cast();
        message.msg_iovlen = into.len().min(SLICES_MAX) as _;
        // SAFETY: a socket that is open, and slices that live for the call and are laid out as the system's own.
        let count = unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        match usize::try_from(count) {
            Ok(count) => Some(Ok(count)),
            Err(_) => {
                let error = io::Error::last_os_error();
                (error.kind() != io::ErrorKind::WouldBlock).then_some(Err(error))
            }
        }
    }
}

/// The writing half. To an end on this machine it lends what stays where it is, and copies nothing.
struct TcpWriter {
    stream: TcpStream,
    /// The other end is on this machine, and pages could be lent so far.
    lends: bool,
    /// Made when it is first needed.
    lender: Option<Lender>,
}

impl TcpWriter {
    fn new(stream: TcpStream) -> Self {
        TcpWriter { lends: stream.near() && lend::CAN, lender: None, stream }
    }
}

impl Write for TcpWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl WriteTimeout for TcpWriter {
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }

    fn lends(&self, slices: &[IoSlice<'_>]) -> bool {
        self.lends && lend::worth(slices)
    }

    fn write_ahead(&mut self, head: &[u8]) -> io::Result<usize> {
        lend::ahead(&self.stream, head)
    }

    fn lend(&mut self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        if self.lender.is_none() {
            self.lender = Lender::new();
        }
        let lent = match &mut self.lender {
            Some(lender) => lender.lend(&self.stream, slices),
            None => Ok(None),
        };
        self.lends = !matches!(lent, Ok(None));
        lent
    }
}

impl WriteTimeout for TcpStream {
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        TcpStream::set_write_timeout(self, timeout)
    }
}
