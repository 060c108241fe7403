//! The few system calls that the standard library lacks. Called by `up`, `supervised`, `dirs`, `inspect` and the roles.

use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// What a process can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Drain and end.
    Terminate,
    /// End now.
    Kill,
}

/// Sends `signal` to a child that has not been waited for yet, so that its number is still its own.
pub fn signal(pid: u32, signal: Signal) {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return };
    let number = match signal {
        Signal::Terminate => libc::SIGTERM,
        Signal::Kill => libc::SIGKILL,
    };
    // SAFETY: kill takes two numbers and touches no memory of ours. An error means that the child has ended.
    unsafe { libc::kill(pid, number) };
}

/// Lets a descriptor stay open in the program that this process turns into. For between fork and exec: one call, no memory.
pub fn pass_on(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: takes numbers; clears the only flag that descriptors have.
    match unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The listening socket that whoever started this process left open for it. Errors when there is none under this number. To be
/// called once per number.
pub fn inherited(descriptor: RawFd) -> io::Result<TcpListener> {
    let none = || io::Error::new(io::ErrorKind::InvalidInput, "no listening socket");
    // Those are of the process itself.
    if descriptor <= libc::STDERR_FILENO {
        return Err(none());
    }
    let (mut listens, mut bytes): (libc::c_int, libc::socklen_t) =
        (0, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the number is checked by the system; the buffer is ours and its length is passed.
    let found = unsafe {
        let value = (&raw mut listens).cast();
        libc::getsockopt(descriptor, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, value, &raw mut bytes)
    };
    if found != 0 || listens == 0 {
        return Err(none());
    }
    // SAFETY: sets a flag of an open descriptor, so that no child of ours gets it.
    unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: it is open, it is a socket, and it was left to us: nobody else in this process has it.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    Ok(TcpListener::from(socket))
}

/// Files and connections that a role may have open, where the system allows: more than clients of a router and the rest.
const OPEN_FILES: libc::rlim_t = 32_768;

/// macOS allows no more than this many (its OPEN_MAX), whatever it says.
const OPEN_FILES_MACOS: libc::rlim_t = 10_240;

/// Takes this process out of a shell's limit, which is 1,024 on Linux and 256 on macOS, as far as its user may.
pub fn allow_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole rlimit of ours.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return;
    }
    for wanted in [OPEN_FILES, OPEN_FILES_MACOS] {
        let wanted = wanted.min(limit.rlim_max);
        if limit.rlim_cur >= wanted {
            return;
        }
        let raised = libc::rlimit { rlim_cur: wanted, ..limit };
        // SAFETY: as above.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raised) } == 0 {
            return;
        }
    }
}

/// The user that this process acts for.
pub fn user_id() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() }
}

/// Lets everything written to standard error vanish: its reader is gone, and writing would fail.
pub fn silence_stderr() {
    // SAFETY: the path is a constant C string; the descriptor is checked; dup2 replaces descriptor 2 atomically.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
        if null >= 0 {
            libc::dup2(null, libc::STDERR_FILENO);
        }
    }
}

/// This machine's name, for people.
pub fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer is ours and its length is passed.
    let ok = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } == 0;
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    if ok { String::from_utf8_lossy(&name[..end]).into_owned() } else { "unnamed".into() }
}

/// All memory of this machine, in bytes, where the system tells.
pub fn memory_bytes() -> Option<u64> {
    // SAFETY: takes a number, touches no memory of ours.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(page).ok()?).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a router of a shell that allows few files has room for its clients.
    #[test]
    fn a_shells_limit_of_files_is_raised() {
        let limit = || {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the pointer is to a whole rlimit of ours.
            assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
            limit
        };
        let few = libc::rlimit { rlim_cur: 256.min(limit().rlim_max), ..limit() };
        // SAFETY: as above.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) }, 0);
        allow_open_files();
        assert!(limit().rlim_cur >= OPEN_FILES_MACOS.min(few.rlim_max));
    }
}
