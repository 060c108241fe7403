//! From a receiver's addresses to a connection on which it has accepted the session. Until then nothing is lost by trying
//! again: another address, and after all of them a pause with jitter, until the session's deadline.

use std::io::IoSlice;
use std::time::{Duration, Instant};

use crate::frame::FrameError;
use crate::id::fill_random;
use crate::sender::pair::Pair;
use crate::sender::pool::Pool;
use crate::sender::watch::SILENT;
use crate::session::send::retryable;
use crate::session::{Outcome, Sending, parse};
use crate::transport::tls::Revoked;
use crate::transport::ucx::Ways;
use crate::wire::{Incoming, Wire, WireError, control_payload};
use crate::{Limits, SessionError};

/// Pause after the first round of failures; doubled each time.
const BACKOFF_MIN: Duration = Duration::from_millis(25);

/// Longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Where there are other addresses, the first round takes this part of the time that one may have to answer.
const FIRST_ROUND: u32 = 4;

/// How often a connection that waits for an answer is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A connection whose receiver waits for data.
pub(super) struct Connected {
    pub address: String,
    pub wire: Wire,
    pub sending: Sending,
}

/// Why a connection did not become a lane's.
struct Ungreeted {
    error: SessionError,
    /// It led to the session's own receiver, which has said so.
    refused: bool,
    /// Nothing came back.
    silent: bool,
}

impl From<SessionError> for Ungreeted {
    fn from(error: SessionError) -> Self {
        Ungreeted { error, refused: false, silent: false }
    }
}

impl From<FrameError> for Ungreeted {
    fn from(error: FrameError) -> Self {
        SessionError::from(error).into()
    }
}

/// Connects a lane of a pair, whose payloads may go by `ways`: over its own path, and over the others where that fails; with `alone`
/// over its own only; `slow` comes last. A push that was given up meanwhile is not waited for, but one round is made by the first lane: its
/// receiver should hear of it, and not hold its reservation until the deadline.
pub(super) fn connect(
    pair: &Pair,
    index: usize,
    pool: &Pool,
    ways: Ways,
    alone: bool,
    slow: Option<&str>,
    until: Instant,
) -> Result<Connected, SessionError> {
    let path = &pair.paths[index];
    let mut backoff = BACKOFF_MIN;
    let mut patience = pool.limits.connect / FIRST_ROUND;
    loop {
        let mut last = SessionError::Connect { peer: pair.addresses.join(", "), reason: "no address".into() };
        let mut again = false;
        let mut order = if alone { vec![path.clone()] } else { pool.order(&pair.addresses, path) };
        order.sort_by_key(|address| Some(address.as_str()) == slow);
        let several = order.len() > 1;
        if !several {
            patience = pool.limits.connect;
        }
        for address in order {
            match idle(pair, index, pool, ways, &address, until) {
                Some(Err(Ungreeted { error, silent: true, .. })) if several => {
                    pool.fell_silent(&address);
                    (again, last) = (true, error);
                    continue;
                }
                Some(Err(ungreeted)) if !ungreeted.silent => return Err(ungreeted.error),
                Some(Ok((wire, sending))) => return Ok(Connected { address, wire, sending }),
                Some(Err(_)) | None => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || (index > 0 && pair.over()) {
                break;
            }
            let dialed = pool.dial(&address, ways, patience.min(left));
            let greeted = dialed
                .map_err(|error| match Revoked::is(&error) {
                    true => SessionError::Revoked { peer: address.clone() },
                    false => SessionError::Connect { peer: address.clone(), reason: error.to_string() },
                })
                .map_err(Ungreeted::from)
                .and_then(|wire| greet(pair, index, &pool.limits, wire, until));
            pool.note(&address, greeted.as_ref().err().is_none_or(|ungreeted| ungreeted.refused));
            match greeted {
                Ok((wire, sending)) => return Ok(Connected { address, wire, sending }),
                // The address may be another machine's: the next one may still be right.
                Err(Ungreeted { error, refused, .. }) => {
                    again |= retryable(&error);
                    last = error;
                    // A receiver that has not let go of the lane's last connection yet: it is the same behind every address,
                    // and nothing is wrong with this one.
                    if refused {
                        break;
                    }
                }
            }
        }
        let pause = jitter(backoff);
        if !again || pair.over() || Instant::now() + pause >= until {
            return Err(pair.aborted().unwrap_or(last));
        }
        tracing::debug!(error = %last, ?pause, "kv receiver not reached");
        pair.pause(Instant::now() + pause);
        if pair.over() {
            return Err(pair.aborted().unwrap_or(last));
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
        patience = pool.limits.connect;
    }
}

/// An idle connection to `address` that the receiver has accepted. They may have died unnoticed; each is tried once. They have agreed
/// on a way already.
fn idle(
    pair: &Pair,
    index: usize,
    pool: &Pool,
    ways: Ways,
    address: &str,
    until: Instant,
) -> Option<Result<(Wire, Sending), Ungreeted>> {
    while ways == pool.limits.ways
        && let Some(wire) = pool.take_idle(address)
    {
        match greet(pair, index, &pool.limits, wire, until) {
            Ok(greeted) => return Some(Ok(greeted)),
            Err(Ungreeted { error, silent: false, .. }) if retryable(&error) => {
                tracing::debug!(address, %error, "idle kv connection was gone")
            }
            Err(ungreeted) => return Some(Err(ungreeted)),
        }
    }
    None
}

/// Hello, challenge, proof, first credit.
fn greet(
    pair: &Pair,
    index: usize,
    limits: &Limits,
    mut wire: Wire,
    until: Instant,
) -> Result<(Wire, Sending), Ungreeted> {
    // The receiver may wait for its own engine to expect the session, as long as its handshake may take.
    let until = until.min(Instant::now() + 2 * limits.handshake);
    let peer = wire.peer.clone();
    let lost = |reason: String| SessionError::Lost { peer: peer.clone(), reason };
    let io = |error: std::io::Error| lost(error.to_string());
    wire.sink.set_stall(limits.handshake).map_err(io)?;
    let mut nonce = [0; 32];
    fill_random(&mut nonce);
    let (mut sending, hello) =
        Sending::new(pair.spec.clone(), pair.start(index), &peer, nonce, Instant::now());
    let mut say = Some(hello);
    loop {
        if let Some(message) = say.take() {
            let payload = message.encode();
            let head = sending.head(&message, &payload);
            // A receiver that refuses has said why before it closed.
            let sent = wire.sink.send(&head, &[IoSlice::new(&payload)]);
            if let Err(error) = sent
                && sending.outcome().is_none()
            {
                tracing::debug!(peer, %error, "kv handshake not sent");
            }
        }
        match sending.outcome() {
            Some(Outcome::Failed(error)) => {
                return Err(Ungreeted { error: error.clone(), refused: sending.refused(), silent: false });
            }
            Some(Outcome::Acknowledged(_)) => {
                return Err(SessionError::Protocol("acknowledged at once".into()).into());
            }
            None if sending.accepted() => return Ok((wire, sending)),
            None => {}
        }
        let head = match answer(&mut wire, until) {
            Ok(Incoming::Head(head)) => head,
            Ok(Incoming::Timeout) => {
                let error = lost("no answer to the handshake".into());
                return Err(Ungreeted { error, refused: false, silent: Instant::now() < until });
            }
            Ok(Incoming::End) => return Err(lost("closed in the handshake".into()).into()),
            Err(WireError::Io(error)) => return Err(io(error).into()),
            Err(WireError::Frame(error)) => return Err(error.into()),
        };
        let message = match control_payload(&mut *wire.source, &head, Some(until)) {
            Ok((payload, crc)) => parse(&head, &payload, crc)?,
            Err(WireError::Io(error)) => return Err(io(error).into()),
            Err(WireError::Frame(error)) => return Err(error.into()),
        };
        say = sending.message(message, Instant::now());
    }
}

/// The next head; a timeout before `until` where nothing comes back from the other end's system.
fn answer(wire: &mut Wire, until: Instant) -> Result<Incoming, WireError> {
    let mut suspect = false;
    loop {
        let now = Instant::now();
        let incoming = wire.source.head(Some(until.min(now + LOOK_EVERY)))?;
        if !matches!(incoming, Incoming::Timeout) || Instant::now() >= until {
            return Ok(incoming);
        }
        let unanswered = wire.control.underway().and_then(|underway| underway.unanswered);
        let silent = unanswered.is_some_and(|unanswered| unanswered >= SILENT);
        if silent && suspect {
            wire.control.abandon();
            return Ok(incoming);
        }
        suspect = silent;
    }
}

/// Between half of `pause` and all of it, so that many senders do not come back at once.
fn jitter(pause: Duration) -> Duration {
    let mut bytes = [0; 4];
    fill_random(&mut bytes);
    pause.mul_f64(0.5 + 0.5 * f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}
