//! Who was turned away at a port before it had proved anything: told to whoever counts it. [`crate::Receiver`] tells of the KV
//! port, `engine` of the port where the ranks of a group meet.

use std::fmt;
use std::io;
use std::sync::Arc;

/// Why a connection was not served.
#[derive(Clone, Copy, Debug)]
pub enum Turned<'a> {
    /// It is not through TLS.
    Handshake(&'a io::Error),
    /// In few words of our own, never the other end's.
    Because(&'static str),
}

/// Hears of every connection that is turned away.
#[derive(Clone)]
pub struct OnTurned(Arc<dyn Fn(Turned<'_>) + Send + Sync>);

impl OnTurned {
    /// Calls `tell`, from threads of the port: it must not block.
    pub fn new(tell: impl Fn(Turned<'_>) + Send + Sync + 'static) -> Self {
        OnTurned(Arc::new(tell))
    }

    /// Tells of one connection.
    pub fn tell(&self, turned: Turned<'_>) {
        (self.0)(turned);
    }
}

/// Nobody hears.
impl Default for OnTurned {
    fn default() -> Self {
        OnTurned::new(|_| {})
    }
}

/// The same listener, not one that looks alike.
impl PartialEq for OnTurned {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for OnTurned {}

impl fmt::Debug for OnTurned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnTurned")
    }
}
