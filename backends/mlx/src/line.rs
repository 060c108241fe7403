//! Steps on their way to the device, in their order; owned by the KV store, whose updates they carry.
//!
//! MLX decides whether an update writes in place when its evaluation begins: an array that something under way still reads
//! is copied, the whole cache for one token. So one evaluation is under way at a time. The next is recorded meanwhile and
//! waits here; it begins where the end of the one before is seen: in a wait, a look, or the next submission.

use mlx_rs::{Array, transforms};

use crate::graph::{Failure, available};
use crate::platform;

/// What a submission is known by: they count up from 1.
pub(crate) type Ticket = u64;

/// At most one evaluation under way and one that waits.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// There when what has begun last is done.
    running: Vec<Array>,
    next: Option<Waiting>,
    submitted: Ticket,
    begun: Ticket,
    /// What could not begin, and why.
    failed: Option<(Ticket, String)>,
}

#[derive(Debug)]
struct Waiting {
    arrays: Vec<Array>,
    ends: Vec<Array>,
}

impl Line {
    /// Has `arrays` evaluated after everything before. They are done when `ends` are, which are none of the cache's
    /// own arrays: those have one owner. Returns without waiting unless two are under way already.
    pub(crate) fn submit(&mut self, arrays: Vec<Array>, ends: Vec<Array>) -> Ticket {
        if self.next.is_some() {
            // What it fails with comes out where it is waited for.
            let _ = self.reach(self.submitted);
        }
        self.submitted += 1;
        self.next = Some(Waiting { arrays, ends });
        self.look();
        self.submitted
    }

    /// The same beside what is under way: for parts of one step, which touch different arrays. Nothing may wait here.
    pub(crate) fn join(&mut self, arrays: Vec<Array>, ends: Vec<Array>) -> Result<(), Failure> {
        self.submitted += 1;
        self.next = Some(Waiting { arrays, ends });
        self.begin();
        self.reach(self.submitted)
    }

    /// Begins what waits if what is under way has ended.
    pub(crate) fn look(&mut self) {
        if self.next.is_some() && self.running.iter().all(available) {
            if !self.running.is_empty() {
                self.running.clear();
                platform::let_go();
            }
            self.begin();
        }
    }

    /// Waits until `ticket` has begun. Errors when it could not, or when what came before it failed.
    pub(crate) fn reach(&mut self, ticket: Ticket) -> Result<(), Failure> {
        while self.begun < ticket && self.next.is_some() {
            let ended = self.end();
            self.begin();
            ended?;
        }
        match &self.failed {
            Some((failed, reason)) if *failed == ticket => Err(Failure(reason.clone())),
            _ => Ok(()),
        }
    }

    /// Waits until everything has begun.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        self.reach(self.submitted)
    }

    /// Waits for the end of everything.
    pub(crate) fn drain(&mut self) -> Result<(), Failure> {
        self.settle()?;
        self.end()
    }

    fn end(&mut self) -> Result<(), Failure> {
        if self.running.is_empty() {
            return Ok(());
        }
        let ended = transforms::eval(&std::mem::take(&mut self.running));
        platform::let_go();
        Ok(ended?)
    }

    fn begin(&mut self) {
        let Some(Waiting { arrays, ends }) = self.next.take() else { return };
        self.begun += 1;
        match transforms::async_eval(&arrays) {
            Ok(()) => self.running = ends,
            Err(error) => self.failed = Some((self.begun, Failure::from(error).0)),
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

    fn submit(line: &mut Line, x: f32) -> (Ticket, Array) {
        let array = slow(x);
        (line.submit(vec![array.clone()], vec![array.clone()]), array)
    }

    /// In order, one at a time, and none is lost when nobody waits for it.
    #[test]
    fn one_runs_and_one_waits() {
        let _alone = alone();
        let mut line = Line::default();
        let all: Vec<_> = (1..=4).map(|x| submit(&mut line, x as f32)).collect();
        assert_eq!(all.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(line.begun >= 3, "the third began only when the second had ended: {}", line.begun);
        assert!(available(&all[1].1) || line.begun < 4);
        line.reach(4).unwrap();
        assert!(available(&all[2].1));
        line.drain().unwrap();
        assert!(line.running.is_empty() && line.next.is_none());
        for (at, (_, array)) in all.iter().enumerate() {
            assert_eq!(array.try_item_exact::<f32>().unwrap().round(), (at + 1) as f32);
        }
    }

    /// What waits begins when somebody looks after the end of the one before.
    #[test]
    fn looking_begins_the_next() {
        let _alone = alone();
        let mut line = Line::default();
        let (_, first) = submit(&mut line, 1.0);
        let (ticket, second) = submit(&mut line, 2.0);
        first.eval().unwrap();
        line.look();
        assert_eq!(line.begun, ticket);
        second.eval().unwrap();
    }
}
