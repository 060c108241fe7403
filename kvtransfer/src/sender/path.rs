//! Which of a receiver's addresses are used: by what probes and pushes have shown of each. Pure.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::interface::Interface;

/// Addresses that are remembered.
const KNOWN_MAX: usize = 4096;

/// A path that has failed is the last choice for so long.
const SHUNNED: Duration = Duration::from_secs(30);

/// Paths are used together when they carry so much more than without the slowest of them.
const ADDS_UP: f64 = 1.15;

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
}

/// All that are known, and which sets of them add up.
#[derive(Debug, Default)]
pub struct Paths {
    known: HashMap<String, Path>,
    /// By the receiver's first address: paths that are used together, best first.
    stripes: HashMap<String, Vec<String>>,
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
        self.stripes.values().any(|set| set.len() > 1 && set.iter().any(|path| path == address))
    }

    /// `addresses` from the best to the worst: those that have not just failed, then the faster (differences below a
    /// fifth do not count), then the nearer, then as they were given. `first` leads unless it has just failed. Of those that
    /// have, the one that failed last comes last.
    pub fn order(&self, addresses: &[String], first: &String, now: Instant) -> Vec<String> {
        let mut order: Vec<&String> = addresses.iter().collect();
        order.sort_by_cached_key(|address| {
            let path = self.known.get(*address);
            let shunned = self.shunned(address, now);
            let rate =
                path.and_then(|path| path.bytes_per_s).map_or(0, |rate| (rate.max(1.0).log2() * 4.0) as i64);
            let rtt = path.and_then(|path| path.rtt).unwrap_or(Duration::MAX);
            let reached = path.is_some_and(|path| path.reached);
            (shunned, *address != first, Reverse(reached), Reverse(rate), rtt)
        });
        order.into_iter().cloned().collect()
    }

    /// When it has just failed, if it has.
    fn shunned(&self, address: &str, now: Instant) -> Option<Instant> {
        let failed = self.known.get(address).and_then(|path| path.failed);
        failed.filter(|at| now.saturating_duration_since(*at) < SHUNNED)
    }

    /// The paths to use together: those found to add up, of which none has just failed, or the best one.
    pub fn stripe(&self, addresses: &[String], now: Instant) -> Vec<String> {
        let Some(given) = addresses.first() else { return vec![String::new()] };
        let together = self.stripes.get(given).map_or(&[][..], Vec::as_slice);
        let usable = |path: &&String| addresses.contains(path) && self.shunned(path, now).is_none();
        let together: Vec<String> = together.iter().filter(usable).cloned().collect();
        if together.is_empty() { self.order(addresses, &String::new(), now)[..1].to_vec() } else { together }
    }

    /// Decides which paths to a receiver are used together. `sums`: the rate of the best path alone, of the best two at
    /// once, and so on, as they were measured.
    pub fn decide(&mut self, addresses: &[String], ordered: &[String], sums: &[f64]) {
        let Some(given) = addresses.first() else { return };
        let mut best = 1.min(ordered.len());
        for (count, pair) in (2..).zip(sums.windows(2)) {
            if pair[1] < pair[0] * ADDS_UP {
                break;
            }
            best = count;
        }
        if self.stripes.len() < KNOWN_MAX || self.stripes.contains_key(given) {
            self.stripes.insert(given.clone(), ordered[..best.min(ordered.len())].to_vec());
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
    fn paths_are_used_together_only_where_they_add_up() {
        let now = Instant::now();
        let mut paths = Paths::default();
        let all = names(&["a", "b", "c"]);
        assert_eq!(paths.stripe(&all, now), names(&["a"]));
        paths.decide(&all, &all, &[1.2e9, 2.3e9, 2.35e9]);
        assert_eq!(paths.stripe(&all, now), names(&["a", "b"]));
        paths.note("a", false, now);
        assert_eq!(paths.stripe(&all, now), names(&["b"]));
        paths.decide(&all, &all, &[1.2e9, 1.25e9, 5e9]);
        assert_eq!(paths.stripe(&all, now + SHUNNED), names(&["a"]));
    }
}
