//! One rank that computes given tokens through its cache and shows the logits: `baton logits`, the bench of devices and the
//! golden tests drive one or several of them. Serving goes through the engine instead.

use backend::{Backend, Batch, DeviceOptions, Group, KvStore, Out, Output, SeqId, Step};

use crate::golden::Case;
use crate::{Checkpoint, Model, ModelError};

/// Bytes of a cache are rounded up to this many spare blocks.
const SPARE_BLOCKS: usize = 2;

/// A rank with its model and cache.
pub struct Rank<B: Backend> {
    /// The device.
    pub backend: B,
    /// This rank's part.
    pub model: Model<B>,
    /// The cache.
    pub kv: B::Kv,
}

impl<B: Backend> Rank<B> {
    /// Opens the device as a rank of `group`, loads its part of `checkpoint`, and makes a cache for `tokens`.
    pub fn open(
        options: &DeviceOptions,
        group: Group,
        checkpoint: &Checkpoint,
        tokens: usize,
    ) -> Result<Self, ModelError> {
        let (rank, world) = (group.rank, group.world);
        let mut backend = B::open(options, group)?;
        let model = Model::load(&mut backend, checkpoint, rank, world, options.dtype, &mut |_| {})?;
        let block = options.block_tokens as usize;
        let rounded = (tokens.div_ceil(block) + SPARE_BLOCKS) * block;
        let kv = backend.kv(model.kv_spec(), (rounded * model.kv_spec().token_bytes()) as u64)?;
        Ok(Rank { backend, model, kv })
    }

    /// Computes `ids` at positions `start..` of the open sequence `seq`, in chunks of at most `chunk` tokens. Returns
    /// the logits after the last one, `[vocabulary]`, on rank 0.
    pub fn feed(
        &mut self,
        seq: SeqId,
        start: u32,
        ids: &[u32],
        chunk: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let mut at = start;
        let mut chunks = ids.chunks(chunk.max(1)).peekable();
        while let Some(ids) = chunks.next() {
            let mut batch = Batch::default();
            batch.push(seq, at, ids);
            at += ids.len() as u32;
            let mut step = self.backend.step(&mut self.kv, &batch);
            if chunks.peek().is_some() {
                self.model.fill(&mut step, &mut |_, _| {});
                step.submit(Out::Nothing).wait()?;
                continue;
            }
            let logits = self.model.forward(&mut step, &batch.last_rows(), &mut |_, _| {});
            if let Output::Logits(row) = step.submit(Out::Logits(logits)).wait()? {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    /// Feeds the ids of `case` that come after its prompt, one at a time. Returns the logits after each, on rank 0.
    pub fn follow(&mut self, seq: SeqId, case: &Case) -> Result<Vec<f32>, ModelError> {
        let mut rows = Vec::new();
        for (at, id) in (case.prompt.len() as u32..).zip(case.fed()) {
            rows.extend(self.feed(seq, at, &[*id], 1)?.into_iter().flatten());
        }
        Ok(rows)
    }

    /// Computes `case` as the sequence `seq`, its prompt in chunks of at most `chunk` tokens. Returns the logits after the
    /// prompt and after each id that is fed, `[ids, vocabulary]`, on rank 0.
    pub fn replay(&mut self, seq: SeqId, case: &Case, chunk: usize) -> Result<Vec<f32>, ModelError> {
        self.begin(seq, case.tokens())?;
        let mut rows: Vec<f32> = self.feed(seq, 0, &case.prompt, chunk)?.into_iter().flatten().collect();
        rows.extend(self.follow(seq, case)?);
        self.end(seq)?;
        Ok(rows)
    }

    /// Opens `seq` with room for `tokens`.
    pub fn begin(&mut self, seq: SeqId, tokens: usize) -> Result<(), ModelError> {
        Ok(self.kv.open(seq, tokens as u32).map_err(backend::BackendError::from)?)
    }

    /// Closes `seq`.
    pub fn end(&mut self, seq: SeqId) -> Result<(), ModelError> {
        Ok(self.kv.close(seq).map_err(backend::BackendError::from)?)
    }
}
