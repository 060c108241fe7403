//! The writing half of a lane: takes rectangles off the pair's queue as credit allows, and sends them from where they lie or
//! through one staging buffer; out of memory that the receiver reads by itself nothing is touched here.

use std::io::{self, IoSlice};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::lane::{Frame, Lane};
use super::{Job, Pair, Progress, REASON_WAIT, State};
use crate::SessionError;
use crate::codec::{Codec, Row};
use crate::crc;
use crate::frame::Head;
use crate::layout::cut;
use crate::message::Message;
use crate::sender::export::SharedExport;
use crate::sender::pool::Pool;
use crate::sender::stripe::{Load, leaves};
use crate::session::{Outcome, Sending};
use crate::sync::lock;
use crate::wire::{FrameSink, Hold};

/// What the writing thread does next.
enum Step {
    Wait(Arc<SharedExport>),
    Data(Frame),
    Say(Message),
    Abort(SessionError),
    Over(Outcome),
}

fn sum(slices: &[IoSlice<'_>]) -> u32 {
    slices.iter().fold(0, |crc, slice| crc::append(crc, slice))
}

/// Buffers of one writing thread.
#[derive(Default)]
struct Staging {
    exact: Vec<u8>,
    encoded: Vec<u8>,
}

impl Pair {
    /// Writes until the connection's part in the session is over.
    pub(super) fn write(&self, index: usize, pool: &Pool, sink: &Mutex<Box<dyn FrameSink>>) -> Outcome {
        let mut staging = Staging::default();
        loop {
            let sent = match self.next(index) {
                Step::Over(outcome) => return outcome,
                Step::Abort(error) => {
                    let message = self.step(index, |live| live.sending.fail(error.clone())).flatten();
                    // Best effort: the connection closes next, which says the same.
                    let _ = message.map(|message| self.say(index, sink, &message));
                    return Outcome::Failed(error);
                }
                Step::Say(message) => self.say(index, sink, &message),
                Step::Wait(export) => match export.wait() {
                    Ok(()) => {
                        self.ready(index);
                        Ok(())
                    }
                    Err(error) => {
                        self.abort(SessionError::Device(error.to_string()));
                        Ok(())
                    }
                },
                Step::Data(frame) => self.data(index, pool, sink, &frame, &mut staging),
            };
            if let Err(error) = sent {
                return self.broken(index, &error);
            }
        }
    }

    /// Waits for something to do.
    fn next(&self, index: usize) -> Step {
        let mut state = lock(&self.state);
        loop {
            if let Some(step) = self.choose(index, &mut state) {
                return step;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What there is to do now.
    fn choose(&self, index: usize, state: &mut State) -> Option<Step> {
        let State { queue, backlog_bytes, taken_bytes, close, abort, lanes, closing, .. } = state;
        let accepted = lanes.iter().filter(|lane| lane.accepted).count() as u16;
        let leaves = self.leaves(index, lanes, *backlog_bytes);
        let lane = &mut lanes[index];
        // `live` is set before this thread writes and taken after.
        let Some(live) = &mut lane.live else {
            return Some(Step::Over(Outcome::Failed(SessionError::Cancelled)));
        };
        if let Some(outcome) = live.sending.outcome() {
            return Some(Step::Over(outcome.clone()));
        }
        if let Some(error) = abort {
            return Some(Step::Abort(error.clone()));
        }
        let frame_bytes = live.sending.frame_bytes()?;
        if let Some(wire_bytes) = lane.outbox.pending() {
            if !live.sending.may_send(wire_bytes as usize, Instant::now()) {
                return None;
            }
            return lane.outbox.again().map(Step::Data);
        }
        while queue.front().is_some_and(|job| job.rects.is_empty()) {
            queue.pop_front();
        }
        // Asks how much has landed, so that the link's rate is that of busy time alone.
        let idle = |unprobed: &mut bool| std::mem::take(unprobed).then_some(Step::Say(Message::Ping));
        match queue.front_mut() {
            Some(job) if job.progress == Progress::New => {
                live.waiting = true;
                if let Some(ping) = idle(&mut live.unprobed) {
                    return Some(ping);
                }
                job.progress = Progress::Waited;
                Some(Step::Wait(job.export.clone()))
            }
            Some(job) if job.progress == Progress::Waited => {
                live.waiting = true;
                idle(&mut live.unprobed)
            }
            // Hears how much has landed, to look again.
            Some(_) if leaves => idle(&mut live.unprobed),
            Some(job) => {
                live.waiting = false;
                let frame = self.cut(job, frame_bytes, &mut live.sending)?;
                *backlog_bytes -= frame.bytes as u64;
                *taken_bytes += frame.bytes as u64;
                lane.outbox.sent(frame.clone(), frame.wire_bytes as u64);
                // Who waits for room, or for what is next in the queue, looks again.
                self.changed.notify_all();
                Some(Step::Data(frame))
            }
            None if lane.late => None,
            None => match close {
                Some(close) => {
                    let lanes = *closing.get_or_insert(accepted);
                    match live.sending.done(*close, lanes, *taken_bytes) {
                        Some(message) => Some(Step::Say(message)),
                        None => live.sending.outcome().cloned().map(Step::Over),
                    }
                }
                None => idle(&mut live.unprobed),
            },
        }
    }

    /// Whether a lane leaves what is queued to the others, see [`leaves`].
    fn leaves(&self, index: usize, lanes: &[Lane], queued_bytes: u64) -> bool {
        if lanes.len() < 2 {
            return false;
        }
        let own = lanes.get(index).and_then(|lane| self.load(index, lane));
        let all: Vec<Load> =
            lanes.iter().enumerate().filter_map(|(index, lane)| self.load(index, lane)).collect();
        own.is_some_and(|own| leaves(own, &all, queued_bytes))
    }

    /// What a connected lane has under way and what its path carries: as it was known before or as it turns out, whichever is less.
    pub(super) fn load(&self, index: usize, lane: &Lane) -> Option<Load> {
        let live = lane.live.as_ref()?;
        let unlanded_bytes = live.sending.sent_bytes() - live.sending.received_bytes();
        let known = self.rates.get(index).copied().flatten();
        let known = known.filter(|_| self.paths.get(index) == Some(&live.address));
        let rates = [known, live.watch.bytes_per_s()].into_iter().flatten();
        let bytes_per_s = rates.reduce(f64::min).filter(|rate| *rate > 0.0)?;
        Some(Load { unlanded_bytes, bytes_per_s })
    }

    /// The next frame, when its bytes are within credit.
    fn cut(&self, job: &mut Job, frame_bytes: usize, sending: &mut Sending) -> Option<Frame> {
        let (rect, token_bytes) = job.rects.front_mut()?;
        let tail = self.tail.as_ref().filter(|tail| tail.has(rect));
        let frame_bytes = tail.map_or(frame_bytes, |tail| tail.frame_bytes.min(frame_bytes));
        let mut rest = rect.clone();
        let piece = cut(&mut rest, *token_bytes, frame_bytes)?;
        let bytes = piece.tokens.len() * *token_bytes;
        let wire_bytes = match self.row(piece.plane) {
            Some(row) => self.codec.wire_bytes(row, piece.heads.len(), piece.tokens.len()),
            None => bytes,
        };
        if !sending.may_send(wire_bytes, Instant::now()) {
            return None;
        }
        *rect = rest;
        if rect.tokens.is_empty() {
            job.rects.pop_front();
        }
        Some(Frame { export: job.export.clone(), piece, bytes, wire_bytes })
    }

    /// Rows of a plane, where they do not travel as they are.
    fn row(&self, plane: usize) -> Option<Row> {
        self.parts.iter().find(|part| part.plane == plane && self.codec != Codec::Exact).map(|part| part.row)
    }

    /// The front job's export has its bytes.
    fn ready(&self, index: usize) {
        let mut state = lock(&self.state);
        if let Some(job) = state.queue.front_mut() {
            job.progress = Progress::Ready;
        }
        if let Some(live) = &mut state.lanes[index].live {
            live.waiting = false;
        }
        self.changed.notify_all();
    }

    /// Sends one rectangle: from where it lies, or through `staging`.
    fn data(
        &self,
        index: usize,
        pool: &Pool,
        sink: &Mutex<Box<dyn FrameSink>>,
        frame: &Frame,
        staging: &mut Staging,
    ) -> io::Result<()> {
        if let Some(pace) = &pool.pace {
            let at = lock(pace).book(frame.wire_bytes as u64, Instant::now());
            self.pause(at);
        }
        let row = self.row(frame.piece.plane);
        let within = frame.export.within(&frame.piece, frame.bytes).filter(|_| row.is_none());
        let within = within.filter(|within| lock(sink).reads(within));
        let hold: Hold = frame.export.clone();
        if let Some(within) = &within
            && let Some(sums) = within.sums
        {
            let crc = crc::of_rows(sums, frame.bytes / sums.len());
            pool.unstaged_bytes.fetch_add(frame.bytes as u64, Ordering::Relaxed);
            let send = |sink: &mut dyn FrameSink, head: &Head| sink.send_within(head, within, &hold);
            return self.send_data(index, pool, sink, frame, Codec::Exact, crc, send);
        }
        let slices = frame.export.slices(&frame.piece, frame.bytes);
        if let (None, Some(slices)) = (row, &slices) {
            let send = |sink: &mut dyn FrameSink, head: &Head| match &within {
                Some(within) => sink.send_within(head, within, &hold),
                None => sink.send_held(head, slices, &hold),
            };
            return self.send_data(index, pool, sink, frame, Codec::Exact, sum(slices), send);
        }
        staging.exact.clear();
        match slices {
            Some(slices) => slices.iter().for_each(|slice| staging.exact.extend_from_slice(slice)),
            None => {
                if let Err(error) = frame.export.read(&frame.piece, &mut staging.exact) {
                    self.abort(error.into());
                    return Ok(());
                }
                let (got, bytes, piece) = (staging.exact.len(), frame.bytes, &frame.piece);
                if got != bytes {
                    self.abort(SessionError::Device(format!(
                        "export gave {got} of {bytes} bytes of {piece:?}"
                    )));
                    return Ok(());
                }
            }
        }
        let (codec, staged) = match row {
            None => (Codec::Exact, &staging.exact),
            Some(row) => {
                staging.encoded.clear();
                self.codec.encode(row, frame.piece.heads.len(), &staging.exact, &mut staging.encoded);
                (self.codec, &staging.encoded)
            }
        };
        let slices = [IoSlice::new(staged)];
        let send = |sink: &mut dyn FrameSink, head: &Head| sink.send(head, &slices);
        self.send_data(index, pool, sink, frame, codec, sum(&slices), send)
    }

    /// Sends a frame whose payload has the checksum `crc`, by `send`.
    #[allow(clippy::too_many_arguments)] // one frame: where it is, where it goes, how it is written
    fn send_data(
        &self,
        index: usize,
        pool: &Pool,
        sink: &Mutex<Box<dyn FrameSink>>,
        frame: &Frame,
        codec: Codec,
        crc: u32,
        send: impl FnOnce(&mut dyn FrameSink, &Head) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut sink = lock(sink);
        let head = {
            let mut state = lock(&self.state);
            let State { abort, lanes, .. } = &mut *state;
            let live = lanes[index].live.as_mut();
            let Some(live) = live.filter(|live| abort.is_none() && live.sending.outcome().is_none()) else {
                return Ok(());
            };
            live.writing = true;
            live.unprobed = true;
            if !std::mem::replace(&mut live.busy, true) {
                pool.measure(&live.address, |meter| meter.begin(Instant::now()));
            }
            live.sending.data(&frame.piece, codec, frame.wire_bytes, crc)
        };
        let sent = send(&mut **sink, &head);
        self.step(index, |live| live.writing = false);
        sent
    }

    fn say(&self, index: usize, sink: &Mutex<Box<dyn FrameSink>>, message: &Message) -> io::Result<()> {
        self.say_locked(index, &mut lock(sink), message)
    }

    /// Numbers and sends a message: frames get their numbers in the order in which they leave.
    pub(super) fn say_locked(
        &self,
        index: usize,
        sink: &mut MutexGuard<'_, Box<dyn FrameSink>>,
        message: &Message,
    ) -> io::Result<()> {
        let payload = message.encode();
        match self.step(index, |live| live.sending.head(message, &payload)) {
            Some(head) => sink.send(&head, &[IoSlice::new(&payload)]),
            None => Ok(()),
        }
    }

    /// A write failed: the receiver may have said why before it closed.
    fn broken(&self, index: usize, error: &io::Error) -> Outcome {
        let until = Instant::now() + REASON_WAIT;
        let mut state = lock(&self.state);
        loop {
            if let Some(error) = &state.abort {
                return Outcome::Failed(error.clone());
            }
            let Some(live) = &mut state.lanes[index].live else { return Outcome::Failed(self.io(error)) };
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
