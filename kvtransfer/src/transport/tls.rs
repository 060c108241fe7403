//! TLS 1.3 over TCP, certificates of both ends: the KV wire where others can listen, and the links between the ranks of a
//! group, for which [`connect`], [`accepted`], [`halves`] and [`super::sealed`] are public. One connection's state is shared
//! by its two halves: what takes time (the sockets) is done outside its lock.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use rustls::Connection;
pub use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::transport::{Dialer, tcp};
use crate::wire::{ReadTimeout, Wire, WriteTimeout, split};

/// Ciphertext read at once.
const READ_BYTES: usize = 256 << 10;
/// Plaintext encrypted at once, before it goes to the socket.
const WRITE_BYTES: usize = 256 << 10;

/// More than a record takes, encrypted.
const RECORD_BYTES: usize = 20 << 10;

/// How both ends of a process know their peers.
#[derive(Clone)]
pub struct Tls {
    /// For connections that come.
    pub server: Arc<ServerConfig>,
    /// For connections that are made.
    pub client: Arc<ClientConfig>,
    /// Name in the certificates of those that connections are made to.
    pub name: ServerName<'static>,
    /// Of those with a right certificate, who may talk; `None`: all.
    pub peers: Option<Arc<dyn Peers>>,
}

/// Who may talk, of those that the authority has certified. Asked at the end of a handshake, and when the answer may have changed.
pub trait Peers: Send + Sync {
    /// Changes when [`Peers::stands`] may answer otherwise than before; 0 as long as it has turned nobody down. Asked at every read
    /// and write.
    fn version(&self) -> u64;

    /// Whether the owner of these certificates, its own first, may talk.
    fn stands(&self, certs: &[CertificateDer<'_>]) -> bool;
}

/// Why a read or write fails whose peer does not stand any more, or a handshake whose peer never did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its join token was revoked")]
pub struct Revoked;

impl Revoked {
    /// Whether it is the reason of `error`.
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Revoked>())
    }
}

/// Whether the other end of one connection still stands.
#[derive(Default)]
pub(super) struct Standing {
    peers: Option<Arc<dyn Peers>>,
    /// When it was looked at last.
    version: AtomicU64,
    ended: AtomicBool,
}

impl Standing {
    pub fn new(tls: &Tls) -> Self {
        Standing { peers: tls.peers.clone(), ..Standing::default() }
    }

    /// Errors with [`Revoked`] when the other end of `connection` may not talk any more; one that is not through its handshake is
    /// nobody yet. One number is read where nothing has changed.
    pub fn check(&self, connection: &Connection, stream: &TcpStream) -> io::Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let version = peers.version();
        if version == self.version.load(Ordering::Relaxed) || connection.is_handshaking() {
            return Ok(());
        }
        if !peers.stands(connection.peer_certificates().unwrap_or_default()) {
            if !self.ended.swap(true, Ordering::Relaxed) {
                let peer = stream.peer_addr().map_or_else(|_| "a peer".to_owned(), |peer| peer.to_string());
                tracing::warn!(peer, "connection ended: {Revoked}");
            }
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, Revoked));
        }
        self.version.store(version, Ordering::Relaxed);
        Ok(())
    }
}

/// The same configurations, not ones that look alike.
impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.server, &other.server)
            && Arc::ptr_eq(&self.client, &other.client)
            && self.name == other.name
    }
}

impl Eq for Tls {}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({:?})", self.name)
    }
}

/// Connects over TCP and proves who both ends are.
#[derive(Clone, Debug)]
pub struct TlsDialer(pub Tls);

impl Dialer for TlsDialer {
    fn dial(&self, address: &str, timeout: Duration) -> io::Result<Wire> {
        let until = Instant::now() + timeout;
        let mut stream = tcp::connect(address, timeout)?;
        tcp::prepare(&stream)?;
        let connection = connect(&mut stream, &self.0, until, |_| Ok(until))?;
        wire(stream, connection, &self.0, address.to_owned())
    }
}

/// Proves to whoever accepted `stream` who this end is, and the other way round, by `until`. `wait` is called when this end has
/// spoken and returns when the other end has answered, for one that may take longer than `until` with it. With TLS 1.3 this
/// end is done before the other has judged its certificate: a refusal comes with the first read.
pub fn connect(
    stream: &mut TcpStream,
    tls: &Tls,
    until: Instant,
    wait: impl FnOnce(&TcpStream) -> io::Result<Instant>,
) -> io::Result<Connection> {
    let connection = ClientConnection::new(tls.client.clone(), tls.name.clone());
    let mut connection = Connection::Client(connection.map_err(io::Error::other)?);
    say(stream, &mut connection, until)?;
    let until = wait(stream)?;
    shake_hands(stream, &mut connection, until)?;
    Standing::new(tls).check(&connection, stream)?;
    Ok(connection)
}

/// The other end of [`connect`], for an accepted `stream`.
pub fn accepted(stream: &mut TcpStream, tls: &Tls, until: Instant) -> io::Result<Connection> {
    let connection = ServerConnection::new(tls.server.clone());
    let mut connection = Connection::Server(connection.map_err(io::Error::other)?);
    shake_hands(stream, &mut connection, until)?;
    Standing::new(tls).check(&connection, stream)?;
    Ok(connection)
}

/// To the end of the handshake; `stream` blocks, and for ever afterwards.
fn shake_hands(stream: &mut TcpStream, connection: &mut Connection, until: Instant) -> io::Result<()> {
    loop {
        say(stream, connection, until)?;
        if !connection.is_handshaking() {
            stream.set_read_timeout(None)?;
            return stream.set_write_timeout(None);
        }
        stream.set_read_timeout(Some(left(until)?))?;
        match connection.read_tls(stream) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => _ = read?,
        }
        if let Err(error) = connection.process_new_packets() {
            // The other end may hear why; it is refused all the same.
            let _ = say(stream, connection, until);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
}

fn say(stream: &mut TcpStream, connection: &mut Connection, until: Instant) -> io::Result<()> {
    while connection.wants_write() {
        stream.set_write_timeout(Some(left(until)?))?;
        connection.write_tls(stream)?;
    }
    Ok(())
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::Error::new(io::ErrorKind::TimedOut, "no TLS in time")) } else { Ok(left) }
}

/// Both directions of a connection, for a thread each. Timeouts are those of its socket.
pub fn halves(
    stream: TcpStream,
    mut connection: Connection,
    tls: &Tls,
) -> io::Result<(impl Read + ReadTimeout + Send + 'static, impl Write + WriteTimeout + Send + 'static)> {
    connection.set_buffer_limit(Some(WRITE_BYTES));
    let (state, out) = (Mutex::new(connection), Mutex::new(stream.try_clone()?));
    let shared = Arc::new(Shared { state, out, standing: Standing::new(tls) });
    let writer = Writer { stream: stream.try_clone()?, shared: shared.clone(), cipher: Vec::new() };
    Ok((Reader { stream, shared, cipher: vec![0; READ_BYTES], ready: 0..0 }, writer))
}

/// An accepted socket as a wire. The handshake happens as the first frame is waited for, within the same deadline.
pub fn accept(stream: TcpStream, tls: &Tls, peer: String) -> io::Result<Wire> {
    tcp::prepare(&stream)?;
    let connection = ServerConnection::new(tls.server.clone()).map_err(io::Error::other)?;
    wire(stream, Connection::Server(connection), tls, peer)
}

fn wire(stream: TcpStream, connection: Connection, tls: &Tls, peer: String) -> io::Result<Wire> {
    let control = tcp::control(&stream)?;
    let (reader, writer) = halves(stream, connection, tls)?;
    Ok(split(reader, writer, control, peer))
}

/// What both halves use. Locks are taken in the order `out`, `state`: records leave in the order in which they were made.
struct Shared {
    state: Mutex<Connection>,
    out: Mutex<TcpStream>,
    standing: Standing,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, Connection> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what the connection itself has to say. During the handshake nobody else writes; later it goes with what is
    /// written next, if somebody writes now.
    fn answer(&self) -> io::Result<()> {
        let handshaking = {
            let state = self.state();
            if !state.wants_write() {
                return Ok(());
            }
            state.is_handshaking()
        };
        let mut out = match (handshaking, self.out.try_lock()) {
            (_, Ok(out)) => out,
            (true, Err(_)) => self.out.lock().unwrap_or_else(PoisonError::into_inner),
            (false, Err(_)) => return Ok(()),
        };
        let mut cipher = Vec::new();
        take(&mut self.state(), &mut cipher)?;
        out.write_all(&cipher)
    }
}

/// Moves all records that are ready into `cipher`.
fn take(state: &mut Connection, cipher: &mut Vec<u8>) -> io::Result<()> {
    while state.wants_write() {
        state.write_tls(cipher)?;
    }
    Ok(())
}

struct Reader {
    stream: TcpStream,
    shared: Arc<Shared>,
    cipher: Vec<u8>,
    /// Of `cipher`: read, not yet taken in.
    ready: std::ops::Range<usize>,
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut state = self.shared.state();
            self.shared.standing.check(&state, &self.stream)?;
            match state.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A peer that closes without saying so ends a session as any lost connection does: the counts are missing.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            if !self.ready.is_empty() {
                let mut ready = &self.cipher[self.ready.clone()];
                let taken = state.read_tls(&mut ready)?;
                self.ready.start += taken;
                let processed = state.process_new_packets();
                drop(state);
                // Also what is wrong is said.
                let answered = self.shared.answer();
                processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                answered?;
                continue;
            }
            drop(state);
            match self.stream.read(&mut self.cipher)? {
                0 => return Ok(0),
                read => self.ready = 0..read,
            }
        }
    }
}

impl ReadTimeout for Reader {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Of what is to come, a part of one record may be here already.
    fn set_least(&self, bytes: usize) {
        self.stream.set_least(if bytes > 2 * RECORD_BYTES { bytes - RECORD_BYTES } else { 1 });
    }
}

struct Writer {
    stream: TcpStream,
    shared: Arc<Shared>,
    /// Kept for its memory.
    cipher: Vec<u8>,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut out = self.shared.out.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.shared.state();
        self.shared.standing.check(&state, &self.stream)?;
        let mut written = 0;
        for slice in slices {
            let part = &slice[..slice.len().min(WRITE_BYTES - written)];
            let taken = state.writer().write(part)?;
            written += taken;
            if taken < slice.len() {
                break;
            }
        }
        self.cipher.clear();
        take(&mut state, &mut self.cipher)?;
        drop(state);
        // Part of a record cannot be taken back: an error here ends the connection, as the sink promises.
        out.write_all(&self.cipher)?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl WriteTimeout for Writer {
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }
}
