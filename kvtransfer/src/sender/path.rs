//! Which of a receiver's addresses are used: by what probes and pushes have shown of each. Pure.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::interface::Interface;
use crate::sender::stripe::{Candidate, together};

/// Addresses that are remembered.
const KNOWN_MAX: usize = 4096;

/// A path that has failed is the last choice for so long.
const SHUNNED: Duration = Duration::from_secs(30);

/// A path that has failed is asked every now and then for so long whether it is good again; later with all others.
const SUSPECT: Duration = Duration::from_secs(60);

/// Of them, those that are asked at once.
const SUSPECTS_MAX: usize = 4;

/// Paths by one port of this machine are used together when they carry so much more than without the slowest of them.
const ADDS_UP: f64 = 1.15;

/// A path that carries this part of its port's speed leaves no room for another one by that port.
const FILLS: f64 = 0.75;

/// Wi-Fi whose speed the system does not tell.
const WIRELESS_BYTES_PER_S: f64 = 30e6;

/// What is known of one address.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Path {
    /// It has led to a receiver, or to an answer.
    pub reached: bool,
    /// When it last failed, if it has not been reached since.
    pub failed: Option<Instant>,
    /// Shortest round trip.
    pub rtt: Option<Duration>,
    /// Rate of the last probe.
    pub bytes_per_s: Option<f64>,
    /// The peer's clock less ours, of the last probe.
    pub skew_ms: Option<i64>,
    /// Why the last probe failed.
    pub error: Option<String>,
    /// The interface of this machine that leads there.
    pub via: Option<Interface>,
    /// The port that this interface sends by, see [`crate::interface::port`]; empty: there is no way.
    pub port: Option<String>,
}

impl Path {
    /// What it carries: as probed, or as its port's speed says.
    pub fn carries(&self) -> Option<f64> {
        let of = |via: &Interface| match (via.mbps, via.wireless) {
            (0, true) => Some(WIRELESS_BYTES_PER_S),
            (0, false) => None,
            (mbps, _) => Some(f64::from(mbps) * 125e3),
        };
        self.bytes_per_s.or_else(|| of(self.via.as_ref()?))
    }

    /// Whether the port that leads there has room for more than this path carries, as far as it is known.
    fn leaves_room(&self) -> bool {
        let speed = self.via.as_ref().map_or(0.0, |via| f64::from(via.mbps) * 125e3);
        speed == 0.0 || self.bytes_per_s.is_none_or(|rate| rate < speed * FILLS)
    }

    /// Whether it may be used beside `best`: it answers, does not lead back to this machine while the other leaves it, and is no Wi-Fi
    /// that nobody has measured beside a cable.
    fn beside(&self, best: &Path) -> bool {
        let is = |path: &Path, of: fn(&Interface) -> bool| path.via.as_ref().is_some_and(of);
        let home = |path| is(path, |via| via.ip.is_loopback());
        let air = |path| is(path, |via| via.wireless);
        let guessed = air(self) && !air(best) && self.bytes_per_s.is_none();
        let way = self.port.as_ref().is_none_or(|port| !port.is_empty());
        self.error.is_none() && way && home(self) == home(best) && !guessed
    }
}

/// All that are known, and which sets of them add up.
#[derive(Debug, Default)]
pub struct Paths {
    known: HashMap<String, Path>,
    /// By the receiver's first address: paths that were measured to add up, best first.
    sums: HashMap<String, Vec<String>>,
    /// By the receiver's first address: paths that are used together.
    used: HashMap<String, Vec<String>>,
}

impl Paths {
    /// Notes whether `address` led to the session's receiver.
    pub fn note(&mut self, address: &str, reached: bool, now: Instant) {
        if let Some(path) = self.entry(address) {
            path.reached |= reached;
            path.failed = (!reached).then_some(now);
        }
    }

    /// Changes what is known of `address`.
    pub fn update(&mut self, address: &str, change: impl FnOnce(&mut Path)) {
        if let Some(path) = self.entry(address) {
            change(path);
        }
    }

    fn entry(&mut self, address: &str) -> Option<&mut Path> {
        if !self.known.contains_key(address) && self.known.len() >= KNOWN_MAX {
            return None;
        }
        Some(self.known.entry(address.to_owned()).or_default())
    }

    /// What is known of `address`.
    pub fn get(&self, address: &str) -> Option<&Path> {
        self.known.get(address)
    }

    /// Addresses that a probe has tried.
    pub fn probed(&self) -> impl Iterator<Item = &String> {
        let probed = |path: &Path| path.rtt.is_some() || path.error.is_some();
        self.known.iter().filter(move |(_, path)| probed(path)).map(|(address, _)| address)
    }

    /// Whether `address` is used together with others.
    pub fn striped(&self, address: &str) -> bool {
        self.used.values().any(|set| set.len() > 1 && set.iter().any(|path| path == address))
    }

    /// `addresses` from the best to the worst: those that have not just failed, then those that answered the last probe, then the faster (differences below a
    /// fifth do not count), then the nearer, then as they were given. `first` leads unless it has failed. Of those that
    /// have just failed, the one that failed last comes last.
    pub fn order(&self, addresses: &[String], first: &String, now: Instant) -> Vec<String> {
        let mut order: Vec<&String> = addresses.iter().collect();
        order.sort_by_cached_key(|address| {
            let path = self.known.get(*address);
            let shunned = self.shunned(address, now);
            let rate = path.and_then(Path::carries).map_or(0, |rate| (rate.max(1.0).log2() * 4.0) as i64);
            let rtt = path.and_then(|path| path.rtt).unwrap_or(Duration::MAX);
            let reached = path.is_some_and(|path| path.reached);
            let broken = path.is_some_and(|path| path.error.is_some());
            (shunned, broken, *address != first, Reverse(reached), Reverse(rate), rtt)
        });
        order.into_iter().cloned().collect()
    }

    /// When it has just failed, if it has.
    fn shunned(&self, address: &str, now: Instant) -> Option<Instant> {
        let failed = self.known.get(address).and_then(|path| path.failed);
        failed.filter(|at| now.saturating_duration_since(*at) < SHUNNED)
    }

    /// Whether there is an address beside `address` that has not failed.
    pub fn other(&self, addresses: &[String], address: &str, now: Instant) -> bool {
        let sound = |other: &&String| {
            let broken = self.known.get(*other).is_some_and(|path| path.error.is_some());
            *other != address && !broken && self.shunned(other, now).is_none()
        };
        addresses.iter().any(|other| sound(&other))
    }

    /// Paths that failed within the last minute and were good before: worth asking whether they are good again.
    pub fn suspects(&self, now: Instant) -> Vec<String> {
        let recent = |path: &Path| {
            path.reached && path.failed.is_some_and(|at| now.saturating_duration_since(at) < SUSPECT)
        };
        let suspects = self.known.iter().filter(|(_, path)| recent(path));
        suspects.map(|(address, _)| address.clone()).take(SUSPECTS_MAX).collect()
    }

    /// The paths to use together, the best first: see [`together`]. Of those that have just failed none, unless all have.
    pub fn stripe(&mut self, addresses: &[String], now: Instant) -> Vec<String> {
        let Some(given) = addresses.first() else { return vec![String::new()] };
        let order = self.order(addresses, &String::new(), now);
        let unknown = Path::default();
        let path = |address: &String| self.known.get(address).unwrap_or(&unknown);
        let best = path(&order[0]);
        let usable = |address: &&String| self.shunned(address, now).is_none() && path(address).beside(best);
        let others: Vec<&String> = order[1..].iter().filter(usable).collect();
        let sums = self.sums.get(given);
        let candidate = |address: &String| Candidate {
            port: path(address).port.clone(),
            bytes_per_s: path(address).carries(),
            adds: sums.is_some_and(|set| set.contains(&order[0]) && set.contains(address)),
        };
        let usable: Vec<&String> = std::iter::once(&order[0]).chain(others).collect();
        let candidates: Vec<Candidate> = usable.iter().map(|address| candidate(address)).collect();
        let stripe: Vec<String> =
            together(&candidates).into_iter().map(|index| usable[index].clone()).collect();
        if self.used.len() < KNOWN_MAX || self.used.contains_key(given) {
            self.used.insert(given.clone(), stripe.clone());
        }
        stripe
    }

    /// Remembers which paths to a receiver add up, whatever ports they leave by. `rates`: of the best path alone, of the best two at
    /// once, and so on, as they were measured.
    pub fn measured(&mut self, addresses: &[String], ordered: &[String], rates: &[f64]) {
        let Some(given) = addresses.first() else { return };
        let mut best = 1.min(ordered.len());
        let room = ordered.first().and_then(|path| self.known.get(path)).is_none_or(Path::leaves_room);
        for (count, pair) in (2..).zip(rates.windows(2)) {
            if !room || pair[1] < pair[0] * ADDS_UP {
                break;
            }
            best = count;
        }
        if self.sums.len() < KNOWN_MAX || self.sums.contains_key(given) {
            self.sums.insert(given.clone(), ordered[..best.min(ordered.len())].to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(of: &[&str]) -> Vec<String> {
        of.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_best_path_is_first_and_one_that_has_just_failed_last() {
        let now = Instant::now();
        let mut paths = Paths::default();
        let all = names(&["wifi", "slow", "fast", "near"]);
        assert_eq!(paths.order(&all, &"slow".into(), now), names(&["slow", "wifi", "fast", "near"]));
        for (name, rate, rtt) in [("wifi", 5e7, 3), ("slow", 1e8, 1), ("fast", 1.2e9, 2), ("near", 1.25e9, 1)]
        {
            paths.note(name, true, now);
            paths.update(name, |path| {
                (path.bytes_per_s, path.rtt) = (Some(rate), Some(Duration::from_millis(rtt)));
            });
        }
        assert_eq!(paths.order(&all, &String::new(), now), names(&["near", "fast", "slow", "wifi"]));
        paths.note("near", false, now);
        assert_eq!(paths.order(&all, &"near".into(), now), names(&["fast", "slow", "wifi", "near"]));
        // Where all have failed, they take turns.
        for (name, ms) in [("fast", 3), ("slow", 1), ("wifi", 2)] {
            paths.note(name, false, now + Duration::from_millis(ms));
        }
        let soon = now + Duration::from_millis(4);
        assert_eq!(paths.order(&all, &"fast".into(), soon), names(&["near", "slow", "wifi", "fast"]));
        let later = now + SHUNNED;
        assert_eq!(paths.order(&all, &String::new(), later)[0], "near");
    }

    #[test]
    fn paths_by_one_port_are_used_together_only_where_they_add_up() {
        let now = Instant::now();
        let mut paths = Paths::default();
        let all = names(&["a", "b", "c"]);
        assert_eq!(paths.stripe(&all, now), names(&["a"]));
        paths.measured(&all, &all, &[1.2e9, 2.3e9, 2.35e9]);
        assert_eq!(paths.stripe(&all, now), names(&["a", "b"]));
        assert!(paths.striped("b") && !paths.striped("c"));
        paths.note("a", false, now);
        assert_eq!(paths.stripe(&all, now), names(&["b"]));
        paths.measured(&all, &all, &[1.2e9, 1.25e9, 5e9]);
        assert_eq!(paths.stripe(&all, now + SHUNNED), names(&["a"]));
        // A port that the first fills has no room, whatever a burst seemed to show.
        let via = Interface {
            name: "en0".into(),
            ip: [10, 0, 0, 1].into(),
            mtu: 9000,
            mbps: 10_000,
            wireless: false,
        };
        paths.update("a", |path| (path.via, path.bytes_per_s) = (Some(via), Some(1.2e9)));
        paths.measured(&all, &all, &[1.2e9, 2.3e9]);
        assert_eq!(paths.stripe(&all, now + SHUNNED), names(&["a"]));
    }

    /// Protects: a new sender spreads its first push over the ports, and what it then learns of a path counts.
    #[test]
    fn paths_by_different_ports_are_used_until_one_fails_or_is_slow() {
        let now = Instant::now();
        let mut paths = Paths::default();
        let all = names(&["a", "a2", "b", "home"]);
        let via = |name: &str, ip: [u8; 4]| Interface {
            name: name.into(),
            ip: ip.into(),
            mtu: 9000,
            mbps: 0,
            wireless: false,
        };
        let ways = [("a", "en0", 1), ("a2", "en0", 1), ("b", "en1", 2)];
        for (path, port, net) in ways {
            paths.update(path, |path| {
                (path.via, path.port) = (Some(via(port, [10, 0, net, 1])), Some(port.into()));
            });
        }
        // An address that this machine has too.
        paths.update("home", |path| {
            (path.via, path.port) = (Some(via("lo", [127, 0, 0, 1])), Some("lo".into()));
        });
        assert_eq!(paths.stripe(&all, now), names(&["a", "b"]));
        paths.note("b", false, now);
        assert_eq!(paths.stripe(&all, now), names(&["a"]));
        assert_eq!(paths.stripe(&all, now + SHUNNED), names(&["a", "b"]));
        paths.update("b", |path| path.error = Some("no answer".into()));
        assert_eq!(paths.stripe(&all, now + SHUNNED), names(&["a"]));
        paths.note("b", true, now);
        paths.update("b", |path| (path.error, path.bytes_per_s) = (None, Some(1e8)));
        paths.note("a", true, now);
        paths.update("a", |path| path.bytes_per_s = Some(1.2e9));
        assert_eq!(paths.stripe(&all, now), names(&["a"]));
        paths.update("b", |path| path.bytes_per_s = Some(1.1e9));
        assert_eq!(paths.stripe(&all, now), names(&["a", "b"]));
        // Wi-Fi beside a cable, of which nobody knows how fast it is.
        paths.update("b", |path| {
            (path.via, path.bytes_per_s) =
                (Some(Interface { wireless: true, ..via("wl0", [10, 0, 2, 1]) }), None);
        });
        assert_eq!(paths.stripe(&all, now), names(&["a"]));
    }
}
