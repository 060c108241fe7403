//! Whom this process has turned away at its doors, and why: counted for its metrics page, so that whoever tries keys, tokens or
//! certificates is seen. Counted by [`crate::auth`], [`crate::doorway`], [`crate::trust`], the router's HTTP gateway, and nodes for
//! their KV port and the port where ranks meet.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use rustls::{CertificateError, Error};

/// A way into a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// The router's, for clients.
    Http,
    /// Where a node shows its join token for a certificate.
    Join,
    /// gRPC between processes.
    Grpc,
    /// Where a node receives KV.
    Kv,
    /// Where the ranks of a group meet.
    Rank,
}

impl Door {
    /// The label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Door::Http => "http",
            Door::Join => "join",
            Door::Grpc => "grpc",
            Door::Kv => "kv",
            Door::Rank => "rank",
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

    /// Somebody did not come through TLS. One that merely left, or that did not trust us, was not turned away.
    pub fn handshake(&self, door: Door, error: &io::Error) {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
        let reason = match inner {
            Some(Error::AlertReceived(_)) => return,
            Some(Error::NoCertificatesPresented) => "no certificate",
            Some(Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            )) => "expired certificate",
            Some(Error::InvalidCertificate(_)) => "certificate of another cluster",
            Some(Error::InvalidMessage(_) | Error::InappropriateMessage { .. }) => "not TLS",
            Some(_) => "TLS of another kind",
            None if error.kind() == io::ErrorKind::TimedOut => "silent",
            None => return,
        };
        self.count(door, reason);
    }

    /// All counts, in order.
    pub fn all(&self) -> Vec<(Door, &'static str, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(&(door, reason), &count)| (door, reason, count)).collect()
    }
}
