//! How many lines are answered at once: as many as the cluster holds with one or two more waiting in the router's queue, so that
//! no capacity is idle; and fewer, down to cutting lines off, when interactive requests wait. Used by `drive`; looked after by
//! `run`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::inference::Load;

/// Lines at once at the most: each costs some memory here and a connection's worth of work.
const LINES_MAX: usize = 1024;

/// Lines at once before anything is known.
const LINES_FIRST: usize = 2;

/// Lines that wait in the router's queue while the cluster is full.
const QUEUED: usize = 1;

/// Permission to have lines answered.
pub struct Pace {
    places: Arc<Semaphore>,
    state: Mutex<State>,
    /// Places to take away as soon as they are given back.
    owed: Arc<AtomicUsize>,
    next: AtomicU64,
}

struct State {
    target: usize,
    /// Interactive requests were waiting at the last look, too.
    waited: bool,
    /// Lines that are being answered, oldest first.
    running: BTreeMap<u64, CancellationToken>,
}

/// A line may be answered; given back when dropped.
pub struct Place {
    /// The line is to stop and try again later: others need the room.
    pub yields: CancellationToken,
    number: u64,
    permit: Option<OwnedSemaphorePermit>,
    pace: Arc<Pace>,
}

impl Default for Pace {
    fn default() -> Pace {
        let state = State { target: LINES_FIRST, waited: false, running: BTreeMap::new() };
        Pace {
            places: Arc::new(Semaphore::new(LINES_FIRST)),
            state: Mutex::new(state),
            owed: Arc::default(),
            next: AtomicU64::new(0),
        }
    }
}

impl Pace {
    /// Waits for a place. First come, first served, so batches take turns.
    pub async fn place(self: &Arc<Self>) -> Place {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.places).acquire_owned().await.ok();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let yields = CancellationToken::new();
        self.lock().running.insert(number, yields.clone());
        Place { yields, number, permit, pace: Arc::clone(self) }
    }

    /// To be called every moment with what the cluster has to do.
    pub fn adjust(&self, load: Load) {
        let mut state = self.lock();
        let running = state.running.len();
        let (target, stop) = next(state.target, running, load, state.waited);
        state.waited = load.waiting > 0;
        // Those that have done the least: their work is the least to do again.
        state.running.values().rev().take(stop).for_each(CancellationToken::cancel);
        let before = std::mem::replace(&mut state.target, target);
        if target > before {
            let mut more = target - before;
            let take = |owed: usize| Some(owed - owed.min(more));
            if let Ok(owed) = self.owed.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
                more -= owed.min(more);
            }
            self.places.add_permits(more);
        } else {
            let less = before - target;
            let taken = self.places.forget_permits(less);
            self.owed.fetch_add(less - taken, Ordering::AcqRel);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Under the lock, so that `adjust` does not miss what comes back.
        let mut state = self.pace.lock();
        state.running.remove(&self.number);
        let owes = |owed: usize| owed.checked_sub(1);
        if self.pace.owed.fetch_update(Ordering::AcqRel, Ordering::Acquire, owes).is_ok()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
        }
    }
}

/// Lines at once from now on, and how many of those that run are to stop. `waited`: interactive requests waited at the last
/// look already; a request that is placed at once is never seen waiting twice.
fn next(target: usize, running: usize, load: Load, waited: bool) -> (usize, usize) {
    let (queued, waiting) = (load.queued as usize, load.waiting as usize);
    if waiting > 0 {
        let stop = if waited { waiting.min(running) } else { 0 };
        return (running.saturating_sub(waiting).max(1), stop);
    }
    if queued > QUEUED {
        // Those that wait are ours: they stay, but nobody follows them.
        return ((running + QUEUED).saturating_sub(queued).max(1), 0);
    }
    if queued == 0 && running >= target {
        return ((target + target.div_ceil(4)).min(LINES_MAX), 0);
    }
    (target, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(queued: u32, waiting: u32) -> Load {
        Load { running: 0, queued, waiting }
    }

    /// A cluster that holds 100: the pace finds it, holds it, and leaves at most a few waiting.
    #[test]
    fn it_finds_what_the_cluster_holds() {
        let (mut target, mut most) = (LINES_FIRST, 0);
        for look in 0..200 {
            // Everything that may run does, at once; the queue is what the cluster does not hold.
            let queued = target.saturating_sub(100);
            target = next(target, target, load(queued as u32, 0), false).0;
            if look > 20 {
                most = most.max(target);
                assert!(target >= 100, "idle at look {look}: {target}");
            }
        }
        assert!(most <= 130, "{most}");
    }

    #[test]
    fn interactive_requests_go_first() {
        // Seen once, it may have been on its way; nobody new begins.
        assert_eq!(next(50, 50, load(2, 2), false), (48, 0));
        // Still there: as many make room.
        assert_eq!(next(48, 50, load(2, 2), true), (48, 2));
        assert_eq!(next(5, 1, load(9, 9), true), (1, 1));
        assert_eq!(next(5, 0, load(9, 9), true), (1, 0));
        // A batch that waits for its inputs asks for no more.
        assert_eq!(next(8, 3, load(0, 0), false), (8, 0));
    }

    #[tokio::test]
    async fn places_follow_the_target() {
        let pace = Arc::new(Pace::default());
        let (first, second) = (pace.place().await, pace.place().await);
        assert_eq!(pace.places.available_permits(), 0);
        pace.adjust(load(0, 0));
        assert_eq!(pace.places.available_permits(), 1);
        let third = pace.place().await;
        // Two wait: the youngest two stop, and their places are gone with them.
        pace.adjust(load(2, 2));
        pace.adjust(load(2, 2));
        assert_eq!([&first, &second, &third].map(|place| place.yields.is_cancelled()), [false, true, true]);
        drop((second, third));
        assert_eq!((pace.places.available_permits(), pace.lock().target), (0, 1));
        drop(first);
        assert_eq!(pace.places.available_permits(), 1);
    }
}
