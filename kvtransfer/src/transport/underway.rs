//! What the system knows of a TCP connection's bytes on their way: by it the sender tells a path that has fallen silent from a
//! receiver that is slow, whose system answers all the same. Asked by [`super::tcp`].

use std::net::TcpStream;

use crate::wire::Underway;

/// Linux: bytes in the send queue, and whether they were sent again without an answer.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn of(stream: &TcpStream) -> Option<Underway> {
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    let mut queued: libc::c_int = 0;
    // SAFETY: a socket that is open, and a place for the answer.
    if unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) } != 0 {
        return None;
    }
    // SAFETY: plain numbers, of which zeros are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of_val(&info) as libc::socklen_t;
    let place = (&raw mut info).cast();
    // SAFETY: a socket that is open, and a place of the size that is said.
    let told = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut size)
    };
    // Either bytes were sent again after a timeout, or a window of nothing was asked about.
    let asked = told == 0 && (info.tcpi_retransmits > 0 && info.tcpi_unacked > 0 || info.tcpi_probes > 0);
    let silence = Duration::from_millis(info.tcpi_last_ack_recv.into());
    Some(Underway {
        bytes: queued.max(0) as u64,
        taken_bytes: (told == 0).then_some(info.tcpi_bytes_acked),
        unanswered: asked.then_some(silence),
    })
}

/// macOS tells the bytes only.
#[cfg(target_vendor = "apple")]
pub(super) fn of(stream: &TcpStream) -> Option<Underway> {
    use std::os::fd::AsRawFd;

    let mut queued: libc::c_int = 0;
    let mut size = size_of_val(&queued) as libc::socklen_t;
    let place = (&raw mut queued).cast();
    // SAFETY: a socket that is open, and a place of the size that is said.
    let told = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NWRITE, place, &raw mut size)
    };
    (told == 0).then_some(Underway { bytes: queued.max(0) as u64, ..Underway::default() })
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
pub(super) fn of(_: &TcpStream) -> Option<Underway> {
    None
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    /// Protects: a receiver that does not read is slow, not silent.
    #[test]
    fn what_nobody_reads_is_under_way_and_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(of(&stream).map(|underway| (underway.bytes, underway.unanswered)), Some((0, None)));
        let _unread = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(bytes) = stream.write(&[0; 64 << 10]) {
            written += bytes as u64;
        }
        let underway = of(&stream).unwrap();
        assert!(underway.bytes > 0 && underway.bytes < written, "{underway:?} of {written}");
        assert!(underway.taken_bytes.is_some_and(|taken| taken > 0), "{underway:?}");
        assert_eq!(underway.unanswered, None);
    }
}
