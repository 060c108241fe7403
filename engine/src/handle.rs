//! The handle that a node's services hold: jobs go in, events come out. It stays valid while the group behind it is
//! lost and met anew; meanwhile it refuses.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc as channel, oneshot};

use crate::request::{Event, Job, JobError, Refusal, Report};
use crate::tp::plan::Notice;
use crate::tp::{Frame, TpError};

/// What the runner's thread is told.
pub(crate) enum Command {
    Submit {
        id: u64,
        job: Box<Job>,
        events: channel::UnboundedSender<Event>,
        arrived: Instant,
    },
    Cancel(u64),
    Probe(oneshot::Sender<Result<Duration, JobError>>),
    /// From this rank's own transfers and store, in the group of `epoch`.
    Notice {
        epoch: u64,
        notice: Notice,
    },
    /// From the link to a rank of the group of `epoch`; an error is the link's last word.
    Frame {
        epoch: u64,
        rank: usize,
        frame: Result<Frame, TpError>,
    },
    /// Only wakes the runner, which then looks at the flags.
    Wake,
}

/// Whether jobs are taken on.
enum Gate {
    Shut(String),
    Open,
}

struct Shared {
    commands: mpsc::Sender<Command>,
    next_job: AtomicU64,
    jobs: AtomicUsize,
    gate: Mutex<Gate>,
    draining: AtomicBool,
    stopping: AtomicBool,
    report: Mutex<Report>,
}

/// Takes jobs. A clone is another handle on the same engine.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// The runner's end of an [`Engine`].
pub struct Commands {
    pub(crate) receiver: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
}

/// Events of one job. Dropping it cancels the job at the next step.
pub struct Events {
    receiver: channel::UnboundedReceiver<Event>,
    job: u64,
    ended: bool,
    shared: Arc<Shared>,
}

/// A handle and the runner's end of it. Jobs are refused until a runner leads.
pub fn engine() -> (Engine, Commands) {
    let (sender, receiver) = mpsc::channel();
    let shared = Arc::new(Shared {
        commands: sender,
        next_job: AtomicU64::new(1),
        jobs: AtomicUsize::new(0),
        gate: Mutex::new(Gate::Shut("engine is starting".into())),
        draining: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
        report: Mutex::new(Report::default()),
    });
    (Engine { shared: shared.clone() }, Commands { receiver, shared })
}

/// A lock whose holders never leave it half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// Hands a job to the runner. What can only be decided there (room, validity) comes as the first event:
    /// [`Event::Failed`] with [`JobError::Refused`].
    pub fn submit(&self, job: Job) -> Result<Events, Refusal> {
        // As many events as the answer has tokens, and a few: the request bounds the channel.
        let (events, receiver) = channel::unbounded_channel();
        let id = self.shared.next_job.fetch_add(1, Ordering::Relaxed);
        // Counted before anything is asked: whoever drains and then sees no jobs has this one refused below.
        self.shared.jobs.fetch_add(1, Ordering::SeqCst);
        let mut heard = Events { receiver, job: id, ended: true, shared: self.shared.clone() };
        let unavailable = |reason: &str| Err(Refusal::Unavailable(reason.into()));
        if self.shared.stopping.load(Ordering::SeqCst) {
            return unavailable("engine stopped");
        }
        if self.shared.draining.load(Ordering::SeqCst) {
            return unavailable("draining");
        }
        let submit = Command::Submit { id, job: Box::new(job), events, arrived: Instant::now() };
        self.send(submit)?;
        heard.ended = false;
        Ok(heard)
    }

    /// Sends what the runner has to answer, while it takes jobs. Under the gate's lock, so that nothing comes after the
    /// runner has shut it and refused what had come.
    fn send(&self, command: Command) -> Result<(), Refusal> {
        let gate = lock(&self.shared.gate);
        if let Gate::Shut(reason) = &*gate {
            return Err(Refusal::Unavailable(reason.clone()));
        }
        let stopped = |_| Refusal::Unavailable("engine stopped".into());
        self.shared.commands.send(command).map_err(stopped)
    }

    /// Jobs whose [`Events`] are still held: those under way, exactly, and answers that are not yet read to their end.
    pub fn jobs(&self) -> usize {
        self.shared.jobs.load(Ordering::SeqCst)
    }

    /// State as of the last step; at most some tens of milliseconds old while steps run.
    pub fn report(&self) -> Report {
        lock(&self.shared.report).clone()
    }

    /// Time of a real step on a scratch sequence.
    pub async fn probe(&self) -> Result<Duration, JobError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Probe(reply))?;
        let stopped = || JobError::Engine("engine stopped".into());
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Takes no more jobs; those that run go on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
    }

    /// Whether [`Engine::drain`] was called.
    pub fn draining(&self) -> bool {
        self.shared.draining.load(Ordering::SeqCst)
    }

    /// Whether jobs are taken on now.
    pub fn ready(&self) -> bool {
        matches!(*lock(&self.shared.gate), Gate::Open)
    }

    /// Ends all jobs and the runner, on every rank.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Nobody to wake is as good.
        let _ = self.shared.commands.send(Command::Wake);
    }
}

impl Events {
    /// The next event; `None` after the last.
    pub async fn recv(&mut self) -> Option<Event> {
        let event = self.receiver.recv().await;
        self.note(event)
    }

    /// The next event, for callers without a runtime.
    pub fn blocking_recv(&mut self) -> Option<Event> {
        let event = self.receiver.blocking_recv();
        self.note(event)
    }

    fn note(&mut self, event: Option<Event>) -> Option<Event> {
        self.ended |= event.as_ref().is_none_or(Event::is_last);
        event
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.shared.jobs.fetch_sub(1, Ordering::SeqCst);
        if !self.ended {
            // A runner that has stopped has nothing to cancel.
            let _ = self.shared.commands.send(Command::Cancel(self.job));
        }
    }
}

impl Commands {
    /// Lets jobs in.
    pub(crate) fn open(&self) {
        *lock(&self.shared.gate) = Gate::Open;
    }

    /// Refuses jobs from now on, for this reason.
    pub(crate) fn shut(&self, reason: &str) {
        *lock(&self.shared.gate) = Gate::Shut(reason.into());
    }

    /// Whether [`Engine::stop`] was called.
    pub fn stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::SeqCst)
    }

    /// Whether [`Engine::drain`] was called.
    pub fn draining(&self) -> bool {
        self.shared.draining.load(Ordering::SeqCst)
    }

    /// Waits for so long, or until the engine is stopped; jobs that slipped in are refused.
    pub(crate) fn wait(&self, duration: Duration, reason: &str) {
        let until = Instant::now() + duration;
        while !self.stopping() {
            let left = until.saturating_duration_since(Instant::now());
            match self.receiver.recv_timeout(left) {
                Ok(command) => self.refuse(command, reason),
                Err(_) => return,
            }
        }
    }

    /// Refuses what came before the gate was shut and was not taken on. Notices and frames among it belong to the epoch
    /// that has ended.
    pub(crate) fn refuse_all(&self, reason: &str) {
        while let Ok(command) = self.receiver.try_recv() {
            self.refuse(command, reason);
        }
    }

    /// Answers a command that this runner cannot carry out.
    pub(crate) fn refuse(&self, command: Command, reason: &str) {
        let error = JobError::Refused(Refusal::Unavailable(reason.into()));
        match command {
            // Those who have left need no answer.
            Command::Submit { events, .. } => drop(events.send(Event::Failed(error))),
            Command::Probe(reply) => drop(reply.send(Err(error))),
            Command::Cancel(_) | Command::Notice { .. } | Command::Frame { .. } | Command::Wake => {}
        }
    }

    pub(crate) fn publish(&self, report: Report) {
        *lock(&self.shared.report) = report;
    }

    pub(crate) fn sender(&self) -> mpsc::Sender<Command> {
        self.shared.commands.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Request;

    /// Protects: a node that drains waits for a job from the moment it is taken on, before any step has heard of it.
    #[test]
    fn a_job_counts_until_nobody_listens() {
        let (engine, commands) = engine();
        commands.open();
        let request = Request { tokens: vec![1], output_start: 1, max_tokens: 1, ..Request::default() };
        let events = engine.submit(Job::Generate(request.clone())).expect("taken on");
        assert_eq!((engine.jobs(), engine.report().running), (1, 0));
        drop(events);
        assert_eq!(engine.jobs(), 0);
        drop(commands);
        assert!(engine.submit(Job::Generate(request)).is_err());
        assert_eq!(engine.jobs(), 0);
    }

    /// Protects: whoever drains and then sees no jobs may stop: a job of the same instant is refused or counted.
    #[test]
    fn a_job_in_the_instant_of_a_drain_is_refused_or_counted() {
        for _ in 0..200 {
            let (engine, commands) = engine();
            commands.open();
            let other = engine.clone();
            let request = Request { tokens: vec![1], output_start: 1, max_tokens: 1, ..Request::default() };
            let submitted = std::thread::spawn(move || other.submit(Job::Generate(request)));
            engine.drain();
            let seen = engine.jobs();
            let submitted = submitted.join().expect("no panic");
            match submitted {
                Ok(_events) => assert_eq!(seen, 1),
                Err(refusal) => assert_eq!(refusal, Refusal::Unavailable("draining".into())),
            }
            assert_eq!(engine.jobs(), 0);
        }
    }

    /// Protects: a job that came just before the gate was shut, too late to be taken on, is answered.
    #[test]
    fn what_comes_before_the_gate_is_shut_is_refused() {
        let (engine, commands) = engine();
        commands.open();
        let request = Request { tokens: vec![1], output_start: 1, max_tokens: 1, ..Request::default() };
        let mut events = engine.submit(Job::Generate(request.clone())).expect("taken on");
        commands.shut("lost");
        commands.refuse_all("lost");
        let refused = Refusal::Unavailable("lost".into());
        let Some(Event::Failed(JobError::Refused(told))) = events.blocking_recv() else {
            panic!("no answer")
        };
        assert_eq!(told, refused);
        assert_eq!(engine.submit(Job::Generate(request)).err(), Some(refused));
    }
}
