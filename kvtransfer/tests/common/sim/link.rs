//! One connection of a simulated session: frames as bytes on their way, and what its two ends know of it.

use std::collections::VecDeque;
use std::time::Instant;

use kvtransfer::frame::Head;
use kvtransfer::message::Message;
use kvtransfer::session::{Handshake, Outcome, Sending};

/// One connection; both its ends.
pub(super) struct Link {
    pub(super) flow: usize,
    pub(super) lane: usize,
    pub(super) sending: Sending,
    /// The sender still listens to it.
    pub(super) owned: bool,
    pub(super) handshake: Option<Handshake>,
    pub(super) up: VecDeque<Vec<u8>>,
    pub(super) down: VecDeque<Vec<u8>>,
    /// Bytes that still arrive before the connection breaks.
    pub(super) cut: Option<usize>,
    pub(super) up_closed: bool,
    pub(super) down_closed: bool,
    /// The receiver's end is done with it.
    pub(super) shut: bool,
    pub(super) hung: bool,
    pub(super) slow: bool,
    pub(super) began: Instant,
}

impl Link {
    pub(super) fn say(&mut self, message: &Message) {
        let payload = message.encode();
        let head = self.sending.head(message, &payload);
        self.up.push_back([&head.encode()[..], &payload].concat());
    }

    /// Says what the sender's machine wants said, and closes when that was a farewell.
    pub(super) fn reply(&mut self, message: Option<Message>) {
        if let Some(message) = message {
            self.say(&message);
        }
        if matches!(self.sending.outcome(), Some(Outcome::Failed(_))) {
            self.up_closed = true;
        }
    }

    pub(super) fn answer(&mut self, message: &Message) {
        if !self.down_closed {
            let payload = message.encode();
            let head = Head::control(message.kind(), 0, 0, &payload);
            self.down.push_back([&head.encode()[..], &payload].concat());
        }
    }
}
