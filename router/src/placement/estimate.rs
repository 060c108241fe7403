//! How long a prompt takes on each way, from what is measured; nothing is guessed.
//!
//! ```text
//! handoff = (queue_P + uncached_P) / rate_P + max(0, bytes(uncached_D) / link - uncached_P / rate_P)
//! local   = (queue_D + uncached_D) / rate_D + streams_D * uncached_D / rate_D     the streams that our prompt slows
//! ```

use super::{Ask, Candidate, View};

/// Seconds until the group can decode after computing the prompt itself, and what its streams lose by it.
pub fn local_s(ask: Ask, group: &Candidate) -> Option<f64> {
    let compute = uncached(ask, group) / group.rate?;
    let queue = group.queue_tokens as f64 / group.rate?;
    Some(queue + compute + f64::from(group.streams) * compute)
}

/// Seconds until the group can decode after a handoff. A link that nobody measured is taken to hide behind compute.
pub fn handoff_s(ask: Ask, view: &View, prefill: usize, decode: usize) -> Option<f64> {
    let node = &view.prefill[prefill];
    let rate = rate_or_mean(node, view)?;
    let compute = uncached(ask, node) / rate;
    let bytes = uncached(ask, &view.decode[decode]) * view.kv_bytes_per_token;
    let exposed = link(view, prefill, decode).map_or(0.0, |link| (bytes / link - compute).max(0.0));
    Some(node.queue_tokens as f64 / rate + compute + exposed)
}

/// The last token is always computed: its logits are wanted.
pub fn uncached(ask: Ask, node: &Candidate) -> f64 {
    f64::from(ask.tokens.saturating_sub(node.cached_tokens).max(1))
}

/// What the group lacks of the prompt is at most one of its blocks.
pub fn tail_is_a_block(ask: Ask, group: &Candidate) -> bool {
    group.store.is_some_and(|store| uncached(ask, group) <= f64::from(store.block_tokens))
}

/// Prompt tokens a second of a prefill node, or of the others while it has computed none.
pub fn rate_or_mean(node: &Candidate, view: &View) -> Option<f64> {
    node.rate.or_else(|| {
        let known: Vec<f64> = view.prefill.iter().filter_map(|node| node.rate).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    })
}

/// Bytes a second between the two, measured.
pub fn link(view: &View, prefill: usize, decode: usize) -> Option<f64> {
    view.prefill[prefill].links.iter().find(|(to, _)| *to == decode).map(|(_, rate)| *rate)
}
