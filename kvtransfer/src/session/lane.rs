//! One lane at the receiver: a sender's connection with its counts, which outlive the connection. When it is lost, the lane's
//! next connection hears what has landed and goes on behind it. Pure; kept by [`super::Receiving`].

use std::time::Instant;

use backend::Piece;

use crate::Close;
use crate::message::Message;
use crate::session::receive::ConnId;

/// Frames that a sender has used when it is proven: Hello and Proof.
const HANDSHAKE_FRAMES: u64 = 2;

#[derive(Debug)]
pub(super) struct Lane {
    /// `None` while it has none.
    pub conn: Option<ConnId>,
    /// Number of that connection, or of the last one.
    pub connection: u32,
    /// Since when it has none, and why.
    pub lost: Option<(Instant, String)>,
    pub heard: Instant,
    pub next_number: u64,
    pub granted_bytes: u64,
    /// Payload announced by heads of frames.
    pub claimed_bytes: u64,
    /// Payload landed with a right checksum.
    pub received_bytes: u64,
    /// Cache that it became.
    pub landed_bytes: u64,
    pub frames: u64,
    /// The rectangle whose payload is under way, its bytes, and those of the payload.
    pub under_way: Option<(Piece, u64, u64)>,
    /// The sender has said that this was all: how it closes, and how many lanes say so.
    pub done: Option<(Close, u16)>,
}

impl Lane {
    pub fn new(conn: ConnId, connection: u32, now: Instant) -> Self {
        Lane {
            conn: Some(conn),
            connection,
            lost: None,
            heard: now,
            next_number: HANDSHAKE_FRAMES,
            granted_bytes: 0,
            claimed_bytes: 0,
            received_bytes: 0,
            landed_bytes: 0,
            frames: 0,
            under_way: None,
            done: None,
        }
    }

    /// Goes on over another connection.
    pub fn resume(&mut self, conn: ConnId, connection: u32, now: Instant) {
        (self.conn, self.connection, self.lost) = (Some(conn), connection, None);
        (self.heard, self.next_number) = (now, HANDSHAKE_FRAMES);
        // What was said after the last frame that landed will be said again.
        self.done = None;
    }

    /// Grants credit up to `window_bytes` beyond what has landed, `total_bytes` at the most; whether that is news.
    pub fn grant(&mut self, window_bytes: u64, total_bytes: u64) -> bool {
        let limit = (self.received_bytes + window_bytes).min(total_bytes);
        // A quarter window at a time: what is left unasked for is always room for one more frame.
        let last = limit == total_bytes && self.granted_bytes < limit;
        if limit <= self.granted_bytes || !last && limit - self.granted_bytes < window_bytes / 4 {
            return false;
        }
        self.granted_bytes = limit;
        true
    }

    pub fn credit(&self, frame_bytes: u64) -> Message {
        Message::Credit {
            limit_bytes: self.granted_bytes,
            received_bytes: self.received_bytes,
            received_frames: self.frames,
            frame_bytes: frame_bytes as u32,
        }
    }

    pub fn pong(&self) -> Message {
        Message::Pong { received_bytes: self.received_bytes, received_frames: self.frames }
    }
}
