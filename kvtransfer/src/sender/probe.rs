//! Measures links in the background: round trip, rate and clock of every address of the receivers that were seen, and which
//! paths add up. One thread per sender; it measures rates only while nothing is pushed.

use std::io::IoSlice;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::frame::{Head, Kind};
use crate::id::fill_random;
use crate::interface::{interfaces, port, toward};
use crate::message::{Hello, Message};
use crate::proof::{End, prove, verify};
use crate::sender::pool::Pool;
use crate::session::parse;
use crate::sync::lock;
use crate::transport::Dialer;
use crate::wire::{Incoming, Wire, control_payload};
use crate::{Codec, SessionId, Ticket};

/// Time between two looks at what there is to probe.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A peer is probed again after this.
const PROBE_EVERY: Duration = Duration::from_secs(60);

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(3);

/// Pings of a probe; the shortest round trip counts.
const PINGS: usize = 4;

/// Bytes of a burst at most, and its time: 100 ms of a 10GbE link are 125 MB, of a slow one less.
const BURST_BYTES: u64 = 24 << 20;
const BURST_TIME: Duration = Duration::from_millis(60);
const BURST_FRAME: usize = 1 << 20;

/// What a probe of one address found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probe {
    /// Shortest round trip.
    pub rtt: Duration,
    /// The peer's clock less ours.
    pub skew_ms: i64,
    /// Rate of the burst.
    pub bytes_per_s: Option<f64>,
}

/// Probes one address; with `burst` its rate too. Errors in words, for people.
pub fn probe(dialer: &dyn Dialer, ticket: &Ticket, address: &str, burst: bool) -> Result<Probe, String> {
    let mut line = Line::open(dialer, ticket, address)?;
    let mut best: Option<(Duration, i64)> = None;
    for _ in 0..PINGS {
        let (sent, clock) = (Instant::now(), unix_ms());
        let (theirs, _) = line.ping()?;
        let rtt = sent.elapsed();
        let skew = theirs as i64 - clock as i64 - rtt.as_millis() as i64 / 2;
        if best.is_none_or(|(shortest, _)| rtt < shortest) {
            best = Some((rtt, skew));
        }
    }
    let (rtt, skew_ms) = best.ok_or("no answer")?;
    let bytes_per_s = if burst { Some(line.burst()?) } else { None };
    Ok(Probe { rtt, skew_ms, bytes_per_s })
}

/// The background thread: ends with the pool.
pub(super) fn watch(pool: &Arc<Pool>, ticket: Ticket) {
    let weak = Arc::downgrade(pool);
    let work = move || {
        loop {
            thread::sleep(LOOK_EVERY);
            let Some(pool) = weak.upgrade() else { return };
            pool.suspects().iter().for_each(|address| try_again(&pool, &ticket, address));
            for addresses in pool.peers_due(PROBE_EVERY) {
                survey(&pool, &ticket, &addresses);
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("kv-probe".into()).spawn(work) {
        tracing::warn!(%error, "no thread for probing kv links");
    }
}

/// Asks whether a path that has failed is good again.
fn try_again(pool: &Pool, ticket: &Ticket, address: &str) {
    let found = probe(&*pool.dialer, ticket, address, false);
    let mut paths = lock(&pool.paths);
    if found.is_ok() {
        paths.note(address, true, Instant::now());
    }
    // One that fails again has failed when it did: it is not asked for ever.
    paths.update(address, |path| path.error = found.err());
}

/// Probes all addresses of one receiver, each alone, then the best together.
fn survey(pool: &Pool, ticket: &Ticket, addresses: &[String]) {
    let quiet = pool.quiet();
    let interfaces = interfaces();
    for address in addresses {
        let via = toward(address, &interfaces);
        let found = probe(&*pool.dialer, ticket, address, quiet);
        if let Err(error) = &found {
            tracing::debug!(address, error, "kv path does not answer");
        }
        let mut paths = lock(&pool.paths);
        paths.note(address, found.is_ok(), Instant::now());
        paths.update(address, |path| {
            path.port = Some(via.as_ref().map_or(String::new(), |via| port(&via.name)));
            path.via = via;
            match found {
                Ok(found) => {
                    (path.rtt, path.skew_ms, path.error) = (Some(found.rtt), Some(found.skew_ms), None);
                    path.bytes_per_s = found.bytes_per_s.or(path.bytes_per_s);
                }
                Err(error) => path.error = Some(error),
            }
        });
    }
    let ordered: Vec<String> = {
        let paths = lock(&pool.paths);
        let order = paths.order(addresses, &String::new(), Instant::now());
        order
            .into_iter()
            .filter(|address| paths.get(address).is_some_and(|path| path.error.is_none()))
            .collect()
    };
    if quiet && ordered.len() > 1 {
        let rate = |count: usize| together(&*pool.dialer, ticket, &ordered[..count]);
        let sums: Vec<f64> = (1..=ordered.len().min(4)).map_while(rate).collect();
        lock(&pool.paths).measured(addresses, &ordered, &sums);
    }
    // For those who ask which paths are used together, before there is a push.
    lock(&pool.paths).stripe(addresses, Instant::now());
}

/// Rate of bursts on all of `addresses` at once.
fn together(dialer: &dyn Dialer, ticket: &Ticket, addresses: &[String]) -> Option<f64> {
    thread::scope(|scope| {
        let lines: Vec<_> = addresses
            .iter()
            .map(|address| scope.spawn(move || Line::open(dialer, ticket, address)?.burst()))
            .collect();
        let rates: Vec<_> = lines.into_iter().map(|line| line.join().ok()?.ok()).collect();
        rates.into_iter().sum::<Option<f64>>()
    })
}

/// A connection that has proved itself.
struct Line {
    wire: Wire,
    number: u64,
}

impl Line {
    fn open(dialer: &dyn Dialer, ticket: &Ticket, address: &str) -> Result<Self, String> {
        let wire = dialer.dial(address, ANSWER).map_err(|error| error.to_string())?;
        let mut line = Line { wire, number: 0 };
        line.wire.sink.set_stall(ANSWER).map_err(|error| error.to_string())?;
        let mut nonce = [0; 32];
        fill_random(&mut nonce);
        let hello = Message::Hello(Box::new(Hello {
            session: SessionId::PROBE,
            epoch: 0,
            attempt: 0,
            sender: 0,
            lane: 0,
            connection: 0,
            senders: vec![0],
            tokens: 0..0,
            bytes: 0,
            nonce,
            request: "probe".into(),
            spec: String::new(),
        }));
        line.say(&hello)?;
        let Message::Challenge { nonce, proof } = line.hear()? else { return Err("no challenge".into()) };
        let hello = hello.encode();
        if !verify(ticket, End::Receiver, &hello, &nonce, &proof) {
            return Err("it is of another cluster".into());
        }
        line.say(&Message::Proof { proof: prove(ticket, End::Sender, &hello, &nonce) })?;
        Ok(line)
    }

    /// The peer's clock, and how many bytes it has.
    fn ping(&mut self) -> Result<(u64, u64), String> {
        self.say(&Message::Ping)?;
        match self.hear()? {
            Message::Probed { unix_ms, received_bytes } => Ok((unix_ms, received_bytes)),
            other => Err(format!("{:?} instead of an answer", other.kind())),
        }
    }

    /// Bytes per second from the first byte sent to the last one's answer.
    fn burst(&mut self) -> Result<f64, String> {
        let payload = vec![0x5a; BURST_FRAME];
        let crc = crc32c::crc32c(&payload);
        let (begun, mut sent) = (Instant::now(), 0);
        while sent < BURST_BYTES && begun.elapsed() < BURST_TIME {
            let head = Head {
                kind: Kind::Data,
                tag: SessionId::PROBE.tag(),
                number: self.number(),
                layer: 0,
                plane: 0,
                heads: 0..1,
                tokens: 0..1,
                codec: Codec::Exact,
                payload_bytes: payload.len() as u32,
                payload_crc: crc,
            };
            self.wire.sink.send(&head, &[IoSlice::new(&payload)]).map_err(|error| error.to_string())?;
            sent += payload.len() as u64;
        }
        let (_, received) = self.ping()?;
        Ok(received as f64 / begun.elapsed().as_secs_f64())
    }

    fn number(&mut self) -> u64 {
        self.number += 1;
        self.number - 1
    }

    fn say(&mut self, message: &Message) -> Result<(), String> {
        let payload = message.encode();
        let head = Head::control(message.kind(), SessionId::PROBE.tag(), self.number(), &payload);
        self.wire.sink.send(&head, &[IoSlice::new(&payload)]).map_err(|error| error.to_string())
    }

    fn hear(&mut self) -> Result<Message, String> {
        let until = Instant::now() + ANSWER;
        let head = match self.wire.source.head(Some(until)).map_err(|error| error.to_string())? {
            Incoming::Head(head) => head,
            Incoming::Timeout => return Err(format!("no answer for {} s", ANSWER.as_secs())),
            Incoming::End => return Err("closed without an answer".into()),
        };
        let (payload, crc) =
            control_payload(&mut *self.wire.source, &head, Some(until)).map_err(|error| error.to_string())?;
        match parse(&head, &payload, crc).map_err(|error| error.to_string())? {
            Message::Fail { reason, .. } => Err(reason),
            message => Ok(message),
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
