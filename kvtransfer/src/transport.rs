//! Transports: how a [`Wire`] comes about. Sessions know nothing of them. TCP between machines, with TLS where
//! others can listen, memory within a process. UCX takes the payloads of such a connection over where both ends have it.

mod lend;
pub mod mem;
pub mod sealed;
pub mod tcp;
pub mod tls;
pub mod ucx;
mod underway;

use std::io;
use std::time::Duration;

use crate::wire::Wire;

/// Makes connections for a sender.
pub trait Dialer: Send + Sync {
    /// Connects to `address` within `timeout`.
    fn dial(&self, address: &str, timeout: Duration) -> io::Result<Wire>;
}
