//! Connections within a process: the same frames over two bounded pipes. For tests, and for commands that hand a cache
//! from one engine to another in one process ([`transfer`]).

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use backend::{KvExport, KvLanding, KvSpec};

use crate::sync::lock;
use crate::transport::Dialer;
use crate::wire::{Control, ReadTimeout, Wire, WriteTimeout, split};
use crate::{
    Close, Expect, Landed, Limits, Peers, PushSpec, Receiver, Sender, SessionError, SessionId, TargetSpec,
    Ticket,
};

/// What a pipe holds before its writer waits: like a socket's buffers.
const PIPE_BYTES: usize = 4 << 20;

/// Longest silence between two ends of one process.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(60);

/// Two connected ends.
pub fn pair(a: &str, b: &str) -> (Wire, Wire) {
    let (there, back) = (Arc::new(Pipe::default()), Arc::new(Pipe::default()));
    (end(back.clone(), there.clone(), b), end(there, back, a))
}

fn end(input: Arc<Pipe>, output: Arc<Pipe>, peer: &str) -> Wire {
    let control: Arc<dyn Control> = Arc::new(MemControl { input: input.clone(), output: output.clone() });
    let reader = MemReader { pipe: input, timeout: Mutex::new(None) };
    let writer = MemWriter { pipe: output, timeout: Mutex::new(None) };
    split(reader, writer, control, peer.to_owned())
}

/// Connects to receivers of this process by name.
#[derive(Clone, Default)]
pub struct MemDialer(Arc<RwLock<HashMap<String, Receiver>>>);

impl MemDialer {
    /// Makes `receiver` reachable as `address`.
    pub fn insert(&self, address: &str, receiver: Receiver) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(address.to_owned(), receiver);
    }
}

impl Dialer for MemDialer {
    fn dial(&self, address: &str, _timeout: Duration) -> io::Result<Wire> {
        let receivers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let receiver = receivers.get(address).ok_or(io::ErrorKind::NotFound)?;
        let (ours, theirs) = pair("sender", address);
        receiver.attach(theirs);
        Ok(ours)
    }
}

/// Hands `tokens` of the senders' caches to the landings, resharded, through whole sessions. Returns the landings in
/// their order. Errors when no session could be begun.
pub fn transfer<E: KvExport + 'static, L: KvLanding + 'static>(
    from: Vec<(KvSpec, Vec<E>)>,
    to: Vec<(KvSpec, L)>,
    tokens: Range<u32>,
    close: Close,
) -> Result<Vec<Landed<L>>, SessionError> {
    let (session, ticket) = (SessionId::random(), Ticket::random());
    let dialer = MemDialer::default();
    let limits = Limits::default();
    let specs: Vec<KvSpec> = from.iter().map(|(spec, _)| spec.clone()).collect();
    let targets: Vec<TargetSpec> = to
        .iter()
        .enumerate()
        .map(|(rank, (spec, _))| TargetSpec {
            rank,
            addresses: vec![format!("rank {rank}")],
            spec: spec.clone(),
        })
        .collect();
    // Kept until the sessions have ended: a pool that is gone takes its connections along.
    let mut senders = Vec::new();
    let mut receivers = Vec::new();
    let (landed, landings) = mpsc::channel();
    for (rank, (spec, landing)) in to.into_iter().enumerate() {
        let receiver = Receiver::detached(limits.clone());
        dialer.insert(&targets[rank].addresses[0], receiver.clone());
        let sender = Sender::with_dialer(limits.clone(), Box::new(dialer.clone()));
        senders.push(sender.clone());
        let expect = Expect {
            session,
            ticket: ticket.clone(),
            request: String::new(),
            attempt: 0,
            epoch: 0,
            spec,
            tokens: tokens.clone(),
            deadline: TRANSFER_DEADLINE,
            peers: Some(Peers { rank, targets: targets.clone(), sender }),
        };
        let landed = landed.clone();
        receiver
            .expect(expect, landing, move |end| drop(landed.send((rank, end))))
            .map_err(|refused| refused.error)?;
        receivers.push(receiver);
    }
    drop(landed);
    for (from_rank, (_, exports)) in from.into_iter().enumerate() {
        let sender = Sender::with_dialer(limits.clone(), Box::new(dialer.clone()));
        let push = PushSpec {
            session,
            ticket: ticket.clone(),
            request: String::new(),
            attempt: 0,
            epoch: 0,
            from: specs.clone(),
            from_rank,
            to: targets.clone(),
            tokens: tokens.clone(),
            deadline: TRANSFER_DEADLINE,
            compute_bytes_per_s: None,
            chunk_tokens: tokens.len() as u32,
        };
        let failing: Vec<Receiver> = receivers.clone();
        let push = sender.open(push, move |result| {
            // A plan that fails reaches no receiver: they must not wait out their deadline.
            if result.is_err() {
                failing.iter().for_each(|receiver| receiver.cancel(&session));
            }
        });
        exports.into_iter().for_each(|export| push.layer(export));
        push.close(close);
        senders.push(sender);
    }
    let mut ends: Vec<(usize, Landed<L>)> = landings.iter().collect();
    ends.sort_by_key(|(rank, _)| *rank);
    receivers.into_iter().for_each(Receiver::stop);
    Ok(ends.into_iter().map(|(_, end)| end).collect())
}

#[derive(Default)]
struct Pipe {
    state: Mutex<PipeState>,
    changed: Condvar,
}

#[derive(Default)]
struct PipeState {
    bytes: VecDeque<u8>,
    closed: bool,
}

impl Pipe {
    fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    /// Waits until `ready` or closed; `false` after `timeout`.
    fn wait<'a>(
        &'a self,
        timeout: Option<Duration>,
        ready: impl Fn(&PipeState) -> bool,
    ) -> Option<std::sync::MutexGuard<'a, PipeState>> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = lock(&self.state);
        while !ready(&state) && !state.closed {
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => return None,
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        Some(state)
    }
}

struct MemReader {
    pipe: Arc<Pipe>,
    timeout: Mutex<Option<Duration>>,
}

impl Read for MemReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let timeout = *lock(&self.timeout);
        let mut state =
            self.pipe.wait(timeout, |state| !state.bytes.is_empty()).ok_or(io::ErrorKind::TimedOut)?;
        let bytes = state.bytes.read(into)?;
        self.pipe.changed.notify_all();
        Ok(bytes)
    }
}

impl ReadTimeout for MemReader {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        *lock(&self.timeout) = timeout;
        Ok(())
    }
}

impl Drop for MemReader {
    fn drop(&mut self) {
        self.pipe.close();
    }
}

struct MemWriter {
    pipe: Arc<Pipe>,
    timeout: Mutex<Option<Duration>>,
}

impl Write for MemWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let timeout = *lock(&self.timeout);
        let room = |state: &PipeState| state.bytes.len() < PIPE_BYTES;
        let mut state = self.pipe.wait(timeout, room).ok_or(io::ErrorKind::TimedOut)?;
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let fits = bytes.len().min(PIPE_BYTES - state.bytes.len());
        state.bytes.extend(&bytes[..fits]);
        self.pipe.changed.notify_all();
        Ok(fits)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl WriteTimeout for MemWriter {
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        *lock(&self.timeout) = timeout;
        Ok(())
    }
}

impl Drop for MemWriter {
    fn drop(&mut self) {
        self.pipe.close();
    }
}

struct MemControl {
    input: Arc<Pipe>,
    output: Arc<Pipe>,
}

impl Control for MemControl {
    fn close(&self, how: Shutdown) {
        if how != Shutdown::Write {
            self.input.close();
        }
        if how != Shutdown::Read {
            self.output.close();
        }
    }

    fn idle(&self) -> bool {
        let state = lock(&self.input.state);
        !state.closed && state.bytes.is_empty()
    }
}
