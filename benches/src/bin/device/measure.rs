//! The measurements: each a number of runs, of which the median is shown.

use std::time::{Duration, Instant};

use anyhow::Result;
use backend::{Backend, Batch, Draw, KvExport, KvStore, Out, Piece, SeqId, Step};
use models::Config;
use models::replay::Rank;

use crate::attention::Random;

/// Prompts of the ragged batch: 16 of 64 to 2,048 tokens.
const RAGGED: [usize; 16] =
    [64, 2048, 192, 320, 1536, 448, 96, 1024, 576, 704, 128, 832, 1280, 256, 960, 1792];
/// Their sum.
pub const RAGGED_TOKENS: usize = {
    let (mut sum, mut at) = (0, 0);
    while at < RAGGED.len() {
        sum += RAGGED[at].div_ceil(64) * 64;
        at += 1;
    }
    sum
};
/// Tokens that each sequence generates.
const GENERATED: usize = 32;

/// Tells a device whether it replays equal steps as one graph, and asks how many it has replayed.
pub struct Replays<B> {
    pub turn: fn(&mut B, bool),
    pub count: fn(&B) -> u64,
}

/// A loaded model under measurement.
pub struct Bench<B: Backend> {
    pub rank: Rank<B>,
    /// Where steps may be replayed.
    pub replays: Option<Replays<B>>,
    pub runs: usize,
    /// Sequence ids used so far.
    pub next: u64,
}

/// Multiply-adds of a token in products with weights, without attention; the head counts once a prompt, so not at all.
pub fn parameters(config: &Config) -> f64 {
    let tables = if config.tied { 1 } else { 2 } * config.vocab_size * config.hidden;
    config.parameters().active as f64 - tables as f64
}

/// How many times as fast as another implementation's seconds under `name`; nothing where there are none.
pub fn times(beside: &serde_json::Value, name: &str, ours: Duration, whom: &str) -> String {
    let theirs = beside.get(name).and_then(serde_json::Value::as_f64);
    theirs.map_or_else(String::new, |theirs| format!(", {:.2} times {whom}", theirs / ours.as_secs_f64()))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Token ids that no cache has seen.
fn ids(seed: u64, count: usize, vocabulary: usize) -> Vec<u32> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..count).map(|_| (random.next() % vocabulary as u64) as u32).collect()
}

impl<B: Backend> Bench<B> {
    /// All measurements as a table.
    pub fn table(
        &mut self,
        prompt: usize,
        parameters: f64,
        peak_tflops: Option<f64>,
        beside: &serde_json::Value,
    ) -> Result<()> {
        let config = self.rank.model.config().clone();
        // The first step compiles, plans and allocates.
        self.prompts(&[prompt.min(512)], false)?;
        let share = |flops: f64, time: Duration| {
            let tflops = flops / time.as_secs_f64() / 1e12;
            match peak_tflops {
                Some(peak) => format!("{tflops:.1} TFLOP/s, {:.1} % of {peak}", tflops / peak * 100.0),
                None => format!("{tflops:.2} TFLOP/s"),
            }
        };
        let attended = |n: usize| 2.0 * (n * n) as f64 * (config.attended() * config.layers) as f64;
        let flops = |n: usize| 2.0 * parameters * n as f64 + attended(n);
        let one = self.timed(&[prompt], false)?;
        let rate = |n: usize, time: Duration| format!("{:.0} tok/s", n as f64 / time.as_secs_f64());
        println!(
            "| prompt of {prompt} | {one:.2?} | {}, {} (goal 60 %){} |",
            rate(prompt, one),
            share(flops(prompt), one),
            times(beside, "prompt", one, "Hugging Face (goal 1.15)")
        );
        let ragged = self.timed(&RAGGED, false)?;
        let (sum, all) = (RAGGED.iter().sum::<usize>(), RAGGED.iter().map(|n| flops(*n)).sum());
        println!(
            "| 16 prompts, {sum} tokens | {ragged:.2?} | {}, {}{} |",
            rate(sum, ragged),
            share(all, ragged),
            times(beside, "ragged", ragged, "Hugging Face (goal 1.5)")
        );
        let leaving = self.timed(&[prompt], true)?;
        let exposed = leaving.saturating_sub(one);
        let percent = exposed.as_secs_f64() / one.as_secs_f64() * 100.0;
        println!(
            "| the same prompt, its cache to the host | {leaving:.2?} | {}, exposed {exposed:.2?}, {percent:.1} % (goal at most 5) |",
            rate(prompt, leaving)
        );
        for batch in [1, 4, 16, 32] {
            let (step, beside) = self.replayed_and_queued(batch, 0)?;
            println!("| generation, batch {batch} | {step:.2?} a step | {}{beside} |", rate(batch, step));
        }
        for (batch, guesses) in [(1, 3), (1, 7), (4, 3)] {
            let (step, beside) = self.replayed_and_queued(batch, guesses)?;
            let rate = rate(batch * (1 + guesses), step);
            println!(
                "| generation, batch {batch}, {guesses} guesses each | {step:.2?} a step | {rate} if all hold{beside} |"
            );
        }
        Ok(())
    }

    /// The time of a step that generates; where steps may be replayed, in words what it is without, in turns.
    fn replayed_and_queued(&mut self, batch: usize, guesses: usize) -> Result<(Duration, String)> {
        let Some(Replays { turn, count }) = &self.replays else {
            return Ok((self.generation(batch, guesses)?, String::new()));
        };
        let (turn, count) = (*turn, *count);
        let before = count(&self.rank.backend);
        let (mut replayed, mut queued) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            for (on, times) in [(false, &mut queued), (true, &mut replayed)] {
                turn(&mut self.rank.backend, on);
                times.push(self.generation(batch, guesses)?);
            }
        }
        let graphs = count(&self.rank.backend) - before;
        let (replayed, queued) = (median(replayed), median(queued));
        let times = queued.as_secs_f64() / replayed.as_secs_f64();
        Ok((replayed, format!("; {graphs} steps replayed, {times:.2} times as fast as queued: {queued:.2?}")))
    }

    fn timed(&mut self, prompts: &[usize], export: bool) -> Result<Duration> {
        let times: Result<Vec<_>> = (0..self.runs).map(|_| self.prompts(prompts, export)).collect();
        times.map(median)
    }

    /// Prompts of these lengths in one step, to their first logits.
    fn prompts(&mut self, lengths: &[usize], export: bool) -> Result<Duration> {
        let vocabulary = self.rank.model.vocab_size();
        let planes = self.rank.model.kv_spec().planes.clone();
        let mut batch = Batch::default();
        let mut sequences = Vec::new();
        for length in lengths {
            self.next += 1;
            let seq = SeqId(self.next);
            self.rank.begin(seq, *length)?;
            batch.push(seq, 0, &ids(self.next, *length, vocabulary));
            sequences.push(seq);
        }
        let begun = Instant::now();
        let mut exports = Vec::new();
        let Rank { backend, model, kv } = &mut self.rank;
        let mut step = backend.step(kv, &batch);
        let logits = model.forward(&mut step, &batch.last_rows(), &mut |step, layer| {
            for (seq, length) in sequences.iter().zip(lengths).filter(|_| export) {
                exports.push((layer, *length, step.export(*seq, layer, 0..*length as u32)));
            }
        });
        step.submit(Out::Logits(logits)).wait()?;
        for (layer, length, lease) in exports {
            let lease = lease?;
            lease.wait()?;
            for (plane, spec) in planes.iter().enumerate() {
                let piece = Piece { layer, plane, heads: spec.heads(), tokens: 0..length as u32 };
                if lease.slices(&piece).is_none() {
                    lease.read(&piece, &mut Vec::new())?;
                }
            }
        }
        let took = begun.elapsed();
        for seq in sequences {
            self.rank.kv.close(seq)?;
        }
        Ok(took)
    }

    /// The median time of a step that generates a token for each of `count` sequences: on ids in flight, or with so many guesses
    /// beside each, behind what the host knows.
    fn generation(&mut self, count: usize, guesses: usize) -> Result<Duration> {
        let vocabulary = self.rank.model.vocab_size();
        let prompt = 128;
        let mut sequences = Vec::new();
        let mut batch = Batch::default();
        for _ in 0..count {
            self.next += 1;
            let seq = SeqId(self.next);
            self.rank.begin(seq, prompt + GENERATED + 1 + guesses)?;
            batch.push(seq, 0, &ids(self.next, prompt, vocabulary));
            sequences.push(seq);
        }
        let mut rows = batch.last_rows();
        let mut times = Vec::new();
        let mut last: Option<Box<dyn backend::Pending<B::Hidden>>> = None;
        for at in 0..=GENERATED {
            let begun = Instant::now();
            let Rank { backend, model, kv } = &mut self.rank;
            let mut step = backend.step(kv, &batch);
            let logits = model.forward(&mut step, &rows, &mut |_, _| {});
            let draws = vec![Draw::Token(backend::draw::Rule::GREEDY); rows.len()];
            let pending = step.submit(Out::Draw(logits, draws));
            let done = if guesses > 0 { Some(pending) } else { last.replace(pending) };
            if let Some(done) = done {
                done.wait()?;
                times.push(begun.elapsed());
            }
            batch = Batch::default();
            for (row, seq) in sequences.iter().enumerate() {
                let position = (prompt + at) as u32;
                match guesses {
                    0 => batch.push_drawn(*seq, position, row as u32),
                    _ => {
                        batch.push(*seq, position, &ids(seq.0 + u64::from(position), 1 + guesses, vocabulary))
                    }
                }
            }
            rows = (0..batch.rows() as u32).collect();
        }
        if let Some(last) = last {
            last.wait()?;
        }
        for seq in sequences {
            self.rank.kv.close(seq)?;
        }
        // The first holds the prompts.
        Ok(median(times.split_off(1)))
    }
}
