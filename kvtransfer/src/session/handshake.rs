//! A connection at the receiver between its Hello and its Proof. Pure.

use crate::Ticket;
use crate::message::{Hello, Message};
use crate::proof::{End, prove, verify};

/// A connection between its Hello and its Proof. The session does not know of it yet: what is not proven changes nothing.
#[derive(Debug)]
pub struct Handshake {
    pub(super) hello: Hello,
    nonce: [u8; 32],
}

impl Handshake {
    /// Answers `hello` with a fresh `nonce`.
    pub fn begin(hello: Hello, ticket: &Ticket, nonce: [u8; 32]) -> (Self, Message) {
        let bytes = Message::Hello(Box::new(hello.clone())).encode();
        let challenge = Message::Challenge { nonce, proof: prove(ticket, End::Receiver, &bytes, &nonce) };
        (Handshake { hello, nonce }, challenge)
    }

    pub(crate) fn proves(&self, ticket: &Ticket, proof: &[u8; 32]) -> bool {
        let bytes = Message::Hello(Box::new(self.hello.clone())).encode();
        verify(ticket, End::Sender, &bytes, &self.nonce, proof)
    }
}
