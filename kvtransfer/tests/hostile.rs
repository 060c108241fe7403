//! A receiver's session against senders that hold the ticket and break the rules, frame by frame: each rule is enforced by
//! the receiver itself, whatever senders check on their side.

mod common;

use std::time::{Duration, Instant};

use backend::{DType, KvSpec};
use common::{CLOSE, Case};
use kvtransfer::coverage::CoverageError;
use kvtransfer::frame::{Head, Kind};
use kvtransfer::layout::describe;
use kvtransfer::message::{Hello, Message};
use kvtransfer::proof::{End, prove};
use kvtransfer::session::{Action, Handshake, Receiving};
use kvtransfer::{Close, Codec, Limits, SessionError, Summary, Ticket};

/// One layer, one head of 4 f32 in two planes: 16 bytes per token and plane, 8 tokens, 256 bytes in all.
const TOKENS: u32 = 8;
const TOTAL: u64 = 256;

struct Test {
    case: Case,
    receiving: Receiving,
    now: Instant,
    tag: u64,
}

fn test(window_bytes: u64) -> Test {
    let spec = || vec![KvSpec::gqa(1, 1, 0..1, 4, DType::F32)];
    let case = Case::new(spec(), spec(), 0..TOKENS);
    let now = Instant::now();
    let limits = Limits { window_bytes, ..Limits::default() };
    let id = case.session.to_bytes();
    let tag = u64::from_le_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]]);
    Test { receiving: Receiving::new(case.expect(0), &limits, now), case, now, tag }
}

impl Test {
    fn hello(&self, sender: u32, senders: &[u32], bytes: u64) -> Hello {
        Hello {
            session: self.case.session,
            epoch: self.case.epoch,
            attempt: self.case.attempt,
            sender,
            lane: 0,
            connection: 0,
            senders: senders.to_vec(),
            tokens: self.case.tokens.clone(),
            bytes,
            nonce: [1; 32],
            request: self.case.request.clone(),
            spec: describe(&self.case.to[0]),
        }
    }

    fn connect(&mut self, conn: u64, hello: Hello, ticket: &Ticket) -> Result<Vec<Action>, SessionError> {
        let bytes = Message::Hello(Box::new(hello.clone())).encode();
        let (handshake, challenge) = Handshake::begin(hello, &self.case.ticket, [2; 32]);
        let Message::Challenge { nonce, .. } = challenge else { panic!("{challenge:?}") };
        let proof = prove(ticket, End::Sender, &bytes, &nonce);
        self.receiving.prove(conn, &handshake, &proof, self.now).map_err(|rejected| rejected.error)
    }

    /// The only sender, on connection 0.
    fn connect_whole(&mut self) -> Vec<Action> {
        let (hello, ticket) = (self.hello(0, &[0], TOTAL), self.case.ticket.clone());
        self.connect(0, hello, &ticket).expect("proven")
    }

    fn head(&self, number: u64, plane: u32, tokens: std::ops::Range<u32>) -> Head {
        let payload_bytes = 16 * tokens.len() as u32;
        Head {
            kind: Kind::Data,
            tag: self.tag,
            number,
            layer: 0,
            plane,
            heads: 0..1,
            tokens,
            codec: Codec::Exact,
            payload_bytes,
            payload_crc: 0,
        }
    }

    /// A frame that lands, and what follows.
    fn land(&mut self, conn: u64, head: &Head) -> Vec<Action> {
        self.receiving.data(conn, head, self.now).expect("a place");
        self.receiving.payload(conn, Ok(()), self.now)
    }

    fn say(&mut self, conn: u64, number: u64, message: Message) -> Vec<Action> {
        let head = Head::control(message.kind(), self.tag, number, &message.encode());
        self.receiving.message(conn, &head, message, self.now)
    }

    fn done(&mut self, conn: u64, number: u64, frames: u64, bytes: u64, close: Close) -> Vec<Action> {
        self.say(conn, number, Message::Done { frames, bytes, lanes: 1, close })
    }
}

fn end(actions: &[Action]) -> Result<Summary, SessionError> {
    let ends: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            Action::End(result) => Some(result.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(ends.len(), 1, "{actions:?}");
    ends[0].clone()
}

fn protocol(actions: &[Action]) -> String {
    match end(actions) {
        Err(SessionError::Protocol(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_rules_kept_the_session_lands_and_is_acknowledged() {
    let mut test = test(1 << 20);
    let credit =
        Message::Credit { limit_bytes: TOTAL, received_bytes: 0, received_frames: 0, frame_bytes: 1 << 19 };
    assert_eq!(test.connect_whole(), [Action::Send(0, credit)]);
    assert_eq!(test.land(0, &test.head(2, 1, 0..8)), []);
    assert_eq!(test.land(0, &test.head(3, 0, 0..8)), []);
    assert_eq!(
        test.say(0, 4, Message::Ping),
        [Action::Send(0, Message::Pong { received_bytes: TOTAL, received_frames: 2 })]
    );
    let summary =
        Summary { bytes: TOTAL, gathered_bytes: 0, wire_bytes: TOTAL, frames: 2, resumed: 0, close: CLOSE };
    let ack = Action::Send(0, Message::Ack { bytes: TOTAL });
    assert_eq!(test.done(0, 5, 2, TOTAL, CLOSE), [Action::End(Ok(summary)), ack]);
    assert_eq!(test.receiving.lost(0, "closed", test.now), [], "a session that is over stays so");
    assert_eq!(test.receiving.tick(test.now + Duration::from_secs(3600)), []);
}

#[test]
fn a_proof_by_another_ticket_changes_nothing() {
    let mut test = test(1 << 20);
    let error = test.connect(0, test.hello(0, &[0], TOTAL), &Ticket::random()).unwrap_err();
    assert_eq!(error, SessionError::Proof("sender rank 0".into()));
    let stranger = test.receiving.data(0, &test.head(2, 0, 0..8), test.now).unwrap_err();
    assert!(matches!(stranger[..], [Action::Close(0, SessionError::Unknown(_))]), "{stranger:?}");
    assert!(matches!(test.say(0, 3, Message::Ping)[..], [Action::Close(0, SessionError::Unknown(_))]));
    assert!(!test.receiving.over());
    test.connect_whole();
}

#[test]
fn a_sender_connects_once() {
    let mut test = test(1 << 20);
    test.connect_whole();
    let (hello, ticket) = (test.hello(0, &[0], TOTAL), test.case.ticket.clone());
    assert!(matches!(test.connect(1, hello, &ticket), Err(SessionError::Protocol(_))));
    assert!(!test.receiving.over(), "the first connection goes on");
}

#[test]
fn senders_agree_on_who_sends_and_how_much() {
    let mut test = test(1 << 20);
    let ticket = test.case.ticket.clone();
    test.connect(0, test.hello(0, &[0, 1], 128), &ticket).unwrap();
    let other = test.connect(1, test.hello(1, &[1, 2], 128), &ticket);
    assert!(matches!(other, Err(SessionError::Stale { what: "list of senders", .. })), "{other:?}");
    let stranger = test.connect(1, test.hello(2, &[0, 1], 128), &ticket);
    assert!(matches!(stranger, Err(SessionError::Protocol(_))));
    let much = test.connect(1, test.hello(1, &[0, 1], 129), &ticket);
    assert!(matches!(much, Err(SessionError::Stale { what: "number of bytes", .. })), "{much:?}");
    test.connect(1, test.hello(1, &[0, 1], 128), &ticket).unwrap();
}

#[test]
fn senders_that_announce_less_than_the_landing_never_complete_it() {
    let mut test = test(1 << 20);
    let (hello, ticket) = (test.hello(0, &[0], TOTAL - 128), test.case.ticket.clone());
    test.connect(0, hello, &ticket).unwrap();
    test.land(0, &test.head(2, 0, 0..8));
    let want = SessionError::Incomplete { got_bytes: 128, want_bytes: TOTAL };
    assert_eq!(end(&test.done(0, 3, 1, 128, CLOSE)), Err(want));
}

#[test]
fn a_done_before_the_announced_bytes_or_with_wrong_counts_fails() {
    let mut early = test(1 << 20);
    early.connect_whole();
    early.land(0, &early.head(2, 0, 0..8));
    let want = SessionError::Incomplete { got_bytes: 128, want_bytes: TOTAL };
    assert_eq!(end(&early.done(0, 3, 1, 128, CLOSE)), Err(want));
    for (frames, bytes) in [(2, 128), (1, TOTAL)] {
        let mut test = test(1 << 20);
        test.connect_whole();
        test.land(0, &test.head(2, 0, 0..8));
        protocol(&test.done(0, 3, frames, bytes, CLOSE));
    }
}

#[test]
fn no_place_is_written_twice() {
    let mut test = test(1 << 20);
    test.connect_whole();
    test.land(0, &test.head(2, 0, 0..5));
    let actions = test.receiving.data(0, &test.head(3, 0, 4..8), test.now).unwrap_err();
    let twice = CoverageError::Twice { layer: 0, plane: 0, head: 0, start: 4, end: 8 };
    assert_eq!(end(&actions), Err(SessionError::Coverage(twice)));
}

#[test]
fn credit_bounds_what_is_sent() {
    // The least window is four rows of 16 bytes.
    let mut test = test(1);
    let credit = |limit_bytes, received_bytes, received_frames| {
        Action::Send(0, Message::Credit { limit_bytes, received_bytes, received_frames, frame_bytes: 32 })
    };
    assert_eq!(test.connect_whole(), [credit(64, 0, 0)]);
    assert_eq!(test.land(0, &test.head(2, 0, 0..2)), [credit(96, 32, 1)]);
    test.land(0, &test.head(3, 0, 2..3));
    // Credit to 112, which is not told before it is a quarter window.
    assert_eq!(test.land(0, &test.head(4, 0, 3..4)), [credit(128, 64, 3)]);
    for (number, token) in (5..).zip(4..8) {
        test.receiving.data(0, &test.head(number, 0, token..token + 1), test.now).unwrap();
    }
    let beyond = test.receiving.data(0, &test.head(9, 1, 0..1), test.now).unwrap_err();
    assert_eq!(protocol(&beyond), "frame of 16 bytes (at most 32) to 144 of 128 bytes of credit");

    let mut test = self::test(1);
    test.connect_whole();
    let long = test.receiving.data(0, &test.head(2, 0, 0..3), test.now).unwrap_err();
    assert_eq!(protocol(&long), "frame of 48 bytes (at most 32) to 48 of 64 bytes of credit");
}

#[test]
fn frames_are_of_this_session_in_order_and_of_the_right_length() {
    let broken: [fn(&mut Head); 4] = [
        |head| head.tag ^= 1,
        |head| head.number += 1,
        |head| head.number -= 1,
        |head| head.payload_bytes -= 1,
    ];
    for (which, breaks) in broken.into_iter().enumerate() {
        let mut test = test(1 << 20);
        test.connect_whole();
        let mut head = test.head(2, 0, 0..8);
        breaks(&mut head);
        let actions = test.receiving.data(0, &head, test.now).unwrap_err();
        assert!(!protocol(&actions).is_empty(), "{which}");
    }
}

#[test]
fn nothing_comes_after_done_and_first_tokens_agree() {
    let mut test = test(1 << 20);
    let ticket = test.case.ticket.clone();
    test.connect(0, test.hello(0, &[0, 1], 128), &ticket).unwrap();
    test.connect(1, test.hello(1, &[0, 1], 128), &ticket).unwrap();
    test.land(0, &test.head(2, 0, 0..8));
    assert_eq!(test.done(0, 3, 1, 128, CLOSE), []);
    let mut again = test.head(4, 1, 0..8);
    let late = test.receiving.data(0, &again, test.now).unwrap_err();
    assert_eq!(protocol(&late), "data of sender rank 0 after its done");

    let mut test = self::test(1 << 20);
    let ticket = test.case.ticket.clone();
    test.connect(0, test.hello(0, &[0, 1], 128), &ticket).unwrap();
    test.connect(1, test.hello(1, &[0, 1], 128), &ticket).unwrap();
    test.land(0, &test.head(2, 0, 0..8));
    again.number = 2;
    again.tag = test.tag;
    test.land(1, &again);
    assert_eq!(test.done(0, 3, 1, 128, CLOSE), []);
    assert!(protocol(&test.done(1, 3, 1, 128, Close { token: 43, ..CLOSE })).contains("disagree"));
}

#[test]
fn a_silent_sender_is_not_excused_by_a_talking_one() {
    let mut test = test(1 << 20);
    let ticket = test.case.ticket.clone();
    test.connect(0, test.hello(0, &[0, 1], 128), &ticket).unwrap();
    test.connect(1, test.hello(1, &[0, 1], 128), &ticket).unwrap();
    for (number, second) in (2..12).zip(1..) {
        test.now += Duration::from_secs(2);
        test.say(0, number, Message::Ping);
        let actions = test.receiving.tick(test.now);
        if 2 * second < test.case.deadline.as_secs() {
            assert_eq!(actions, [], "after {second}");
        } else {
            let what = "nothing came from sender rank 1".to_owned();
            assert_eq!(end(&actions), Err(SessionError::Expired { what, ms: 20_000 }));
            return;
        }
    }
    panic!("no end");
}
