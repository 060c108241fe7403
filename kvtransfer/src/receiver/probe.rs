//! Answers probes of a link: round trips, and bursts of bytes that are read and forgotten. Only for senders that hold the
//! cluster's probe secret, and only so much per connection.

use std::io::IoSliceMut;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::SessionError;
use crate::frame::Kind;
use crate::id::fill_random;
use crate::limits::PROBE_BYTES_MAX;
use crate::message::{Hello, Message};
use crate::receiver::conn::{lost, read};
use crate::receiver::registry::Registry;
use crate::receiver::slot::Conn;
use crate::session::Handshake;
use crate::wire::{FrameSource, Incoming};

/// Time of one probing connection.
const PROBE_TIME: Duration = Duration::from_secs(15);

/// Serves a connection whose Hello asks for no session, until it closes.
pub(super) fn serve(
    registry: &Registry,
    conn: &Conn,
    source: &mut dyn FrameSource,
    hello: Hello,
    until: Instant,
) -> Result<(), SessionError> {
    let session = hello.session;
    let ticket = registry.limits.probe.clone().ok_or(SessionError::Unknown(session))?;
    let mut nonce = [0; 32];
    fill_random(&mut nonce);
    let (handshake, challenge) = Handshake::begin(hello, &ticket, nonce);
    conn.send(session.tag(), &challenge);
    let head = match source.head(Some(until)).map_err(|error| lost(conn, error))? {
        Incoming::Head(head) => head,
        Incoming::End | Incoming::Timeout => return Ok(()),
    };
    match read(conn, source, &head, until)? {
        Message::Proof { proof } if handshake.proves(&ticket, &proof) => {}
        _ => return Err(SessionError::Proof("probe".into())),
    }
    let until = Instant::now() + PROBE_TIME;
    let (mut received_bytes, mut scratch) = (0, Vec::new());
    loop {
        let head = match source.head(Some(until)).map_err(|error| lost(conn, error))? {
            Incoming::Head(head) => head,
            Incoming::End | Incoming::Timeout => return Ok(()),
        };
        if head.kind == Kind::Data {
            received_bytes += u64::from(head.payload_bytes);
            if received_bytes > PROBE_BYTES_MAX {
                return Err(SessionError::Protocol(format!("probe of more than {PROBE_BYTES_MAX} bytes")));
            }
            scratch.resize(head.payload_bytes as usize, 0);
            let crc = source.payload(&mut [IoSliceMut::new(&mut scratch)], Some(until));
            head.check_payload(crc.map_err(|error| lost(conn, error))?)?;
            continue;
        }
        match read(conn, source, &head, until)? {
            Message::Ping => {
                conn.send(session.tag(), &Message::Probed { unix_ms: unix_ms(), received_bytes })
            }
            other => return Err(SessionError::Protocol(format!("{:?} in a probe", other.kind()))),
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
