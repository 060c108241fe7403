//! The leader's loop: takes commands, plans, tells the followers, computes, and takes results in.
//!
//! On a device that computes by itself the next plan is made, told and submitted while a step runs; results are taken in
//! the order of steps. On one that computes as it is called a step is done when it is submitted, and none runs ahead.

use std::collections::VecDeque;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use backend::{Backend, KvStore};
use kvtransfer::Sender;

use crate::error::EngineError;
use crate::executor::{Executor, Submitted};
use crate::handle::{Command, Commands};
use crate::leader::{Core, Step};
use crate::tp::plan::Notice;
use crate::tp::{Frame, Group, TpError};

/// How old a published report may become while steps run.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// The leader's loop and what it needs.
pub(super) struct Lead<'l, 'd> {
    core: &'l mut Core<'d>,
    group: &'l mut Group,
    commands: &'l Commands,
    sender: Sender,
    reported: Option<Instant>,
    /// When the latest step that is done ended.
    ended: Option<Instant>,
}

/// A step of the leader under way.
struct Running<B: Backend> {
    step: Step,
    submitted: Submitted<B>,
    at: Instant,
}

impl<'l, 'd> Lead<'l, 'd> {
    pub(super) fn new(
        core: &'l mut Core<'d>,
        group: &'l mut Group,
        commands: &'l Commands,
        sender: Sender,
    ) -> Self {
        Lead { core, group, commands, sender, reported: None, ended: None }
    }

    /// Until somebody stops the engine, or something fails.
    pub(super) fn run<B: Backend>(&mut self, executor: &mut Executor<'_, B>) -> Result<(), EngineError> {
        let mut running = VecDeque::<Running<B>>::new();
        loop {
            loop {
                match self.commands.receiver.try_recv() {
                    Ok(command) => self.take(command)?,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            }
            if self.commands.stopping() {
                return Ok(());
            }
            let step = self.core.plan(Instant::now());
            if let Some(fault) = self.core.fault() {
                return Err(EngineError::Plan(fault.to_owned()));
            }
            if let Some(step) = step {
                self.group.tell(&step.plan)?;
                let at = Instant::now();
                let submitted = executor.execute(&step.plan)?;
                self.core.notice(Instant::now(), 0, Notice::Executed { step: step.plan.step });
                running.push_back(Running { step, submitted, at });
                while running.front().is_some_and(|first| first.submitted.ready()) {
                    self.finish(executor, running.pop_front())?;
                }
            } else if let Some(first) = running.pop_front() {
                self.finish(executor, Some(first))?;
            } else if self.core.read_ahead() {
                self.report_when_due(executor);
            } else {
                // A transfer drops its last lease a moment after it has told of its end: seen by looking again.
                let command = match self.report(executor) {
                    0 => self.commands.receiver.recv().map_err(RecvTimeoutError::from),
                    _ => self.commands.receiver.recv_timeout(REPORT_EVERY),
                };
                match command {
                    Ok(command) => self.take(command)?,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        }
    }

    /// Waits for a step and takes in what it drew.
    fn finish<B: Backend>(
        &mut self,
        executor: &mut Executor<'_, B>,
        running: Option<Running<B>>,
    ) -> Result<(), EngineError> {
        let Some(Running { step, submitted, at }) = running else { return Ok(()) };
        let drawn = submitted.wait()?;
        let ended = Instant::now();
        // A step submitted while the one before ran began when that one ended.
        let began = self.ended.map_or(at, |before| before.max(at));
        self.ended = Some(ended);
        self.core.done(step, began, ended, drawn);
        if self.core.has_probed() {
            self.report(executor);
        }
        self.report_when_due(executor);
        // Whoever hears of the probe finds what came before it in the report.
        self.core.answer_probes();
        Ok(())
    }

    fn take(&mut self, command: Command) -> Result<(), EngineError> {
        let now = Instant::now();
        match command {
            Command::Submit { id, job, events, arrived } => self.core.submit(now, id, *job, events, arrived),
            Command::Cancel(job) => self.core.cancel(job),
            Command::Probe(reply) => self.core.probe(reply),
            // What is left of an earlier epoch.
            Command::Notice { epoch, .. } | Command::Frame { epoch, .. } if epoch != self.group.epoch => {}
            Command::Notice { notice, .. } => self.core.notice(now, 0, notice),
            Command::Frame { rank, frame, .. } => {
                let lost = |reason| TpError::Lost { rank, reason };
                match frame.map_err(|error| lost(error.to_string()))? {
                    Frame::Notice(bytes) => match Notice::decode(&bytes).map_err(TpError::from)? {
                        Notice::Failed { reason } => return Err(lost(reason).into()),
                        notice => self.core.notice(now, rank, notice),
                    },
                    other => return Err(lost(format!("sent {other:?}")).into()),
                }
            }
            Command::Wake => {}
        }
        Ok(())
    }

    fn report_when_due<B: Backend>(&mut self, executor: &mut Executor<'_, B>) {
        if self.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            self.report(executor);
        }
    }

    /// Publishes the state; returns the blocks that only transfers hold.
    pub(super) fn report<B: Backend>(&mut self, executor: &mut Executor<'_, B>) -> u32 {
        let links = self.sender.links().into_iter().map(|l| (l.peer, l.gbytes_per_s, l.bytes)).collect();
        let mut report = self.core.report(executor.kv.usage(), links);
        let counters = &mut report.counters;
        (counters.kv_resumed, counters.kv_fallbacks, counters.kv_silent) =
            (self.sender.resumed(), self.sender.fallbacks(), self.sender.silent());
        counters.kv_unstaged_bytes = self.sender.unstaged_bytes();
        self.reported = Some(Instant::now());
        let quarantined = report.blocks.quarantined;
        self.commands.publish(report);
        quarantined
    }
}
