//! The graphs of one device, by the list of work that each stands for. A list that comes a second time is captured: the
//! first time has loaded its kernels, planned its products and connected its ranks, and what comes once only costs no capture.
//! In a group all ranks queue, capture or replay a list together ([`crate::ballot`]).

use std::collections::VecDeque;

use backend::BackendError;

use crate::ballot::{Ballot, Verdict, Vote};
use crate::driver::Driver;
use crate::queue::List;

/// Graphs that are kept: a decode group has one for every number of rows up to 8, then one for every 8, and new ones where
/// the longest sequence doubles. Those of a model with 100 layers hold some megabytes each.
const GRAPHS_MAX: usize = 32;
/// Lists that have come once and are remembered: with guesses every number of rows comes by turns.
const SEEN_MAX: usize = GRAPHS_MAX;
/// Shorter lists are queued as fast as a graph is.
const CALLS_MIN: usize = 8;

pub(crate) struct Graphs<D: Driver> {
    /// The most recently used last.
    known: Vec<Known<D>>,
    /// The latest last.
    seen: VecDeque<List>,
    replayed: u64,
    /// Whether somebody has been told that the device captures nothing.
    told: bool,
}

struct Known<D: Driver> {
    list: List,
    /// Which one of the group's; 0 where a device is alone.
    number: u64,
    /// `None`: the device could not capture it, or another rank's could not.
    graph: Option<D::Graph>,
}

impl<D: Driver> Graphs<D> {
    pub(crate) fn new() -> Self {
        Graphs { known: Vec::new(), seen: VecDeque::new(), replayed: 0, told: false }
    }

    /// Graphs that were replayed so far.
    pub(crate) fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Gives everything back; whether there was anything.
    pub(crate) fn clear(&mut self) -> bool {
        self.seen.clear();
        let had = self.known.iter().any(|known| known.graph.is_some());
        self.known.clear();
        had
    }

    /// Queues `list`, as a graph where it has come before.
    pub(crate) fn run(&mut self, driver: &D, list: List) -> Result<(), BackendError> {
        if list.len() < CALLS_MIN {
            return list.queue(driver);
        }
        if !self.find(&list) {
            if !self.has_seen(&list) {
                return self.queue(driver, list);
            }
            let graph = self.captured(driver, &list);
            self.keep(Known { list, number: 0, graph });
        }
        self.latest(driver)
    }

    /// Queues `list`, as a graph where all ranks have one of it.
    pub(crate) fn run_together(
        &mut self,
        driver: &D,
        list: List,
        ballot: &Ballot,
    ) -> Result<(), BackendError> {
        let sums = list.sums();
        let known = self.find(&list);
        let vote = match self.known.last().filter(|_| known) {
            Some(Known { graph: Some(_), number, .. }) => Vote::Replay(*number, sums),
            Some(_) => Vote::Queue,
            None if list.len() >= CALLS_MIN && self.seen.contains(&list) => Vote::Capture(sums),
            None => Vote::Queue,
        };
        match ballot.cast(driver, vote)? {
            Verdict::Replay(_) => self.latest(driver),
            Verdict::Capture(number) => {
                if known {
                    self.known.pop();
                }
                self.has_seen(&list);
                let graph = self.captured(driver, &list);
                let all = ballot.all_have(driver, number, graph.is_some())?;
                self.keep(Known { list, number, graph: graph.filter(|_| all) });
                self.latest(driver)
            }
            Verdict::Queue if known || list.len() < CALLS_MIN => list.queue(driver),
            Verdict::Queue => {
                self.has_seen(&list);
                self.queue(driver, list)
            }
            Verdict::Apart(rank) => {
                let reason = "its step sums other things than that of rank 0".to_owned();
                Err(BackendError::Group { rank, reason })
            }
        }
    }

    /// Whether `list` is known; it is the latest then.
    fn find(&mut self, list: &List) -> bool {
        let Some(at) = self.known.iter().rposition(|known| known.list == *list) else { return false };
        let known = self.known.remove(at);
        self.known.push(known);
        true
    }

    /// Whether `list` has come once; that is forgotten.
    fn has_seen(&mut self, list: &List) -> bool {
        let at = self.seen.iter().rposition(|seen| seen == list);
        at.and_then(|at| self.seen.remove(at)).is_some()
    }

    fn keep(&mut self, known: Known<D>) {
        if self.known.len() == GRAPHS_MAX {
            self.known.remove(0);
        }
        self.known.push(known);
    }

    /// Queues a list call by call, and remembers it.
    fn queue(&mut self, driver: &D, list: List) -> Result<(), BackendError> {
        list.queue(driver)?;
        if self.seen.len() == SEEN_MAX {
            self.seen.pop_front();
        }
        self.seen.push_back(list);
        Ok(())
    }

    /// Queues the latest of those that are known.
    fn latest(&mut self, driver: &D) -> Result<(), BackendError> {
        match self.known.last() {
            Some(Known { graph: Some(graph), .. }) => {
                self.replayed += 1;
                driver.replay(graph)
            }
            Some(Known { list, .. }) => list.queue(driver),
            None => Ok(()),
        }
    }

    fn captured(&mut self, driver: &D, list: &List) -> Option<D::Graph> {
        let captured = driver.capture(&mut || list.queue(driver));
        captured
            .map_err(|error| {
                if !std::mem::replace(&mut self.told, true) {
                    eprintln!("cuda: steps that generate are queued kernel by kernel: {error}");
                }
            })
            .ok()
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
