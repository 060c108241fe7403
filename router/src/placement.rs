//! Where a request goes: which decode group, and whether a prefill node reads its prompt. Pure: no clock, no I/O.
//!
//! Caller: `dispatch::book`, with what the nodes report and what this router gave them since.

mod estimate;
mod outcome;
mod policy;
#[cfg(test)]
mod tests;

pub use outcome::{Outcome, Placement, Reason, Wait};
pub use policy::Disaggregation;

use estimate::{handoff_s, link, local_s, rate_or_mean, tail_is_a_block, uncached};

use crate::inference::Decision;

/// A ready node, as placement sees it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Candidate {
    /// Tokens at the start of the sequence that its cache is believed to hold.
    pub cached_tokens: u32,
    /// Prompt tokens that it computes before ours.
    pub queue_tokens: u64,
    /// Prompts given to it that have no first token yet.
    pub queue_prompts: u32,
    /// Prompt tokens a second, measured.
    pub rate: Option<f64>,
    /// Sequences that it generates.
    pub streams: u32,
    /// Seconds of a decode step, measured.
    pub step_s: Option<f64>,
    /// Its store; none: not reported.
    pub store: Option<Store>,
    /// It refused for want of room, and nothing has changed since.
    pub full: bool,
    /// Of a prefill node: bytes a second to decode candidates, by their index, measured.
    pub links: Vec<(usize, f64)>,
}

/// A node's KV store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Store {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks in all.
    pub total: u32,
    /// Blocks that a new sequence can have: free, or cached and evictable, less what was promised since the report.
    pub available: u32,
}

/// What is to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Prompt and output so far. At least 1.
    pub tokens: u32,
    /// Only one more token is wanted: no decode group is needed if a prefill node is there.
    pub one_token: bool,
}

/// The cluster at one moment: only nodes that take work.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Prefill nodes.
    pub prefill: Vec<Candidate>,
    /// Decode groups.
    pub decode: Vec<Candidate>,
    /// KV bytes of one token over all layers and ranks.
    pub kv_bytes_per_token: f64,
}

/// Bounds on placement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// The policy.
    pub disaggregation: Disaggregation,
    /// Room on a decode group is asked for only when a prefill node can start within this many seconds.
    pub start_within_s: f64,
}

/// Prompts given at once to a prefill node whose rate nobody knows yet.
const UNMEASURED_PROMPTS_MAX: u32 = 2;

/// Only for ranking groups against each other while nothing is measured; decides nothing between handoff and local.
const RANK_RATE: f64 = 1000.0;

/// As [`RANK_RATE`], for a decode step.
const RANK_STEP_S: f64 = 0.01;

/// Chooses for one request.
pub fn place(ask: Ask, view: &View, rules: &Rules) -> Outcome {
    let Readers { best: reader, startable } = readers(ask, view, rules);
    let alone = ask.one_token && rules.disaggregation != Disaggregation::Never;
    match reader.filter(|_| alone) {
        Some(prefill) if startable => return Outcome::Place(Placement::PrefillOnly { prefill }),
        Some(_) => return Outcome::Wait(Wait::Prefill),
        None => {}
    }
    if view.decode.is_empty() {
        return Outcome::Wait(Wait::DecodeGroup);
    }
    let stores: Option<Vec<Store>> = view.decode.iter().map(|group| group.store).collect();
    if let Some(stores) = stores {
        // One block is for the answer.
        let takes = |store: &Store| u64::from(store.total.saturating_sub(1)) * u64::from(store.block_tokens);
        if stores.iter().all(|store| blocks_for(ask.tokens, store) > store.total) {
            let most = stores.iter().map(takes).max().unwrap_or(0);
            return Outcome::Never(format!(
                "{} tokens do not fit: the largest decode group takes {most} and an answer (--kv-memory of its nodes)",
                ask.tokens
            ));
        }
    }
    let choices = (0..view.decode.len()).filter(|&decode| has_room(ask, &view.decode[decode]));
    let choice = choices
        .map(|decode| choose(ask, view, rules, decode, reader))
        .min_by(|a, b| a.score.total_cmp(&b.score));
    match choice.map(|choice| choice.placement) {
        None => Outcome::Wait(Wait::Room),
        Some(Placement::Handoff { .. }) if !startable => Outcome::Wait(Wait::Prefill),
        Some(placement) => Outcome::Place(placement),
    }
}

/// Blocks of a sequence of `tokens` and of one block of output, as a decode group reserves.
pub fn blocks_for(tokens: u32, store: &Store) -> u32 {
    tokens.div_ceil(store.block_tokens.max(1)).saturating_add(1)
}

fn has_room(ask: Ask, group: &Candidate) -> bool {
    // What the group holds of us is shared. Unknown stores are asked: the group has the last word anyway.
    !group.full
        && group.store.is_none_or(|store| {
            let shared = group.cached_tokens.min(ask.tokens) / store.block_tokens.max(1);
            blocks_for(ask.tokens, &store) - shared <= store.available
        })
}

struct Readers {
    /// The prefill node that is done soonest.
    best: Option<usize>,
    /// It can start within the bound.
    startable: bool,
}

fn readers(ask: Ask, view: &View, rules: &Rules) -> Readers {
    let time = |node: &Candidate| {
        (node.queue_tokens as f64 + uncached(ask, node)) / rate_or_mean(node, view).unwrap_or(RANK_RATE)
    };
    let startable = |node: &Candidate| {
        let starts = match node.rate {
            Some(rate) => node.queue_tokens as f64 / rate <= rules.start_within_s,
            None => node.queue_prompts < UNMEASURED_PROMPTS_MAX,
        };
        starts && !node.full
    };
    // One that can start goes before one that cannot, however fast.
    let best = view
        .prefill
        .iter()
        .enumerate()
        .min_by(|(_, a), (_, b)| (!startable(a)).cmp(&!startable(b)).then(time(a).total_cmp(&time(b))));
    Readers { best: best.map(|(index, _)| index), startable: best.is_some_and(|(_, node)| startable(node)) }
}

struct Choice {
    placement: Placement,
    /// Seconds, for ranking groups: time to the first step, what travels, and the batch that it joins.
    score: f64,
}

fn choose(ask: Ask, view: &View, rules: &Rules, decode: usize, reader: Option<usize>) -> Choice {
    let group = &view.decode[decode];
    let local = local_s(ask, group);
    let handoff = reader.map(|prefill| (prefill, handoff_s(ask, view, prefill, decode)));
    let placement = match (rules.disaggregation, handoff) {
        (Disaggregation::Never, _) => Placement::Local { decode, reason: Reason::Policy },
        (_, None) => Placement::Local { decode, reason: Reason::NoPrefillNode },
        (Disaggregation::Always, Some((prefill, _))) => {
            Placement::Handoff { prefill, decode, reason: Reason::Policy }
        }
        (Disaggregation::Auto, Some((prefill, handoff))) => match (local, handoff) {
            (Some(local), Some(handoff)) if local <= handoff => {
                Placement::Local { decode, reason: Reason::Sooner }
            }
            (Some(_), Some(_)) => Placement::Handoff { prefill, decode, reason: Reason::Sooner },
            (None, _) if tail_is_a_block(ask, group) => {
                Placement::Local { decode, reason: Reason::Measuring }
            }
            _ => Placement::Handoff { prefill, decode, reason: Reason::Measuring },
        },
    };
    let start = match placement {
        Placement::Local { .. } => {
            local.unwrap_or((group.queue_tokens as f64 + uncached(ask, group)) / RANK_RATE)
        }
        _ => handoff.and_then(|(_, seconds)| seconds).unwrap_or(0.0),
    };
    // A hidden transfer still takes the link from others: that is what sends a conversation back to its group.
    let link = reader.and_then(|prefill| link(view, prefill, decode));
    let travels = match (placement.decision(), link) {
        (Decision::Local, _) => 0.0,
        (Decision::Handoff, Some(link)) => uncached(ask, group) * view.kv_bytes_per_token / link,
        (Decision::Handoff, None) => uncached(ask, group) / RANK_RATE,
    };
    let batch = f64::from(group.streams) * group.step_s.unwrap_or(RANK_STEP_S);
    Choice { placement, score: start + travels + batch }
}
