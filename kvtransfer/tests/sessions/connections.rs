//! Connections under a session: kept, lost, cut, replaced, not to be had.

use std::sync::atomic::Ordering;
use std::time::Duration;

use kvtransfer::{FailCode, Limits, Receiver, Sender, SessionError};

use super::{assert_lands, limits, one_receiver, whole};
use crate::common::net::{Harm, Proxy, expect_all, open, push_all, session};
use crate::common::{CLOSE, Case};

#[test]
fn an_idle_connection_serves_the_next_session_and_a_dead_one_is_replaced() {
    let (receiver, _) = one_receiver(&limits());
    let addr = receiver.local_addr();
    let proxy = Proxy::new(addr, Harm::None, Harm::None);
    let sender = Sender::new(limits());
    for _ in 0..3 {
        assert_lands(&whole(100), &sender, &receiver, &proxy.address);
    }
    assert_eq!(proxy.connections.load(Ordering::SeqCst), 1);
    receiver.stop();
    let receiver = Receiver::bind(addr, limits()).unwrap();
    assert_lands(&whole(100), &sender, &receiver, &proxy.address);
    assert_eq!(proxy.connections.load(Ordering::SeqCst), 2);
    let links = sender.links();
    assert_eq!(links.len(), 1);
    assert_eq!((links[0].peer.as_str(), links[0].bytes), (proxy.address.as_str(), 4 * 100 * 8192));
    assert!(links[0].gbytes_per_s > 0.0);
}

#[test]
fn a_connection_that_dies_at_any_byte_ends_both_ends_and_the_next_session_works() {
    let limits = Limits { frame_bytes: 64 << 10, ..limits() };
    let (receiver, address) = one_receiver(&limits);
    // 200 tokens are 1.6 MB. Within the Hello the sender may try again, until its deadline.
    let cuts = [10, 64, 200, 500].map(Harm::CutAfter).into_iter().chain([1, 2].map(Harm::CutInFrame));
    for up in cuts {
        let proxy = Proxy::new(receiver.local_addr(), up, Harm::None);
        let case = Case { deadline: Duration::from_millis(400), ..whole(200) };
        let (pushed, landed) = session(&case, &Sender::new(limits.clone()), &receiver, &proxy.address);
        assert!(pushed.is_err() && landed.result.is_err(), "{up:?}");
    }
    for down in [10, 100, 130, 200] {
        let proxy = Proxy::new(receiver.local_addr(), Harm::None, Harm::CutAfter(down));
        let case = Case { deadline: Duration::from_millis(400), ..whole(200) };
        let (pushed, landed) = session(&case, &Sender::new(limits.clone()), &receiver, &proxy.address);
        assert!(pushed.is_err(), "answer cut after {down}");
        assert!(landed.result.is_err() || landed.landing.cache.is_right());
    }
    assert_lands(&whole(200), &Sender::new(limits), &receiver, &address);
}

/// Protects: a connection that is lost in mid-transfer is replaced, over another path where there is one, and only what had
/// not landed is sent again; whatever carries the payloads, and wherever the loss falls.
#[test]
fn a_connection_that_dies_in_mid_transfer_is_replaced() {
    let limits = Limits { frame_bytes: 64 << 10, ..limits() };
    let (receiver, address) = one_receiver(&limits);
    // 7 exports of 4 layers of 2 planes are 56 frames; then it ends.
    for count in [1, 3, 30, 56, 57] {
        let proxy = Proxy::new(receiver.local_addr(), Harm::CutInFrame(count), Harm::None);
        let case = whole(200);
        let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
        let sender = Sender::new(limits.clone());
        let (push, end) = open(&case, 0, &sender, &[vec![proxy.address.clone(), address.clone()]]);
        push_all(&case, 0, &push, 32, 16, true);
        push.close(CLOSE);
        let (pushed, landed) = (end.recv().unwrap().unwrap(), ends.recv().unwrap().1);
        let summary = landed.result.unwrap();
        assert_eq!((pushed.resumed, summary.resumed, sender.resumed()), (1, 1, 1), "cut in frame {count}");
        assert_eq!((pushed.bytes, summary.wire_bytes, summary.frames), (200 * 8192, 200 * 8192, 56));
        assert!(landed.landing.cache.is_right());
    }
}

#[test]
fn a_flipped_bit_on_the_link_fails_the_session_only() {
    let limits = Limits { frame_bytes: 64 << 10, ..limits() };
    let (receiver, address) = one_receiver(&limits);
    for count in [1, 20, 56] {
        let proxy = Proxy::new(receiver.local_addr(), Harm::FlipInFrame(count), Harm::None);
        let (pushed, landed) = session(&whole(200), &Sender::new(limits.clone()), &receiver, &proxy.address);
        assert!(matches!(landed.result, Err(SessionError::Frame(_))), "frame {count}: {:?}", landed.result);
        let Err(SessionError::Refused { code, .. }) = pushed else { panic!("frame {count}: {pushed:?}") };
        assert_eq!(code, FailCode::Checksum, "frame {count}");
    }
    assert_lands(&whole(200), &Sender::new(limits), &receiver, &address);
}

#[test]
fn a_sender_ahead_of_its_session_waits_for_it() {
    let (receiver, address) = one_receiver(&limits());
    let case = whole(64);
    let proxy = Proxy::new(address.parse().unwrap(), Harm::None, Harm::None);
    let (push, end) = open(&case, 0, &Sender::new(limits()), &[vec![proxy.address.clone()]]);
    push_all(&case, 0, &push, 64, 16, true);
    push.close(CLOSE);
    // The Hello has passed before the session is expected.
    while proxy.upstream_bytes.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    assert!(end.recv().unwrap().is_ok());
    assert!(ends.recv().unwrap().1.landing.cache.is_right());
}

#[test]
fn nobody_at_any_address_is_an_error_within_the_deadline_and_a_second_address_is_used() {
    let nobody = {
        let (receiver, address) = one_receiver(&limits());
        receiver.stop();
        address
    };
    let sender = Sender::new(limits());
    let case = Case { deadline: Duration::from_millis(200), ..whole(16) };
    let (push, end) = open(&case, 0, &sender, &[vec![nobody.clone()]]);
    assert!(matches!(end.recv().unwrap(), Err(SessionError::Connect { .. })));
    drop(push);
    let (receiver, address) = one_receiver(&limits());
    let case = whole(16);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &sender, &[vec![nobody, address]]);
    push_all(&case, 0, &push, 16, 16, true);
    push.close(CLOSE);
    assert!(end.recv().unwrap().is_ok());
    assert!(ends.recv().unwrap().1.landing.cache.is_right());
}

#[test]
fn idle_connections_of_others_do_not_keep_a_sender_out() {
    let (receiver, address) = one_receiver(&Limits { connections_max: 2, ..limits() });
    let senders: Vec<_> = (0..4).map(|_| Sender::new(limits())).collect();
    for sender in senders.iter().chain(&senders) {
        assert_lands(&whole(20), sender, &receiver, &address);
    }
}
