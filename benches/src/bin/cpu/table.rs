//! What was measured, as one table.

use crate::blocks::Recipe;
use crate::limits::Limits;
use crate::shape::Shape;

/// What one row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// A prompt of `tokens` behind `depth` positions.
    Prefill { tokens: usize, depth: usize },
    /// `count` sequences that each generate behind `depth` positions.
    Decode { count: usize, depth: usize },
    /// As a decode of one sequence, while a neighbour computes on one core.
    Disturbed,
}

/// Work of a model in one format.
pub struct Work {
    shape: Shape,
    /// Multiply-adds of a token with weights, the head apart.
    products: f64,
    head: f64,
    /// Bytes of weights that a decode step of one sequence reads.
    bytes: f64,
    /// Of those, bytes of experts, which several sequences choose apart.
    expert_bytes: f64,
}

impl Work {
    pub fn new(shape: Shape, recipe: Recipe) -> Self {
        let (mut products, mut head, mut bytes, mut expert_bytes) = (0.0, 0.0, 0.0, 0.0);
        for tensor in shape.tensors(recipe) {
            let share = tensor.bytes() as f64 * tensor.share;
            bytes += share;
            if tensor.share < 1.0 {
                expert_bytes += share;
            }
            match tensor.name.as_str() {
                "token_embd.weight" => head += tensor.elements() as f64,
                _ => products += tensor.elements() as f64 * tensor.share,
            }
        }
        Work { shape, products, head, bytes, expert_bytes }
    }

    /// Operations (two per multiply-add) and bytes read per token of a test.
    fn of(&self, test: Test) -> (f64, f64) {
        let cache = self.shape.cache_bytes();
        let (count, depth) = match test {
            Test::Prefill { tokens, depth } => {
                let seen = depth as f64 + tokens as f64 / 2.0;
                let operations = self.products + self.head / tokens as f64 + seen * self.shape.attended();
                return (2.0 * operations, 0.0);
            }
            Test::Decode { count, depth } => (count as f64, depth as f64),
            Test::Disturbed => (1.0, 0.0),
        };
        let used = self.shape.experts.map_or(1.0, |experts| {
            // Experts that at least one of the sequences chose, over those that one chooses.
            let (all, own) = (experts.count as f64, experts.used as f64);
            all * (1.0 - (1.0 - own / all).powf(count)) / own
        });
        let weights = self.bytes - self.expert_bytes + self.expert_bytes * used;
        let operations = 2.0 * (self.products + self.head + depth * self.shape.attended());
        (operations, weights / count + depth * cache)
    }
}

impl Test {
    fn words(self) -> String {
        match self {
            Test::Prefill { tokens, depth: 0 } => format!("prefill {tokens}"),
            Test::Prefill { tokens, depth } => format!("prefill {tokens} at {depth}"),
            Test::Decode { count: 1, depth: 0 } => "decode".to_owned(),
            Test::Decode { count: 1, depth } => format!("decode at {depth}"),
            Test::Decode { count, .. } => format!("decode, {count} sequences, sum"),
            Test::Disturbed => "decode, a busy neighbour".to_owned(),
        }
    }
}

pub fn heading(shape: &Shape, limits: Limits, device: &str, threads: usize) {
    println!(
        "{} ({device}); reads at most {:.1} GB/s with {threads} threads,",
        shape.name,
        limits.read / 1e9
    );
    println!(
        "multiplies at most {:.0} GFLOP/s of floats, {}{:.0} GOP/s of 16-bit and {:.0} of 8-bit whole numbers.\n",
        limits.floats / 1e9,
        if limits.tiles > 0.0 {
            format!("{:.0} of bf16 in tiles, ", limits.tiles / 1e9)
        } else {
            String::new()
        },
        limits.int16 / 1e9,
        limits.int8 / 1e9
    );
    println!(
        "| weights | what | ours, tok/s | llama.cpp | ratio | reads GB/s | of the limit | GFLOP/s | of the limit |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
}

/// One line: medians of both sides.
pub fn row(format: &str, test: Test, work: &Work, ours: &[f64], theirs: &[f64], limits: Limits) {
    let own = median(ours);
    let (operations, bytes) = work.of(test);
    let (rate, read) = (own * operations, own * bytes);
    let peer = match theirs {
        [] => "| |".to_owned(),
        _ => format!("{:.1} | {:.2}", median(theirs), own / median(theirs)),
    };
    let reading = match bytes {
        0.0 => " | ".to_owned(),
        _ => format!("{:.1} | {:.2}", read / 1e9, read / limits.read),
    };
    // Quantised weights are multiplied as whole numbers.
    let whole = if format.starts_with('q') { limits.int16 } else { 0.0 };
    let limit = limits.floats.max(limits.tiles).max(whole);
    println!(
        "| {format} | {} | {own:.1} | {peer} | {reading} | {:.0} | {:.2} |",
        test.words(),
        rate / 1e9,
        rate / limit
    );
}

/// The middle of the values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
