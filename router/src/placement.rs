//! Where a request goes: which decode group, and whether a prefill node reads its prompt. Pure: no clock, no I/O.
//!
//! Caller: `dispatch::book`, with what the nodes report and what this router gave them since.
//!
//! ```text
//! handoff = (queue_P + uncached_P) / rate_P + max(0, bytes(uncached_D) / link - uncached_P / rate_P)
//! local   = (queue_D + uncached_D) / rate_D + streams_D * uncached_D / rate_D     the streams that our prompt slows
//! ```

use serde::{Deserialize, Serialize};

use crate::inference::Decision;

/// Whether prompts travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Disaggregation {
    /// Where it is estimated to be sooner.
    #[default]
    Auto,
    /// Whenever a prefill node is there.
    Always,
    /// Decode groups compute every prompt themselves.
    Never,
}

impl std::str::FromStr for Disaggregation {
    type Err = String;

    fn from_str(text: &str) -> Result<Disaggregation, String> {
        match text {
            "auto" => Ok(Disaggregation::Auto),
            "always" => Ok(Disaggregation::Always),
            "never" => Ok(Disaggregation::Never),
            other => Err(format!("disaggregation `{other}` is unknown: auto, always or never")),
        }
    }
}

impl std::fmt::Display for Disaggregation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Disaggregation::Auto => "auto",
            Disaggregation::Always => "always",
            Disaggregation::Never => "never",
        })
    }
}

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

/// Who does what. Indices into the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// `prefill` computes the prompt, its KV travels to `decode`.
    Handoff {
        /// Prefill node.
        prefill: usize,
        /// Decode group.
        decode: usize,
        /// Why.
        reason: Reason,
    },
    /// The decode group computes the prompt itself.
    Local {
        /// Decode group.
        decode: usize,
        /// Why.
        reason: Reason,
    },
    /// `prefill` computes the prompt and the only token.
    PrefillOnly {
        /// Prefill node.
        prefill: usize,
    },
}

impl Placement {
    /// Who computes the prompt.
    pub fn decision(&self) -> Decision {
        match self {
            Placement::Handoff { .. } | Placement::PrefillOnly { .. } => Decision::Handoff,
            Placement::Local { .. } => Decision::Local,
        }
    }

    /// Why, for the metric.
    pub fn reason(&self) -> Reason {
        match self {
            Placement::Handoff { reason, .. } | Placement::Local { reason, .. } => *reason,
            Placement::PrefillOnly { .. } => Reason::OneToken,
        }
    }

    /// The prefill node, if one is used.
    pub fn prefill(&self) -> Option<usize> {
        match self {
            Placement::Handoff { prefill, .. } | Placement::PrefillOnly { prefill } => Some(*prefill),
            Placement::Local { .. } => None,
        }
    }

    /// The decode group, if one is used.
    pub fn decode(&self) -> Option<usize> {
        match self {
            Placement::Handoff { decode, .. } | Placement::Local { decode, .. } => Some(*decode),
            Placement::PrefillOnly { .. } => None,
        }
    }
}

/// Why the prompt is computed where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The policy says so.
    Policy,
    /// No prefill node is there.
    NoPrefillNode,
    /// Estimated to be sooner.
    Sooner,
    /// A rate is not known yet: a tail of at most one block measures the group, all else travels.
    Measuring,
    /// One token is wanted: nothing needs to travel.
    OneToken,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Reason; 5] =
        [Reason::Policy, Reason::NoPrefillNode, Reason::Sooner, Reason::Measuring, Reason::OneToken];

    /// The label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Policy => "policy",
            Reason::NoPrefillNode => "no_prefill_node",
            Reason::Sooner => "sooner",
            Reason::Measuring => "measuring",
            Reason::OneToken => "one_token",
        }
    }
}

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// A decode group that takes work.
    DecodeGroup,
    /// Room in a decode group's store.
    Room,
    /// A prefill node that can start soon.
    Prefill,
}

/// What to do with a request now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Send it.
    Place(Placement),
    /// Keep it in the queue.
    Wait(Wait),
    /// No store could ever hold it: why.
    Never(String),
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
        let holds = |store: &Store| u64::from(store.total) * u64::from(store.block_tokens);
        if stores.iter().all(|store| blocks_for(ask.tokens, store) > store.total) {
            let most = stores.iter().map(holds).max().unwrap_or(0);
            return Outcome::Never(format!(
                "{} tokens do not fit: the largest decode group holds {most} tokens of KV, one block kept for output",
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

/// Seconds until the group can decode after computing the prompt itself, and what its streams lose by it.
fn local_s(ask: Ask, group: &Candidate) -> Option<f64> {
    let compute = uncached(ask, group) / group.rate?;
    let queue = group.queue_tokens as f64 / group.rate?;
    Some(queue + compute + f64::from(group.streams) * compute)
}

/// Seconds until the group can decode after a handoff. A link that nobody measured is taken to hide behind compute.
fn handoff_s(ask: Ask, view: &View, prefill: usize, decode: usize) -> Option<f64> {
    let node = &view.prefill[prefill];
    let rate = rate_or_mean(node, view)?;
    let compute = uncached(ask, node) / rate;
    let bytes = uncached(ask, &view.decode[decode]) * view.kv_bytes_per_token;
    let exposed = link(view, prefill, decode).map_or(0.0, |link| (bytes / link - compute).max(0.0));
    Some(node.queue_tokens as f64 / rate + compute + exposed)
}

/// The last token is always computed: its logits are wanted.
fn uncached(ask: Ask, node: &Candidate) -> f64 {
    f64::from(ask.tokens.saturating_sub(node.cached_tokens).max(1))
}

fn tail_is_a_block(ask: Ask, group: &Candidate) -> bool {
    group.store.is_some_and(|store| uncached(ask, group) <= f64::from(store.block_tokens))
}

fn rate_or_mean(node: &Candidate, view: &View) -> Option<f64> {
    node.rate.or_else(|| {
        let known: Vec<f64> = view.prefill.iter().filter_map(|node| node.rate).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    })
}

fn link(view: &View, prefill: usize, decode: usize) -> Option<f64> {
    view.prefill[prefill].links.iter().find(|(to, _)| *to == decode).map(|(_, rate)| *rate)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STORE: Store = Store { block_tokens: 16, total: 1000, available: 1000 };

    fn rules(disaggregation: Disaggregation) -> Rules {
        Rules { disaggregation, start_within_s: 2.0 }
    }

    fn ask(tokens: u32) -> Ask {
        Ask { tokens, one_token: false }
    }

    /// A fast prefill node, a slow decode group, 100 KB a token over 1 GB/s.
    fn view() -> View {
        View {
            prefill: vec![Candidate { rate: Some(10_000.0), links: vec![(0, 1e9)], ..Candidate::default() }],
            decode: vec![Candidate {
                rate: Some(1_000.0),
                step_s: Some(0.02),
                store: Some(STORE),
                ..Candidate::default()
            }],
            kv_bytes_per_token: 100e3,
        }
    }

    fn placed(tokens: u32, view: &View, policy: Disaggregation) -> (Decision, Reason) {
        match place(ask(tokens), view, &rules(policy)) {
            Outcome::Place(placement) => (placement.decision(), placement.reason()),
            other => panic!("{other:?}"),
        }
    }

    /// Protects: the three policies, and that a group without prefill node serves itself under each.
    #[test]
    fn policies() {
        use Disaggregation::*;
        assert_eq!(placed(500, &view(), Always), (Decision::Handoff, Reason::Policy));
        assert_eq!(placed(500, &view(), Never), (Decision::Local, Reason::Policy));
        assert_eq!(placed(500, &view(), Auto), (Decision::Handoff, Reason::Sooner));
        let alone = View { prefill: vec![], ..view() };
        assert_eq!(placed(500, &alone, Always), (Decision::Local, Reason::NoPrefillNode));
        assert_eq!(placed(500, &alone, Auto), (Decision::Local, Reason::NoPrefillNode));
    }

    /// Protects: the estimate. 500 tokens: handoff 0.05 s compute hides 0.05 s of link, local 0.5 s.
    #[test]
    fn the_estimate_moves_with_what_is_measured() {
        use Disaggregation::Auto;
        // 9 s of queue before us on P: local is sooner.
        let mut busy = view();
        busy.prefill[0].queue_tokens = 90_000;
        assert_eq!(placed(500, &busy, Auto), (Decision::Local, Reason::Sooner));
        // The group holds all but 20 tokens, P none: 0.02 s against 0.05 s.
        let mut held = view();
        held.decode[0].cached_tokens = 480;
        assert_eq!(placed(500, &held, Auto), (Decision::Local, Reason::Sooner));
        // ... but four streams would pay 0.02 s each.
        held.decode[0].streams = 4;
        assert_eq!(placed(500, &held, Auto), (Decision::Handoff, Reason::Sooner));
        // A link of 50 MB/s takes 1 s for 50 MB: local at 0.5 s.
        let mut slow = view();
        slow.prefill[0].links = vec![(0, 50e6)];
        assert_eq!(placed(500, &slow, Auto), (Decision::Local, Reason::Sooner));
    }

    /// Protects: without measurements nothing is guessed: short tails measure the group, the rest travels.
    #[test]
    fn unknown_rates_are_measured() {
        use Disaggregation::Auto;
        let mut unknown = view();
        unknown.decode[0].rate = None;
        assert_eq!(placed(500, &unknown, Auto), (Decision::Handoff, Reason::Measuring));
        assert_eq!(placed(16, &unknown, Auto), (Decision::Local, Reason::Measuring));
        unknown.decode[0].rate = Some(1000.0);
        unknown.prefill[0].rate = None;
        assert_eq!(placed(500, &unknown, Auto), (Decision::Handoff, Reason::Measuring));
    }

    /// Protects: only the router's queue is long: nothing is reserved for a prompt that cannot start soon.
    #[test]
    fn a_late_start_waits_here() {
        let always = rules(Disaggregation::Always);
        let mut busy = view();
        busy.prefill[0].queue_tokens = 20_000;
        assert!(matches!(place(ask(500), &busy, &always), Outcome::Place(_)));
        busy.prefill[0].queue_tokens = 20_001;
        assert_eq!(place(ask(500), &busy, &always), Outcome::Wait(Wait::Prefill));
        // Another prefill node that can start is taken, though it is slower.
        busy.prefill.push(Candidate { rate: Some(100.0), ..Candidate::default() });
        assert!(matches!(
            place(ask(500), &busy, &always),
            Outcome::Place(Placement::Handoff { prefill: 1, .. })
        ));
        let mut unmeasured = view();
        unmeasured.prefill[0].rate = None;
        unmeasured.prefill[0].queue_prompts = UNMEASURED_PROMPTS_MAX;
        assert_eq!(place(ask(500), &unmeasured, &always), Outcome::Wait(Wait::Prefill));
    }

    /// Protects: room. What a group holds of us is shared; what no group could ever hold is refused by name.
    #[test]
    fn room() {
        let always = rules(Disaggregation::Always);
        let mut small = view();
        small.decode[0].store = Some(Store { block_tokens: 16, total: 12, available: 10 });
        assert!(matches!(place(ask(144), &small, &always), Outcome::Place(_)));
        assert_eq!(place(ask(145), &small, &always), Outcome::Wait(Wait::Room));
        small.decode[0].cached_tokens = 32;
        assert!(matches!(place(ask(145), &small, &always), Outcome::Place(_)));
        assert!(matches!(place(ask(176), &small, &always), Outcome::Place(_)));
        assert_eq!(
            place(ask(177), &small, &always),
            Outcome::Never(
                "177 tokens do not fit: the largest decode group holds 192 tokens of KV, one block kept for output"
                    .into()
            )
        );
        small.decode[0].full = true;
        assert_eq!(place(ask(1), &small, &always), Outcome::Wait(Wait::Room));
        small.decode.clear();
        assert_eq!(place(ask(1), &small, &always), Outcome::Wait(Wait::DecodeGroup));
    }

    /// Protects: one token reserves nothing, as long as a prefill node is there and the policy lets it work.
    #[test]
    fn one_token_needs_no_group() {
        let one = Ask { tokens: 10, one_token: true };
        let mut lone = view();
        lone.decode.clear();
        assert_eq!(
            place(one, &lone, &rules(Disaggregation::Auto)),
            Outcome::Place(Placement::PrefillOnly { prefill: 0 })
        );
        assert!(matches!(
            place(one, &view(), &rules(Disaggregation::Never)),
            Outcome::Place(Placement::Local { decode: 0, reason: Reason::Policy })
        ));
        lone.prefill.clear();
        assert_eq!(place(one, &lone, &rules(Disaggregation::Auto)), Outcome::Wait(Wait::DecodeGroup));
    }

    /// Protects: a conversation returns to its group, unless that is so busy that moving is sooner.
    #[test]
    fn affinity_against_load() {
        let mut two = view();
        two.decode.push(two.decode[0].clone());
        two.prefill[0].links = vec![(0, 1e9), (1, 1e9)];
        two.decode[1].cached_tokens = 4_000;
        let chosen = |view: &View| match place(ask(4_500), view, &rules(Disaggregation::Always)) {
            Outcome::Place(placement) => placement.decode(),
            other => panic!("{other:?}"),
        };
        assert_eq!(chosen(&two), Some(1));
        two.decode[1].streams = 10;
        assert_eq!(chosen(&two), Some(1));
        two.decode[1].streams = 40;
        assert_eq!(chosen(&two), Some(0));
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        (
            (0..2000u32, 0..100_000u64, 0..4u32, proptest::option::of(1.0..20_000.0f64)),
            (0..64u32, proptest::option::of(0.001..0.1f64), any::<bool>()),
            proptest::option::of((1..64u32, 1..400u32, 0..400u32)),
            proptest::option::of(1e6..1e10f64),
        )
            .prop_map(|((cached, queue, prompts, rate), (streams, step, full), store, link)| {
                Candidate {
                    cached_tokens: cached,
                    queue_tokens: queue,
                    queue_prompts: prompts,
                    rate,
                    streams,
                    step_s: step,
                    store: store.map(|(block_tokens, total, available)| Store {
                        block_tokens,
                        total,
                        available: available.min(total),
                    }),
                    full,
                    links: link.map(|rate| (0, rate)).into_iter().collect(),
                }
            })
    }

    fn any_view() -> impl Strategy<Value = View> {
        (
            proptest::collection::vec(candidate(), 0..4),
            proptest::collection::vec(candidate(), 0..4),
            1.0..1e6f64,
        )
            .prop_map(|(prefill, decode, kv_bytes_per_token)| View {
                prefill,
                decode,
                kv_bytes_per_token,
            })
    }

    proptest! {
        /// Protects: whatever is reported, a chosen group has room, a chosen prefill node can start, policies hold.
        #[test]
        fn choices_are_possible(view in any_view(), tokens in 1..4000u32, one_token: bool, policy in 0..3usize) {
            use Disaggregation::*;
            let policy = [Auto, Always, Never][policy];
            match place(Ask { tokens, one_token }, &view, &rules(policy)) {
                Outcome::Place(placement) => {
                    if let Some(decode) = placement.decode() {
                        prop_assert!(has_room(ask(tokens), &view.decode[decode]));
                    }
                    if let Some(prefill) = placement.prefill() {
                        let node = &view.prefill[prefill];
                        prop_assert!(!node.full && policy != Never);
                        if let Some(rate) = node.rate {
                            prop_assert!(node.queue_tokens as f64 / rate <= 2.0);
                        }
                    }
                    if policy == Always && !view.prefill.is_empty() {
                        prop_assert_eq!(placement.decision(), Decision::Handoff);
                    }
                }
                Outcome::Wait(Wait::DecodeGroup) => prop_assert!(view.decode.is_empty()),
                Outcome::Wait(Wait::Prefill) => prop_assert!(policy != Never && !view.prefill.is_empty()),
                Outcome::Wait(Wait::Room) => {
                    prop_assert!(view.decode.iter().all(|group| !has_room(ask(tokens), group)));
                }
                Outcome::Never(_) => prop_assert!(view.decode.iter().all(|group| group.store.is_some())),
            }
        }

        /// Protects: a longer queue at the prefill node never draws a prompt to it.
        #[test]
        fn a_queue_repels(view in any_view(), tokens in 1..4000u32, more in 0..100_000u64) {
            let view = View { prefill: view.prefill.into_iter().take(1).collect(), ..view };
            let mut busier = view.clone();
            if let Some(node) = busier.prefill.first_mut() {
                node.queue_tokens += more;
            }
            let auto = rules(Disaggregation::Auto);
            let local =
                |view| matches!(place(ask(tokens), view, &auto), Outcome::Place(Placement::Local { .. }));
            if view.decode.len() == 1 && local(&view) {
                prop_assert!(local(&busier));
            }
        }
    }
}
