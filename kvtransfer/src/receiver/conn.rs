//! One connection at the receiver, on its own thread: Hello, proof, frames of one session, and again.

use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::frame::{FrameError, Head, Kind};
use crate::id::fill_random;
use crate::message::{Hello, Message};
use crate::receiver::registry::{Place, Registry};
use crate::receiver::slot::{Conn, Slot};
use crate::session::Handshake;
use crate::session::receive::parse;
use crate::sync::lock;
use crate::wire::{FrameSource, Incoming, WireError, control_payload};
use crate::{SessionError, SessionId};

/// How long a sender that is still sending is listened to after it was told to stop.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves the connection until it ends. `place`: it has not proved anything yet.
pub(super) fn serve(
    registry: &Arc<Registry>,
    conn: &Arc<Conn>,
    mut source: Box<dyn FrameSource>,
    place: Place,
) {
    let mut place = Some(place);
    let mut hello = None;
    let mut staging = Vec::new();
    loop {
        let (session, slot) = match greet(registry, conn, &mut *source, place.take(), hello.take()) {
            Ok(Some(greeted)) => greeted,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(peer = conn.peer, %error, "kv connection refused");
                conn.send(0, &Message::fail(error.code(), &error.to_string()));
                conn.control.close(Shutdown::Write);
                return;
            }
        };
        match receive(conn, &*slot, &mut *source, &mut staging) {
            Ok(Some(next)) => hello = Some(next),
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

/// From idleness to a proven sender: its session. `None`: the peer closed.
fn greet(
    registry: &Arc<Registry>,
    conn: &Arc<Conn>,
    source: &mut dyn FrameSource,
    place: Option<Place>,
    hello: Option<Head>,
) -> Result<Option<(SessionId, Arc<dyn Slot>)>, SessionError> {
    // A connection that was proven may idle for hours; a new one has to speak.
    let speak_by = place.is_some().then(|| Instant::now() + registry.limits.handshake);
    let head = match hello {
        Some(head) => head,
        None => match next_hello(conn, source, speak_by)? {
            Some(head) => head,
            None => return Ok(None),
        },
    };
    let _place = match place {
        Some(place) => place,
        None => registry.place()?,
    };
    let until = speak_by.unwrap_or_else(|| Instant::now() + registry.limits.handshake);
    let Message::Hello(hello) = read(conn, source, &head, Some(until))? else {
        return Err(SessionError::Protocol(format!("{:?} instead of Hello", head.kind)));
    };
    let hello: Hello = *hello;
    let session = hello.session;
    let slot = registry.find(&session, until)?;
    let mut nonce = [0; 32];
    fill_random(&mut nonce);
    let (handshake, challenge) = Handshake::begin(hello, &slot.ticket(), nonce);
    conn.send(session.tag(), &challenge);
    let Some(head) = next(conn, source, Some(until))? else { return Ok(None) };
    let Message::Proof { proof } = read(conn, source, &head, Some(until))? else {
        return Err(SessionError::Protocol(format!("{:?} instead of Proof", head.kind)));
    };
    *lock(&conn.fate) = None;
    slot.prove(conn, &handshake, &proof)?;
    Ok(Some((session, slot)))
}

/// The head of a Hello; a ping that crossed with the last session's acknowledgement is forgotten.
fn next_hello(
    conn: &Conn,
    source: &mut dyn FrameSource,
    until: Option<Instant>,
) -> Result<Option<Head>, SessionError> {
    loop {
        match next(conn, source, until)? {
            Some(head) if head.kind == Kind::Ping && until.is_none() => {
                read(conn, source, &head, until)?;
            }
            Some(head) if head.kind == Kind::Hello => return Ok(Some(head)),
            Some(head) => return Err(SessionError::Protocol(format!("{:?} instead of Hello", head.kind))),
            None => return Ok(None),
        }
    }
}

fn next(
    conn: &Conn,
    source: &mut dyn FrameSource,
    until: Option<Instant>,
) -> Result<Option<Head>, SessionError> {
    match source.head(until).map_err(|error| lost(conn, error))? {
        Incoming::Head(head) => Ok(Some(head)),
        Incoming::End => Ok(None),
        Incoming::Timeout => Err(SessionError::Expired { what: "no proof".into(), ms: 0 }),
    }
}

/// The control message of `head`.
fn read(
    conn: &Conn,
    source: &mut dyn FrameSource,
    head: &Head,
    until: Option<Instant>,
) -> Result<Message, SessionError> {
    if head.kind == Kind::Data {
        return Err(SessionError::Protocol("data before its session".into()));
    }
    let (payload, crc) = control_payload(source, head, until).map_err(|error| lost(conn, error))?;
    Ok(parse(head, &payload, crc)?)
}

fn lost(conn: &Conn, error: WireError) -> SessionError {
    match error {
        WireError::Frame(error) => error.into(),
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
            Err(WireError::Io(error)) => {
                slot.lost(conn, &error.to_string());
                return lock(&conn.fate).take().map_or(Ok(None), Err);
            }
            Err(WireError::Frame(error)) => return Err(spoilt(conn, slot, error)),
        };
        match head.kind {
            Kind::Hello if slot.landed() => return Ok(Some(head)),
            Kind::Data => slot.data(conn, &head, source, staging),
            _ => match control_payload(source, &head, None) {
                Ok((payload, crc)) => match parse(&head, &payload, crc) {
                    Ok(message) => slot.message(conn, &head, message),
                    Err(error) => return Err(spoilt(conn, slot, error)),
                },
                Err(WireError::Io(error)) => slot.lost(conn, &error.to_string()),
                Err(WireError::Frame(error)) => return Err(spoilt(conn, slot, error)),
            },
        }
    }
}

/// A bad frame ends its session, and its connection even when the session was over.
fn spoilt(conn: &Conn, slot: &dyn Slot, error: FrameError) -> SessionError {
    slot.fail(Some(conn), error.clone().into());
    error.into()
}
