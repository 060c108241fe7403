//! Passes a rank's share of replicated planes on to the other ranks of its group while it arrives: one push to all of them,
//! of copies, so that it never touches the landing. Slots of [`crate::Receiver`] own one each.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use backend::{KvError, KvExport, Piece};

use crate::limits::RELAY_BACKLOG_BYTES_MAX;
use crate::receiver::Peers;
use crate::sync::lock;
use crate::{Close, Expect, Push, SessionError};

pub(super) struct Relay(Mutex<Option<Arc<Push>>>);

impl Relay {
    /// Begins a push to the other ranks; `failed` is called at most once, on a thread of the sender.
    pub fn open(expect: &Expect, peers: &Peers, failed: impl FnOnce(SessionError) + Send + 'static) -> Self {
        let push = peers.sender.relay(expect, peers, move |result| {
            if let Err(error) = result {
                failed(error);
            }
        });
        Relay(Mutex::new(Some(Arc::new(push))))
    }

    /// Queues a verified rectangle for the other ranks.
    pub fn pass(&self, piece: &Piece, bytes: Vec<u8>) {
        if let Some(push) = &*lock(&self.0) {
            let rows = piece.tokens.len().max(1);
            let export =
                Passed { token_bytes: bytes.len() / rows, piece: piece.clone(), bytes: bytes.into() };
            push.piece(piece, export.token_bytes, || export.clone());
        }
    }

    /// Waits until the other ranks have taken most of what was queued, or the push has ended.
    pub fn wait_room(&self) {
        let push = lock(&self.0).clone();
        if let Some(push) = push {
            push.wait_room(RELAY_BACKLOG_BYTES_MAX);
        }
    }

    /// The share is whole.
    pub fn close(&self, close: Close) {
        if let Some(push) = lock(&self.0).take() {
            push.finish(close);
        }
    }

    /// Gives the push up.
    pub fn cancel(&self) {
        if let Some(push) = lock(&self.0).take() {
            push.give_up(SessionError::Cancelled);
        }
    }
}

/// A copy of one rectangle.
#[derive(Clone)]
struct Passed {
    piece: Piece,
    token_bytes: usize,
    bytes: Arc<[u8]>,
}

impl Passed {
    fn rows(&self, piece: &Piece) -> Option<&[u8]> {
        let start = piece.tokens.start.checked_sub(self.piece.tokens.start)? as usize;
        self.bytes.get(start * self.token_bytes..(start + piece.tokens.len()) * self.token_bytes)
    }
}

impl KvExport for Passed {
    fn tokens(&self) -> Range<u32> {
        self.piece.tokens.clone()
    }

    fn layers(&self) -> Range<usize> {
        self.piece.layer..self.piece.layer + 1
    }

    fn read(&self, piece: &Piece, out: &mut Vec<u8>) -> Result<(), KvError> {
        // A rectangle outside gives nothing, which the push sees as too few bytes.
        out.extend_from_slice(self.rows(piece).unwrap_or_default());
        Ok(())
    }

    fn slices(&self, piece: &Piece) -> Option<Vec<IoSlice<'_>>> {
        self.rows(piece).map(|rows| vec![IoSlice::new(rows)])
    }
}
