//! Worker threads that share the tasks of one operation. Between operations workers look for more for a fraction of a
//! millisecond, then sleep: an idle server uses no processor, and being woken takes as long as a small product. After some
//! microseconds they give way to whoever else wants the processor. Used by every operation of a step.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cores;
use crate::memory::Memory;

/// Looks before a thread gives way between them: 10 to 40 us, longer than most gaps between the operations of a layer.
const SPINS: u32 = 1000;
/// The same from then on: about a microsecond.
const SPINS_GIVING_WAY: u32 = 50;
/// Longest wait without sleep: longer than what one thread does alone within a step, such as attention to a short cache.
const AWAKE: Duration = Duration::from_micros(150);
/// Giving way took so long: somebody else has something to do here.
const WANTED: Duration = Duration::from_micros(50);
/// Multiply-adds from which on others help: some 10 us, several times what it takes to meet.
const WORK_SHARED_MIN: usize = 128 * 1024;
/// Tasks of one job: fits the packed ticket.
const TASKS_MAX: u64 = (1 << 31) - 1;

/// Threads that run tasks together with the caller.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// What a task may use besides its arguments: memory of its thread.
pub(crate) struct Scratch<'a>(&'a RefCell<Option<Memory>>);

impl Scratch<'_> {
    /// At least `len` floats, aligned to a cache line, contents arbitrary, until the task ends or asks again.
    pub(crate) fn floats(&self, len: usize) -> *mut f32 {
        let mut memory = self.0.borrow_mut();
        let bytes = len * size_of::<f32>();
        if memory.as_ref().is_none_or(|held| held.bytes() < bytes) {
            *memory = None;
            let grown = bytes.next_power_of_two();
            *memory = Some(Memory::zeroed(grown).unwrap_or_else(|error| panic!("scratch: {error}")));
        }
        memory.as_ref().map_or(std::ptr::dangling_mut(), |held| held.at(0).cast())
    }
}

thread_local! {
    static SCRATCH: RefCell<Option<Memory>> = const { RefCell::new(None) };
}

type Job<'a> = dyn Fn(usize, &Scratch<'_>) + Sync + 'a;

#[derive(Debug)]
struct Shared {
    /// `tasks << 32 | next`: a task is taken by counting up; both halves belong to the same job.
    ticket: AtomicU64,
    /// The job's closure, as a `*const &Job`. Valid while a taken task of it is unfinished.
    job: AtomicPtr<()>,
    done: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    caller_sleeps: AtomicBool,
    finish: Mutex<()>,
    finished: Condvar,
    /// One job at a time.
    publish: Mutex<()>,
}

impl Pool {
    /// `threads` in all, the caller included; `0`: as many as this process may use, by its cores and its cgroup's share of
    /// time. `pin`: each stays on a core of its own, as far as there are so many; the caller too.
    pub(crate) fn new(threads: usize, pin: bool) -> Self {
        let usable = || std::thread::available_parallelism().map_or(1, |count| count.get());
        let threads = if threads == 0 { usable() } else { threads };
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
            finish: Mutex::new(()),
            finished: Condvar::new(),
            publish: Mutex::new(()),
        });
        let own = if pin { cores::usable() } else { Vec::new() };
        let worker = |at: usize| {
            let shared = shared.clone();
            let core = own.get(at).copied();
            // Fewer threads than wished only make steps slower.
            let spawned = std::thread::Builder::new().name(format!("cpu-{at}")).spawn(move || {
                core.into_iter().for_each(cores::stay);
                shared.work();
            });
            spawned.ok()
        };
        own.first().copied().into_iter().for_each(cores::stay);
        let workers = (1..threads).filter_map(worker).collect();
        Pool { shared, workers }
    }

    /// Threads that share a job.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The task that a thread runs after `task`, as long as threads take turns.
    pub(crate) fn next(&self, task: usize) -> usize {
        task + self.threads()
    }

    /// Calls `job` with every item and its number, each once, on any thread; otherwise as [`Pool::run`].
    pub(crate) fn each<T: Send>(&self, items: &mut [T], work: usize, job: impl Fn(usize, &mut T) + Sync) {
        struct Items<T>(*mut T);
        // SAFETY: every task has its own item, and items may go to other threads.
        unsafe impl<T: Send> Sync for Items<T> {}
        impl<T> Items<T> {
            fn at(&self, at: usize) -> *mut T {
                self.0.wrapping_add(at)
            }
        }
        let (count, items) = (items.len(), Items(items.as_mut_ptr()));
        // SAFETY: task `at` of `count` is the only one with this item, which outlives the run.
        self.run(count, work, |at, _| job(at, unsafe { &mut *items.at(at) }));
    }

    /// Calls `job(task, scratch)` for every task in `[0, tasks)`, each once, on any thread; returns when all are done.
    /// `work` is the multiply-adds of all tasks, or what takes as long: where it is little, the caller does it alone.
    pub(crate) fn run(&self, tasks: usize, work: usize, job: impl Fn(usize, &Scratch<'_>) + Sync) {
        if tasks == 0 {
            return;
        }
        if tasks == 1 || work < WORK_SHARED_MIN || self.workers.is_empty() {
            SCRATCH.with(|scratch| (0..tasks).for_each(|task| job(task, &Scratch(scratch))));
            return;
        }
        assert!(tasks as u64 <= TASKS_MAX, "{tasks} tasks in one job");
        let shared = &*self.shared;
        let _one = lock(&shared.publish);
        let job: &Job<'_> = &job;
        shared.done.store(0, SeqCst);
        shared.panicked.store(false, SeqCst);
        shared.job.store((&raw const job).cast_mut().cast(), SeqCst);
        shared.ticket.store((tasks as u64) << 32, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            let _held = lock(&shared.sleep);
            shared.wake.notify_all();
        }
        while shared.take_one() {}
        shared.wait_done(tasks);
        if shared.panicked.load(SeqCst) {
            resume_unwind(Box::new("a worker's task panicked"));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        {
            let _held = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so it always ends in order.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn ready(&self) -> bool {
        let ticket = self.ticket.load(SeqCst);
        (ticket & 0xffff_ffff) < ticket >> 32
    }

    /// Takes and runs one task; false when none is left.
    fn take_one(&self) -> bool {
        if !self.ready() {
            return false;
        }
        let ticket = self.ticket.fetch_add(1, SeqCst);
        let (task, tasks) = (ticket & 0xffff_ffff, ticket >> 32);
        if task >= tasks {
            return false;
        }
        // SAFETY: the ticket just taken belongs to the job published last, and `run` returns (ending the life of the
        // closure) only after this task has counted itself done below.
        let job: &Job<'_> = unsafe { *self.job.load(SeqCst).cast::<&Job<'_>>() };
        let ran =
            SCRATCH.with(|scratch| catch_unwind(AssertUnwindSafe(|| job(task as usize, &Scratch(scratch)))));
        if ran.is_err() {
            self.panicked.store(true, SeqCst);
        }
        let done = self.done.fetch_add(1, SeqCst) + 1;
        if done as u64 == tasks && self.caller_sleeps.load(SeqCst) {
            let _held = lock(&self.finish);
            self.finished.notify_all();
        }
        true
    }

    fn wait_done(&self, tasks: usize) {
        let done = || self.done.load(SeqCst) == tasks;
        if awake_until(done) {
            return;
        }
        self.caller_sleeps.store(true, SeqCst);
        let mut held = lock(&self.finish);
        while !done() {
            held = self.finished.wait(held).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.caller_sleeps.store(false, SeqCst);
    }

    fn work(&self) {
        loop {
            let ready = awake_until(|| self.ready() || self.stop.load(SeqCst));
            if self.stop.load(SeqCst) {
                return;
            }
            if ready {
                self.take_one();
            } else {
                self.sleep_until_ready();
            }
        }
    }

    fn sleep_until_ready(&self) {
        let mut held = lock(&self.sleep);
        self.sleepers.fetch_add(1, SeqCst);
        // `run` publishes before it looks for sleepers, we count ourselves before looking: one of both sees the other.
        while !self.ready() && !self.stop.load(SeqCst) {
            held = self.wake.wait(held).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }
}

/// Waits without sleep, as long as that is worth it and nobody else wants the processor; whether it was until `ready`.
fn awake_until(ready: impl Fn() -> bool) -> bool {
    let mut looks = SPINS;
    let begun = Instant::now();
    loop {
        for _ in 0..looks {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        let now = Instant::now();
        if now - begun > AWAKE {
            return false;
        }
        std::thread::yield_now();
        if now.elapsed() > WANTED {
            return ready();
        }
        looks = SPINS_GIVING_WAY;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every task of many small jobs runs exactly once, however the threads meet.
    #[test]
    fn each_task_runs_once() {
        let pool = Pool::new(4, false);
        for tasks in (0..2000).map(|round| round % 37) {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, usize::MAX, |task, _| {
                counts[task].fetch_add(1, SeqCst);
            });
            assert!(counts.iter().all(|count| count.load(SeqCst) == 1), "{tasks} tasks: {counts:?}");
        }
    }

    /// Two owners of one pool do not mix their jobs.
    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(3, false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let sum = AtomicUsize::new(0);
                        pool.run(10, usize::MAX, |task, _| {
                            sum.fetch_add(task, SeqCst);
                        });
                        assert_eq!(sum.load(SeqCst), 45);
                    }
                });
            }
        });
    }

    /// A panic in a task reaches the caller, and the pool still works.
    #[test]
    fn panics_come_out() {
        let pool = Pool::new(2, false);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, usize::MAX, |task, _| assert!(task != 5, "task 5"))
        }));
        assert!(ran.is_err());
        pool.run(8, usize::MAX, |_, _| {});
    }
}
