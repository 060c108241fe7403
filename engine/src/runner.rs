//! One thread owns the device, the model and the KV store of a rank, through all epochs of its group: it leads (takes
//! jobs, decides) or follows (does what the leader says). Called by [`crate::serve`].

mod follow;
mod lead;

use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::{Backend, KvSpec, KvStore};
use kvtransfer::transport::tls::TlsDialer;
use kvtransfer::{Receiver, Sender, TargetSpec};
use models::Model;

use crate::draft::model::DraftModel;
use crate::error::EngineError;
use crate::executor::Executor;
use crate::handle::{Command, Commands};
use crate::leader::{Core, Setup, Totals};
use crate::options::EngineOptions;
use crate::request::{JobError, Target};
use crate::runner::lead::Lead;
use crate::tp::plan::Notice;
use crate::tp::{Group, Member};
use crate::transfer::{Notify, Transfers};

/// Addresses of a KV port that are told to others.
const KV_ADDRESSES_MAX: usize = 16;

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
    draft: Option<DraftModel<B>>,
}

impl<B: Backend> Runner<B> {
    /// Makes the KV store and opens the KV port.
    pub fn new(mut backend: B, model: Model<B>, options: EngineOptions) -> Result<Self, EngineError> {
        options.validate()?;
        let kv = backend
            .kv(model.kv_spec(), options.kv_bytes)
            .map_err(|reason| EngineError::KvMemory { bytes: options.kv_bytes, reason })?;
        let limits = kvtransfer::Limits {
            rate_bytes_per_s: options.pace,
            codec: options.kv_codec,
            streams: options.kv_streams,
            ways: options.kv_ways,
            probe: options.kv_probe.clone(),
            ..kvtransfer::Limits::default()
        };
        let (tls, turned) = (options.kv_tls.clone(), options.kv_turned.clone());
        let receiver = Receiver::bind_counted(options.kv_bind, limits.clone(), tls, turned)
            .map_err(|reason| EngineError::Port { addr: options.kv_bind.to_string(), reason })?;
        let mut secret = [0; 16];
        getrandom::fill(&mut secret).map_err(|e| EngineError::Options(format!("no random numbers: {e}")))?;
        let sender = match &options.kv_tls {
            Some(tls) => Sender::with_dialer(limits, Box::new(TlsDialer(tls.clone()))),
            None => Sender::new(limits),
        };
        let totals = Totals::default();
        Ok(Runner { backend, model, kv, options, receiver, sender, totals, secret, draft: None })
    }

    /// Guesses come from a draft model, too. Of rank 0, which alone has one.
    pub fn draft_with(&mut self, draft: DraftModel<B>) {
        self.draft = Some(draft);
    }

    /// What this rank pushes with: a handle on the same pool.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Where KV that leaves may stay until receivers read it, see [`KvStore::stays`].
    pub fn stays(&self) -> Option<backend::Place> {
        self.kv.stays()
    }

    /// This rank's cache.
    pub fn kv_spec(&self) -> &KvSpec {
        self.model.kv_spec()
    }

    /// `host:port`s of this rank's KV port, best first.
    pub fn kv_addresses(&self) -> Vec<String> {
        let bound = self.receiver.local_addr();
        if self.options.kv_advertise.is_empty() && !bound.ip().is_unspecified() {
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
        let mut addresses: Vec<String> = self.options.kv_advertise.iter().map(with_port).collect();
        if bound.ip().is_unspecified() {
            // Every way to this machine, cables first: the senders find out which is best.
            let mut ways = kvtransfer::interface::interfaces();
            ways.retain(|way| way.reachable() && (way.ip.is_ipv4() || bound.ip().is_ipv6()));
            ways.sort_by_key(|way| (way.wireless, std::cmp::Reverse(way.mbps)));
            let ways = ways.iter().map(|way| std::net::SocketAddr::new(way.ip, bound.port()).to_string());
            let others: Vec<String> = ways.filter(|way| !addresses.contains(way)).collect();
            addresses.extend(others);
        }
        addresses.truncate(KV_ADDRESSES_MAX);
        addresses
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
            native: None,
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
        let mut draft = self.draft.take();
        let mut core = Core::new(setup, std::mem::take(&mut self.totals));
        if let Some(draft) = &mut draft {
            core.draft_with(draft);
        }
        let sender = self.sender.clone();
        let mut executor = self.executor(&group, notify);
        let mut lead = Lead::new(&mut core, &mut group, commands, sender);
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
        self.draft = draft;
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
        let ended = follow::follow(&mut executor, group.epoch, group.rank, commands);
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
        // What waits for the other ranks by itself does so under the eyes of the links.
        if group.is_native() {
            group.run(commands)?;
        }
        let joining = group.joining();
        if let Some(collective) = group.collective() {
            self.backend.regroup(collective)?;
        }
        drop(joining);
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
            self.options.chunk_tokens as u32,
        );
        Executor::new(&mut self.backend, &self.model, &mut self.kv, transfers, notify)
    }
}
