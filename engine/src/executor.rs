//! Carries out plans on one rank's device, store and transfers. The leader and every follower run this very code on the
//! same plans; only the leader learns what its rows drew.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use backend::{Backend, Drawn, Fork, KvError, KvStore, Out, Output, Pending, SeqId, Step};
use models::Model;

use crate::error::EngineError;
use crate::tp::plan::{Notice, Op, Plan};
use crate::transfer::{Notify, Transfers};

/// Longest wait for a lease that a transfer has ended but not dropped yet.
const LEASE_WAIT: Duration = Duration::from_secs(5);

/// One rank at work in one epoch.
pub(crate) struct Executor<'r, B: Backend> {
    pub backend: &'r mut B,
    pub model: &'r Model<B>,
    pub kv: &'r mut B::Kv,
    pub transfers: Transfers<B::Kv>,
    pub notify: Notify,
    /// Sequences in the store.
    open: HashSet<SeqId>,
}

impl<'r, B: Backend> Executor<'r, B> {
    pub fn new(
        backend: &'r mut B,
        model: &'r Model<B>,
        kv: &'r mut B::Kv,
        transfers: Transfers<B::Kv>,
        notify: Notify,
    ) -> Self {
        Executor { backend, model, kv, transfers, notify, open: HashSet::new() }
    }

    /// Carries out `plan`. Its rows are under way then; they are done where the device computes at once.
    pub fn execute(&mut self, plan: &Plan) -> Result<Submitted<B>, EngineError> {
        for op in &plan.ops {
            self.apply(plan.step, op)?;
        }
        if plan.batch.runs.is_empty() {
            return Ok(Submitted { pending: None, refused: None });
        }
        Ok(self.compute(plan))
    }

    /// Ends all transfers and sequences: the store is empty once transfers have let go.
    pub fn clear(mut self) {
        self.transfers.clear();
        for seq in self.open.drain() {
            if let Err(error) = self.kv.close(seq) {
                tracing::error!("closing sequence {seq}: {error}");
            }
        }
    }

    fn compute(&mut self, plan: &Plan) -> Submitted<B> {
        let place = self.kv.stays();
        let mut step = self.backend.step(self.kv, &plan.batch);
        let transfers = &self.transfers;
        let mut refused = None;
        let mut after = |step: &mut B::Step<'_>, layer: usize| {
            for export in &plan.exports {
                let (seq, tokens) = (export.seq, export.tokens.clone());
                let cuts = place.and_then(|place| transfers.reads(export.lease, place));
                let given = match &cuts {
                    Some(cuts) => step.export_there(seq, layer, tokens, cuts),
                    None => step.export(seq, layer, tokens),
                };
                match given {
                    Ok(bytes) => transfers.push_layer(export.lease, bytes),
                    Err(error) => refused = refused.take().or(Some((format!("{export:?}"), error))),
                }
            }
        };
        let pending = if plan.rows.is_empty() {
            self.model.fill(&mut step, &mut after);
            step.submit(Out::Nothing)
        } else {
            let rows: Vec<u32> = plan.rows.iter().map(|wanted| wanted.row).collect();
            let logits = self.model.forward(&mut step, &rows, &mut after);
            step.submit(Out::Draw(logits, plan.rows.iter().map(|wanted| wanted.draw).collect()))
        };
        let refused = refused.map(|(op, reason)| EngineError::Store { step: plan.step, op, reason });
        Submitted { pending: Some(pending), refused }
    }

    fn apply(&mut self, step: u64, op: &Op) -> Result<(), EngineError> {
        let refused = |reason| EngineError::Store { step, op: format!("{op:?}"), reason };
        match op {
            Op::Open { seq, tokens } => {
                self.with_room(|kv| kv.open(*seq, *tokens)).map_err(refused)?;
                self.open.insert(*seq);
            }
            Op::Grow { seq, tokens } => self.with_room(|kv| kv.grow(*seq, *tokens)).map_err(refused)?,
            Op::Fork { from, to, tokens, mode } => {
                self.with_room(|kv| kv.fork(*from, *to, *tokens, *mode)).map_err(refused)?;
                if *mode == Fork::Move {
                    self.open.remove(from);
                }
                self.open.insert(*to);
            }
            Op::Truncate { seq, tokens } => self.kv.truncate(*seq, *tokens).map_err(refused)?,
            Op::Close { seq } => {
                self.open.remove(seq);
                self.kv.close(*seq).map_err(refused)?;
            }
            Op::Land(land) => {
                let landing = self.kv.land(land.seq, land.tokens.clone()).map_err(refused)?;
                self.transfers.expect(land, landing);
            }
            Op::Commit { lease } => {
                let landing = self.transfers.landed(*lease);
                let landing =
                    landing.ok_or_else(|| EngineError::Plan(format!("step {step}, {op:?}: not landed")))?;
                self.kv.commit(landing).map_err(refused)?;
            }
            Op::Abort { lease } => self.transfers.abort(*lease),
            Op::Push(push) => {
                self.transfers.push(push);
                let (kv, layers) = (&mut *self.kv, self.model.config().layers);
                self.transfers.push_cached(push.lease, layers, &push.cached, |layer| {
                    kv.export(push.seq, layer, push.cached.clone()).map_err(refused)
                })?;
            }
            Op::PushClose { lease, close } => self.transfers.close(*lease, *close),
            Op::Audit { held, total } => self.audit(*held, *total),
        }
        Ok(())
    }

    /// A transfer may tell of its end a moment before its thread drops the last lease: then room that the leader's book
    /// has is not there yet.
    fn with_room(&mut self, op: impl Fn(&mut B::Kv) -> Result<(), KvError>) -> Result<(), KvError> {
        let begun = Instant::now();
        loop {
            match op(self.kv) {
                Err(KvError::Full { .. })
                    if begun.elapsed() < LEASE_WAIT && self.kv.usage().quarantined > 0 =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }

    fn audit(&mut self, held: u32, total: u32) {
        let usage = self.kv.usage();
        let agrees = usage.used == held
            && usage.free + usage.used + usage.quarantined == usage.total
            && usage.total >= total;
        let disagreement =
            (!agrees).then(|| format!("{usage:?}, the leader's book holds {held} of {total} blocks"));
        (self.notify)(Notice::Audited { disagreement });
    }
}

/// A plan that was carried out, whose rows may still be computed.
pub(crate) struct Submitted<B: Backend> {
    /// `None`: it has no rows.
    pending: Option<Box<dyn Pending<B::Hidden>>>,
    /// The first export that was not given.
    refused: Option<EngineError>,
}

impl<B: Backend> Submitted<B> {
    /// Whether [`Submitted::wait`] would return at once.
    pub fn ready(&self) -> bool {
        self.pending.as_ref().is_none_or(|pending| pending.ready())
    }

    /// What the plan's rows drew (on the leader), once they are computed.
    pub fn wait(self) -> Result<Vec<Drawn>, EngineError> {
        let output = self.pending.map(Pending::wait).transpose()?;
        match (self.refused, output) {
            (Some(error), _) => Err(error),
            (None, Some(Output::Drawn(drawn))) => Ok(drawn),
            (None, _) => Ok(Vec::new()),
        }
    }
}
