//! Which child is to be started, asked to stop or killed, and when. Pure: no process, no clock. `up` carries it out.

use std::time::{Duration, Instant};

/// Wait before the first restart; doubled with each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// Longest wait before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A child that ran for this long starts again with the shortest wait.
const STEADY: Duration = Duration::from_secs(30);
/// A child that was asked to stop is killed after this long: the drain that `up` sets, and room for its own end.
pub const STOP_GRACE: Duration = Duration::from_secs(8);
/// What `up` tells its children: running requests may go on for this long after a stop signal.
pub const DRAIN: Duration = Duration::from_secs(5);

const _: () = assert!(STOP_GRACE.as_millis() > DRAIN.as_millis());

/// A child by its place in the list.
pub type ChildId = usize;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A child ended, or could not be started.
    Exited(ChildId, Exit),
    /// The cluster answers requests.
    Serving,
    /// The user wants to stop; a second time: now.
    Stop,
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
    /// It never ran.
    NotStarted(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the child.
    Start(ChildId),
    /// Ask it to drain and end.
    Terminate(ChildId),
    /// End it now.
    Kill(ChildId),
    /// Tell the user.
    Say(String),
    /// All children have ended: end with this status.
    Finish(u8),
}

/// The table of children.
#[derive(Debug)]
pub struct Supervisor {
    children: Vec<Child>,
    phase: Phase,
}

#[derive(Debug)]
struct Child {
    name: String,
    /// Children stop wave by wave: the router first, so that what it still serves finds its nodes.
    wave: u8,
    restarts: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Since then.
    Running { since: Instant },
    /// To be started again then.
    Waiting { until: Instant },
    /// Ended for good, or not begun.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not all parts have answered yet: a child that gives up by itself has a reason that a restart does not mend.
    Starting,
    /// Children that end are restarted.
    Serving,
    /// This wave was asked to stop and is killed at the deadline.
    Stopping { wave: u8, deadline: Instant, status: u8 },
    /// Said so.
    Finished,
}

impl Supervisor {
    /// Children by name and stop wave.
    pub fn new(children: impl IntoIterator<Item = (String, u8)>) -> Self {
        let child = |(name, wave)| Child { name, wave, restarts: 0, state: State::Gone };
        Supervisor { children: children.into_iter().map(child).collect(), phase: Phase::Starting }
    }

    /// Starts all.
    pub fn begin(&mut self, now: Instant) -> Vec<Action> {
        (0..self.children.len()).map(|id| self.start(id, now)).collect()
    }

    /// Not all parts have answered yet.
    pub fn is_starting(&self) -> bool {
        self.phase == Phase::Starting
    }

    /// Takes in what happened.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match (event, self.phase) {
            (Event::Serving, Phase::Starting) => {
                self.phase = Phase::Serving;
                Vec::new()
            }
            (Event::Serving, _) => Vec::new(),
            (Event::Stop, Phase::Starting | Phase::Serving) => self.stop(0, now),
            (Event::Stop, Phase::Stopping { status, .. }) => {
                self.phase = Phase::Stopping { wave: u8::MAX, deadline: now + STOP_GRACE, status };
                self.running().map(Action::Kill).collect()
            }
            (Event::Stop, Phase::Finished) => Vec::new(),
            (Event::Exited(id, exit), _) => self.exited(id, &exit, now),
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn wake(&self) -> Option<Instant> {
        match self.phase {
            Phase::Stopping { deadline, .. } => Some(deadline),
            Phase::Finished => None,
            Phase::Starting | Phase::Serving => {
                let due = |child: &Child| match child.state {
                    State::Waiting { until } => Some(until),
                    State::Running { .. } | State::Gone => None,
                };
                self.children.iter().filter_map(due).min()
            }
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Starting | Phase::Serving => {
                let is_due = |state| if let State::Waiting { until } = state { until <= now } else { false };
                let due: Vec<_> =
                    (0..self.children.len()).filter(|&id| is_due(self.children[id].state)).collect();
                due.into_iter().map(|id| self.start(id, now)).collect()
            }
            Phase::Stopping { wave, deadline, status } if deadline <= now => {
                let late: Vec<_> = self.running().filter(|&id| self.children[id].wave <= wave).collect();
                self.phase = Phase::Stopping { wave, deadline: now + STOP_GRACE, status };
                let kill = |id: ChildId| {
                    let name = &self.children[id].name;
                    [Action::Say(format!("{name} did not stop in time: killed")), Action::Kill(id)]
                };
                late.into_iter().flat_map(kill).collect()
            }
            Phase::Stopping { .. } | Phase::Finished => Vec::new(),
        }
    }

    fn start(&mut self, id: ChildId, now: Instant) -> Action {
        self.children[id].state = State::Running { since: now };
        Action::Start(id)
    }

    fn running(&self) -> impl Iterator<Item = ChildId> {
        let is_running = |id: &ChildId| matches!(self.children[*id].state, State::Running { .. });
        (0..self.children.len()).filter(is_running)
    }

    fn exited(&mut self, id: ChildId, exit: &Exit, now: Instant) -> Vec<Action> {
        let child = &mut self.children[id];
        let State::Running { since } = child.state else { return Vec::new() };
        child.state = State::Gone;
        let how = match exit {
            Exit::Status(status) => format!("ended with status {status}"),
            Exit::Signal(signal) => format!("was killed by signal {signal}"),
            Exit::NotStarted(reason) => format!("could not be started: {reason}"),
        };
        match self.phase {
            Phase::Starting if !matches!(exit, Exit::Signal(_)) => {
                let said = Action::Say(format!("{} {how} before it served; stopping the others", child.name));
                let mut actions = vec![said];
                actions.extend(self.stop(1, now));
                actions
            }
            Phase::Starting | Phase::Serving => {
                child.restarts = if now.duration_since(since) >= STEADY { 0 } else { child.restarts };
                // 2^6 x 250 ms is beyond the longest wait.
                let wait = (BACKOFF_MIN * (1 << child.restarts.min(6))).min(BACKOFF_MAX);
                child.restarts += 1;
                child.state = State::Waiting { until: now + wait };
                vec![Action::Say(format!("{} {how}; starting it again in {wait:?}", child.name))]
            }
            Phase::Stopping { wave, status, .. } => self.next_wave(wave, status, now),
            Phase::Finished => Vec::new(),
        }
    }

    fn stop(&mut self, status: u8, now: Instant) -> Vec<Action> {
        for child in &mut self.children {
            if matches!(child.state, State::Waiting { .. }) {
                child.state = State::Gone;
            }
        }
        self.begin_wave(0, status, now)
    }

    /// Goes on once every child of this wave and the waves before has ended.
    fn next_wave(&mut self, wave: u8, status: u8, now: Instant) -> Vec<Action> {
        if self.running().any(|id| self.children[id].wave <= wave) {
            return Vec::new();
        }
        self.begin_wave(wave.saturating_add(1), status, now)
    }

    fn begin_wave(&mut self, from: u8, status: u8, now: Instant) -> Vec<Action> {
        let Some(wave) = self.running().map(|id| self.children[id].wave).filter(|&w| w >= from).min() else {
            self.phase = Phase::Finished;
            return vec![Action::Finish(status)];
        };
        self.phase = Phase::Stopping { wave, deadline: now + STOP_GRACE, status };
        self.running().filter(|&id| self.children[id].wave == wave).map(Action::Terminate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER: ChildId = 0;
    const PREFILL: ChildId = 1;
    const DECODE: ChildId = 2;

    /// A router and two nodes, started at the returned time.
    fn started() -> (Supervisor, Instant) {
        let now = Instant::now();
        let mut all =
            Supervisor::new([("router".into(), 0), ("prefill-0".into(), 1), ("decode-0.0".into(), 1)]);
        assert_eq!(all.begin(now), [Action::Start(ROUTER), Action::Start(PREFILL), Action::Start(DECODE)]);
        (all, now)
    }

    fn serving() -> (Supervisor, Instant) {
        let (mut all, now) = started();
        assert_eq!(all.on(Event::Serving, now), []);
        (all, now)
    }

    fn killed(id: ChildId) -> Event {
        Event::Exited(id, Exit::Signal(9))
    }

    /// A child that dies is started again, said so, and waits longer each time until it has run for a while.
    #[test]
    fn restarts_with_backoff() {
        let (mut all, mut now) = serving();
        for wait in ["250ms", "500ms", "1s", "2s", "4s", "8s", "10s", "10s"] {
            let said = format!("decode-0.0 was killed by signal 9; starting it again in {wait}");
            assert_eq!(all.on(killed(DECODE), now), [Action::Say(said)]);
            let due = all.wake().expect("a restart is due");
            assert_eq!(all.tick(due - Duration::from_millis(1)), []);
            assert_eq!(all.tick(due), [Action::Start(DECODE)]);
            assert_eq!(all.wake(), None);
            now = due;
        }
        now += STEADY;
        let said = "decode-0.0 was killed by signal 9; starting it again in 250ms".into();
        assert_eq!(all.on(killed(DECODE), now), [Action::Say(said)]);
    }

    /// Wrong settings end `up` with a failure instead of a loop of restarts.
    #[test]
    fn gives_up_when_a_child_cannot_start() {
        let (mut all, now) = started();
        let actions = all.on(Event::Exited(PREFILL, Exit::Status(1)), now);
        let said = "prefill-0 ended with status 1 before it served; stopping the others".into();
        assert_eq!(actions, [Action::Say(said), Action::Terminate(ROUTER)]);
        assert_eq!(all.on(Event::Exited(ROUTER, Exit::Status(0)), now), [Action::Terminate(DECODE)]);
        assert_eq!(all.on(Event::Exited(DECODE, Exit::Status(0)), now), [Action::Finish(1)]);
        // But a kill from outside is no verdict on the settings.
        let (mut all, now) = started();
        assert!(matches!(all.on(killed(PREFILL), now)[..], [Action::Say(_)]));
        assert!(all.wake().is_some());
    }

    /// The router drains while its nodes still serve; then the nodes; a child that was waiting for its restart stays down.
    #[test]
    fn stops_the_router_first() {
        let (mut all, now) = serving();
        all.on(killed(PREFILL), now);
        assert_eq!(all.on(Event::Stop, now), [Action::Terminate(ROUTER)]);
        assert_eq!(all.on(Event::Exited(ROUTER, Exit::Status(0)), now), [Action::Terminate(DECODE)]);
        assert_eq!(all.on(Event::Exited(DECODE, Exit::Status(0)), now), [Action::Finish(0)]);
        assert_eq!(all.wake(), None);
        assert_eq!(all.tick(now + STEADY), []);
    }

    /// No child can hold up the end: each wave is killed at its deadline, and at once on a second request to stop.
    #[test]
    fn kills_what_does_not_stop() {
        let (mut all, now) = serving();
        all.on(Event::Stop, now);
        assert_eq!(all.wake(), Some(now + STOP_GRACE));
        assert_eq!(all.tick(now), []);
        let said = Action::Say("router did not stop in time: killed".into());
        assert_eq!(all.tick(now + STOP_GRACE), [said, Action::Kill(ROUTER)]);
        assert_eq!(all.on(killed(ROUTER), now), [Action::Terminate(PREFILL), Action::Terminate(DECODE)]);
        assert_eq!(all.on(Event::Stop, now), [Action::Kill(PREFILL), Action::Kill(DECODE)]);
        assert_eq!(all.on(killed(PREFILL), now), []);
        assert_eq!(all.on(killed(DECODE), now), [Action::Finish(0)]);
    }
}
