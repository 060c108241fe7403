//! Our side of the comparison: the model of a file on the CPU backend, in this process.

use std::path::Path;

use anyhow::Result;
use backend::{Batch, CpuOptions, DType, DeviceOptions, Draw, Group, KvStore, Out, Pending, SeqId};
use backend_cpu::{CpuAct, CpuBackend};
use models::replay::Rank;
use models::{Checkpoint, ModelError};

use crate::blocks::Random;

/// Tokens of a step of a prompt, as nodes are set up.
const CHUNK: usize = 512;
/// Tokens of the prompts of a batch.
pub const BATCH_PROMPT: usize = 128;

/// A loaded model.
pub struct Ours {
    rank: Rank<CpuBackend>,
    next: u64,
    /// Whether seconds are the processor's.
    pub cpu_time: bool,
}

impl Ours {
    /// Loads `path` with a cache for `tokens`.
    pub fn open(path: &Path, threads: usize, cpu: CpuOptions, tokens: usize) -> Result<Self> {
        let options = DeviceOptions { dtype: DType::BF16, threads, cpu, ..DeviceOptions::default() };
        let checkpoint = Checkpoint::open(path)?;
        Ok(Ours {
            rank: Rank::open(&options, Group::alone(), &checkpoint, tokens)?,
            next: 0,
            cpu_time: false,
        })
    }

    /// What computes.
    pub fn device(&self) -> String {
        use backend::Backend;
        self.rank.backend.caps().device
    }

    /// Tokens per second of a prompt behind `depth` positions of cache.
    pub fn prefill(&mut self, tokens: usize, depth: usize) -> Result<f64> {
        let seq = self.begin(depth, tokens)?;
        let ids = ids(self.next, tokens, self.rank.model.vocab_size());
        let begun = self.now();
        self.rank.feed(seq, depth as u32, &ids, CHUNK)?;
        let took = self.now() - begun;
        self.rank.end(seq)?;
        Ok(tokens as f64 / took)
    }

    /// Tokens per second of `count` sequences together, each behind `depth` positions, `steps` steps.
    pub fn decode(&mut self, count: usize, depth: usize, steps: usize) -> Result<f64> {
        let mut sequences = Vec::new();
        let mut batch = Batch::default();
        for at in 0..count {
            let seq = self.begin(depth, steps + 1)?;
            batch.push(seq, depth as u32, &[at as u32]);
            sequences.push(seq);
        }
        let draws = vec![Draw::Token(backend::draw::Rule::GREEDY); count];
        let mut last: Option<Box<dyn Pending<CpuAct>>> = None;
        let mut begun = self.now();
        for at in 0..=steps {
            let Rank { backend, model, kv } = &mut self.rank;
            let mut step = backend::Backend::step(backend, kv, &batch);
            let logits = model.forward(&mut step, &batch.last_rows(), &mut |_, _| {});
            let pending = backend::Step::submit(step, Out::Draw(logits, draws.clone()));
            if let Some(last) = last.replace(pending) {
                last.wait()?;
            }
            if at == 0 {
                // The first warms up.
                begun = self.now();
            }
            batch = Batch::default();
            for (row, seq) in sequences.iter().enumerate() {
                batch.push_drawn(*seq, (depth + at + 1) as u32, row as u32);
            }
        }
        if let Some(last) = last {
            last.wait()?;
        }
        let took = self.now() - begun;
        for seq in sequences {
            self.rank.end(seq)?;
        }
        Ok((count * steps) as f64 / took)
    }

    /// Seconds of the clock, or of the processor for this process.
    fn now(&self) -> f64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let clock = if self.cpu_time { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
        // SAFETY: the call fills `time`.
        unsafe { libc::clock_gettime(clock, &mut time) };
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    }

    /// A sequence with `depth` positions of cache (zeros are as good as any) and room for `more`.
    fn begin(&mut self, depth: usize, more: usize) -> Result<SeqId> {
        self.next += 1;
        let seq = SeqId(self.next);
        self.rank.begin(seq, depth + more)?;
        if depth > 0 {
            let failed = |error| ModelError::from(backend::BackendError::from(error));
            let landing = self.rank.kv.land(seq, 0..depth as u32).map_err(failed)?;
            self.rank.kv.commit(landing).map_err(failed)?;
        }
        Ok(seq)
    }
}

/// Token ids that no cache has seen.
fn ids(seed: u64, count: usize, vocabulary: usize) -> Vec<u32> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..count).map(|_| (random.next() % vocabulary as u64) as u32).collect()
}
