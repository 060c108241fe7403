//! Sessions between two processes over UCX: this test binary again is the receiver. Protects: payloads really take the way that was
//! chosen, a way that fails is left for the connection itself, and a peer that is killed ends the session in time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use backend::{DType, KvSpec};
use kvtransfer::transport::ucx::{Way, Ways, available};
use kvtransfer::{Limits, Receiver, Sender, SessionError, SessionId, Ticket};

use crate::common::net::{Harm, LOCAL, Proxy, expect_all, open, push_all};
use crate::common::{CLOSE, Cache, Case, MemExport};

const TOKENS: u32 = 3000;

pub fn limits() -> Limits {
    Limits { ways: crate::WAYS, ..Limits::default() }
}

/// The same case in both processes: 2 layers of 8 heads of 64 bf16, 4 KiB per token.
fn case(seed: u8) -> Case {
    let spec = || vec![KvSpec::gqa(2, 8, 0..8, 64, DType::BF16)];
    Case {
        session: SessionId::from_bytes([seed; 16]),
        ticket: Ticket::from_bytes([seed; 32]),
        deadline: Duration::from_secs(10),
        ..Case::new(spec(), spec(), 0..TOKENS)
    }
}

/// Whether there is UCX to test; says so where there is not.
pub fn here() -> bool {
    match available() {
        Ok(_) => true,
        Err(why) => {
            println!("skipped: {why}");
            assert!(std::env::var_os("BATON_NEEDS_UCX").is_none(), "{why}");
            false
        }
    }
}

/// The receiver's process: expects the sessions of the seeds that it is told, and says how each ended.
#[test]
#[ignore = "the other process of the tests below"]
fn receiver_process() {
    let receiver = Receiver::bind(LOCAL, limits()).unwrap();
    println!("\naddress {}", receiver.local_addr());
    for line in std::io::stdin().lines() {
        let case = case(line.unwrap().parse().unwrap());
        let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
        println!("expecting");
        let landed = ends.recv().unwrap().1;
        let right = landed.result.is_ok() && landed.landing.cache.is_right();
        println!("ended {right} {:?}", landed.result.map(|summary| (summary.bytes, summary.resumed)));
    }
}

struct Other {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    address: String,
}

impl Other {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["processes::receiver_process", "--exact", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut other = Other { child, lines, address: String::new() };
        other.address = other.hear("address ");
        other
    }

    fn hear(&mut self, word: &str) -> String {
        let found = self.lines.find_map(|line| Some(line.ok()?.strip_prefix(word)?.to_owned()));
        found.expect("the other process says so")
    }

    fn expect(&mut self, seed: u8) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{seed}").unwrap();
        self.hear("expecting");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

#[test]
fn payloads_take_the_way_between_processes() {
    if !here() {
        return;
    }
    let (mut other, sender) = (Other::start(), Sender::new(limits()));
    // The first frames go while the ends still agree on the way; a connection that is used again has it from its first.
    for (seed, direct) in [(1, true), (2, true), (3, false)] {
        other.expect(seed);
        let case = case(seed);
        let (push, end) = open(&case, 0, &sender, &[vec![other.address.clone()]]);
        push_all(&case, 0, &push, 500, 64, direct);
        push.close(CLOSE);
        assert_eq!(end.recv().unwrap().unwrap().bytes, 4096 * u64::from(TOKENS));
        assert_eq!(other.hear("ended "), format!("true Ok(({}, 0))", 4096 * TOKENS));
    }
    assert_eq!(sender.links()[0].way, crate::WAY);
    assert_eq!(sender.fallbacks(), 0);
}

#[test]
fn a_killed_receiver_ends_the_session_in_time_and_the_leases_come_back() {
    // Over its own TCP the library ends the process that is asked for a read by somebody who is gone, see `Way::Tcp`.
    if !here() || crate::WAY == Way::Tcp {
        return;
    }
    let (mut other, sender) = (Other::start(), Sender::new(limits()));
    other.expect(1);
    let warm = case(1);
    let (push, end) = open(&warm, 0, &sender, &[vec![other.address.clone()]]);
    push_all(&warm, 0, &push, 500, 64, true);
    push.close(CLOSE);
    end.recv().unwrap().unwrap();
    other.hear("ended ");
    other.expect(2);
    let case = Case { deadline: Duration::from_secs(2), ..case(2) };
    let cache = Arc::new(Cache::full(&case.from[0], case.tokens.clone(), 64));
    let (push, end) = open(&case, 0, &sender, &[vec![other.address.clone()]]);
    let export = |layer: usize| MemExport {
        cache: cache.clone(),
        layers: layer..layer + 1,
        tokens: case.tokens.clone(),
        direct: true,
    };
    push.layer(export(0));
    while push.backlog_bytes() > 0 {
        std::thread::yield_now();
    }
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    push.layer(export(1));
    push.close(CLOSE);
    let begun = Instant::now();
    let error = end.recv().unwrap().unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(matches!(error, SessionError::Connect { .. } | SessionError::Lost { .. }), "{error}");
    assert_eq!(Arc::strong_count(&cache), 1, "leases of a push that has ended");
}

/// Protects: a sender that is killed in the middle ends the receiver's session in time, and the port works on.
#[test]
fn a_killed_sender_ends_the_session_in_time() {
    if !here() {
        return;
    }
    let receiver = Receiver::bind(LOCAL, limits()).unwrap();
    let case = Case { deadline: Duration::from_secs(2), ..case(9) };
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["processes::sender_process", "--exact", "--ignored", "--nocapture"])
        .env("BATON_TEST_ADDRESS", receiver.local_addr().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said =
        BufReader::new(child.stdout.take().unwrap()).lines().find(|line| line.as_ref().unwrap() == "half");
    assert!(said.is_some());
    child.kill().unwrap();
    child.wait().unwrap();
    let (begun, landed) = (Instant::now(), ends.recv().unwrap().1);
    assert!(landed.result.is_err() && begun.elapsed() < Duration::from_secs(10));
    let sender = Sender::new(limits());
    let again = crate::processes::case(10);
    let address = receiver.local_addr().to_string();
    let (pushed, landed) = crate::common::net::session(&again, &sender, &receiver, &address);
    assert!(pushed.is_ok() && landed.result.is_ok() && landed.landing.cache.is_right());
}

/// The sender's process of the test above: half of the case, then nothing until it is killed.
#[test]
#[ignore = "the other process of the test above"]
fn sender_process() {
    let Ok(address) = std::env::var("BATON_TEST_ADDRESS") else { return };
    let case = Case { deadline: Duration::from_secs(2), ..case(9) };
    let (push, _end) = open(&case, 0, &Sender::new(limits()), &[vec![address]]);
    let cache = Arc::new(Cache::full(&case.from[0], case.tokens.clone(), 64));
    push.layer(MemExport { cache, layers: 0..1, tokens: case.tokens.clone(), direct: true });
    while push.backlog_bytes() > 0 {
        std::thread::yield_now();
    }
    println!("\nhalf");
    std::thread::sleep(Duration::from_secs(60));
}

/// Protects: an end that may not use UCX gets everything over the connection.
#[test]
fn a_receiver_without_the_way_is_served_over_the_connection() {
    let receiver = Receiver::bind(LOCAL, Limits { ways: Ways::NONE, ..Limits::default() }).unwrap();
    let sender = Sender::new(limits());
    let address = receiver.local_addr().to_string();
    let (pushed, landed) = crate::common::net::session(&case(11), &sender, &receiver, &address);
    assert!(pushed.is_ok() && landed.result.is_ok() && landed.landing.cache.is_right());
    assert_eq!(sender.links()[0].way, Way::Stream);
}

/// Protects: a lane that is lost while its payloads go beside the connection goes on over a connection alone, wherever that leads.
#[test]
fn a_lane_that_is_lost_comes_back_without_the_way() {
    if !here() {
        return;
    }
    let receiver = Receiver::bind(LOCAL, limits()).unwrap();
    let (address, sender) = (receiver.local_addr().to_string(), Sender::new(limits()));
    // 94 exports of 2 layers of 2 planes and a Done are a session; the connection is used again, and lost in the next one.
    let frames = TOKENS.div_ceil(32) as usize * 4 + 1;
    let proxy = Proxy::new(receiver.local_addr(), Harm::CutInFrame(frames + 100), Harm::None);
    let (pushed, landed) = crate::common::net::session(&case(12), &sender, &receiver, &proxy.address);
    assert!(pushed.is_ok() && landed.result.is_ok());
    let case = case(13);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &sender, &[vec![proxy.address.clone(), address.clone()]]);
    push_all(&case, 0, &push, 32, 16, true);
    push.close(CLOSE);
    let (pushed, landed) = (end.recv().unwrap().unwrap(), ends.recv().unwrap().1);
    assert_eq!((pushed.resumed, landed.result.unwrap().resumed, sender.fallbacks()), (1, 1, 1));
    assert!(landed.landing.cache.is_right());
    let way = |peer: &String| sender.links().iter().find(|link| link.peer == *peer).map(|link| link.way);
    assert_eq!((way(&proxy.address), way(&address)), (Some(crate::WAY), Some(Way::Stream)));
}

/// Protects: large pushes through shared memory are read by two threads, small ones and those over other ways by one.
#[test]
fn a_large_push_through_shared_memory_takes_two_lanes() {
    if !here() {
        return;
    }
    let receiver = Receiver::bind(LOCAL, limits()).unwrap();
    let sender = Sender::new(limits());
    let proxy = Proxy::new(receiver.local_addr(), Harm::None, Harm::None);
    let push = |seed, tokens| {
        let case = Case { tokens: 0..tokens, ..case(seed) };
        let (pushed, landed) = crate::common::net::session(&case, &sender, &receiver, &proxy.address);
        assert!(pushed.is_ok() && landed.result.is_ok() && landed.landing.cache.is_right());
    };
    // Until the way is taken, which needs the library: a tenth of a second.
    let until = Instant::now() + Duration::from_secs(10);
    let mut seed = 40;
    while sender.links().first().is_none_or(|link| link.way != crate::WAY) && Instant::now() < until {
        seed += 1;
        push(seed, 1000);
    }
    assert_eq!(sender.links()[0].way, crate::WAY);
    push(seed + 1, 1000);
    assert_eq!(proxy.connections.load(Ordering::SeqCst), 1, "small");
    push(seed + 2, 8192);
    let expected = if crate::WAY == Way::Shm { 2 } else { 1 };
    assert_eq!(proxy.connections.load(Ordering::SeqCst), expected, "32 MiB");
}
