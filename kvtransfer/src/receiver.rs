//! The receiving end of a rank process: owns the KV port, expects sessions, hands landings back. Decode ranks use it.
//!
//! Threads: one accepts, one watches deadlines, one per connection reads frames and puts them in place.

mod conn;
mod probe;
mod registry;
mod relay;
mod slot;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use backend::{KvLanding, KvSpec};

use crate::layout::describe;
use crate::limits::{PAYLOAD_BYTES_MAX, REQUEST_BYTES_MAX, SPEC_BYTES_MAX};
use crate::receiver::registry::Registry;
use crate::receiver::slot::LandingSlot;
use crate::session::Receiving;
use crate::sync::lock;
use crate::transport::tcp;
use crate::transport::tls::{self, Tls};
use crate::wire::Wire;
use crate::{Close, Limits, OnTurned, Sender, SessionError, SessionId, TargetSpec, Ticket};

/// Pause after a failed accept (out of file descriptors, say), so that it is not tried at once again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Owns the KV port of one rank process. A clone is another handle on the same port; the port closes with
/// [`Receiver::stop`] or the last handle.
#[derive(Clone)]
pub struct Receiver(Arc<Handle>);

struct Handle {
    registry: Arc<Registry>,
    local_addr: Option<SocketAddr>,
    /// Wakes the accepting thread when it goes.
    door: Mutex<Option<UnixStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A session that is about to come.
#[derive(Clone, Debug)]
pub struct Expect {
    /// Its name.
    pub session: SessionId,
    /// Its secret.
    pub ticket: Ticket,
    /// The router's id of the request, at most 256 bytes.
    pub request: String,
    /// The request's attempt.
    pub attempt: u32,
    /// Epoch of the decode group.
    pub epoch: u64,
    /// What this rank holds.
    pub spec: KvSpec,
    /// Positions that land; those of the landing.
    pub tokens: Range<u32>,
    /// Longest silence: until the first sender has proved itself, and then of every sender.
    pub deadline: Duration,
    /// The group of several ranks that this one is of: they pass replicated planes on to each other.
    pub peers: Option<Peers>,
}

/// All ranks of a receiving group, as each of them sees it. A replicated plane crosses the link to the group once: every
/// rank gets its share of the tokens and sends it to the other ranks' KV ports, in the same session.
#[derive(Clone)]
pub struct Peers {
    /// This rank, an index into `targets`.
    pub rank: usize,
    /// Every rank, in order.
    pub targets: Vec<TargetSpec>,
    /// What this rank sends with.
    pub sender: Sender,
}

impl Peers {
    /// Every rank's cache.
    pub(crate) fn specs(&self) -> Vec<KvSpec> {
        self.targets.iter().map(|target| target.spec.clone()).collect()
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peers(rank {} of {})", self.rank, self.targets.len())
    }
}

/// The end of an expected session. The landing is back; nobody writes to it any more.
#[derive(Debug)]
pub struct Landed<L> {
    /// What was given to [`Receiver::expect`].
    pub landing: L,
    /// `Ok`: every byte is there, verified. Otherwise nothing of it may be used.
    pub result: Result<Summary, SessionError>,
    /// When the last frame came (the beginning of the wait, if none came).
    pub last_frame: Instant,
}

/// A session that landed whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of cache.
    pub bytes: u64,
    /// Of them, those that came from other ranks of the own group.
    pub gathered_bytes: u64,
    /// Payload bytes on the wire: fewer where a codec was used.
    pub wire_bytes: u64,
    /// Connections that were lost and replaced.
    pub resumed: u32,
    /// Data frames.
    pub frames: u64,
    /// How the prompt's computation ended.
    pub close: Close,
}

/// A session that is not expected after all; the landing is handed back.
pub struct Refused<L> {
    /// Why.
    pub error: SessionError,
    /// What was given to [`Receiver::expect`].
    pub landing: L,
}

impl<L> fmt::Debug for Refused<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Refused({})", self.error)
    }
}

impl<L> fmt::Display for Refused<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Receiver {
    /// Listens on `addr` (port 0: any free one).
    pub fn bind(addr: SocketAddr, limits: Limits) -> std::io::Result<Self> {
        Receiver::bind_with(addr, limits, None)
    }

    /// As [`Receiver::bind`]; with `tls`, connections are encrypted and their other ends have certificates.
    pub fn bind_with(addr: SocketAddr, limits: Limits, tls: Option<Tls>) -> std::io::Result<Self> {
        Receiver::bind_counted(addr, limits, tls, OnTurned::default())
    }

    /// As [`Receiver::bind_with`]; `turned` hears of connections that were turned away.
    pub fn bind_counted(
        addr: SocketAddr,
        limits: Limits,
        tls: Option<Tls>,
        turned: OnTurned,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(addr)?;
        // Who hung up between the wait and the accept must not be waited for.
        listener.set_nonblocking(true)?;
        let local_addr = listener.local_addr()?;
        let (door, inside) = UnixStream::pair()?;
        let receiver = Receiver::new(limits, turned, Some(local_addr));
        *lock(&receiver.0.door) = Some(door);
        let registry = receiver.0.registry.clone();
        let accepts = thread::Builder::new()
            .name("kv-accept".into())
            .spawn(move || accept(&listener, &inside, tls.as_ref(), &registry))?;
        lock(&receiver.0.threads).push(accepts);
        Ok(receiver)
    }

    /// Without a port: connections are handed in by [`Receiver::attach`].
    pub fn detached(limits: Limits) -> Self {
        Receiver::new(limits, OnTurned::default(), None)
    }

    fn new(limits: Limits, turned: OnTurned, local_addr: Option<SocketAddr>) -> Self {
        let registry = Arc::new(Registry::new(limits, turned));
        let watched = registry.clone();
        let watch =
            thread::Builder::new().name("kv-deadlines".into()).spawn(move || watched.watch_deadlines());
        if let Err(error) = &watch {
            tracing::error!(%error, "no thread for the deadlines of kv sessions");
        }
        let (threads, door) = (Mutex::new(watch.into_iter().collect()), Mutex::new(None));
        Receiver(Arc::new(Handle { registry, local_addr, door, threads }))
    }

    /// The address listened on; `0.0.0.0:0` without a port.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_addr.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0))
    }

    /// Serves a connection of any transport, under the same bounds as accepted ones.
    pub fn attach(&self, wire: Wire) {
        self.0.registry.admit(wire);
    }

    /// Waits for a session in the background. `done` is called exactly once, on a thread of the receiver, when the
    /// session has ended in whatever way; it must not block for long. Errors hand the landing back at once and `done` is
    /// dropped.
    pub fn expect<L: KvLanding + 'static>(
        &self,
        expect: Expect,
        landing: L,
        done: impl FnOnce(Landed<L>) + Send + 'static,
    ) -> Result<(), Refused<L>> {
        if let Err(error) = expect.check(&landing) {
            return Err(Refused { error, landing });
        }
        let session = expect.session;
        let registry = &self.0.registry;
        let receiving = Receiving::new(expect.clone(), &registry.limits, Instant::now());
        let weak = Arc::downgrade(registry);
        let slot = LandingSlot::new(expect, receiving, landing, Box::new(done), weak);
        registry.insert(session, slot).map_err(|(error, slot)| {
            let landing = Arc::into_inner(slot).and_then(LandingSlot::into_landing);
            Refused { error, landing: landing.expect("nobody else has seen the slot") }
        })
    }

    /// Ends a session; its `done` is called with [`SessionError::Cancelled`] unless it had ended before.
    pub fn cancel(&self, session: &SessionId) {
        if let Some(slot) = self.0.registry.get(session) {
            slot.fail(None, SessionError::Cancelled);
        }
    }

    /// Closes the port, ends all sessions and waits for connections to be gone (at most 5 s). Not to be called from a
    /// `done`, whose connection it would wait for.
    pub fn stop(self) {
        self.0.stop();
    }
}

impl Expect {
    fn check<L: KvLanding>(&self, landing: &L) -> Result<(), SessionError> {
        let invalid = |text: String| Err(SessionError::Invalid(text));
        let (ours, theirs) = (&self.tokens, landing.tokens());
        if *ours != theirs || ours.start > ours.end {
            return invalid(format!("session of tokens {ours:?} for a landing of {theirs:?}"));
        }
        if self.request.len() > REQUEST_BYTES_MAX {
            return invalid(format!(
                "request id of {} bytes, at most {REQUEST_BYTES_MAX}",
                self.request.len()
            ));
        }
        if let Some(peers) = &self.peers
            && peers.targets.get(peers.rank).is_none_or(|own| own.spec != self.spec)
        {
            return invalid(format!("{peers:?} holds another cache"));
        }
        let spec_bytes = describe(&self.spec).len();
        if spec_bytes > SPEC_BYTES_MAX {
            return invalid(format!("spec of {spec_bytes} bytes, at most {SPEC_BYTES_MAX}"));
        }
        match self.spec.planes.iter().map(|plane| plane.token_bytes()).max() {
            Some(row) if row > PAYLOAD_BYTES_MAX => {
                invalid(format!("row of {row} bytes, a frame takes {PAYLOAD_BYTES_MAX}"))
            }
            _ => Ok(()),
        }
    }
}

impl Handle {
    fn stop(&self) {
        self.registry.stop();
        drop(lock(&self.door).take());
        let threads = std::mem::take(&mut *lock(&self.threads));
        let own = thread::current().id();
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != own) {
            if thread.join().is_err() {
                tracing::error!("a kv receiver thread panicked");
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(listener: &TcpListener, door: &UnixStream, tls: Option<&Tls>, registry: &Arc<Registry>) {
    while let Some(waited) = wait(listener, door).transpose() {
        let accepted = waited.and_then(|()| listener.accept());
        let wire = accepted.and_then(|(stream, peer)| {
            // Some systems hand the listener's own setting on.
            stream.set_nonblocking(false)?;
            match tls {
                Some(tls) => tls::accept(stream, tls, peer.to_string()),
                None => tcp::wire(stream, peer.to_string()),
            }
        });
        match wire {
            Ok(wire) => registry.admit(wire),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::warn!(%error, "kv connection not accepted");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// Until somebody connects; `None`: until `door`'s other end is gone.
fn wait(listener: &TcpListener, door: &UnixStream) -> io::Result<Option<()>> {
    let on = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut both = [on(listener.as_raw_fd()), on(door.as_raw_fd())];
    // SAFETY: two descriptors that are open for the call.
    let ready = unsafe { libc::poll(both.as_mut_ptr(), both.len() as libc::nfds_t, -1) };
    if both[1].revents != 0 {
        return Ok(None);
    }
    if ready < 0 { Err(io::Error::last_os_error()) } else { Ok(Some(())) }
}
