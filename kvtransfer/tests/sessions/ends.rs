//! Ends other than the right one: cancelled, stopped, closed too early, lapsed.

use std::sync::Arc;
use std::time::Duration;

use backend::KvLanding;
use kvtransfer::{FailCode, Sender, SessionError};

use super::{limits, one_receiver, whole};
use crate::common::net::{expect_all, open, push_all};
use crate::common::{CLOSE, Cache, Case, MemExport, MemLanding};

#[test]
fn a_receiver_that_stops_mid_transfer_hands_the_landing_back() {
    let (receiver, address) = one_receiver(&limits());
    let case = whole(200);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &Sender::new(limits()), &[vec![address]]);
    push_all(&case, 0, &push, 200, 16, true);
    // Everything is sent, the push stays open: the session cannot complete.
    while push.backlog_bytes() > 0 {
        std::thread::yield_now();
    }
    receiver.stop();
    assert!(matches!(ends.recv().unwrap().1.result, Err(SessionError::Stopped)));
    assert!(end.recv().unwrap().is_err());
    drop(push);
}

#[test]
fn cancelling_either_end_ends_the_other() {
    let (receiver, address) = one_receiver(&limits());
    let sender = Sender::new(limits());
    // Sessions of which everything has landed, but for the end.
    let landed_bytes = || sender.links().iter().map(|link| link.bytes).sum::<u64>();
    let begin = || {
        let (case, before) = (whole(300), landed_bytes());
        let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
        let (push, end) = open(&case, 0, &sender, &[vec![address.clone()]]);
        push_all(&case, 0, &push, 300, 16, true);
        while landed_bytes() < before + 300 * 8192 {
            std::thread::yield_now();
        }
        (case, push, end, ends)
    };
    let (case, push, end, ends) = begin();
    receiver.cancel(&case.session);
    assert!(matches!(ends.recv().unwrap().1.result, Err(SessionError::Cancelled)));
    let error = end.recv().unwrap().unwrap_err();
    assert!(matches!(&error, SessionError::Refused { code: FailCode::Cancelled, .. }), "{error}");
    drop(push);

    let (_, push, end, ends) = begin();
    push.cancel();
    assert_eq!(end.recv().unwrap(), Err(SessionError::Cancelled));
    let error = ends.recv().unwrap().1.result.unwrap_err();
    assert_eq!(error.to_string(), "sender rank 0 gave up: cancelled");

    let (_, push, end, ends) = begin();
    drop(push);
    assert_eq!(end.recv().unwrap(), Err(SessionError::Dropped));
    let error = ends.recv().unwrap().1.result.unwrap_err();
    assert_eq!(error.to_string(), "sender rank 0 gave up: dropped before it was closed");
}

#[test]
fn a_push_closed_too_early_fails_at_both_ends() {
    let (receiver, address) = one_receiver(&limits());
    let case = whole(64);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &Sender::new(limits()), &[vec![address]]);
    let cache = Arc::new(Cache::full(&case.from[0], case.tokens.clone(), 16));
    push.layer(MemExport { cache, layers: 0..3, tokens: 0..64, direct: true });
    push.close(CLOSE);
    let want_bytes = 64 * 8192;
    assert_eq!(
        end.recv().unwrap(),
        Err(SessionError::Incomplete { got_bytes: want_bytes * 3 / 4, want_bytes })
    );
    assert!(ends.recv().unwrap().1.result.is_err());
}

#[test]
fn the_same_tokens_pushed_twice_fail_the_push() {
    let (receiver, address) = one_receiver(&limits());
    let case = whole(64);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &Sender::new(limits()), &[vec![address]]);
    push_all(&case, 0, &push, 64, 16, true);
    push_all(&case, 0, &push, 64, 16, true);
    assert!(matches!(end.recv().unwrap(), Err(SessionError::Coverage(_))));
    assert!(ends.recv().unwrap().1.result.is_err());
}

#[test]
fn a_session_that_nobody_serves_lapses_and_its_name_is_not_used_again() {
    let (receiver, _) = one_receiver(&limits());
    let case = Case { deadline: Duration::from_millis(50), ..whole(16) };
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let again = MemLanding::new(&case.to[0], case.tokens.clone(), 16, true);
    let refused = receiver.expect(case.expect(0), again, |_| {}).unwrap_err();
    assert_eq!((refused.error, refused.landing.tokens()), (SessionError::Known(case.session), 0..16));
    let expired = SessionError::Expired { what: "no sender connected".into(), ms: 50 };
    assert_eq!(ends.recv().unwrap().1.result, Err(expired));
    let again = MemLanding::new(&case.to[0], case.tokens.clone(), 16, true);
    assert!(receiver.expect(case.expect(0), again, |_| {}).is_err());
    let other = MemLanding::new(&case.to[0], 0..8, 16, true);
    assert!(
        matches!(receiver.expect(whole(16).expect(0), other, |_| {}), Err(refused) if refused.landing.tokens() == (0..8))
    );
}
