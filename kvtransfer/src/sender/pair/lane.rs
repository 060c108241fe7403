//! One lane at the sender: its connection, and what it has sent that the receiver has not yet reported as landed.

use std::sync::Arc;
use std::time::Instant;

use backend::Piece;

use crate::sender::export::SharedExport;
use crate::sender::watch::Watch;
use crate::session::{Outbox, Sending};
use crate::transport::ucx::WayCell;
use crate::wire::{Control, Wire};

/// One frame, for as long as it may have to be sent again.
#[derive(Clone)]
pub(super) struct Frame {
    pub export: Arc<SharedExport>,
    pub piece: Piece,
    /// As the store has it.
    pub bytes: usize,
    /// On the wire.
    pub wire_bytes: usize,
}

/// Why a lane left the path of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing came back from there.
    Silent,
    /// Another path has what is left sooner.
    Slow,
}

/// A lane over all its connections.
#[derive(Default)]
pub(super) struct Lane {
    pub live: Option<Live>,
    pub outbox: Outbox<Frame>,
    /// The receiver has accepted the lane once.
    pub accepted: bool,
    /// It came when the others were closing already: it has nothing to send and nothing to say.
    pub late: bool,
    /// It left the path of its last connection.
    pub left: Option<Left>,
    /// It left a path because that was slow: once is enough.
    pub moved: bool,
}

/// A lane's connection.
pub(super) struct Live {
    pub sending: Sending,
    pub address: String,
    pub control: Arc<dyn Control>,
    pub way: Arc<WayCell>,
    pub watch: Watch,
    /// A frame is being written: the connection has to go if the push is given up now.
    pub writing: bool,
    /// The front job's export is waited for.
    pub waiting: bool,
    /// Data was sent after the last ping.
    pub unprobed: bool,
    /// The link's meter counts this lane as busy.
    pub busy: bool,
}

impl Live {
    pub fn new(sending: Sending, address: String, wire: &Wire) -> Self {
        let (control, way) = (wire.control.clone(), wire.way.clone());
        let watch = Watch::new(Instant::now());
        Live {
            sending,
            address,
            control,
            way,
            watch,
            writing: false,
            waiting: false,
            unprobed: false,
            busy: false,
        }
    }
}

impl Lane {
    /// Takes a connection whose receiver has said what has landed. Whether it takes the place of another.
    pub fn attach(&mut self, live: Live, closing: bool) -> bool {
        let again = self.accepted;
        self.late |= closing && !self.accepted;
        self.accepted = true;
        self.outbox.resume(live.sending.received_frames());
        self.live = Some(live);
        again
    }
}
