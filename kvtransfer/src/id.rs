//! Names and secrets of a KV session. The decode group makes both at admission; the router carries them to the prefill
//! node; on the KV port the name is sent and the secret only proved (see [`crate::proof`]).

use std::fmt;
use std::str::FromStr;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Names a session on the KV port: 128 random bits, printed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// No session: a connection that measures the link.
    pub const PROBE: SessionId = SessionId([0; 16]);

    /// A new name. Panics where the operating system has no random numbers: nothing can be kept safe there.
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        fill_random(&mut bytes);
        SessionId(bytes)
    }

    /// The name with these bits.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        SessionId(bytes)
    }

    /// The bits of the name.
    pub const fn to_bytes(&self) -> [u8; 16] {
        self.0
    }

    /// The short form that every frame carries, so that a frame of another session is seen at once.
    pub(crate) fn tag(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// A text that is not a [`SessionId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("session id of {0} characters is not 32 hex digits")]
pub struct BadSessionId(usize);

impl FromStr for SessionId {
    type Err = BadSessionId;

    fn from_str(text: &str) -> Result<Self, BadSessionId> {
        let bad = || BadSessionId(text.chars().count());
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u128::from_str_radix(text, 16).map(|bits| SessionId(bits.to_be_bytes())).map_err(|_| bad())
    }
}

/// The secret of one admission: 256 random bits, used once, compared in constant time, never printed.
#[derive(Clone)]
pub struct Ticket([u8; 32]);

impl Ticket {
    /// The secret by which the nodes of a cluster measure links, of the cluster's own.
    pub fn probe(cluster_secret: &[u8]) -> Self {
        let mut mac = Hmac::<Sha256>::new_from_slice(cluster_secret).expect("a key of any length serves");
        mac.update(b"baton kv probe 1");
        Ticket(mac.finalize().into_bytes().into())
    }

    /// A new secret. Panics where the operating system has no random numbers.
    pub fn random() -> Self {
        let mut bytes = [0; 32];
        fill_random(&mut bytes);
        Ticket(bytes)
    }

    /// The secret with these bits.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Ticket(bytes)
    }

    /// The bits, for the authenticated control plane only.
    pub const fn to_bytes(&self) -> [u8; 32] {
        self.0
    }

    pub(crate) fn key(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Ticket {}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(..)")
    }
}

/// Fills `bytes` from the operating system.
pub(crate) fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the operating system gives random numbers");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ids_survive_their_text_and_bad_texts_are_refused() {
        let id = SessionId::from_bytes(*b"\x00\x01aaaaaaaaaaaaa\xff");
        assert_eq!(id.to_string(), "000161616161616161616161616161ff");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("00".parse::<SessionId>(), Err(BadSessionId(2)));
        assert!("+0016161616161616161616161616100".parse::<SessionId>().is_err());
        assert!("+00161616161616161616161616161ff".parse::<SessionId>().is_err());
        assert_ne!(SessionId::random(), SessionId::random());
    }

    #[test]
    fn a_ticket_never_shows_its_bits() {
        let ticket = Ticket::from_bytes([7; 32]);
        assert_eq!(format!("{ticket:?}"), "Ticket(..)");
        assert_eq!(ticket, Ticket::from_bytes([7; 32]));
        assert_ne!(ticket, Ticket::random());
    }
}
