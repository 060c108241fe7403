//! Who may speak: proofs, probes, and everybody else on the port.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kvtransfer::sender::probe::probe;
use kvtransfer::transport::tcp::TcpDialer;
use kvtransfer::{FailCode, Limits, Sender, SessionError, Ticket};

use super::{assert_lands, limits, one_receiver, whole};
use crate::common::net::{expect_all, open, push_all};
use crate::common::{CLOSE, Case};

/// Protects: who holds the cluster's secret learns a link's round trip, rate and clock; nobody else learns anything.
#[test]
fn a_probe_measures_a_link_for_those_of_the_cluster() {
    let secret = Ticket::probe(b"the cluster's token");
    let (receiver, address) = one_receiver(&Limits { probe: Some(secret.clone()), ..limits() });
    let found = probe(&TcpDialer, &secret, &address, true).unwrap();
    assert!(found.rtt > Duration::ZERO && found.bytes_per_s.unwrap() > 1e6, "{found:?}");
    assert!(found.skew_ms.abs() < 10_000);
    let error = probe(&TcpDialer, &Ticket::probe(b"another"), &address, true).unwrap_err();
    assert_eq!(error, "it is of another cluster");
    assert_lands(&whole(64), &Sender::new(limits()), &receiver, &address);
    let (_closed, address) = one_receiver(&limits());
    assert!(probe(&TcpDialer, &secret, &address, false).unwrap_err().contains("is not expected"));
}

#[test]
fn a_wrong_ticket_a_stale_attempt_and_an_old_session_are_refused_and_the_right_one_lands() {
    let limits = Limits { handshake: Duration::from_secs(2), ..limits() };
    let (receiver, address) = one_receiver(&limits);
    let sender = Sender::new(limits);
    let case = whole(64);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let attempt = |case: &Case| {
        let (push, end) = open(case, 0, &sender, &[vec![address.clone()]]);
        push_all(case, 0, &push, 64, 16, true);
        push.close(CLOSE);
        end.recv().unwrap()
    };
    let forged = Case { ticket: Ticket::random(), ..case.clone() };
    assert_eq!(attempt(&forged), Err(SessionError::Proof(address.clone())));
    let stale = Case { attempt: 0, ..case.clone() };
    let error = attempt(&stale).unwrap_err();
    assert!(matches!(&error, SessionError::Refused { code: FailCode::Stale, .. }), "{error}");
    assert_eq!(error.to_string(), format!("{address} gave up: stale: attempt is 0, expected 1"));

    assert!(attempt(&case).is_ok());
    assert!(ends.recv().unwrap().1.landing.cache.is_right());
    for unknown in [case, whole(64)] {
        let error = attempt(&unknown).unwrap_err();
        assert!(matches!(&error, SessionError::Refused { code: FailCode::Unknown, .. }), "{error}");
    }
}

#[test]
fn garbage_on_the_port_harms_nobody() {
    let (receiver, address) = one_receiver(&limits());
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 5000], &[0xff; 64], b"BKV\x01"] {
        let mut stream = TcpStream::connect(&address).unwrap();
        // The receiver may close before all of it is written.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_lands(&whole(64), &Sender::new(limits()), &receiver, &address);
}

#[test]
fn strangers_are_bounded_and_do_not_keep_a_sender_out_for_ever() {
    let limits = Limits { handshake: Duration::from_secs(60), ..limits() };
    let (receiver, address) = one_receiver(&limits);
    let silent: Vec<_> = (0..limits.unproven_max).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let mut refused = TcpStream::connect(&address).unwrap();
    let mut words = Vec::new();
    let _ = refused.read_to_end(&mut words);
    assert!(String::from_utf8_lossy(&words).contains("connections without proof at its bound of 64"));

    // A sender comes back until there is a place for it.
    let case = whole(64);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &Sender::new(limits), &[vec![address]]);
    push_all(&case, 0, &push, 64, 16, true);
    push.close(CLOSE);
    drop(silent);
    assert!(end.recv().unwrap().is_ok());
    assert!(ends.recv().unwrap().1.landing.cache.is_right());
}

#[test]
fn a_stranger_that_does_not_speak_is_shown_out() {
    let limits = Limits { handshake: Duration::from_millis(30), ..limits() };
    let (_receiver, address) = one_receiver(&limits);
    let mut stream = TcpStream::connect(&address).unwrap();
    let mut words = Vec::new();
    stream.read_to_end(&mut words).unwrap();
    assert!(String::from_utf8_lossy(&words).contains("no proof for 30 ms"));
}
