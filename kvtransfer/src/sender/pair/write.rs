//! The writing half of a pair: takes rectangles off the queue as credit allows, and sends them from where they lie or
//! through one staging buffer.

use std::io::{self, IoSlice};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backend::Piece;

use super::{Job, Pair, SharedExport, State};
use crate::SessionError;
use crate::layout::cut;
use crate::message::Message;
use crate::sender::pool::Pool;
use crate::session::{Outcome, Sending};
use crate::sync::lock;
use crate::wire::FrameSink;

/// After a failed write: how long the receiver's reason is waited for.
const REASON_WAIT: Duration = Duration::from_secs(1);

/// What the writing thread does next.
enum Step {
    Wait(SharedExport),
    Data(SharedExport, Piece, usize),
    Say(Message),
    Abort(SessionError),
    Over(Outcome),
}

impl Pair {
    /// Writes until the session is over.
    pub(super) fn write(&self, pool: &Pool, sink: &Mutex<Box<dyn FrameSink>>) -> Outcome {
        let mut staging = Vec::new();
        loop {
            let sent = match self.next() {
                Step::Over(outcome) => return outcome,
                Step::Abort(error) => {
                    let message = self.step(|live| live.sending.fail(error.clone())).flatten();
                    // Best effort: the connection closes next, which says the same.
                    let _ = message.map(|message| self.say(sink, &message));
                    return Outcome::Failed(error);
                }
                Step::Say(message) => self.say(sink, &message),
                Step::Wait(export) => match lock(&export).wait() {
                    Ok(()) => {
                        self.ready();
                        Ok(())
                    }
                    Err(error) => {
                        self.abort(SessionError::Device(error.to_string()));
                        Ok(())
                    }
                },
                Step::Data(export, piece, bytes) => {
                    self.data(pool, sink, &export, &piece, bytes, &mut staging)
                }
            };
            if let Err(error) = sent {
                return self.broken(&error);
            }
        }
    }

    /// Waits for something to do.
    fn next(&self) -> Step {
        let mut state = lock(&self.state);
        loop {
            let State { queue, backlog_bytes, close, abort, live, .. } = &mut *state;
            // `live` is set before this thread writes and taken after.
            let Some(live) = live else { return Step::Over(Outcome::Failed(SessionError::Cancelled)) };
            if let Some(outcome) = live.sending.outcome() {
                return Step::Over(outcome.clone());
            }
            if let Some(error) = abort {
                return Step::Abort(error.clone());
            }
            if let Some(frame_bytes) = live.sending.frame_bytes() {
                match queue.front_mut() {
                    Some(job) if job.rects.is_empty() => {
                        queue.pop_front();
                        continue;
                    }
                    Some(job) if !job.ready => {
                        live.waiting = true;
                        if std::mem::take(&mut live.unprobed) {
                            return Step::Say(Message::Ping);
                        }
                        return Step::Wait(job.export.clone());
                    }
                    Some(job) => {
                        if let Some((piece, bytes)) = job.cut(frame_bytes, &mut live.sending) {
                            *backlog_bytes -= bytes as u64;
                            // Who waits for room looks again.
                            self.changed.notify_all();
                            return Step::Data(job.export.clone(), piece, bytes);
                        }
                    }
                    None => match close {
                        Some(close) => {
                            if let Some(message) = live.sending.done(*close) {
                                return Step::Say(message);
                            }
                            continue;
                        }
                        // Asks how much has landed, so that the link's rate is that of busy time alone.
                        None if std::mem::take(&mut live.unprobed) => return Step::Say(Message::Ping),
                        None => {}
                    },
                }
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The front job's export has its bytes.
    fn ready(&self) {
        let mut state = lock(&self.state);
        if let Some(job) = state.queue.front_mut() {
            job.ready = true;
        }
        if let Some(live) = &mut state.live {
            live.waiting = false;
        }
    }

    /// Sends one rectangle: from where it lies, or through `staging`.
    fn data(
        &self,
        pool: &Pool,
        sink: &Mutex<Box<dyn FrameSink>>,
        export: &SharedExport,
        piece: &Piece,
        bytes: usize,
        staging: &mut Vec<u8>,
    ) -> io::Result<()> {
        if let Some(pace) = &pool.pace {
            let at = lock(pace).book(bytes as u64, Instant::now());
            self.pause(at);
        }
        let lease = lock(export);
        let slices = lease
            .slices(piece)
            .filter(|slices| slices.iter().map(|slice| slice.len()).sum::<usize>() == bytes);
        if let (true, Some(slices)) = (self.alone, &slices) {
            return self.send_data(pool, sink, piece, bytes, slices);
        }
        staging.clear();
        match slices {
            Some(slices) => slices.iter().for_each(|slice| staging.extend_from_slice(slice)),
            None => {
                if let Err(error) = lease.read(piece, staging) {
                    self.abort(error.into());
                    return Ok(());
                }
                if staging.len() != bytes {
                    let got = staging.len();
                    self.abort(SessionError::Device(format!(
                        "export gave {got} of {bytes} bytes of {piece:?}"
                    )));
                    return Ok(());
                }
            }
        }
        // Other pairs read the same export while this one's bytes leave.
        drop(lease);
        self.send_data(pool, sink, piece, bytes, &[IoSlice::new(staging)])
    }

    fn send_data(
        &self,
        pool: &Pool,
        sink: &Mutex<Box<dyn FrameSink>>,
        piece: &Piece,
        bytes: usize,
        slices: &[IoSlice<'_>],
    ) -> io::Result<()> {
        let crc = slices.iter().fold(0, |crc, slice| crc32c::crc32c_append(crc, slice));
        let mut sink = lock(sink);
        let head = {
            let mut state = lock(&self.state);
            let State { abort, live, .. } = &mut *state;
            let Some(live) = live.as_mut().filter(|live| abort.is_none() && live.sending.outcome().is_none())
            else {
                return Ok(());
            };
            live.writing = true;
            live.unprobed = true;
            if !std::mem::replace(&mut live.busy, true) {
                pool.measure(&live.address, |meter| meter.begin(Instant::now()));
            }
            live.sending.data(piece, bytes, crc)
        };
        let sent = sink.send(&head, slices);
        self.step(|live| live.writing = false);
        sent
    }

    fn say(&self, sink: &Mutex<Box<dyn FrameSink>>, message: &Message) -> io::Result<()> {
        self.say_locked(&mut lock(sink), message)
    }

    /// Numbers and sends a message: frames get their numbers in the order in which they leave.
    pub(super) fn say_locked(
        &self,
        sink: &mut MutexGuard<'_, Box<dyn FrameSink>>,
        message: &Message,
    ) -> io::Result<()> {
        let payload = message.encode();
        match self.step(|live| live.sending.head(message, &payload)) {
            Some(head) => sink.send(&head, &[IoSlice::new(&payload)]),
            None => Ok(()),
        }
    }

    /// A write failed: the receiver may have said why before it closed.
    fn broken(&self, error: &io::Error) -> Outcome {
        let until = Instant::now() + REASON_WAIT;
        let mut state = lock(&self.state);
        loop {
            if let Some(error) = &state.abort {
                return Outcome::Failed(error.clone());
            }
            let Some(live) = &mut state.live else { return Outcome::Failed(self.io(error)) };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || error.kind() == io::ErrorKind::TimedOut {
                live.sending.lost(&error.to_string());
            }
            if let Some(outcome) = live.sending.outcome() {
                return outcome.clone();
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Job {
    /// The next frame's rectangle, when its bytes are within credit.
    fn cut(&mut self, frame_bytes: usize, sending: &mut Sending) -> Option<(Piece, usize)> {
        let (rect, token_bytes) = self.rects.front_mut()?;
        let mut rest = rect.clone();
        let piece = cut(&mut rest, *token_bytes, frame_bytes)?;
        let bytes = piece.tokens.len() * *token_bytes;
        if !sending.may_send(bytes, Instant::now()) {
            return None;
        }
        *rect = rest;
        if rect.tokens.is_empty() {
            self.rects.pop_front();
        }
        Some((piece, bytes))
    }
}
