//! Whoever is turned away at the KV port before it has proved anything is told of, by what was wrong: who tries tickets is seen.

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver as Told, channel};
use std::time::Duration;

use backend::{DType, KvSpec};
use common::Case;
use common::net::{LOCAL, expect_all};
use kvtransfer::frame::Head;
use kvtransfer::layout::describe;
use kvtransfer::message::{Hello, Message};
use kvtransfer::{Limits, OnTurned, Receiver, Turned};

/// Nothing here takes this long; it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(30);

fn counting() -> (OnTurned, Told<String>) {
    let (tell, told) = channel();
    let turned = OnTurned::new(move |turned| {
        let what = match turned {
            Turned::Because(reason) => reason.to_owned(),
            Turned::Handshake(error) => error.to_string(),
        };
        // A test that has ended does not listen.
        let _ = tell.send(what);
    });
    (turned, told)
}

fn case() -> Case {
    let spec = || vec![KvSpec::gqa(1, 1, 0..1, 4, DType::F32)];
    Case::new(spec(), spec(), 0..8)
}

/// A connection that sends these messages, as frames of the case's session.
fn says(receiver: &Receiver, case: &Case, messages: &[Message]) -> TcpStream {
    let mut stream = TcpStream::connect(receiver.local_addr()).unwrap();
    let id = case.session.to_bytes();
    let tag = u64::from_le_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]]);
    for (number, message) in (0..).zip(messages) {
        let payload = message.encode();
        stream.write_all(&Head::control(message.kind(), tag, number, &payload).encode()).unwrap();
        stream.write_all(&payload).unwrap();
    }
    stream
}

fn hello(case: &Case) -> Message {
    Message::Hello(Box::new(Hello {
        session: case.session,
        epoch: case.epoch,
        attempt: case.attempt,
        sender: 0,
        lane: 0,
        connection: 0,
        senders: vec![0],
        tokens: case.tokens.clone(),
        bytes: 256,
        nonce: [1; 32],
        request: case.request.clone(),
        spec: describe(&case.to[0]),
    }))
}

#[test]
fn who_proves_nothing_is_counted() {
    let (turned, told) = counting();
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let receiver = Receiver::bind_counted(LOCAL, limits, None, turned).unwrap();
    let heard = || told.recv_timeout(PATIENCE).unwrap();

    // One that merely leaves is nobody's refusal: the next one told of is the next one.
    drop(TcpStream::connect(receiver.local_addr()).unwrap());
    let mut stranger = TcpStream::connect(receiver.local_addr()).unwrap();
    stranger.write_all(&[b'x'; 256]).unwrap();
    assert_eq!(heard(), "not the kv wire");
    let silent = TcpStream::connect(receiver.local_addr()).unwrap();
    assert_eq!(heard(), "silent");
    drop(silent);

    // A guess at the ticket of a session that is expected; it stays expected.
    let case = case();
    let landed = expect_all(&case, std::slice::from_ref(&receiver), 8, true);
    let _guess = says(&receiver, &case, &[hello(&case), Message::Proof { proof: [0; 32] }]);
    assert_eq!(heard(), "ticket not proved");
    assert!(landed.try_recv().is_err(), "a guess has ended the session");
    // Once the session is over, nobody comes in by its ticket.
    receiver.cancel(&case.session);
    landed.recv_timeout(PATIENCE).unwrap();
    let _late = says(&receiver, &case, &[hello(&case)]);
    assert_eq!(heard(), "no such admission");
    assert!(told.try_recv().is_err());
}
