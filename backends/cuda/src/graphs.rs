//! The graphs of one device, by the list of work that each stands for. A list that comes a second time is captured: the
//! first time has loaded its kernels and planned its products, and what comes once only costs no capture.

use std::collections::VecDeque;

use backend::BackendError;

use crate::driver::Driver;
use crate::queue::List;

/// Graphs that are kept: a decode group has one for every number of rows up to 8, then one for every 8, and new ones where
/// the longest sequence doubles. Those of a model with 100 layers hold some megabytes each.
const GRAPHS_MAX: usize = 32;
/// Lists that have come once and are remembered.
const SEEN_MAX: usize = 8;
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
    /// `None`: the device could not capture it.
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
        if let Some(at) = self.known.iter().rposition(|known| known.list == list) {
            let known = self.known.remove(at);
            self.known.push(known);
        } else if let Some(at) = self.seen.iter().rposition(|seen| *seen == list) {
            self.seen.remove(at);
            let graph = self.captured(driver, &list);
            if self.known.len() == GRAPHS_MAX {
                self.known.remove(0);
            }
            self.known.push(Known { list, graph });
        } else {
            list.queue(driver)?;
            if self.seen.len() == SEEN_MAX {
                self.seen.pop_front();
            }
            self.seen.push_back(list);
            return Ok(());
        }
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
