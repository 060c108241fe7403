//! How both ends prove that they hold the ticket without sending it: HMAC-SHA256 over Hello (which has the sender's
//! nonce and names everything the session is bound to) and the receiver's nonce, each end under its own label.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::Ticket;

/// Which end proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The end that pushes.
    Sender,
    /// The end that lands.
    Receiver,
}

/// The proof of one end.
pub fn prove(ticket: &Ticket, end: End, hello: &[u8], receiver_nonce: &[u8; 32]) -> [u8; 32] {
    mac(ticket, end, hello, receiver_nonce).finalize().into_bytes().into()
}

/// Whether `proof` is that of `end`; constant time.
pub fn verify(ticket: &Ticket, end: End, hello: &[u8], receiver_nonce: &[u8; 32], proof: &[u8; 32]) -> bool {
    mac(ticket, end, hello, receiver_nonce).verify_slice(proof).is_ok()
}

fn mac(ticket: &Ticket, end: End, hello: &[u8], receiver_nonce: &[u8; 32]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(ticket.key()).expect("a key of any length serves");
    mac.update(match end {
        End::Sender => b"baton kv wire 1 sender\0\0",
        End::Receiver => b"baton kv wire 1 receiver",
    });
    mac.update(receiver_nonce);
    mac.update(hello);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_ticket_end_hello_and_nonce_only() {
        let ticket = Ticket::from_bytes([1; 32]);
        let proof = prove(&ticket, End::Sender, b"hello", &[2; 32]);
        assert!(verify(&ticket, End::Sender, b"hello", &[2; 32], &proof));
        assert!(!verify(&Ticket::from_bytes([3; 32]), End::Sender, b"hello", &[2; 32], &proof));
        assert!(!verify(&ticket, End::Receiver, b"hello", &[2; 32], &proof));
        assert!(!verify(&ticket, End::Sender, b"hellO", &[2; 32], &proof));
        assert!(!verify(&ticket, End::Sender, b"hello", &[4; 32], &proof));
    }
}
