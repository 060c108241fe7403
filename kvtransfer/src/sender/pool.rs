//! What all pushes of one sender share: the bound on connections, idle connections, links as measured, the pace.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::interface;
use crate::limits::LANES_MAX;
use crate::meter::Meter;
use crate::pace::Pace;
use crate::sender::path::Paths;
use crate::sync::lock;
use crate::transport::Dialer;
use crate::transport::ucx::{self, Way, Ways};
use crate::wire::Wire;
use crate::{Limits, LinkStat, SessionError};

/// Receivers that are probed.
const PEERS_MAX: usize = 256;

/// An address whose payloads could not be read goes without UCX for so long.
const WITHOUT: Duration = Duration::from_secs(600);

/// Peers whose links are measured.
const METERS_MAX: usize = 4096;

pub(super) struct Pool {
    pub limits: Limits,
    pub dialer: Box<dyn Dialer>,
    pub pace: Option<Mutex<Pace>>,
    meters: Mutex<BTreeMap<String, Meter>>,
    pub paths: Mutex<Paths>,
    /// Lanes that lost a connection and went on over another, of all pushes.
    pub resumed: AtomicU64,
    /// Connections that were left because nothing came back by their path.
    pub silent: AtomicU64,
    /// Payload bytes that receivers were let read out of a device's memory.
    pub unstaged_bytes: AtomicU64,
    /// Lanes that lost a connection whose payloads went by UCX: their next one is without.
    pub fallbacks: AtomicU64,
    /// When that was last, by address.
    without: Mutex<HashMap<String, Instant>>,
    /// Receivers by their addresses, and when they were last probed.
    peers: Mutex<Vec<(Vec<String>, Option<Instant>)>>,
    conns: Mutex<Conns>,
    turn: Condvar,
}

#[derive(Default)]
struct Conns {
    in_use: usize,
    /// Pushes that wait for room, in the order of their opening: all of a push's connections at once, so that no two
    /// pushes wait for each other.
    waiting: VecDeque<Arc<Admission>>,
    idle: HashMap<String, Vec<(Wire, Instant)>>,
}

/// Lanes of a path whose payloads are read from shared memory: there one of the receiver's threads copies, which is slower than
/// memory, and nobody else is busy.
const SHM_STREAMS: usize = 2;

/// A push with less than this is over before a second lane is worth its handshake.
const SHM_STREAMS_BYTES_MIN: u64 = 32 << 20;

/// A push's share of the bound on connections.
pub(super) struct Admission {
    /// Lanes of the push that have not left.
    lanes: Mutex<usize>,
    granted: AtomicBool,
}

impl Pool {
    pub fn new(limits: Limits, dialer: Box<dyn Dialer>) -> Self {
        ucx::warm(limits.ways);
        let pace = limits.rate_bytes_per_s.map(|rate| Mutex::new(Pace::new(rate)));
        Pool {
            limits,
            dialer,
            pace,
            meters: Mutex::default(),
            paths: Mutex::default(),
            resumed: AtomicU64::new(0),
            silent: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
            unstaged_bytes: AtomicU64::new(0),
            without: Mutex::default(),
            peers: Mutex::default(),
            conns: Mutex::default(),
            turn: Condvar::new(),
        }
    }

    /// A new connection, which offers `ways` that may carry its payloads, unless they have just failed there.
    pub fn dial(&self, address: &str, ways: Ways, timeout: Duration) -> io::Result<Wire> {
        let wire = self.dialer.dial(address, timeout)?;
        let without = lock(&self.without).get(address).is_some_and(|at| at.elapsed() < WITHOUT);
        Ok(ucx::give(wire, if without { Ways::NONE } else { ways }))
    }

    /// A connection to `address` was lost while its payloads went another `way`.
    pub fn fell_back(&self, address: &str, way: Way) {
        if way == Way::Stream {
            return;
        }
        tracing::info!(address, way = way.name(), "kv goes over the connection after a loss");
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
        let mut without = lock(&self.without);
        without.retain(|_, at| at.elapsed() < WITHOUT);
        if without.len() < METERS_MAX {
            without.insert(address.to_owned(), Instant::now());
        }
    }

    /// Queues a push with `lanes` connections.
    pub fn enter(&self, lanes: usize) -> Result<Arc<Admission>, SessionError> {
        let max = self.limits.connections_max;
        if lanes > max {
            return Err(SessionError::Busy { what: "connections of one push", max });
        }
        let admission = Arc::new(Admission { lanes: Mutex::new(lanes), granted: AtomicBool::new(false) });
        let mut conns = lock(&self.conns);
        conns.waiting.push_back(admission.clone());
        self.grant(&mut conns);
        Ok(admission)
    }

    /// Waits for the push's turn; `false` when `given_up` or at `until`.
    pub fn wait_turn(&self, admission: &Admission, until: Instant, given_up: impl Fn() -> bool) -> bool {
        let mut conns = lock(&self.conns);
        while !admission.granted.load(Ordering::Acquire) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || given_up() {
                return false;
            }
            conns = self.turn.wait_timeout(conns, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Makes waiting pairs look whether they were given up.
    pub fn look(&self) {
        let _conns = lock(&self.conns);
        self.turn.notify_all();
    }

    /// One lane of the push has ended.
    pub fn leave(&self, admission: &Admission) {
        let mut conns = lock(&self.conns);
        *lock(&admission.lanes) -= 1;
        if admission.granted.load(Ordering::Acquire) {
            conns.in_use -= 1;
        }
        self.grant(&mut conns);
    }

    fn grant(&self, conns: &mut Conns) {
        let max = self.limits.connections_max;
        while let Some(first) = conns.waiting.front() {
            let lanes = *lock(&first.lanes);
            if conns.in_use + lanes > max {
                return;
            }
            first.granted.store(true, Ordering::Release);
            conns.in_use += lanes;
            conns.waiting.pop_front();
            self.turn.notify_all();
        }
        let room = max - conns.in_use;
        conns.evict(room);
    }

    /// An idle connection to `address` that is still there.
    pub fn take_idle(&self, address: &str) -> Option<Wire> {
        let mut conns = lock(&self.conns);
        let idle = conns.idle.get_mut(address)?;
        // The youngest first: the others may fall out of use.
        while let Some((wire, since)) = idle.pop() {
            if since.elapsed() < self.limits.idle_max && wire.control.idle() {
                return Some(wire);
            }
        }
        None
    }

    /// Keeps a connection whose session was acknowledged.
    pub fn put_idle(&self, address: String, wire: Wire) {
        let mut conns = lock(&self.conns);
        // The caller's own connection still counts as in use: its place becomes the idle one's.
        let room = (self.limits.connections_max + 1).saturating_sub(conns.in_use);
        conns.idle.entry(address).or_default().push((wire, Instant::now()));
        conns.evict(room);
    }

    /// `addresses` with `path` first, then the best of the others. A path that has just failed comes last.
    pub fn order(&self, addresses: &[String], path: &String) -> Vec<String> {
        lock(&self.paths).order(addresses, path, Instant::now())
    }

    /// The address that each lane of a push of `bytes` to a receiver tries first: one lane, or as many as there are paths that are
    /// used together; two a path for many bytes, where payloads were last read from shared memory.
    pub fn lanes(&self, addresses: &[String], bytes: u64) -> Vec<String> {
        self.know(addresses);
        self.route(addresses);
        let best = lock(&self.paths).stripe(addresses, Instant::now());
        let shared = |address| lock(&self.meters).get(address).is_some_and(|meter| meter.way == Way::Shm);
        let more = bytes >= SHM_STREAMS_BYTES_MIN && best.iter().any(shared);
        let streams = if more { SHM_STREAMS } else { 1 }.max(self.limits.streams);
        let lanes = (0..streams).flat_map(|_| best.iter().cloned());
        lanes.take(LANES_MAX.into()).collect()
    }

    /// Finds out by which ports addresses are reached that nobody has looked at yet. Names are left to the probes: looking one up
    /// takes its time.
    fn route(&self, addresses: &[String]) {
        if addresses.len() < 2 {
            return;
        }
        let known = |address: &String| lock(&self.paths).get(address).is_some_and(|path| path.port.is_some());
        let literal = |address: &String| Some((address.clone(), address.parse::<SocketAddr>().ok()?));
        let unknown: Vec<_> =
            addresses.iter().filter(|address| !known(address)).filter_map(literal).collect();
        if unknown.is_empty() {
            return;
        }
        let interfaces = interface::interfaces();
        for (address, peer) in unknown {
            let via = interface::route(peer, &interfaces);
            let port = via.as_ref().map_or(String::new(), |via| interface::port(&via.name));
            lock(&self.paths).update(&address, |path| (path.via, path.port) = (via, Some(port)));
        }
    }

    /// Notes whether `address` led to the session's receiver.
    pub fn note(&self, address: &str, reached: bool) {
        lock(&self.paths).note(address, reached, Instant::now());
    }

    /// Nothing comes back from `address`: it is the last choice for a while, and connections to it that are idle are not tried.
    pub fn fell_silent(&self, address: &str) {
        tracing::info!(address, "kv path is silent");
        self.silent.fetch_add(1, Ordering::Relaxed);
        self.note(address, false);
        let idle = lock(&self.conns).idle.remove(address);
        for (wire, _) in idle.into_iter().flatten() {
            wire.control.abandon();
        }
    }

    /// Whether a receiver has an address beside this one that has not just failed.
    pub fn other(&self, addresses: &[String], address: &str) -> bool {
        lock(&self.paths).other(addresses, address, Instant::now())
    }

    /// Addresses of receivers whose paths have failed of late, see [`Paths::suspects`].
    pub fn suspects(&self) -> Vec<String> {
        lock(&self.paths).suspects(Instant::now())
    }

    /// Changes the meter of the link to `address`.
    pub fn measure(&self, address: &str, change: impl FnOnce(&mut Meter)) {
        let mut meters = lock(&self.meters);
        if !meters.contains_key(address) && meters.len() >= METERS_MAX {
            meters.pop_first();
        }
        change(meters.entry(address.to_owned()).or_default());
    }

    /// What the path to `address` carries: as pushes were measured to get, or else as it was probed, or as its port's speed says.
    pub fn carries(&self, address: &str) -> Option<f64> {
        let measured = lock(&self.meters).get(address).and_then(Meter::bytes_per_s);
        measured.or_else(|| lock(&self.paths).get(address)?.carries())
    }

    /// What pushes over `paths` together get, as they were measured or, before the first one, probed.
    pub fn bytes_per_s(&self, paths: &[String]) -> Option<f64> {
        self.rate(paths, Meter::bytes_per_s)
    }

    /// As [`Pool::bytes_per_s`], where a few bytes will do: for what is only told.
    pub fn about_bytes_per_s(&self, paths: &[String]) -> Option<f64> {
        self.bytes_per_s(paths).or_else(|| self.rate(paths, Meter::about_bytes_per_s))
    }

    fn rate(&self, paths: &[String], of: impl Fn(&Meter) -> Option<f64>) -> Option<f64> {
        let (meters, known) = (lock(&self.meters), lock(&self.paths));
        let rate = |path: &String| {
            let measured = meters.get(path).and_then(&of);
            measured.or_else(|| known.get(path)?.bytes_per_s)
        };
        let each: BTreeSet<&String> = paths.iter().collect();
        each.into_iter().filter_map(rate).reduce(|a, b| a + b)
    }

    /// All addresses that were pushed to or probed.
    pub fn links(&self) -> Vec<LinkStat> {
        let (meters, paths) = (lock(&self.meters), lock(&self.paths));
        let probed = paths.probed().filter(|peer| !meters.contains_key(*peer)).map(|peer| (peer, None));
        let all: BTreeMap<&String, Option<&Meter>> =
            meters.iter().map(|(peer, meter)| (peer, Some(meter))).chain(probed).collect();
        let stat = |(peer, meter): (&String, Option<&Meter>)| LinkStat {
            peer: peer.clone(),
            gbytes_per_s: meter.and_then(Meter::bytes_per_s).map_or(0.0, |rate| (rate / 1e9) as f32),
            bytes: meter.map_or(0, Meter::total_bytes),
            way: meter.map_or(Way::Stream, |meter| meter.way),
            path: paths.get(peer).cloned().unwrap_or_default(),
            striped: paths.striped(peer),
        };
        all.into_iter().map(stat).collect()
    }

    /// Remembers a receiver for probes.
    pub fn know(&self, addresses: &[String]) {
        let mut peers = lock(&self.peers);
        if peers.len() < PEERS_MAX
            && !addresses.is_empty()
            && !peers.iter().any(|(known, _)| known == addresses)
        {
            peers.push((addresses.to_vec(), None));
        }
    }

    /// Receivers that were not probed within `every`, which now count as probed.
    pub fn peers_due(&self, every: Duration) -> Vec<Vec<String>> {
        let now = Instant::now();
        let mut peers = lock(&self.peers);
        let due = peers.iter_mut().filter(|(_, at)| at.is_none_or(|at| now >= at + every));
        due.map(|(addresses, at)| {
            *at = Some(now);
            addresses.clone()
        })
        .collect()
    }

    /// Whether nothing is pushed.
    pub fn quiet(&self) -> bool {
        lock(&self.conns).in_use == 0
    }
}

impl Conns {
    /// Closes the longest idle connections beyond `room`.
    fn evict(&mut self, room: usize) {
        while self.idle.values().map(Vec::len).sum::<usize>() > room {
            let oldest = self
                .idle
                .iter()
                .filter_map(|(address, idle)| Some((idle.first()?.1, address.clone())))
                .min_by_key(|(since, _)| *since);
            let Some((_, address)) = oldest else { return };
            if let Some(idle) = self.idle.get_mut(&address) {
                idle.remove(0);
            }
        }
        self.idle.retain(|_, idle| !idle.is_empty());
    }
}
