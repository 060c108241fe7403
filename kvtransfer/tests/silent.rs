//! Paths that fall silent: real ones, in two network namespaces with two ports between them. The receiver's address of a port goes
//! away, so that packets to it vanish without a word, as behind a switch that lost its link. Needs root and `ip`; without them the
//! tests say so and pass.
#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver as Results, channel};
use std::thread;
use std::time::{Duration, Instant};

use backend::{DType, KvSpec};
use kvtransfer::{Landed, Limits, Push, Pushed, Receiver, Sender, SessionError, SessionId, Ticket};

use common::net::{open, push_all};
use common::{CLOSE, Case, MemLanding};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Two namespaces and the ports between them; gone when dropped.
struct Net {
    far: String,
    near: String,
}

impl Net {
    fn new(name: &str, ports: usize) -> Option<Net> {
        let id = std::process::id();
        let net = Net { far: format!("kvt-far-{name}-{id}"), near: format!("kvt-near-{name}-{id}") };
        let made = net.up(ports);
        if made.is_none() {
            eprintln!("no network namespaces here: nothing was tested");
        }
        made.map(|()| net)
    }

    fn up(&self, ports: usize) -> Option<()> {
        ip(&["netns", "add", &self.far])?;
        ip(&["netns", "add", &self.near])?;
        for port in 0..ports {
            let (far, near) = (format!("vf{port}"), format!("vn{port}"));
            ip(&[
                "link", "add", &far, "netns", &self.far, "type", "veth", "peer", "name", &near, "netns",
                &self.near,
            ])?;
            for (space, device, last) in [(&self.far, &far, 1), (&self.near, &near, 2)] {
                ip(&["-n", space, "addr", "add", &format!("10.214.{port}.{last}/24"), "dev", device])?;
                ip(&["-n", space, "link", "set", device, "up"])?;
            }
        }
        Some(())
    }

    /// Nothing that is sent to the receiver by this port arrives any more.
    fn silence(&self, port: usize) {
        self.address("del", port);
    }

    fn heal(&self, port: usize) {
        self.address("add", port);
    }

    fn address(&self, what: &str, port: usize) {
        let (address, device) = (format!("10.214.{port}.2/24"), format!("vn{port}"));
        ip(&["-n", &self.near, "addr", what, &address, "dev", &device]).expect("an address");
    }

    /// A receiver that nobody reaches but by the ports: it is stopped without being reached at all.
    fn receiver(&self, limits: &Limits) -> Receiver {
        let limits = limits.clone();
        within(&self.near, move || Receiver::bind(ANY, limits).expect("a port"))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for space in [&self.far, &self.near] {
            ip(&["netns", "del", space]);
        }
    }
}

fn ip(arguments: &[&str]) -> Option<()> {
    let status = Command::new("ip").args(arguments).stderr(Stdio::null()).status().ok()?;
    status.success().then_some(())
}

/// Runs `work` on a thread of a namespace; sockets of it and of threads that it starts belong there.
fn within<T: Send + 'static>(space: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let space = File::open(format!("/run/netns/{space}")).expect("a namespace");
    let run = move || {
        // SAFETY: a namespace that is open; it is this thread's alone that changes.
        assert_eq!(unsafe { libc::setns(space.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
        work()
    };
    thread::spawn(run).join().expect("no panic")
}

/// 8 KiB per token.
fn case(tokens: u32, number: u8) -> Case {
    let spec = || vec![KvSpec::gqa(4, 8, 0..8, 64, DType::BF16)];
    Case { session: SessionId::from_bytes([number; 16]), ..Case::new(spec(), spec(), 0..tokens) }
}

fn limits() -> Limits {
    Limits { probe: Some(Ticket::probe(b"silent")), ..Limits::default() }
}

type Ended = (Results<Result<Pushed, SessionError>>, Results<Landed<MemLanding>>);

/// A push over these ports of which all is queued.
fn begin(net: &Net, case: &Case, sender: &Sender, receiver: &Receiver, ports: &[usize]) -> (Push, Ended) {
    let port = receiver.local_addr().port();
    let addresses = vec![ports.iter().map(|net| format!("10.214.{net}.2:{port}")).collect::<Vec<_>>()];
    let (landed, ends) = channel();
    let landing = MemLanding::new(&case.to[0], case.tokens.clone(), 16, true);
    let expect = case.expect_in(0, &addresses, sender);
    receiver.expect(expect, landing, move |end| drop(landed.send(end))).expect("a new session");
    let (own, sender) = (case.clone(), sender.clone());
    let (push, end) = within(&net.far, move || {
        let (push, end) = open(&own, 0, &sender, &addresses);
        push_all(&own, 0, &push, 256, 16, true);
        (push, end)
    });
    (push, (end, ends))
}

fn whole((end, ends): Ended) -> Pushed {
    let (pushed, landed) = (end.recv().unwrap().unwrap(), ends.recv().unwrap());
    assert_eq!(landed.result.unwrap().bytes, pushed.bytes);
    assert!(landed.landing.cache.is_right());
    pushed
}

fn sent_bytes(sender: &Sender) -> u64 {
    sender.links().iter().map(|link| link.bytes).sum()
}

fn until(what: &str, longest: Duration, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < longest, "{what}: not within {longest:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Protects: of two ports one that falls silent in mid-transfer costs a fraction of a second (TCP alone would give up after 8 s), the
/// next push does without it at once, and it is used again when it answers again.
#[test]
fn one_of_two_ports_that_falls_silent_costs_a_fraction_of_a_second() {
    let Some(net) = Net::new("two", 2) else { return };
    let receiver = net.receiver(&limits());
    // 96 MiB at 150 MB/s take 0.67 s.
    let paced = Limits { rate_bytes_per_s: Some(150_000_000), ..limits() };
    let sender = within(&net.far, move || Sender::new(paced));
    let (tokens, whole_s) = (12 << 10, 96.0 * 1.048576 / 150.0);
    let first = case(tokens, 1);
    let begun = Instant::now();
    let (push, ended) = begin(&net, &first, &sender, &receiver, &[0, 1]);
    push.close(CLOSE);
    until("a third", Duration::from_secs(20), || sent_bytes(&sender) > 32 << 20);
    let used = sender.links().iter().filter(|link| link.bytes > 0).count();
    assert_eq!(used, 2, "both ports are used from the first push on");
    net.silence(1);
    let silent = Instant::now();
    let pushed = whole(ended);
    let stall = pushed.acknowledged - silent;
    eprintln!(
        "96 MiB in {:.3} s ({whole_s:.3} s without a fault), {:.3} s after the port fell silent",
        (pushed.acknowledged - begun).as_secs_f64(),
        stall.as_secs_f64()
    );
    assert_eq!((pushed.resumed, sender.silent()), (1, 1));
    assert!(stall < Duration::from_secs(4), "{stall:?}");

    let (push, ended) = begin(&net, &case(64, 2), &sender, &receiver, &[0, 1]);
    push.close(CLOSE);
    assert_eq!(whole(ended).resumed, 0);
    assert_eq!(sender.silent(), 1);

    net.heal(1);
    let back = |link: &kvtransfer::LinkStat| link.path.failed.is_none() && link.path.error.is_none();
    until("the port is back", Duration::from_secs(30), || sender.links().iter().all(back));
    let before: Vec<u64> = sender.links().iter().map(|link| link.bytes).collect();
    let (push, ended) = begin(&net, &case(tokens / 2, 3), &sender, &receiver, &[0, 1]);
    push.close(CLOSE);
    whole(ended);
    let after: Vec<u64> = sender.links().iter().map(|link| link.bytes).collect();
    assert!(before.iter().zip(&after).all(|(before, after)| after > before), "{before:?} {after:?}");
}

/// Protects: a path that fell silent between two pushes, with a connection to it that is idle, does not hold the next one up.
#[test]
fn a_port_that_fell_silent_between_pushes_is_found_out_at_once() {
    let Some(net) = Net::new("idle", 2) else { return };
    // Nobody probes: the push itself has to find out.
    let receiver = net.receiver(&Limits::default());
    let sender = within(&net.far, || Sender::new(Limits::default()));
    let (push, ended) = begin(&net, &case(64, 1), &sender, &receiver, &[0]);
    push.close(CLOSE);
    whole(ended);
    net.silence(0);
    let begun = Instant::now();
    let (push, ended) = begin(&net, &case(64, 2), &sender, &receiver, &[0, 1]);
    push.close(CLOSE);
    let pushed = whole(ended);
    let took = pushed.acknowledged - begun;
    eprintln!("a push whose first path is silent took {:.3} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// Protects: where there is no other path both ends end in bounded time, say why, and have their memory back.
#[test]
fn the_only_port_that_falls_silent_ends_both_ends_by_the_deadline() {
    let Some(net) = Net::new("one", 1) else { return };
    let receiver = net.receiver(&limits());
    let paced = Limits { rate_bytes_per_s: Some(100_000_000), resume: Duration::from_secs(1), ..limits() };
    let sender = within(&net.far, move || Sender::new(paced));
    let case = Case { deadline: Duration::from_secs(2), ..case(8 << 10, 1) };
    let (push, (end, ends)) = begin(&net, &case, &sender, &receiver, &[0]);
    push.close(CLOSE);
    until("a quarter", Duration::from_secs(20), || sent_bytes(&sender) > 16 << 20);
    net.silence(0);
    let silent = Instant::now();
    let pushed = end.recv().unwrap().unwrap_err();
    let sender_s = silent.elapsed().as_secs_f64();
    let landed = ends.recv().unwrap();
    let error = landed.result.unwrap_err();
    let receiver_s = silent.elapsed().as_secs_f64();
    eprintln!("sender after {sender_s:.3} s: {pushed}; receiver after {receiver_s:.3} s: {error}");
    assert!(matches!(pushed, SessionError::Lost { .. } | SessionError::Connect { .. }), "{pushed}");
    assert!(matches!(error, SessionError::Expired { .. }), "{error}");
    assert!(sender_s.max(receiver_s) < 10.0);
}
