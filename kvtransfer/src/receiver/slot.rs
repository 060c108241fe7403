//! One expected session with its landing: the shell around [`Receiving`]. Connection threads call in; whoever makes the session
//! end and is the last to touch the landing hands it back.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use backend::{KvLanding, Piece, Sharding};

use crate::codec::{Codec, Row};
use crate::frame::Head;
use crate::message::Message;
use crate::receiver::Peers;
use crate::receiver::registry::Registry;
use crate::receiver::relay::Relay;
use crate::session::{Action, ConnId, Handshake, Receiving, Rejected};
use crate::sync::lock;
use crate::wire::{Control, FrameSink, FrameSource, WireError};
use crate::{Expect, Landed, SessionError, SessionId, Summary, Ticket};

/// One connection, as every thread may use it.
pub(super) struct Conn {
    pub id: ConnId,
    pub peer: String,
    pub control: Arc<dyn Control>,
    pub sink: Mutex<Box<dyn FrameSink>>,
    /// Why its session ended: its own thread tells the sender and closes.
    pub fate: Mutex<Option<SessionError>>,
    /// Since when it has had no session; `None` before its first and during one.
    pub idle_since: Mutex<Option<Instant>>,
}

impl Conn {
    /// Sends a control frame. A failure shows on the reading side soon.
    pub fn send(&self, tag: u64, message: &Message) {
        let payload = message.encode();
        let head = Head::control(message.kind(), tag, 0, &payload);
        if let Err(error) = lock(&self.sink).send(&head, &[IoSlice::new(&payload)]) {
            tracing::debug!(peer = self.peer, %error, kind = ?message.kind(), "kv frame not sent");
        }
    }
}

/// A session whatever it lands in.
pub(super) trait Slot: Send + Sync {
    fn ticket(&self) -> Ticket;
    /// See [`Receiving::prove`]; a proven connection belongs to the session.
    fn prove(&self, conn: &Arc<Conn>, handshake: &Handshake, proof: &[u8; 32]) -> Result<(), SessionError>;
    /// Takes the payload of a data frame from `source`, through `staging` where it cannot be read in place.
    fn data(&self, conn: &Conn, head: &Head, source: &mut dyn FrameSource, staging: &mut Vec<u8>);
    fn message(&self, conn: &Conn, head: &Head, message: Message);
    fn lost(&self, conn: &Conn, reason: &str);
    fn fail(&self, by: Option<&Conn>, error: SessionError);
    /// Looks at the deadlines; when to look again.
    fn tick(&self, now: Instant) -> Instant;
    /// Whether it has ended well.
    fn landed(&self) -> bool;
    /// Why it failed, if it has.
    fn verdict(&self) -> Option<SessionError>;
}

/// How long a lane's new connection waits for the last one's thread to let go; then it may ask again.
const LET_GO: Duration = Duration::from_millis(500);

/// How often it looks meanwhile.
const LOOK: Duration = Duration::from_millis(20);

type Done<L> = Box<dyn FnOnce(Landed<L>) + Send>;

pub(super) struct LandingSlot<L> {
    session: SessionId,
    expect: Expect,
    /// Until the relay is opened.
    peers: Mutex<Option<Peers>>,
    own: Weak<Self>,
    registry: Weak<Registry>,
    core: Mutex<Core<L>>,
    /// A connection is not of the session any more.
    let_go: Condvar,
    /// `None` once handed back.
    landing: Mutex<Option<L>>,
}

struct Core<L> {
    receive: Receiving,
    conns: BTreeMap<ConnId, Arc<Conn>>,
    /// Threads between the head of a data frame and the end of its payload.
    touching: usize,
    /// Passes this rank's share of replicated planes on; from the first proven sender to the last Done.
    relay: Option<Arc<Relay>>,
    /// Set when the session ends, taken by who hands the landing back.
    result: Option<Result<Summary, SessionError>>,
    done: Option<Done<L>>,
}

impl<L: KvLanding + 'static> LandingSlot<L> {
    pub fn new(
        expect: Expect,
        receive: Receiving,
        landing: L,
        done: Done<L>,
        registry: Weak<Registry>,
    ) -> Arc<Self> {
        let conns = BTreeMap::new();
        let core = Core { receive, conns, touching: 0, relay: None, result: None, done: Some(done) };
        let peers = Mutex::new(expect.peers.clone());
        Arc::new_cyclic(|own| LandingSlot {
            session: expect.session,
            expect: Expect { peers: None, ..expect },
            peers,
            own: own.clone(),
            registry,
            core: Mutex::new(core),
            let_go: Condvar::new(),
            landing: Mutex::new(Some(landing)),
        })
    }

    /// The landing of a session that was never registered.
    pub fn into_landing(self) -> Option<L> {
        self.landing.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Changes the session and does what follows from it. `by`: the connection whose thread this is.
    fn step(&self, by: Option<&Conn>, change: impl FnOnce(&mut Core<L>) -> Vec<Action>) {
        let mut sends = Vec::new();
        let mut relayed = None;
        let mut core = lock(&self.core);
        for action in change(&mut core) {
            match action {
                Action::Relayed(close) => relayed = core.relay.take().zip(Some(close)),
                Action::Send(id, message) => {
                    sends.extend(core.conns.get(&id).map(|conn| (conn.clone(), message)))
                }
                Action::Close(id, error) => {
                    let Some(conn) = core.conns.get(&id) else { continue };
                    *lock(&conn.fate) = Some(error);
                    // Wakes the connection's own thread, which says farewell.
                    if by.is_none_or(|by| by.id != id) {
                        conn.control.close(Shutdown::Read);
                    }
                }
                Action::Drop(id) => {
                    if let Some(conn) = core.conns.get(&id) {
                        conn.control.close(Shutdown::Both);
                    }
                }
                Action::End(result) => core.result = Some(result),
            }
        }
        let ends = core.touching == 0 && core.result.is_some();
        let ended = if ends { core.result.take().zip(core.done.take()) } else { None };
        let last_frame = core.receive.last_frame();
        let failed = if core.receive.over() { core.relay.take() } else { None };
        drop(core);
        if let Some((relay, close)) = relayed {
            relay.close(close);
        }
        if let Some(relay) = failed {
            relay.cancel();
        }
        if let Some((result, done)) = ended {
            if let Some(registry) = self.registry.upgrade() {
                registry.ended(&self.session);
            }
            // No payload is under way and the session takes no more: the landing is ours alone.
            if let Some(landing) = lock(&self.landing).take() {
                done(Landed { landing, result, last_frame });
            }
        }
        // The acknowledgement comes last: a sender that has it knows that the receiver's engine does.
        for (conn, message) in sends {
            if matches!(message, Message::Ack { .. }) {
                *lock(&conn.idle_since) = Some(Instant::now());
            }
            conn.send(self.session.tag(), &message);
        }
    }

    /// Moves one payload from the connection to its place.
    fn land(
        &self,
        piece: &Piece,
        head: &Head,
        in_place: bool,
        relay: Option<&Relay>,
        source: &mut dyn FrameSource,
        staging: &mut Vec<u8>,
    ) -> Result<(), Interrupted> {
        let bytes = head.payload_bytes as usize;
        if in_place && head.codec == Codec::Exact {
            let mut landing = lock(&self.landing);
            if let Some(mut slices) = landing.as_mut().and_then(|landing| landing.slices(piece))
                && slices.iter().map(|slice| slice.len()).sum::<usize>() == bytes
            {
                let crc = source.payload(&mut slices, None)?;
                return Ok(head.check_payload(crc).map_err(SessionError::from)?);
            }
        }
        staging.resize(bytes, 0);
        let crc = source.payload(&mut [IoSliceMut::new(staging)], None)?;
        head.check_payload(crc).map_err(SessionError::from)?;
        if head.codec != Codec::Exact {
            let row = Row::of(&self.expect.spec.planes[piece.plane]);
            let mut exact = Vec::new();
            // Its length was checked when the place was taken.
            head.codec.decode(row, piece.heads.len(), piece.tokens.len(), staging, &mut exact);
            *staging = exact;
        }
        match lock(&self.landing).as_mut() {
            Some(landing) => landing.write(piece, staging).map_err(SessionError::from)?,
            None => return Err(Interrupted::Session(SessionError::Unknown(self.session))),
        }
        if let Some(relay) = relay {
            relay.pass(piece, std::mem::take(staging));
        }
        Ok(())
    }

    /// Begins to pass replicated planes on, when there is to whom and the session's own senders have begun.
    fn open_relay(&self, core: &mut Core<L>) {
        if !core.receive.relays() || !core.receive.begun() || core.receive.over() {
            return;
        }
        if let Some(peers) = lock(&self.peers).take() {
            let own = self.own.clone();
            core.relay = Some(Arc::new(Relay::open(&self.expect, &peers, move |error| {
                if let Some(slot) = own.upgrade() {
                    slot.fail(None, error);
                }
            })));
        }
    }
}

/// Why a payload did not get to its place.
enum Interrupted {
    Wire(WireError),
    Session(SessionError),
}

impl From<WireError> for Interrupted {
    fn from(error: WireError) -> Self {
        Interrupted::Wire(error)
    }
}

impl From<SessionError> for Interrupted {
    fn from(error: SessionError) -> Self {
        Interrupted::Session(error)
    }
}

impl<L: KvLanding + 'static> Slot for LandingSlot<L> {
    fn ticket(&self) -> Ticket {
        lock(&self.core).receive.ticket().clone()
    }

    fn prove(&self, conn: &Arc<Conn>, handshake: &Handshake, proof: &[u8; 32]) -> Result<(), SessionError> {
        let until = Instant::now() + LET_GO;
        loop {
            let mut outcome = Ok(());
            let mut taken = false;
            self.step(Some(conn), |core| {
                match core.receive.prove(conn.id, handshake, proof, Instant::now()) {
                    Ok(actions) => {
                        core.conns.insert(conn.id, conn.clone());
                        self.open_relay(core);
                        actions
                    }
                    Err(Rejected { error, actions }) => {
                        taken = actions.iter().any(|action| matches!(action, Action::Drop(_)));
                        outcome = Err(error);
                        actions
                    }
                }
            });
            // The lane's last connection is told to go: as soon as its thread has, this one takes its place.
            let left = until.saturating_duration_since(Instant::now());
            if !taken || left.is_zero() {
                return outcome;
            }
            let core = lock(&self.core);
            if core.receive.over() {
                return outcome;
            }
            drop(self.let_go.wait_timeout(core, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn data(&self, conn: &Conn, head: &Head, source: &mut dyn FrameSource, staging: &mut Vec<u8>) {
        let mut place = None;
        self.step(Some(conn), |core| match core.receive.data(conn.id, head, Instant::now()) {
            Ok(piece) => {
                core.touching += 1;
                let replicated = self.expect.spec.planes[piece.plane].sharding == Sharding::Replicated;
                let relay = core.relay.clone().filter(|_| replicated && !core.receive.is_peer(conn.id));
                place = Some((piece, core.receive.single(), relay));
                Vec::new()
            }
            Err(actions) => actions,
        });
        let Some((piece, in_place, relay)) = place else {
            // Too late for this frame: the session's end may have come from elsewhere.
            lock(&conn.fate)
                .get_or_insert_with(|| self.verdict().unwrap_or(SessionError::Unknown(self.session)));
            return;
        };
        // A store that panics must not keep the session open for ever.
        let landed = catch_unwind(AssertUnwindSafe(|| {
            self.land(&piece, head, in_place, relay.as_deref(), source, staging)
        }))
        .unwrap_or_else(|_| Err(SessionError::Device("the store panicked while landing".into()).into()));
        let broken = matches!(landed, Err(Interrupted::Wire(WireError::Io(_))));
        self.step(Some(conn), |core| {
            core.touching -= 1;
            let receive = &mut core.receive;
            let result = match landed {
                Ok(()) => Ok(()),
                Err(Interrupted::Session(error)) => Err(error),
                Err(Interrupted::Wire(WireError::Frame(error))) => Err(error.into()),
                Err(Interrupted::Wire(WireError::Io(error))) => {
                    core.conns.remove(&conn.id);
                    return receive.lost(conn.id, &error.to_string(), Instant::now());
                }
            };
            receive.payload(conn.id, result, Instant::now())
        });
        if broken {
            self.let_go.notify_all();
        }
        // A slow rank of the group slows the sender down, and nothing grows.
        if let Some(relay) = relay {
            relay.wait_room();
        }
    }

    fn message(&self, conn: &Conn, head: &Head, message: Message) {
        self.step(Some(conn), |core| core.receive.message(conn.id, head, message, Instant::now()));
    }

    fn lost(&self, conn: &Conn, reason: &str) {
        self.step(Some(conn), |core| {
            core.conns.remove(&conn.id);
            core.receive.lost(conn.id, reason, Instant::now())
        });
        self.let_go.notify_all();
        // The lane's time to come back runs from now.
        if let Some(registry) = self.registry.upgrade() {
            registry.look();
        }
    }

    fn fail(&self, by: Option<&Conn>, error: SessionError) {
        self.step(by, |core| core.receive.fail(error));
    }

    fn tick(&self, now: Instant) -> Instant {
        let mut next = now;
        self.step(None, |core| {
            let actions = core.receive.tick(now);
            next = core.receive.next_tick();
            actions
        });
        next
    }

    fn landed(&self) -> bool {
        lock(&self.core).receive.landed()
    }

    fn verdict(&self) -> Option<SessionError> {
        lock(&self.core).receive.verdict()
    }
}
