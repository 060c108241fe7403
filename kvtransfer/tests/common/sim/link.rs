//! One connection of a simulated session: frames as bytes on their way, and what its two ends know of it.

use std::collections::VecDeque;
use std::time::Instant;

use kvtransfer::frame::Head;
use kvtransfer::message::Message;
use kvtransfer::sender::watch::{Seen, Verdict, Watch};
use kvtransfer::session::{Handshake, Outcome, Sending};
use kvtransfer::wire::Underway;

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
    /// Since when nothing passes.
    pub(super) hung: Option<Instant>,
    pub(super) watch: Watch,
    pub(super) slow: bool,
    pub(super) began: Instant,
}

impl Link {
    /// What the sender's system would tell of it: a network that is hung does not answer what is sent again.
    pub(super) fn look(&mut self, now: Instant) -> Verdict {
        let bytes = self.up.iter().map(|frame| frame.len() as u64).sum();
        let unanswered = self.hung.filter(|_| bytes > 0).map(|since| now - since);
        let seen = Seen {
            underway: Some(Underway { bytes, taken_bytes: None, unanswered }),
            sent_bytes: self.sending.sent_bytes(),
            landed_bytes: self.sending.received_bytes(),
            owed: self.sending.owed(),
            heard: self.sending.heard(),
            others: None,
        };
        self.watch.look(seen, now)
    }

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
