//! Real ends on real sockets: receivers and senders of a case, and a proxy between them that breaks what passes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver as Results, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use kvtransfer::frame::{Head, Kind};
use kvtransfer::limits::HEADER_BYTES;
use kvtransfer::{Landed, Limits, Push, Pushed, Receiver, Sender, SessionError};

use super::{CLOSE, Cache, Case, MemExport, MemLanding};

pub const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub fn receivers(count: usize, limits: &Limits) -> Vec<Receiver> {
    (0..count).map(|_| Receiver::bind(LOCAL, limits.clone()).expect("a free port")).collect()
}

pub fn addresses(receivers: &[Receiver]) -> Vec<Vec<String>> {
    receivers.iter().map(|receiver| vec![receiver.local_addr().to_string()]).collect()
}

/// Expects the case at every receiver; ends come in any order, with their rank.
pub fn expect_all(
    case: &Case,
    receivers: &[Receiver],
    block_tokens: u32,
    direct: bool,
) -> Results<(usize, Landed<MemLanding>)> {
    let (landed, ends) = channel();
    let sender = Sender::new(Limits::default());
    let addresses = addresses(receivers);
    for (rank, receiver) in receivers.iter().enumerate() {
        let landing = MemLanding::new(&case.to[rank], case.tokens.clone(), block_tokens, direct);
        let landed = landed.clone();
        receiver
            .expect(case.expect_in(rank, &addresses, &sender), landing, move |end| {
                drop(landed.send((rank, end)))
            })
            .expect("a new session");
    }
    ends
}

/// Opens the case at one sender rank.
pub fn open(
    case: &Case,
    rank: usize,
    sender: &Sender,
    addresses: &[Vec<String>],
) -> (Push, Results<Result<Pushed, SessionError>>) {
    let (pushed, end) = channel();
    let push = sender.open(case.push(rank, addresses), move |result| drop(pushed.send(result)));
    (push, end)
}

/// Queues all layers in chunks of tokens.
pub fn push_all(case: &Case, rank: usize, push: &Push, chunk: u32, block_tokens: u32, direct: bool) {
    let cache = Arc::new(Cache::full(&case.from[rank], case.tokens.clone(), block_tokens));
    for start in case.tokens.clone().step_by(chunk as usize) {
        let tokens = start..(start + chunk).min(case.tokens.end);
        for layer in 0..case.from[rank].layers {
            let (cache, tokens) = (cache.clone(), tokens.clone());
            push.layer(MemExport { cache, layers: layer..layer + 1, tokens, direct });
        }
    }
}

/// A whole session of one sender rank and one receiver over `address`: both ends' results, and the landing.
pub fn session(
    case: &Case,
    sender: &Sender,
    receiver: &Receiver,
    address: &str,
) -> (Result<Pushed, SessionError>, Landed<MemLanding>) {
    let ends = expect_all(case, std::slice::from_ref(receiver), 16, true);
    let (push, end) = open(case, 0, sender, &[vec![address.to_owned()]]);
    push_all(case, 0, &push, 32, 16, true);
    push.close(CLOSE);
    (end.recv().expect("an end"), ends.recv().expect("an end").1)
}

/// What a proxy does to the bytes of one direction.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    None,
    /// Both directions close after so many bytes.
    CutAfter(usize),
    /// Both directions close behind the head of the so manieth frame that brings cache or ends it, from 1: the same place in a
    /// session whatever its payloads go by.
    CutInFrame(usize),
    /// One bit of the first byte behind that head flips.
    FlipInFrame(usize),
}

/// A TCP proxy in front of `target`. Counts connections.
pub struct Proxy {
    pub address: String,
    pub connections: Arc<AtomicUsize>,
    pub upstream_bytes: Arc<AtomicUsize>,
}

impl Proxy {
    pub fn new(target: SocketAddr, up: Harm, down: Harm) -> Self {
        let listener = TcpListener::bind(LOCAL).expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let (connections, upstream_bytes) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, bytes) = (connections.clone(), upstream_bytes.clone());
        // The thread ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(target)) else { return };
                counted.fetch_add(1, Ordering::SeqCst);
                let ends = Arc::new(Mutex::new((client.try_clone().unwrap(), server.try_clone().unwrap())));
                pipe(
                    client.try_clone().unwrap(),
                    server.try_clone().unwrap(),
                    up,
                    ends.clone(),
                    Some(bytes.clone()),
                );
                pipe(server, client, down, ends, None);
            }
        });
        Proxy { address, connections, upstream_bytes }
    }
}

fn pipe(
    mut from: TcpStream,
    mut to: TcpStream,
    harm: Harm,
    ends: Arc<Mutex<(TcpStream, TcpStream)>>,
    count: Option<Arc<AtomicUsize>>,
) {
    thread::spawn(move || {
        let (mut passed, mut buffer) = (0, vec![0; 16 << 10]);
        let (mut frames, mut flip) = (Frames::default(), false);
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            let (mut part, mut cut) = (&mut buffer[..bytes], false);
            match harm {
                Harm::CutInFrame(count) => {
                    if let Some(end) = frames.head_of(count, part) {
                        part = &mut part[..end];
                        cut = true;
                    }
                }
                Harm::FlipInFrame(count) => {
                    let start = if std::mem::take(&mut flip) { Some(0) } else { frames.head_of(count, part) };
                    match start.and_then(|start| part.get_mut(start)) {
                        Some(byte) => *byte ^= 0x10,
                        // The next to come.
                        None => flip = start.is_some(),
                    }
                }
                Harm::CutAfter(at) if passed + bytes > at => {
                    part = &mut part[..at - passed];
                    cut = true;
                }
                _ => {}
            }
            if to.write_all(part).is_err() || cut {
                break;
            }
            passed += bytes;
            if let Some(count) = &count {
                count.fetch_add(bytes, Ordering::SeqCst);
            }
        }
        if matches!(harm, Harm::CutAfter(_) | Harm::CutInFrame(_)) {
            let ends = ends.lock().unwrap();
            let _ = (ends.0.shutdown(Shutdown::Both), ends.1.shutdown(Shutdown::Both));
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Where a stream is in its frames.
#[derive(Default)]
struct Frames {
    /// Of the head that is coming.
    head: Vec<u8>,
    /// Of the payload that is coming.
    payload_bytes_left: usize,
    /// Heads of frames that bring cache or end it.
    count: usize,
}

impl Frames {
    /// Goes on through `bytes`; where in them the head of the `wanted`th frame ends, if it does.
    fn head_of(&mut self, wanted: usize, bytes: &[u8]) -> Option<usize> {
        let (mut at, mut found) = (0, None);
        while at < bytes.len() {
            let left = bytes.len() - at;
            if self.payload_bytes_left > 0 {
                let skipped = self.payload_bytes_left.min(left);
                self.payload_bytes_left -= skipped;
                at += skipped;
                continue;
            }
            let more = (HEADER_BYTES - self.head.len()).min(left);
            self.head.extend_from_slice(&bytes[at..at + more]);
            at += more;
            if let Ok(whole) = self.head[..].try_into() {
                let head = Head::decode(whole).expect("a sender's frame");
                self.head.clear();
                self.payload_bytes_left = head.payload_bytes as usize;
                if matches!(head.kind, Kind::Data | Kind::Fetch | Kind::Done) {
                    self.count += 1;
                    found = found.or((self.count == wanted).then_some(at));
                }
            }
        }
        found
    }
}
