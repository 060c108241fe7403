//! Writes to a socket of this machine without a copy: pages go to the socket as they are, and the receiver copies out of them.
//! Used by [`super::tcp`] for payloads that stay where they are until their receiver has reported them; Linux only.
//!
//! What is changed before the receiver has read it arrives changed. A lane keeps its frames until they are reported as landed, over all
//! its connections. Only a push that is given up lets go of them earlier: its session is over, and what is read of it then lands
//! nowhere or does not check.

use std::io::{self, IoSlice};
use std::net::TcpStream;

use socket2::SockRef;

/// Shorter slices are sooner copied: every page and every slice has its price.
const SLICE_BYTES_MIN: usize = 16 << 10;

/// Pages are whole pieces of memory, and a slice's first and last ones cost as much as the others.
const PAGE_BYTES: usize = 4 << 10;

/// From here on that does not count.
const LONG_BYTES_MIN: usize = 1 << 20;

/// Whether lending such slices takes less than copying them.
pub(super) fn worth(slices: &[IoSlice<'_>]) -> bool {
    slices.iter().all(|slice| {
        let (start, bytes) = (slice.as_ptr() as usize, slice.len());
        let whole = start.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        bytes >= LONG_BYTES_MIN || whole && bytes >= SLICE_BYTES_MIN
    })
}

/// Whether there is such a thing.
pub(super) const CAN: bool = cfg!(any(target_os = "linux", target_os = "android"));

/// Writes `head`, behind which something is lent at once.
pub(super) fn ahead(socket: &TcpStream, head: &[u8]) -> io::Result<usize> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let flags = libc::MSG_MORE | libc::MSG_NOSIGNAL;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let flags = 0;
    SockRef::from(socket).send_with_flags(head, flags)
}

/// A pipe through which pages go to a socket. Empty between calls.
pub(super) struct Lender {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pipe: pipe::Pipe,
}

#[cfg(any(target_os = "linux", target_os = "android"))]
impl Lender {
    /// `None` where no pipe is to be had.
    pub fn new() -> Option<Self> {
        pipe::Pipe::new().map(|pipe| Lender { pipe })
    }

    /// Hands the first bytes of `slices` to the socket; how many. `None`: these pages cannot be lent, nothing was done.
    pub fn lend(&mut self, socket: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let Some(taken) = self.pipe.take(slices) else { return Ok(None) };
        let all = taken == slices.iter().map(|slice| slice.len()).sum();
        self.pipe.pass(socket, taken, !all)?;
        Ok(Some(taken))
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
impl Lender {
    pub fn new() -> Option<Self> {
        None
    }

    pub fn lend(&mut self, _: &TcpStream, _: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        Ok(None)
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod pipe {
    use std::io::{self, IoSlice};
    use std::net::TcpStream;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::ptr::null_mut;

    /// Bytes on their way at once.
    const PIPE_BYTES: libc::c_int = 1 << 20;

    /// Slices that the system takes at once.
    const SLICES_MAX: usize = 1024;

    pub struct Pipe {
        read: OwnedFd,
        write: OwnedFd,
    }

    impl Pipe {
        pub fn new() -> Option<Self> {
            let mut ends = [0; 2];
            // SAFETY: a place for two descriptors, which are nobody else's.
            let pipe = unsafe {
                if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
                    return None;
                }
                Pipe { read: OwnedFd::from_raw_fd(ends[0]), write: OwnedFd::from_raw_fd(ends[1]) }
            };
            // SAFETY: a pipe that is open. Where so much is refused it holds less.
            unsafe { libc::fcntl(pipe.write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
            Some(pipe)
        }

        /// Takes the first bytes of `slices` in, as pages; how many.
        pub fn take(&mut self, slices: &[IoSlice<'_>]) -> Option<usize> {
            let count = slices.len().min(SLICES_MAX);
            let (places, flags) = (slices.as_ptr().cast(), libc::SPLICE_F_NONBLOCK);
            // SAFETY: slices that live for the call and are laid out as the system's own. It only ever reads their pages, and keeps them
            // itself for as long.
            let taken = unsafe { libc::vmsplice(self.write.as_raw_fd(), places, count, flags) };
            usize::try_from(taken).ok().filter(|taken| *taken > 0)
        }

        /// Hands `bytes` of what was taken in to the socket; `more` follows at once.
        pub fn pass(&mut self, socket: &TcpStream, bytes: usize, more: bool) -> io::Result<()> {
            let flags = if more { libc::SPLICE_F_MORE } else { 0 };
            let mut left = bytes;
            while left > 0 {
                let (from, to) = (self.read.as_raw_fd(), socket.as_raw_fd());
                // SAFETY: descriptors that are open, and no offsets.
                let moved = unsafe { libc::splice(from, null_mut(), to, null_mut(), left, flags) };
                match usize::try_from(moved) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(moved) => left -= moved,
                    Err(_) => match io::Error::last_os_error() {
                        error if error.kind() == io::ErrorKind::Interrupted => {}
                        // What is in the pipe cannot be taken back: the connection is over.
                        error => return Err(error),
                    },
                }
            }
            Ok(())
        }
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{Shutdown, TcpListener};
    use std::time::Duration;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (stream, listener.accept().unwrap().0)
    }

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    /// Protects: more than the pipe holds, of slices that begin anywhere, arrives whole and in order.
    #[test]
    fn what_is_lent_arrives() {
        let (near, mut far) = connected();
        let bytes = pattern(5 << 20);
        let parts = [&bytes[..3], &bytes[3..1 << 20], &bytes[1 << 20..]];
        let mut slices = parts.map(IoSlice::new);
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            far.read_to_end(&mut got).map(|_| got)
        });
        let mut lender = Lender::new().unwrap();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let lent = lender.lend(&near, left).unwrap().expect("plain memory can be lent");
            IoSlice::advance_slices(&mut left, lent);
        }
        near.shutdown(Shutdown::Write).unwrap();
        assert!(reader.join().unwrap().unwrap() == bytes);
    }

    /// Protects: a receiver that does not read holds a sender up no longer than it says, and a receiver that is gone does not.
    #[test]
    fn who_does_not_read_is_not_waited_for() {
        let (near, far) = connected();
        near.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        let bytes = pattern(1 << 20);
        let mut lender = Lender::new().unwrap();
        let slow = loop {
            if let Err(error) = lender.lend(&near, &[IoSlice::new(&bytes)]) {
                break error;
            }
        };
        assert_eq!(slow.kind(), io::ErrorKind::WouldBlock);
        let (near, gone) = connected();
        drop((far, gone));
        let mut lender = Lender::new().unwrap();
        let over = (0..64).find_map(|_| lender.lend(&near, &[IoSlice::new(&bytes)]).err());
        assert!(over.is_some());
    }

    #[test]
    fn what_is_short_or_lies_across_pages_is_copied() {
        let bytes = vec![0; (1 << 20) + 2 * PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        let slice = |at: usize, count: usize| IoSlice::new(&bytes[start + at..][..count]);
        assert!(worth(&[slice(0, SLICE_BYTES_MIN), slice(PAGE_BYTES, 1 << 19)]));
        assert!(!worth(&[slice(0, SLICE_BYTES_MIN), slice(16, 1 << 19)]));
        assert!(!worth(&[slice(0, SLICE_BYTES_MIN / 2)]));
        assert!(worth(&[slice(16, LONG_BYTES_MIN)]));
    }
}
