//! Whom this process has turned away at its doors, and why: counted for its metrics page, so that whoever tries keys, tokens or
//! certificates is seen. Counted by [`crate::auth`], [`crate::trust`] and the router's HTTP gateway.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A way into a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// The router's, for clients.
    Http,
    /// Where a node shows its join token for a certificate.
    Join,
    /// gRPC between processes.
    Grpc,
}

impl Door {
    /// The label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Door::Http => "http",
            Door::Join => "join",
            Door::Grpc => "grpc",
        }
    }
}

/// Counts since start.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<BTreeMap<(Door, &'static str), u64>>);

impl Refusals {
    /// Somebody was turned away. Reasons are few words of our own, never the caller's.
    pub fn count(&self, door: Door, reason: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry((door, reason)).or_default() += 1;
    }

    /// All counts, in order.
    pub fn all(&self) -> Vec<(Door, &'static str, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(&(door, reason), &count)| (door, reason, count)).collect()
    }
}
