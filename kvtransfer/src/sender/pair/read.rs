//! The reading half of a pair: credit, reports and endings from the receiver, and signs of life to it.

use std::net::Shutdown;
use std::sync::Mutex;
use std::time::Instant;

use super::{Pair, State};
use crate::SessionError;
use crate::frame::Kind;
use crate::message::Message;
use crate::sender::pool::Pool;
use crate::session::{Outcome, parse};
use crate::sync::lock;
use crate::wire::{Control, FrameSink, FrameSource, Incoming, WireError, control_payload};

impl Pair {
    /// Reads the receiver's frames until the session is over, and keeps its lease alive meanwhile.
    pub(super) fn read(
        &self,
        index: usize,
        pool: &Pool,
        source: &mut dyn FrameSource,
        sink: &Mutex<Box<dyn FrameSink>>,
        control: &dyn Control,
    ) {
        loop {
            let until = self.step(index, |live| match live.sending.outcome() {
                Some(_) => None,
                None => Some(live.sending.next_tick()),
            });
            let Some(Some(until)) = until else { break };
            let reply = match source.head(Some(until)) {
                Ok(Incoming::Timeout) => self.step(index, |live| live.sending.tick(Instant::now())).flatten(),
                Ok(Incoming::Head(head)) if head.kind == Kind::Data => {
                    let error = SessionError::Protocol("data from a receiver".into());
                    self.step(index, |live| live.sending.fail(error)).flatten()
                }
                Ok(Incoming::Head(head)) => {
                    let message = control_payload(source, &head, Some(Instant::now() + self.spec.deadline))
                        .and_then(|(payload, crc)| Ok(parse(&head, &payload, crc)?));
                    match message {
                        Ok(message) => self.heard(index, pool, message),
                        Err(error) => self.unreadable(index, error),
                    }
                }
                Ok(Incoming::End) => {
                    self.step(index, |live| live.sending.lost("closed by the receiver"));
                    None
                }
                Err(error) => self.unreadable(index, error),
            };
            if let Some(message) = reply {
                // A writer at work is a sign of life itself; a Fail that cannot be said closes the connection instead.
                let failed = matches!(message, Message::Fail { .. });
                let said = match sink.try_lock() {
                    Ok(mut sink) => self.say_locked(index, &mut sink, &message).is_ok(),
                    Err(_) => !failed,
                };
                if failed && !said {
                    control.close(Shutdown::Both);
                }
            }
            self.changed.notify_all();
        }
        // A receiver that has given up need not read on: the writer must not wait for it.
        self.step(index, |live| {
            if live.writing && matches!(live.sending.outcome(), Some(Outcome::Failed(_))) {
                control.close(Shutdown::Both);
            }
        });
        self.changed.notify_all();
    }

    fn unreadable(&self, index: usize, error: WireError) -> Option<Message> {
        match error {
            WireError::Frame(error) => self.step(index, |live| live.sending.fail(error.into())).flatten(),
            WireError::Io(error) => {
                self.step(index, |live| live.sending.lost(&error.to_string()));
                None
            }
        }
    }

    /// A message of the receiver, and what it says about the link.
    fn heard(&self, index: usize, pool: &Pool, message: Message) -> Option<Message> {
        let mut state = lock(&self.state);
        let State { queue, lanes, .. } = &mut *state;
        let lane = &mut lanes[index];
        let live = lane.live.as_mut()?;
        let now = Instant::now();
        let before = live.sending.received_bytes();
        let reply = live.sending.message(message, now);
        let landed = live.sending.received_bytes() - before;
        let frames = live.sending.received_frames();
        let drained = live.sending.received_bytes() == live.sending.sent_bytes();
        let quiet = live.busy && drained && (queue.is_empty() || live.waiting);
        if quiet {
            live.busy = false;
        }
        if landed > 0 || quiet {
            pool.measure(&live.address, |meter| {
                meter.landed(landed, now);
                meter.way = live.way.get();
                if quiet {
                    meter.end(now);
                }
            });
        }
        lane.outbox.landed(frames);
        reply
    }
}
