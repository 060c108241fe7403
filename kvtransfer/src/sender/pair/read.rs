//! The reading half of a pair: credit, reports and endings from the receiver, and signs of life to it.

use std::net::Shutdown;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lane::{Lane, Left};
use super::{Pair, State};
use crate::SessionError;
use crate::frame::Kind;
use crate::message::Message;
use crate::sender::pool::Pool;
use crate::sender::stripe::{Load, moves};
use crate::sender::watch::{Seen, Verdict};
use crate::session::{Outcome, parse};
use crate::sync::lock;
use crate::wire::{Control, FrameSink, FrameSource, Incoming, WireError, control_payload};

/// A lane that could take another path looks so often whether its own still carries what it is given; at the end of a push, where
/// milliseconds show, more often.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LOOK_EVERY_AT_END: Duration = Duration::from_millis(10);

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
        let mut look = self.next_look();
        loop {
            let until = self.step(index, |live| match live.sending.outcome() {
                Some(_) => None,
                None => Some(live.sending.next_tick()),
            });
            let Some(Some(until)) = until else { break };
            let until = look.map_or(until, |look| until.min(look));
            let reply = match source.head(Some(until)) {
                Ok(Incoming::Timeout) if look.is_some_and(|look| Instant::now() >= look) => {
                    look = self.next_look();
                    self.look(index, pool, control)
                }
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

    /// When to look next; never where there is no other path.
    fn next_look(&self) -> Option<Instant> {
        let striped = self.paths.len() > 1 && lock(&self.state).close.is_some();
        let every = if striped { LOOK_EVERY_AT_END } else { LOOK_EVERY };
        (self.addresses.len() > 1).then(|| Instant::now() + every)
    }

    /// Looks whether the lane's path still carries what it is given, and leaves it where another one is better; what to say else.
    fn look(&self, index: usize, pool: &Pool, control: &dyn Control) -> Option<Message> {
        let underway = control.underway();
        let now = Instant::now();
        let mut state = lock(&self.state);
        let others =
            state.lanes.iter().enumerate().filter(|(other, _)| *other != index).filter_map(|(_, lane)| {
                let live = lane.live.as_ref()?;
                live.watch.grew()
            });
        let others = others.max();
        let live = state.lanes.get_mut(index)?.live.as_mut()?;
        if live.sending.outcome().is_some() {
            return None;
        }
        let seen = Seen {
            underway,
            sent_bytes: live.sending.sent_bytes(),
            landed_bytes: live.sending.received_bytes(),
            owed: live.sending.owed(),
            heard: live.sending.heard(),
            others,
        };
        let verdict = live.watch.look(seen, now);
        let on_way_bytes = underway.map_or(seen.sent_bytes - seen.landed_bytes, |underway| underway.bytes);
        let left = match verdict {
            Verdict::Ask => return Some(Message::Ping),
            Verdict::Silent if pool.other(&self.addresses, &live.address) => Left::Silent,
            Verdict::Fine if self.goes(index, &state, on_way_bytes) => Left::Slow,
            Verdict::Silent | Verdict::Fine => return live_tick(&mut state.lanes[index], now),
        };
        let lane = &mut state.lanes[index];
        (lane.left, lane.moved) = (Some(left), lane.moved || left == Left::Slow);
        if let Some(live) = &mut lane.live {
            live.sending.lost(match left {
                Left::Silent => "nothing comes back by this path",
                Left::Slow => "another path is faster",
            });
        }
        drop(state);
        control.abandon();
        None
    }

    /// Whether, at the end of the push, the lane takes what it has under way to another path, see [`moves`].
    fn goes(&self, index: usize, state: &State, on_way_bytes: u64) -> bool {
        let lane = &state.lanes[index];
        let Some(live) = lane.live.as_ref().filter(|_| state.close.is_some() && state.queue.is_empty())
        else {
            return false;
        };
        let elsewhere = |(_, lane): &(usize, &Lane)| {
            lane.live.as_ref().is_some_and(|other| other.address != live.address)
        };
        let lanes = state.lanes.iter().enumerate();
        let loads = lanes.filter(elsewhere).filter_map(|(other, lane)| self.load(other, lane));
        let best = loads.max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s));
        let own: Option<Load> = self.load(index, lane);
        !lane.moved && own.zip(best).is_some_and(|(own, best)| moves(own, on_way_bytes, best))
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

/// What is due beside a look.
fn live_tick(lane: &mut Lane, now: Instant) -> Option<Message> {
    lane.live.as_mut()?.sending.tick(now)
}
