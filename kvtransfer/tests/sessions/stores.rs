//! Stores that are slow, fail or panic while a session lands in them.

use std::sync::mpsc::{Receiver as Gate, Sender as GateOpener, channel};
use std::time::Duration;

use backend::{KvError, KvLanding, Piece};
use kvtransfer::{FailCode, Limits, Sender, SessionError};

use super::{assert_lands, limits, one_receiver, whole};
use crate::common::net::{expect_all, open, push_all};
use crate::common::{CLOSE, Case, MemLanding};

/// Lands nothing until it is let.
struct Slow {
    inner: MemLanding,
    gate: Gate<()>,
}

impl KvLanding for Slow {
    fn tokens(&self) -> std::ops::Range<u32> {
        self.inner.tokens()
    }

    fn write(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        self.gate.recv().expect("the test lets every frame through");
        self.inner.write(piece, bytes)
    }
}

fn slow(case: &Case) -> (Slow, GateOpener<()>) {
    let (opener, gate) = channel();
    (Slow { inner: MemLanding::new(&case.to[0], case.tokens.clone(), 16, false), gate }, opener)
}

#[test]
fn a_slow_receiver_slows_the_sender_and_nothing_grows() {
    let limits = Limits { frame_bytes: 32 << 10, window_bytes: 128 << 10, ..limits() };
    let (receiver, address) = one_receiver(&limits);
    let case = whole(512);
    let (total, window) = (512 * 8192, 128 << 10);
    let (landing, gate) = slow(&case);
    let (landed, ends) = channel();
    receiver.expect(case.expect(0), landing, move |end| drop(landed.send(end))).unwrap();
    let (push, end) = open(&case, 0, &Sender::new(limits), &[vec![address]]);
    push_all(&case, 0, &push, 512, 16, true);
    // With every frame let through a little more may leave, never more than the window beyond what has landed.
    for landed_bytes in (0..total).step_by(32 << 10) {
        while push.backlog_bytes() > total - (landed_bytes + window).min(total) {
            std::thread::yield_now();
        }
        assert!(push.backlog_bytes() >= total.saturating_sub(landed_bytes + window));
        gate.send(()).unwrap();
    }
    push.close(CLOSE);
    assert!(end.recv().unwrap().is_ok());
    let landed = ends.recv().unwrap();
    assert!(landed.result.is_ok() && landed.landing.inner.cache.is_right());
}

#[test]
fn a_receiver_that_never_lands_anything_ends_the_push_by_its_deadline() {
    let (receiver, address) = one_receiver(&limits());
    let case = Case { deadline: Duration::from_millis(200), ..whole(64) };
    let (landing, gate) = slow(&case);
    let (landed, ends) = channel();
    receiver.expect(case.expect(0), landing, move |end| drop(landed.send(end))).unwrap();
    let (push, end) = open(&case, 0, &Sender::new(limits()), &[vec![address]]);
    push_all(&case, 0, &push, 64, 16, true);
    push.close(CLOSE);
    let error = end.recv().unwrap().unwrap_err();
    assert!(matches!(&error, SessionError::Expired { .. } | SessionError::Refused { .. }), "{error}");
    // Other sessions' deadlines are still watched over.
    let other = Case { deadline: Duration::from_millis(20), ..whole(64) };
    let other = expect_all(&other, std::slice::from_ref(&receiver), 16, true);
    assert!(matches!(other.recv().unwrap().1.result, Err(SessionError::Expired { .. })));
    // The session is over, but its landing is still being written: it is not handed back before that ends.
    assert!(ends.try_recv().is_err());
    gate.send(()).unwrap();
    assert!(ends.recv().unwrap().result.is_err());
}

/// A store that fails, in one way or another.
struct Failing {
    panics: bool,
}

impl KvLanding for Failing {
    fn tokens(&self) -> std::ops::Range<u32> {
        0..64
    }

    fn write(&mut self, _piece: &Piece, bytes: &[u8]) -> Result<(), KvError> {
        assert!(!self.panics, "a store that panics");
        Err(KvError::Length { got: bytes.len(), want: 1 })
    }
}

#[test]
fn a_failing_or_panicking_store_fails_its_session_only() {
    let (receiver, address) = one_receiver(&limits());
    let sender = Sender::new(limits());
    for panics in [false, true] {
        let case = whole(64);
        let (landed, ends) = channel();
        receiver.expect(case.expect(0), Failing { panics }, move |end| drop(landed.send(end))).unwrap();
        let (push, end) = open(&case, 0, &sender, &[vec![address.clone()]]);
        push_all(&case, 0, &push, 64, 16, true);
        push.close(CLOSE);
        assert!(matches!(end.recv().unwrap(), Err(SessionError::Refused { code: FailCode::Store, .. })));
        assert!(ends.recv().unwrap().result.is_err());
    }
    assert_lands(&whole(64), &sender, &receiver, &address);
}
