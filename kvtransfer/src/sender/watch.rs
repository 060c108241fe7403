//! Whether a lane's path still carries what it is given: what the system tells of its bytes, and what the receiver says. A path that
//! has fallen silent is left within a fraction of a second, where TCP alone would wait for many. Pure; stepped by the lanes of
//! [`super::pair::Pair`] and by the simulator.

use std::time::{Duration, Instant};

use crate::wire::Underway;

/// Silence of the other end's system on what was sent to it again. Below Linux's shortest retransmission timeout, 200 ms, there is
/// nothing to judge by.
pub const SILENT: Duration = Duration::from_millis(300);

/// Where the system does not tell: nothing has moved for so long, while another path to the same receiver does.
const STUCK: Duration = Duration::from_secs(1);

/// Another path moves: it did so within this time.
const MOVES: Duration = Duration::from_millis(250);

/// A receiver that owes an answer and has said nothing for so long is asked, so that there is something to be answered.
const ASK: Duration = Duration::from_millis(150);

/// Time constant of the measured rate.
const RATE: Duration = Duration::from_millis(30);

/// Less time under way than this says nothing of a rate.
const RATE_MIN: Duration = Duration::from_millis(4);

/// A lane as it is at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// What the system tells.
    pub underway: Option<Underway>,
    /// Payload sent on the lane.
    pub sent_bytes: u64,
    /// Of it, what the receiver has reported as landed.
    pub landed_bytes: u64,
    /// The receiver owes something: word of bytes that are sent, or the acknowledgement.
    pub owed: bool,
    /// When the receiver last said something.
    pub heard: Instant,
    /// When another lane to the same receiver last moved.
    pub others: Option<Instant>,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Fine,
    /// Ask the receiver for a sign of life.
    Ask,
    /// The path is silent.
    Silent,
}

/// One connection, looked at now and then.
#[derive(Debug)]
pub struct Watch {
    /// The last look: when, what had been carried, and whether there was more on its way.
    last: Option<(Instant, u64, bool)>,
    /// When what has been carried last grew, or there was nothing to carry.
    moved: Instant,
    /// When it last grew.
    grew: Option<Instant>,
    asked: Instant,
    /// The last look found it silent.
    suspect: bool,
    /// Bytes carried and the time for it, of late.
    carried: f64,
    seconds: f64,
}

impl Watch {
    /// A connection as it begins.
    pub fn new(now: Instant) -> Self {
        Watch { last: None, moved: now, grew: None, asked: now, suspect: false, carried: 0.0, seconds: 0.0 }
    }

    /// Bytes per second that the path has carried of late, once known. What fills buffers at the beginning counts, so it is rather
    /// too high at first.
    pub fn bytes_per_s(&self) -> Option<f64> {
        (self.seconds > RATE_MIN.as_secs_f64()).then(|| self.carried / self.seconds)
    }

    /// When it was last seen to have carried something.
    pub fn grew(&self) -> Option<Instant> {
        self.grew
    }

    /// A look at `now`.
    pub fn look(&mut self, seen: Seen, now: Instant) -> Verdict {
        let queued = seen.underway.map_or(seen.sent_bytes - seen.landed_bytes, |underway| underway.bytes);
        // What is being handed over counts as sent already.
        let about = seen.sent_bytes.saturating_sub(queued).max(seen.landed_bytes);
        let carried = seen.underway.and_then(|underway| underway.taken_bytes).unwrap_or(about);
        let busy = queued > 0;
        if let Some((at, before, true)) = self.last {
            let dt = now.saturating_duration_since(at).as_secs_f64();
            let keep = (-dt / RATE.as_secs_f64()).exp();
            self.carried = self.carried * keep + carried.saturating_sub(before) as f64;
            self.seconds = self.seconds * keep + dt;
        }
        if self.last.is_some_and(|(_, before, _)| carried > before) {
            (self.moved, self.grew) = (now, Some(now));
        }
        if !busy {
            self.moved = now;
        }
        self.last = Some((now, carried, busy));
        let silent = match seen.underway.and_then(|underway| underway.unanswered) {
            Some(unanswered) => unanswered >= SILENT && now.saturating_duration_since(seen.heard) >= SILENT,
            None => {
                let told = cfg!(any(target_os = "linux", target_os = "android")) && seen.underway.is_some();
                let others = seen.others.is_some_and(|at| now.saturating_duration_since(at) < MOVES);
                !told && busy && others && now >= self.moved.max(seen.heard) + STUCK
            }
        };
        // Twice in a row: one look may fall between a question and its answer.
        let before = std::mem::replace(&mut self.suspect, silent);
        if silent {
            return if before { Verdict::Silent } else { Verdict::Fine };
        }
        if seen.owed && !busy && now >= seen.heard.max(self.asked) + ASK {
            self.asked = now;
            return Verdict::Ask;
        }
        Verdict::Fine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn seen(heard: Instant) -> Seen {
        Seen { underway: None, sent_bytes: 0, landed_bytes: 0, owed: true, heard, others: None }
    }

    #[test]
    fn silence_is_what_was_asked_again_and_not_answered_in_two_looks() {
        let start = Instant::now();
        let unanswered = |ms: u32| Underway { bytes: 9, unanswered: Some(ms * MS), ..Underway::default() };
        let answered = Underway { bytes: 9, ..Underway::default() };
        let mut watch = Watch::new(start);
        let mut look = |at: u32, underway, heard: u32| {
            let seen = Seen { underway: Some(underway), sent_bytes: 9, ..seen(start + heard * MS) };
            watch.look(seen, start + at * MS)
        };
        assert_eq!(look(250, unanswered(250), 0), Verdict::Fine);
        assert_eq!(look(310, unanswered(310), 0), Verdict::Fine, "the first look");
        assert_eq!(look(320, answered, 0), Verdict::Fine, "an answer");
        assert_eq!(look(700, unanswered(380), 600), Verdict::Fine, "the receiver itself was heard");
        assert_eq!(look(1000, unanswered(680), 600), Verdict::Fine);
        assert_eq!(look(1010, unanswered(690), 600), Verdict::Silent);
    }

    /// Protects: a receiver that takes its time, whose system answers, is not left, however long.
    #[test]
    fn a_slow_receiver_is_not_silent() {
        let start = Instant::now();
        let slow = Seen {
            underway: Some(Underway { bytes: 1 << 20, ..Underway::default() }),
            sent_bytes: 2 << 20,
            others: Some(start),
            ..seen(start)
        };
        if cfg!(any(target_os = "linux", target_os = "android")) {
            let mut watch = Watch::new(start);
            for s in 1..60u32 {
                assert_eq!(watch.look(slow, start + s * 1000 * MS), Verdict::Fine);
            }
        }
        // Where the system does not tell, only another path that moves makes it look so.
        let mut watch_blind = Watch::new(start);
        let blind = Seen { underway: None, ..slow };
        for s in 1..60u32 {
            assert_eq!(watch_blind.look(blind, start + s * 1000 * MS), Verdict::Fine, "{s}");
        }
        let other = |s: u32| Seen { others: Some(start + s * 1000 * MS), ..blind };
        assert_eq!(watch_blind.look(other(60), start + 60_000 * MS), Verdict::Fine);
        assert_eq!(watch_blind.look(other(61), start + 61_000 * MS), Verdict::Silent);
    }

    #[test]
    fn a_receiver_that_owes_an_answer_is_asked_now_and_then() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let idle = Seen { underway: Some(Underway::default()), ..seen(start) };
        let mut asked = |at: u32, owed| watch.look(Seen { owed, ..idle }, start + at * MS) == Verdict::Ask;
        assert!(!asked(100, true) && asked(150, true) && !asked(200, true) && asked(300, true));
        assert!(!asked(900, false));
    }

    #[test]
    fn the_rate_is_that_of_time_under_way() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        assert_eq!(watch.bytes_per_s(), None);
        for at in 0..40u32 {
            // 1 MB each 10 ms, and 5 MB on their way.
            let sent_bytes = u64::from(at) * 1_000_000 + 5_000_000;
            let underway = Some(Underway { bytes: 5_000_000, ..Underway::default() });
            watch.look(Seen { underway, sent_bytes, ..seen(start) }, start + at * 10 * MS);
        }
        let rate = watch.bytes_per_s().unwrap();
        assert!((rate - 1e8).abs() < 1e5, "{rate}");
        // Nothing is under way for a second: that says nothing.
        let idle = Seen { underway: Some(Underway::default()), sent_bytes: 44_000_000, ..seen(start) };
        watch.look(idle, start + 400 * MS);
        watch.look(idle, start + 1400 * MS);
        assert!(watch.bytes_per_s().unwrap() >= rate);
    }
}
