//! What a sender's lane has sent and may have to send again: frames stay here until the receiver has reported them as landed.
//! Pure; kept by the lanes of [`crate::Sender`] and of the simulator, over all connections of a lane.

use std::collections::VecDeque;

use crate::session::LaneStart;

/// Frames of one lane, oldest first.
#[derive(Debug)]
pub struct Outbox<F> {
    /// On their way, with their bytes on the wire.
    sent: VecDeque<(F, u64)>,
    /// Their connection was lost before they had landed.
    again: VecDeque<(F, u64)>,
    landed_frames: u64,
    landed_bytes: u64,
    connections: u32,
}

impl<F> Default for Outbox<F> {
    fn default() -> Self {
        Outbox {
            sent: VecDeque::new(),
            again: VecDeque::new(),
            landed_frames: 0,
            landed_bytes: 0,
            connections: 0,
        }
    }
}

impl<F: Clone> Outbox<F> {
    /// What the lane's next connection begins with.
    pub fn start(&mut self, lane: u16) -> LaneStart {
        self.connections += 1;
        LaneStart {
            lane,
            connection: self.connections - 1,
            frames: self.landed_frames + self.sent.len() as u64,
            bytes: self.landed_bytes + self.sent.iter().map(|(_, bytes)| bytes).sum::<u64>(),
        }
    }

    /// The receiver has accepted a connection and says how many frames of the lane have landed: the others are to be sent
    /// again, before anything new.
    pub fn resume(&mut self, landed_frames: u64) {
        self.landed(landed_frames);
        self.sent.append(&mut self.again);
        std::mem::swap(&mut self.sent, &mut self.again);
    }

    /// Wire bytes of the frame that has to be sent again next.
    pub fn pending(&self) -> Option<u64> {
        self.again.front().map(|(_, bytes)| *bytes)
    }

    /// That frame, which is now on its way.
    pub fn again(&mut self) -> Option<F> {
        let next = self.again.pop_front()?;
        self.sent.push_back(next.clone());
        Some(next.0)
    }

    /// A new frame of `wire_bytes` is on its way.
    pub fn sent(&mut self, frame: F, wire_bytes: u64) {
        self.sent.push_back((frame, wire_bytes));
    }

    /// The receiver has so many frames of the lane: they are not needed any more.
    pub fn landed(&mut self, frames: u64) {
        while self.landed_frames < frames
            && let Some((_, bytes)) = self.sent.pop_front()
        {
            self.landed_frames += 1;
            self.landed_bytes += bytes;
        }
    }

    /// Forgets all frames, and hands them back to be dropped.
    pub fn clear(&mut self) -> impl Sized + use<F> {
        (std::mem::take(&mut self.sent), std::mem::take(&mut self.again))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_not_landed_is_sent_again_in_order_before_anything_new() {
        let mut outbox = Outbox::default();
        assert_eq!(outbox.start(2), LaneStart { lane: 2, ..LaneStart::default() });
        outbox.resume(0);
        (0..5).for_each(|frame| outbox.sent(frame, 10));
        outbox.landed(2);
        assert_eq!(outbox.start(2), LaneStart { lane: 2, connection: 1, frames: 5, bytes: 50 });
        outbox.resume(3);
        assert_eq!((outbox.pending(), outbox.again()), (Some(10), Some(3)));
        // Lost again, before the second of them was sent.
        assert_eq!(outbox.start(2), LaneStart { lane: 2, connection: 2, frames: 4, bytes: 40 });
        outbox.resume(3);
        assert_eq!((outbox.again(), outbox.again(), outbox.again()), (Some(3), Some(4), None));
        outbox.sent(5, 10);
        outbox.landed(6);
        assert_eq!(outbox.start(2), LaneStart { lane: 2, connection: 3, frames: 6, bytes: 60 });
    }
}
