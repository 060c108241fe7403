//! Steps on their way to the device, in their order; owned by the KV store, whose updates they carry.
//!
//! MLX decides whether an update writes in place when its evaluation begins: an array that something under way still reads
//! is copied, the whole cache for one token. So what touches the same arrays is never under way together. A step is evaluated in two
//! halves, each with the caches of its layers: while the second half of one runs the first half of the next begins, so that the
//! device has work when a step ends. What waits begins where the end of what it waits for is seen: in a wait, a look, or the
//! next submission.

use std::collections::VecDeque;

use mlx_rs::{Array, transforms};

use crate::graph::{Failure, available};
use crate::platform;

/// What a submission is known by: they count up from 1.
pub(crate) type Ticket = u64;

/// The caches that an evaluation touches: of all layers, of the first ones of a step, or of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touches {
    All,
    First,
    Second,
}

impl Touches {
    fn meets(self, other: Touches) -> bool {
        self == other || self == Touches::All || other == Touches::All
    }
}

/// One evaluation. It is done when `ends` are, which are none of the cache's own arrays: those have one owner.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) arrays: Vec<Array>,
    pub(crate) ends: Vec<Array>,
    pub(crate) touches: Touches,
}

/// Evaluations under way and evaluations that wait, in one order.
#[derive(Debug, Default)]
pub(crate) struct Line {
    running: VecDeque<Running>,
    waiting: VecDeque<Waiting>,
    submitted: Ticket,
    /// What could not begin, and why.
    failed: Option<(Ticket, String)>,
}

#[derive(Debug)]
struct Running {
    ends: Vec<Array>,
    touches: Touches,
    /// Whether its submission ends with it.
    last: bool,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    part: Part,
    last: bool,
}

impl Line {
    /// Has `parts` evaluated after everything before. Returns without waiting unless a submission waits already.
    pub(crate) fn submit(&mut self, parts: Vec<Part>) -> Ticket {
        if !self.waiting.is_empty() {
            // What it fails with comes out where it is waited for.
            let _ = self.reach(self.submitted);
        }
        self.submitted += 1;
        let (ticket, count) = (self.submitted, parts.len());
        let waiting = |(at, part)| Waiting { ticket, part, last: at + 1 == count };
        self.waiting.extend(parts.into_iter().enumerate().map(waiting));
        self.look();
        ticket
    }

    /// The same beside what is under way: for parts of one step, which touch different arrays. Nothing may wait here.
    pub(crate) fn join(&mut self, arrays: Vec<Array>, ends: Vec<Array>) -> Result<(), Failure> {
        self.submitted += 1;
        let part = Part { arrays, ends, touches: Touches::All };
        self.waiting.push_back(Waiting { ticket: self.submitted, part, last: true });
        self.begin();
        self.reach(self.submitted)
    }

    /// Begins what waits as far as what it waits for has ended.
    pub(crate) fn look(&mut self) {
        while let Some(Waiting { part, .. }) = self.waiting.front() {
            let touches = part.touches;
            let ended = |running: &Running| running.ends.iter().all(available);
            if self.running.iter().any(|running| running.touches.meets(touches) && !ended(running)) {
                return;
            }
            let before = self.running.len();
            self.running.retain(|running| !ended(running));
            if self.running.len() < before {
                platform::let_go(!self.running.is_empty());
            }
            self.begin();
        }
    }

    /// Waits until `ticket` has begun. Errors when it could not, or when what came before it failed.
    pub(crate) fn reach(&mut self, ticket: Ticket) -> Result<(), Failure> {
        while self.waiting.front().is_some_and(|waiting| waiting.ticket <= ticket) {
            let ended = self.make_way();
            self.begin();
            ended?;
        }
        match &self.failed {
            Some((failed, reason)) if *failed == ticket => Err(Failure(reason.clone())),
            _ => Ok(()),
        }
    }

    /// Begins what may begin before the submissions under way have ended, waiting for their first halves.
    pub(crate) fn ahead(&mut self) -> Result<(), Failure> {
        while let Some(Waiting { part, .. }) = self.waiting.front() {
            let touches = part.touches;
            if self.running.iter().any(|running| running.last && running.touches.meets(touches)) {
                break;
            }
            self.make_way()?;
            self.begin();
        }
        Ok(())
    }

    /// Waits until everything has begun.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        self.reach(self.submitted)
    }

    /// Waits for the end of everything.
    pub(crate) fn drain(&mut self) -> Result<(), Failure> {
        self.settle()?;
        self.end(Touches::All)
    }

    /// Waits for what the first that waits must not run beside.
    fn make_way(&mut self) -> Result<(), Failure> {
        match self.waiting.front() {
            Some(Waiting { part, .. }) => self.end(part.touches),
            None => Ok(()),
        }
    }

    /// Waits for the end of what touches the same.
    fn end(&mut self, touches: Touches) -> Result<(), Failure> {
        let (over, left) =
            std::mem::take(&mut self.running).into_iter().partition(|running| running.touches.meets(touches));
        self.running = left;
        let over: VecDeque<Running> = over;
        if over.is_empty() {
            return Ok(());
        }
        let ends: Vec<Array> = over.into_iter().flat_map(|running| running.ends).collect();
        let ended = transforms::eval(&ends);
        platform::let_go(!self.running.is_empty());
        Ok(ended?)
    }

    fn begin(&mut self) {
        let Some(Waiting { ticket, part, last }) = self.waiting.pop_front() else { return };
        let Part { arrays, ends, touches } = part;
        match transforms::async_eval(&arrays) {
            Ok(()) => self.running.push_back(Running { ends, touches, last }),
            Err(error) => self.failed = Some((ticket, Failure::from(error).0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::ops;

    use super::*;
    use crate::kv::tests::alone;

    /// A product that takes milliseconds, and is `x` in the end.
    fn slow(x: f32) -> Array {
        let ones = ops::ones::<f32>(&[1000, 1000]).unwrap();
        ones.matmul(&ones).unwrap().max(None).unwrap().multiply(Array::from_f32(x / 1000.0)).unwrap()
    }

    fn part(array: &Array, touches: Touches) -> Part {
        Part { arrays: vec![array.clone()], ends: vec![array.clone()], touches }
    }

    fn submit(line: &mut Line, x: f32) -> (Ticket, Array) {
        let array = slow(x);
        (line.submit(vec![part(&array, Touches::All)]), array)
    }

    fn value(array: &Array) -> f32 {
        array.try_item_exact::<f32>().unwrap().round()
    }

    /// In order, one at a time, and none is lost when nobody waits for it.
    #[test]
    fn one_runs_and_one_waits() {
        let _alone = alone();
        let mut line = Line::default();
        let all: Vec<_> = (1..=4).map(|x| submit(&mut line, x as f32)).collect();
        assert_eq!(all.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(available(&all[1].1), "the third began before the second had ended");
        assert!(line.waiting.len() <= 1);
        line.reach(4).unwrap();
        assert!(available(&all[2].1));
        line.drain().unwrap();
        assert!(line.running.is_empty() && line.waiting.is_empty());
        for (at, (_, array)) in all.iter().enumerate() {
            assert_eq!(value(array), (at + 1) as f32);
        }
    }

    /// What waits begins when somebody looks after the end of the one before.
    #[test]
    fn looking_begins_the_next() {
        let _alone = alone();
        let mut line = Line::default();
        let (_, first) = submit(&mut line, 1.0);
        let (_, second) = submit(&mut line, 2.0);
        first.eval().unwrap();
        line.look();
        assert!(line.waiting.is_empty());
        second.eval().unwrap();
    }

    /// The first half of a step begins beside the second of the one before, and no sooner than its own caches are free; the
    /// second half waits for the end, and what touches everything for both.
    #[test]
    fn halves_overlap_where_they_touch_different_caches() {
        let _alone = alone();
        let mut line = Line::default();
        // Ended when somebody evaluates the gate.
        let gated = |touches| {
            let gate = slow(1.0);
            (Part { arrays: vec![slow(2.0)], ends: vec![gate.clone()], touches }, gate)
        };
        let halves = |line: &mut Line| {
            let ((first, first_gate), (second, second_gate)) =
                (gated(Touches::First), gated(Touches::Second));
            (line.submit(vec![first, second]), first_gate, second_gate)
        };
        let (one, first, second) = halves(&mut line);
        assert!(line.waiting.is_empty(), "halves of one step follow each other without a wait");
        let (two, ..) = halves(&mut line);
        assert_eq!(line.waiting.len(), 2);
        line.reach(one).unwrap();
        line.ahead().unwrap();
        assert!(available(&first), "its caches were in use");
        assert!(!available(&second), "it waited for the end of the step before");
        assert_eq!(line.waiting.len(), 1);
        assert_eq!((line.waiting[0].ticket, line.waiting[0].part.touches), (two, Touches::Second));
        second.eval().unwrap();
        line.look();
        assert!(line.waiting.is_empty());
        let (whole, gate) = gated(Touches::All);
        let whole = line.submit(vec![whole]);
        line.ahead().unwrap();
        assert_eq!(line.waiting.len(), 1, "one that touches all caches has begun beside a half");
        line.reach(whole).unwrap();
        assert!(line.waiting.is_empty() && line.running.len() == 1 && !available(&gate));
        line.drain().unwrap();
        assert!(line.running.is_empty() && available(&gate));
    }
}
