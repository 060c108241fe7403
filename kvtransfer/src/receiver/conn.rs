//! One connection at the receiver, on its own thread: Hello, proof, frames of one session, and again.

use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::frame::{Head, Kind};
use crate::id::fill_random;
use crate::message::Message;
use crate::receiver::probe;
use crate::receiver::registry::{Place, Registry};
use crate::receiver::slot::{Conn, Slot};
use crate::session::{Handshake, millis, parse};
use crate::sync::lock;
use crate::transport::tls::Revoked;
use crate::wire::{FrameSource, Incoming, WireError, control_payload};
use crate::{SessionError, SessionId};

/// How long a sender that is still sending is listened to after it was told to stop.
const FAREWELL: Duration = Duration::from_secs(1);

/// How a session begins on a connection.
enum Opening {
    /// The connection is new and has to speak.
    New(Place),
    /// The connection was proven for another session; this is the head of its next Hello.
    Again(Head),
}

/// The session that a connection has proved to be of.
type Greeted = (SessionId, Arc<dyn Slot>);

/// Serves the connection until it ends. `place`: it has not proved anything yet.
pub(super) fn serve(
    registry: &Arc<Registry>,
    conn: &Arc<Conn>,
    mut source: Box<dyn FrameSource>,
    place: Place,
) {
    let mut opening = Opening::New(place);
    let mut staging = Vec::new();
    loop {
        let (session, slot) = match greet(registry, conn, &mut *source, opening) {
            Ok(Some(greeted)) => greeted,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(peer = conn.peer, %error, "kv connection refused");
                registry.turned_away(&error);
                conn.send(0, &Message::fail(error.code(), &error.to_string()));
                conn.control.close(Shutdown::Write);
                return;
            }
        };
        match receive(conn, &*slot, &mut *source, &mut staging) {
            Ok(Some(hello)) => opening = Opening::Again(hello),
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(peer = conn.peer, %session, %error, "kv session failed");
                conn.send(session.tag(), &Message::fail(error.code(), &error.to_string()));
                conn.control.close(Shutdown::Write);
                source.drain(Instant::now() + FAREWELL);
                return;
            }
        }
    }
}

/// From the first byte of a Hello, or from the connection's beginning, to a proven sender: its session. `None`: the peer
/// closed.
fn greet(
    registry: &Arc<Registry>,
    conn: &Arc<Conn>,
    source: &mut dyn FrameSource,
    opening: Opening,
) -> Result<Option<Greeted>, SessionError> {
    let time = registry.limits.handshake;
    let until = Instant::now() + time;
    let next = |source: &mut dyn FrameSource| match source.head(Some(until)) {
        Ok(Incoming::Head(head)) => Ok(Some(head)),
        Ok(Incoming::End) => Ok(None),
        Ok(Incoming::Timeout) => Err(SessionError::Expired { what: "no proof".into(), ms: millis(time) }),
        Err(error) => {
            registry.no_handshake(&error);
            Err(lost(conn, error))
        }
    };
    let (_place, head) = match opening {
        Opening::Again(head) => {
            *lock(&conn.idle_since) = None;
            (registry.place()?, head)
        }
        Opening::New(place) => match next(source)? {
            Some(head) => (place, head),
            None => return Ok(None),
        },
    };
    let Message::Hello(hello) = read(conn, source, &head, until)? else {
        return Err(SessionError::Protocol(format!("{:?} instead of Hello", head.kind)));
    };
    let session = hello.session;
    if session == SessionId::PROBE {
        return probe::serve(registry, conn, source, *hello, until).map(|()| None);
    }
    let slot = registry.find(&session, until)?;
    let mut nonce = [0; 32];
    fill_random(&mut nonce);
    let (handshake, challenge) = Handshake::begin(*hello, &slot.ticket(), nonce);
    conn.send(session.tag(), &challenge);
    let Some(head) = next(source)? else { return Ok(None) };
    let Message::Proof { proof } = read(conn, source, &head, until)? else {
        return Err(SessionError::Protocol(format!("{:?} instead of Proof", head.kind)));
    };
    *lock(&conn.fate) = None;
    slot.prove(conn, &handshake, &proof)?;
    source.proven();
    Ok(Some((session, slot)))
}

/// The control message of `head`.
pub(super) fn read(
    conn: &Conn,
    source: &mut dyn FrameSource,
    head: &Head,
    until: Instant,
) -> Result<Message, SessionError> {
    if head.kind == Kind::Data || head.kind.is_transports() {
        return Err(SessionError::Protocol(format!("{:?} before its session", head.kind)));
    }
    let (payload, crc) = control_payload(source, head, Some(until)).map_err(|error| lost(conn, error))?;
    Ok(parse(head, &payload, crc)?)
}

pub(super) fn lost(conn: &Conn, error: WireError) -> SessionError {
    match error {
        WireError::Frame(error) => error.into(),
        WireError::Io(error) if Revoked::is(&error) => SessionError::Revoked { peer: conn.peer.clone() },
        WireError::Io(error) => SessionError::Lost { peer: conn.peer.clone(), reason: error.to_string() },
    }
}

/// Frames of one session until it ends. Ends well with the head of the next Hello, or `None` when the peer closed.
fn receive(
    conn: &Conn,
    slot: &dyn Slot,
    source: &mut dyn FrameSource,
    staging: &mut Vec<u8>,
) -> Result<Option<Head>, SessionError> {
    loop {
        if let Some(error) = lock(&conn.fate).take() {
            return Err(error);
        }
        let head = match source.head(None) {
            Ok(Incoming::Head(head)) => head,
            Ok(Incoming::Timeout) => continue,
            Ok(Incoming::End) => {
                slot.lost(conn, "closed by the sender");
                return lock(&conn.fate).take().map_or(Ok(None), Err);
            }
            Err(WireError::Io(error)) if !Revoked::is(&error) => {
                slot.lost(conn, &error.to_string());
                return lock(&conn.fate).take().map_or(Ok(None), Err);
            }
            // Its sender does not come back.
            Err(error) => return Err(spoilt(conn, slot, lost(conn, error))),
        };
        match head.kind {
            Kind::Hello if slot.landed() => return Ok(Some(head)),
            Kind::Data => slot.data(conn, &head, source, staging),
            _ => match control_payload(source, &head, None) {
                Ok((payload, crc)) => match parse(&head, &payload, crc) {
                    Ok(message) => slot.message(conn, &head, message),
                    Err(error) => return Err(spoilt(conn, slot, error.into())),
                },
                Err(WireError::Io(error)) => slot.lost(conn, &error.to_string()),
                Err(WireError::Frame(error)) => return Err(spoilt(conn, slot, error.into())),
            },
        }
    }
}

/// A bad frame ends its session, and its connection even when the session was over.
fn spoilt(conn: &Conn, slot: &dyn Slot, error: SessionError) -> SessionError {
    slot.fail(Some(conn), error.clone());
    error
}
