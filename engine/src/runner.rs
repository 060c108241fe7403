//! One thread owns the device, the model and the KV store of a rank, through all epochs of its group: it leads (takes
//! jobs, decides) or follows (does what the leader says). Called by [`crate::serve`].
//!
//! On a device that computes by itself the next plan is made, told and submitted while a step runs; results are taken in
//! the order of steps. On one that computes as it is called a step is done when it is submitted, and none runs ahead.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use backend::{Backend, KvSpec, KvStore};
use kvtransfer::{Receiver, Sender, TargetSpec};
use models::Model;

use crate::error::EngineError;
use crate::executor::{Executor, Submitted};
use crate::handle::{Command, Commands};
use crate::leader::{Core, Setup, Step, Totals};
use crate::options::EngineOptions;
use crate::request::{JobError, Target};
use crate::tp::plan::{Notice, Plan};
use crate::tp::{Frame, Group, Member, TpError};
use crate::transfer::{Notify, Transfers};

/// How old a published report may become while steps run.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// A follower with a step under way to which no plan comes for so long looks how that step ended.
const PLAN_WAIT: Duration = Duration::from_millis(50);

/// Longest wait for transfers of an ended epoch to let go of the store.
const QUIET_WAIT: Duration = Duration::from_secs(5);

/// Why a rank's part in an epoch is over.
#[derive(Debug)]
pub enum EpochEnd {
    /// [`crate::Engine::stop`], here or at the leader.
    Stopped,
    /// The group, or this rank, cannot go on.
    Lost(EngineError),
}

/// A rank: its device, its part of the model and its KV store.
pub struct Runner<B: Backend> {
    backend: B,
    model: Model<B>,
    kv: B::Kv,
    options: EngineOptions,
    receiver: Receiver,
    sender: Sender,
    totals: Totals,
    secret: [u8; 16],
}

impl<B: Backend> Runner<B> {
    /// Makes the KV store and opens the KV port.
    pub fn new(mut backend: B, model: Model<B>, options: EngineOptions) -> Result<Self, EngineError> {
        options.validate()?;
        let kv = backend.kv(model.kv_spec(), options.kv_bytes)?;
        let limits = kvtransfer::Limits { rate_bytes_per_s: options.pace, ..kvtransfer::Limits::default() };
        let receiver = Receiver::bind(options.kv_bind, limits.clone())
            .map_err(|reason| EngineError::Port { addr: options.kv_bind.to_string(), reason })?;
        let mut secret = [0; 16];
        getrandom::fill(&mut secret).map_err(|e| EngineError::Options(format!("no random numbers: {e}")))?;
        let (sender, totals) = (Sender::new(limits), Totals::default());
        Ok(Runner { backend, model, kv, options, receiver, sender, totals, secret })
    }

    /// This rank's cache.
    pub fn kv_spec(&self) -> &KvSpec {
        self.model.kv_spec()
    }

    /// `host:port`s of this rank's KV port, best first.
    pub fn kv_addresses(&self) -> Vec<String> {
        let bound = self.receiver.local_addr();
        if self.options.kv_advertise.is_empty() {
            return vec![bound.to_string()];
        }
        let with_port = |host: &String| match host.parse::<std::net::SocketAddr>() {
            Ok(_) => host.clone(),
            Err(_) => match host.rsplit_once(':') {
                // A name with a port; an IPv6 address without one has more colons.
                Some((name, port)) if !name.contains(':') && port.parse::<u16>().is_ok() => host.clone(),
                _ if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{}", bound.port()),
                _ => format!("{host}:{}", bound.port()),
            },
        };
        self.options.kv_advertise.iter().map(with_port).collect()
    }

    /// What this rank is to the others of the next epoch's group. Waits for transfers of the last epoch to let go of the
    /// store; blocks that they keep nevertheless are left out of the next.
    pub fn member(&mut self, rank: usize, version: &str, identity: &str) -> Member {
        Member {
            version: version.to_owned(),
            identity: identity.to_owned(),
            target: Target { rank, addresses: self.kv_addresses(), spec: self.kv_spec().clone() },
            blocks: self.free_blocks(),
            block_tokens: self.kv.block_tokens(),
        }
    }

    fn free_blocks(&mut self) -> u32 {
        let begun = Instant::now();
        while self.kv.usage().quarantined > 0 && begun.elapsed() < QUIET_WAIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        let usage = self.kv.usage();
        if usage.quarantined > 0 {
            tracing::warn!(
                "{} of {} kv blocks are still under old transfers",
                usage.quarantined,
                usage.total
            );
        }
        usage.free
    }

    /// Leads `group` until it ends. Jobs are let in meanwhile; those that have not ended fail with it.
    pub fn lead(&mut self, mut group: Group, commands: &Commands) -> EpochEnd {
        if let Err(error) = self.enter(&mut group, commands) {
            return EpochEnd::Lost(error);
        }
        let epoch = group.epoch;
        let sender = commands.sender();
        // A runner that has ended needs no notices.
        let notify: Notify = Arc::new(move |notice| drop(sender.send(Command::Notice { epoch, notice })));
        let setup = Setup {
            options: self.options.clone(),
            epoch,
            targets: group.targets.clone(),
            vocabulary: self.model.vocab_size(),
            blocks: group.blocks,
            block_tokens: self.kv.block_tokens(),
            shares: self.kv.shares(),
            secret: self.secret,
        };
        let mut core = Core::new(setup, std::mem::take(&mut self.totals));
        let sender = self.sender.clone();
        let mut executor = self.executor(&group, notify);
        let mut lead =
            Lead { core: &mut core, group: &mut group, commands, sender, reported: None, ended: None };
        lead.report(&mut executor);
        commands.open();
        let ended = lead.run(&mut executor);
        let reason = match &ended {
            Ok(()) => "engine stopped".to_owned(),
            Err(error) => error.to_string(),
        };
        commands.shut(&reason);
        commands.refuse_all(&reason);
        group.end(&reason);
        executor.clear();
        let usage = self.kv.usage();
        commands.publish(core.last_report(usage));
        self.totals = core.finish(&JobError::Engine(reason));
        match ended {
            Ok(()) => EpochEnd::Stopped,
            Err(error) => EpochEnd::Lost(error),
        }
    }

    /// Does what the leader of `group` says until it ends.
    pub fn follow(&mut self, mut group: Group, commands: &Commands) -> EpochEnd {
        if let Err(error) = self.enter(&mut group, commands) {
            return EpochEnd::Lost(error);
        }
        let notify: Notify = Arc::new(group.answer());
        let mut executor = self.executor(&group, notify.clone());
        let ended = follow(&mut executor, group.epoch, group.rank, commands);
        if let Err(error) = &ended {
            notify(Notice::Failed { reason: error.to_string() });
        }
        group.end("");
        executor.clear();
        match ended {
            Ok(()) => EpochEnd::Stopped,
            Err(error) => EpochEnd::Lost(error),
        }
    }

    /// Lets the links of a group run and gives the backend its sockets.
    fn enter(&mut self, group: &mut Group, commands: &Commands) -> Result<(), EngineError> {
        if let Some(collective) = group.collective() {
            self.backend.regroup(collective)?;
        }
        Ok(group.run(commands)?)
    }

    fn executor(&mut self, group: &Group, notify: Notify) -> Executor<'_, B> {
        let target = |target: &Target| TargetSpec {
            rank: target.rank,
            addresses: target.addresses.clone(),
            spec: target.spec.clone(),
        };
        let targets = group.targets.iter().map(target).collect();
        let transfers = Transfers::new(
            self.receiver.clone(),
            self.sender.clone(),
            notify.clone(),
            group.epoch,
            targets,
            group.rank,
        );
        Executor::new(&mut self.backend, &self.model, &mut self.kv, transfers, notify)
    }
}

/// A follower's loop: until the engine is stopped here, or the group ends.
fn follow<B: Backend>(
    executor: &mut Executor<'_, B>,
    epoch: u64,
    rank: usize,
    commands: &Commands,
) -> Result<(), EngineError> {
    let lost = |reason| EngineError::Group(TpError::Lost { rank: 0, reason });
    let mut steps = 0;
    let mut running = VecDeque::new();
    loop {
        if commands.stopping() {
            return Ok(());
        }
        let command = match running.is_empty() {
            true => commands.receiver.recv().map_err(RecvTimeoutError::from),
            false => commands.receiver.recv_timeout(PLAN_WAIT),
        };
        let command = match command {
            Ok(command) => command,
            Err(RecvTimeoutError::Timeout) => {
                running.pop_front().map(Submitted::wait).transpose()?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        let frame = match command {
            Command::Frame { epoch: of, frame, .. } if of == epoch => frame,
            other => {
                commands.refuse(other, &format!("rank {rank} follows"));
                continue;
            }
        };
        match frame {
            Ok(Frame::Plan(bytes)) => {
                let plan = Plan::decode(&bytes).map_err(TpError::from)?;
                steps += 1;
                if plan.step != steps {
                    return Err(EngineError::Plan(format!("step {} came as number {steps}", plan.step)));
                }
                running.push_back(executor.execute(&plan)?);
                (executor.notify)(Notice::Executed { step: plan.step });
                while running.len() > 1 || running.front().is_some_and(Submitted::ready) {
                    running.pop_front().map(Submitted::wait).transpose()?;
                }
            }
            Ok(Frame::End(reason)) => return Err(lost(format!("ended the group: {reason}"))),
            Ok(other) => return Err(lost(format!("sent {other:?}"))),
            Err(error) => return Err(lost(error.to_string())),
        }
    }
}

/// The leader's loop and what it needs.
struct Lead<'l> {
    core: &'l mut Core,
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

impl Lead<'_> {
    /// Until somebody stops the engine, or something fails.
    fn run<B: Backend>(&mut self, executor: &mut Executor<'_, B>) -> Result<(), EngineError> {
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
        let due = self.reported.is_none_or(|at| ended.saturating_duration_since(at) >= REPORT_EVERY);
        if due || self.core.has_probed() {
            self.report(executor);
        }
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

    /// Publishes the state; returns the blocks that only transfers hold.
    fn report<B: Backend>(&mut self, executor: &mut Executor<'_, B>) -> u32 {
        let links = self.sender.links().into_iter().map(|l| (l.peer, l.gbytes_per_s, l.bytes)).collect();
        let report = self.core.report(executor.kv.usage(), links);
        self.reported = Some(Instant::now());
        let quarantined = report.blocks.quarantined;
        self.commands.publish(report);
        quarantined
    }
}
