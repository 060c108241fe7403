//! What all threads of one receiver share: expected sessions, sessions that were, connections, and their bounds.

use std::collections::{HashMap, VecDeque};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::limits::ENDED_MAX;
use crate::receiver::conn;
use crate::receiver::slot::{Conn, Slot};
use crate::session::ConnId;
use crate::sync::lock;
use crate::transport::ucx;
use crate::wire::{Wire, WireError};
use crate::{FailCode, Limits, OnTurned, SessionError, SessionId, Turned};

/// How long [`Registry::stop`] waits for connection threads.
const STOP_MAX: Duration = Duration::from_secs(5);

pub(super) struct Registry {
    pub limits: Limits,
    turned: OnTurned,
    sessions: Mutex<Sessions>,
    /// A session came, or the registry stops: for Hellos ahead of their session, and for the deadlines' thread.
    changed: Condvar,
    conns: Mutex<Conns>,
    conn_gone: Condvar,
    next_conn: AtomicU64,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Sessions {
    expected: HashMap<SessionId, Arc<dyn Slot>>,
    /// Those that landed still answer a sender that has not heard so.
    ended: HashMap<SessionId, Option<Arc<dyn Slot>>>,
    ended_order: VecDeque<SessionId>,
    /// Counts arrivals: who looked before one looks again instead of waiting.
    arrivals: u64,
}

#[derive(Default)]
struct Conns {
    open: HashMap<ConnId, Arc<Conn>>,
    /// Connections that have not proved a ticket.
    unproven: usize,
}

impl Conns {
    /// Closes the connection that has been idle for longest: its sender makes another when it needs one.
    fn evict_idle(&mut self) -> bool {
        let idle = self.open.values().filter_map(|conn| Some(((*lock(&conn.idle_since))?, conn.id)));
        let Some((_, oldest)) = idle.min() else { return false };
        if let Some(conn) = self.open.remove(&oldest) {
            conn.control.close(Shutdown::Both);
        }
        true
    }
}

/// A place among the unproven connections; given back on drop.
pub(super) struct Place(Arc<Registry>);

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.conns).unproven -= 1;
    }
}

impl Registry {
    pub fn new(limits: Limits, turned: OnTurned) -> Self {
        ucx::warm(limits.ways);
        Registry {
            limits,
            turned,
            sessions: Mutex::default(),
            changed: Condvar::new(),
            conns: Mutex::default(),
            conn_gone: Condvar::new(),
            next_conn: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        }
    }

    /// Counts a connection that did not get as far as a proof. One that was merely lost is nobody's refusal.
    pub fn turned_away(&self, error: &SessionError) {
        let because = match error {
            SessionError::Proof(_) => "ticket not proved",
            SessionError::Revoked { .. } => "join token revoked",
            SessionError::Unknown(_) => "no such admission",
            SessionError::Stale { .. } => "ticket of another session",
            SessionError::Expired { .. } => "silent",
            SessionError::Busy { .. } => "too many connections",
            SessionError::Frame(_) | SessionError::Protocol(_) => "not the kv wire",
            _ => return,
        };
        self.turned.tell(Turned::Because(because));
    }

    /// As [`Registry::turned_away`], where TLS has ended a connection.
    pub fn no_handshake(&self, error: &WireError) {
        if let WireError::Io(error) = error
            && error.kind() == std::io::ErrorKind::InvalidData
        {
            self.turned.tell(Turned::Handshake(error));
        }
    }

    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Adds a session; `Err` hands it back.
    pub fn insert<S: Slot + 'static>(
        &self,
        session: SessionId,
        slot: Arc<S>,
    ) -> Result<(), (SessionError, Arc<S>)> {
        let mut sessions = lock(&self.sessions);
        let error = if self.stopping() {
            SessionError::Stopped
        } else if sessions.expected.contains_key(&session) || sessions.ended.contains_key(&session) {
            SessionError::Known(session)
        } else if sessions.expected.len() >= self.limits.sessions_max {
            SessionError::Busy { what: "expected sessions", max: self.limits.sessions_max }
        } else {
            sessions.expected.insert(session, slot);
            sessions.arrivals += 1;
            self.changed.notify_all();
            return Ok(());
        };
        Err((error, slot))
    }

    /// The session of this name, waiting until `until` for it to be expected: a sender may be ahead of a slow rank.
    pub fn find(&self, session: &SessionId, until: Instant) -> Result<Arc<dyn Slot>, SessionError> {
        let mut sessions = lock(&self.sessions);
        loop {
            if let Some(slot) = sessions.expected.get(session) {
                return Ok(slot.clone());
            }
            if let Some(Some(slot)) = sessions.ended.get(session) {
                return Ok(slot.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if sessions.ended.contains_key(session) || left.is_zero() {
                return Err(SessionError::Unknown(*session));
            }
            if self.stopping() {
                return Err(SessionError::Stopped);
            }
            sessions = self.changed.wait_timeout(sessions, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes the thread of the deadlines look anew: one may have come closer.
    pub fn look(&self) {
        lock(&self.sessions).arrivals += 1;
        self.changed.notify_all();
    }

    pub fn get(&self, session: &SessionId) -> Option<Arc<dyn Slot>> {
        lock(&self.sessions).expected.get(session).cloned()
    }

    /// Forgets a session, but not that it was, nor that it landed.
    pub fn ended(&self, session: &SessionId) {
        let mut sessions = lock(&self.sessions);
        let landed = sessions.expected.remove(session).filter(|slot| slot.landed());
        if sessions.ended.insert(*session, landed).is_none() {
            sessions.ended_order.push_back(*session);
        }
        if sessions.ended_order.len() > ENDED_MAX
            && let Some(oldest) = sessions.ended_order.pop_front()
        {
            sessions.ended.remove(&oldest);
        }
        self.changed.notify_all();
    }

    /// Ends sessions whose deadline has passed, until the registry stops.
    pub fn watch_deadlines(&self) {
        loop {
            let (slots, arrivals) = {
                let sessions = lock(&self.sessions);
                (sessions.expected.values().cloned().collect::<Vec<_>>(), sessions.arrivals)
            };
            let now = Instant::now();
            let next = slots.iter().map(|slot| slot.tick(now)).min();
            drop(slots);
            let sessions = lock(&self.sessions);
            if self.stopping() {
                return;
            }
            if sessions.arrivals != arrivals {
                continue;
            }
            match next {
                Some(next) => {
                    let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                    drop(self.changed.wait_timeout(sessions, wait));
                }
                None => drop(self.changed.wait(sessions)),
            }
        }
    }

    /// A place for a connection to prove itself.
    pub fn place(self: &Arc<Self>) -> Result<Place, SessionError> {
        let mut conns = lock(&self.conns);
        let max = self.limits.unproven_max;
        if conns.unproven >= max {
            return Err(SessionError::Busy { what: "connections without proof", max });
        }
        conns.unproven += 1;
        Ok(Place(self.clone()))
    }

    /// Serves a new connection on a thread of its own, or refuses it.
    pub fn admit(self: &Arc<Self>, wire: Wire) {
        let Wire { mut sink, source, control, peer, .. } = ucx::take(wire, self.limits.ways);
        let admitted = self.place().and_then(|place| {
            sink.set_stall(self.limits.handshake)
                .map_err(|error| SessionError::Invalid(error.to_string()))?;
            Ok(place)
        });
        let id = self.next_conn.fetch_add(1, Ordering::Relaxed);
        let conn = Arc::new(Conn {
            id,
            peer,
            control,
            sink: Mutex::new(sink),
            fate: Mutex::new(None),
            idle_since: Mutex::new(None),
        });
        let admitted = admitted.and_then(|place| self.register(&conn).map(|()| place));
        let place = match admitted {
            Ok(place) => place,
            Err(error) => {
                tracing::debug!(peer = conn.peer, %error, "kv connection refused");
                self.turned_away(&error);
                conn.send(0, &crate::message::Message::fail(FailCode::Busy, &error.to_string()));
                conn.control.close(Shutdown::Both);
                return;
            }
        };
        let (registry, served) = (self.clone(), conn.clone());
        let spawned = thread::Builder::new().name("kv-land".into()).spawn(move || {
            let gone = Gone { registry: &registry, id };
            conn::serve(&registry, &served, source, place);
            served.control.close(Shutdown::Both);
            drop(gone);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a kv connection");
            self.forget(id);
        }
    }

    fn register(&self, conn: &Arc<Conn>) -> Result<(), SessionError> {
        let mut conns = lock(&self.conns);
        if self.stopping() {
            return Err(SessionError::Stopped);
        }
        let max = self.limits.connections_max;
        if conns.open.len() >= max && !conns.evict_idle() {
            return Err(SessionError::Busy { what: "connections", max });
        }
        conns.open.insert(conn.id, conn.clone());
        Ok(())
    }

    fn forget(&self, id: ConnId) {
        lock(&self.conns).open.remove(&id);
        self.conn_gone.notify_all();
    }

    /// Ends everything and waits for connection threads to be gone.
    pub fn stop(&self) {
        let slots: Vec<_> = {
            let sessions = lock(&self.sessions);
            self.stopping.store(true, Ordering::Release);
            self.changed.notify_all();
            sessions.expected.values().cloned().collect()
        };
        slots.iter().for_each(|slot| slot.fail(None, SessionError::Stopped));
        let until = Instant::now() + STOP_MAX;
        let mut conns = lock(&self.conns);
        conns.open.values().for_each(|conn| conn.control.close(Shutdown::Read));
        while !conns.open.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(connections = conns.open.len(), "kv connections outlive their receiver");
                return;
            }
            conns = self.conn_gone.wait_timeout(conns, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Takes a connection off the list when its thread ends, however it ends.
struct Gone<'a> {
    registry: &'a Registry,
    id: ConnId,
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.registry.forget(self.id);
    }
}
