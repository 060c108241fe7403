//! What the ranks of a group that sums by NCCL agree on before a step that generates goes to their devices: whether it is
//! queued call by call, captured, or replayed. NCCL wants that to be the same on all ranks, and the graphs of one replay to
//! be captured together. Whether a rank can is its own matter (memory that moved, a capture that failed), so each votes, rank
//! 0 counts, and what comes out is a function of the votes alone.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use backend::{BackendError, Peers};

use crate::driver::Driver;

/// `kind, number, fingerprint`, little endian.
const VOTE_BYTES: usize = 17;
/// `kind, number`, little endian.
const VERDICT_BYTES: usize = 9;

/// What one rank could do with its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    /// Queue it only.
    Queue,
    /// Capture it: it has been queued before. With a fingerprint of its sums.
    Capture(u64),
    /// Replay the graph of this number. With a fingerprint of its sums.
    Replay(u64, u64),
}

/// What all ranks do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Queue,
    /// The graph has this number.
    Capture(u64),
    Replay(u64),
    /// This rank sums other things than rank 0.
    Apart(usize),
}

/// The votes of a group's steps, one after the other.
pub(crate) struct Ballot {
    peers: Rc<RefCell<Peers>>,
    /// Graphs so far, as rank 0 counts.
    numbers: Cell<u64>,
    stage: Cell<Stage>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nobody waits for this rank's vote.
    Over,
    /// A step has begun, and this rank has not voted.
    Open,
    /// It has, and not yet heard what comes out.
    Voted,
}

impl Vote {
    fn bytes(self) -> [u8; VOTE_BYTES] {
        let (kind, number, sums) = match self {
            Vote::Queue => (0, 0, 0),
            Vote::Capture(sums) => (1, 0, sums),
            Vote::Replay(number, sums) => (2, number, sums),
        };
        let mut bytes = [kind; VOTE_BYTES];
        bytes[1..9].copy_from_slice(&u64::to_le_bytes(number));
        bytes[9..].copy_from_slice(&u64::to_le_bytes(sums));
        bytes
    }

    fn of(bytes: &[u8; VOTE_BYTES]) -> Self {
        match (bytes[0], word(&bytes[1..9]), word(&bytes[9..])) {
            (1, _, sums) => Vote::Capture(sums),
            (2, number, sums) => Vote::Replay(number, sums),
            _ => Vote::Queue,
        }
    }

    fn sums(self) -> Option<u64> {
        match self {
            Vote::Queue => None,
            Vote::Capture(sums) | Vote::Replay(_, sums) => Some(sums),
        }
    }
}

impl Verdict {
    fn bytes(self) -> [u8; VERDICT_BYTES] {
        let (kind, number) = match self {
            Verdict::Queue => (0, 0),
            Verdict::Capture(number) => (1, number),
            Verdict::Replay(number) => (2, number),
            Verdict::Apart(rank) => (3, rank as u64),
        };
        let mut bytes = [kind; VERDICT_BYTES];
        bytes[1..].copy_from_slice(&u64::to_le_bytes(number));
        bytes
    }

    fn of(bytes: &[u8; VERDICT_BYTES]) -> Self {
        match (bytes[0], word(&bytes[1..])) {
            (1, number) => Verdict::Capture(number),
            (2, number) => Verdict::Replay(number),
            (3, rank) => Verdict::Apart(rank as usize),
            _ => Verdict::Queue,
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// The votes by rank; a graph that is captured gets the number `next`.
fn count(votes: &[Vote], next: u64) -> Verdict {
    let sums: Vec<Option<u64>> = votes.iter().map(|vote| vote.sums()).collect();
    if sums.contains(&None) {
        return Verdict::Queue;
    }
    if let Some(rank) = sums.iter().position(|other| *other != sums[0]) {
        return Verdict::Apart(rank);
    }
    match votes.first() {
        Some(first @ Vote::Replay(number, _)) if votes.iter().all(|vote| vote == first) => {
            Verdict::Replay(*number)
        }
        _ => Verdict::Capture(next),
    }
}

impl Ballot {
    pub(crate) fn new(peers: Rc<RefCell<Peers>>) -> Self {
        Ballot { peers, numbers: Cell::new(0), stage: Cell::new(Stage::Over) }
    }

    /// A step begins, on all ranks.
    pub(crate) fn open(&self) {
        self.stage.set(Stage::Open);
    }

    /// This rank's vote, and what comes out.
    pub(crate) fn cast<D: Driver>(&self, driver: &D, vote: Vote) -> Result<Verdict, BackendError> {
        let voted = self.stage.replace(Stage::Over) == Stage::Voted;
        driver.go_on();
        let mut peers = self.peers.borrow_mut();
        if peers.rank() != 0 {
            if !voted {
                peers.give(&vote.bytes())?;
            }
            let mut told = [0; VERDICT_BYTES];
            peers.hear(&mut told)?;
            return Ok(Verdict::of(&told));
        }
        let mut given = vec![[0; VOTE_BYTES]; peers.world()];
        given[0] = vote.bytes();
        let places = given.iter_mut().enumerate().skip(1).map(|(rank, bytes)| (rank, &mut bytes[..]));
        peers.take(places.collect())?;
        let votes: Vec<Vote> = given.iter().map(Vote::of).collect();
        let verdict = count(&votes, self.numbers.get());
        if let Verdict::Capture(number) = verdict {
            self.numbers.set(number + 1);
        }
        peers.tell(&verdict.bytes())?;
        Ok(verdict)
    }

    /// Votes for queueing before the list is complete: this rank is about to wait for its device, or for other ranks.
    pub(crate) fn decline<D: Driver>(&self, driver: &D) -> Result<(), BackendError> {
        if self.stage.get() != Stage::Open {
            return Ok(());
        }
        let rank = self.peers.borrow().rank();
        if rank == 0 {
            // The others only learn it from this rank; they vote without waiting for it.
            return self.cast(driver, Vote::Queue).map(|_| ());
        }
        self.peers.borrow_mut().give(&Vote::Queue.bytes())?;
        self.stage.set(Stage::Voted);
        Ok(())
    }

    /// Comes to the end of a vote for a list that was queued, or never written.
    pub(crate) fn settle<D: Driver>(&self, driver: &D) -> Result<(), BackendError> {
        match self.stage.get() {
            Stage::Over => Ok(()),
            Stage::Open | Stage::Voted => self.cast(driver, Vote::Queue).map(|_| ()),
        }
    }

    /// Whether all ranks have captured graph `number`.
    pub(crate) fn all_have<D: Driver>(
        &self,
        driver: &D,
        number: u64,
        captured: bool,
    ) -> Result<bool, BackendError> {
        self.open();
        let vote = if captured { Vote::Replay(number, 0) } else { Vote::Queue };
        Ok(self.cast(driver, vote)? == Verdict::Replay(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All replay the same graph, or all capture one, or all queue.
    #[test]
    fn votes_come_to_one_thing() {
        use Vote::*;
        for (votes, verdict) in [
            (vec![Replay(4, 9), Replay(4, 9), Replay(4, 9)], Verdict::Replay(4)),
            // Another graph, or none: all capture anew.
            (vec![Replay(4, 9), Replay(3, 9)], Verdict::Capture(7)),
            (vec![Replay(4, 9), Capture(9)], Verdict::Capture(7)),
            (vec![Capture(9), Capture(9)], Verdict::Capture(7)),
            // One that cannot decides for all, whatever the others sum.
            (vec![Replay(4, 9), Queue, Replay(4, 9)], Verdict::Queue),
            (vec![Queue, Capture(9), Capture(8)], Verdict::Queue),
            (vec![Capture(9), Capture(9), Capture(8)], Verdict::Apart(2)),
            (vec![Replay(4, 9), Replay(4, 8)], Verdict::Apart(1)),
        ] {
            assert_eq!(count(&votes, 7), verdict, "{votes:?}");
        }
    }

    #[test]
    fn votes_and_verdicts_travel() {
        for vote in [Vote::Queue, Vote::Capture(u64::MAX), Vote::Replay(1 << 40, 3)] {
            assert_eq!(Vote::of(&vote.bytes()), vote);
        }
        for verdict in [Verdict::Queue, Verdict::Capture(5), Verdict::Replay(u64::MAX), Verdict::Apart(3)] {
            assert_eq!(Verdict::of(&verdict.bytes()), verdict);
        }
    }
}
