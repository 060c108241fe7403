//! The reshard plan: which sender rank sends which heads of which plane to which receiver rank. A pure function of both
//! sides' specs, computed once per session; both ends of the wire and the tests use it.
//!
//! Heads that several senders hold are sent by the lowest rank that does; heads that several receivers hold are sent to
//! each. A replicated plane crosses the link once: each of N receivers gets every N-th stripe of its tokens, receiver `r`
//! from sender `r % senders`, and passes it on to the others ([`relay`]).

use std::ops::Range;

use backend::{KvSpec, Piece, Plane, Sharding};

use crate::codec::Row;
use crate::limits::PAYLOAD_BYTES_MAX;

/// Heads of one plane that travel from one sender to one receiver, in every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index into the senders' specs.
    pub sender: usize,
    /// Index into the receivers' specs.
    pub receiver: usize,
    /// Index into [`KvSpec::planes`].
    pub plane: usize,
    /// Heads of the whole model, not empty.
    pub heads: Range<usize>,
    /// Bytes of one token of these heads.
    pub token_bytes: usize,
    /// One head of one token.
    pub row: Row,
    /// Which tokens.
    pub share: Share,
}

/// Tokens of a stripe of a replicated plane: few enough that a chunk feeds every rank, enough for frames of some size.
pub const STRIPE_TOKENS: u32 = 128;

/// Every `count`-th stripe of [`STRIPE_TOKENS`] absolute positions, from the `index`-th on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Below `count`.
    pub index: u32,
    /// Not 0; 1: all tokens.
    pub count: u32,
}

impl Share {
    /// All tokens.
    pub const WHOLE: Share = Share { index: 0, count: 1 };

    /// The parts of `tokens` that are in the share, ascending, none empty.
    pub fn within(self, tokens: &Range<u32>) -> impl Iterator<Item = Range<u32>> + use<> {
        let Range { start, end } = *tokens;
        let whole = self.count == 1 && start < end;
        let stripes = if self.count == 1 { 0..0 } else { start / STRIPE_TOKENS..end.div_ceil(STRIPE_TOKENS) };
        let within = stripes
            .filter(move |stripe| stripe % self.count == self.index)
            .map(move |stripe| {
                let first = stripe * STRIPE_TOKENS;
                first.max(start)..first.saturating_add(STRIPE_TOKENS).min(end)
            })
            .filter(|part| !part.is_empty());
        whole.then_some(start..end).into_iter().chain(within)
    }

    /// How many of `tokens` are in the share.
    pub fn count_within(self, tokens: &Range<u32>) -> u64 {
        self.within(tokens).map(|part| part.len() as u64).sum()
    }
}

/// All parts of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Ordered by receiver, plane, head.
    pub parts: Vec<Part>,
    /// Layers of the model.
    pub layers: usize,
    senders: usize,
    receivers: usize,
}

/// Two caches that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A side without ranks.
    #[error("no {0} ranks")]
    NoRanks(&'static str),
    /// Number of layers or planes.
    #[error("{what}: sender rank {sender} has {sender_has}, receiver rank {receiver} has {receiver_has}")]
    Count {
        /// `layers` or `planes`.
        what: &'static str,
        /// Sender rank.
        sender: usize,
        /// Its number.
        sender_has: usize,
        /// Receiver rank.
        receiver: usize,
        /// Its number.
        receiver_has: usize,
    },
    /// A plane that is another plane on the other side.
    #[error(
        "plane {plane}: sender rank {sender} has {sender_has}, receiver rank {receiver} has {receiver_has}"
    )]
    Plane {
        /// Index of the plane.
        plane: usize,
        /// Sender rank.
        sender: usize,
        /// Its plane in words.
        sender_has: String,
        /// Receiver rank.
        receiver: usize,
        /// Its plane in words.
        receiver_has: String,
    },
    /// A head range that the model does not have.
    #[error("plane {plane}: heads {start}..{end} of a model with {total}")]
    Heads {
        /// Index of the plane.
        plane: usize,
        /// First head.
        start: usize,
        /// One past the last head.
        end: usize,
        /// Heads of the model.
        total: usize,
    },
    /// A head that a receiver wants and no sender holds.
    #[error("plane {plane}: head {head} of receiver rank {receiver} is held by no sender")]
    Missing {
        /// Index of the plane.
        plane: usize,
        /// Head of the whole model.
        head: usize,
        /// Receiver rank.
        receiver: usize,
    },
    /// One token's row does not fit a frame.
    #[error("plane {plane}: {bytes} bytes per token, a frame takes {PAYLOAD_BYTES_MAX}")]
    Row {
        /// Index of the plane.
        plane: usize,
        /// Bytes of one token.
        bytes: usize,
    },
}

/// Plans a session from all senders to all receivers.
pub fn plan(from: &[KvSpec], to: &[KvSpec]) -> Result<Plan, PlanError> {
    let first = from.first().ok_or(PlanError::NoRanks("sender"))?;
    let first_to = to.first().ok_or(PlanError::NoRanks("receiver"))?;
    for (receiver, spec) in to.iter().enumerate() {
        same_cache(0, first, receiver, spec)?;
    }
    for (sender, spec) in from.iter().enumerate() {
        same_cache(sender, spec, 0, first_to)?;
    }
    let mut parts = Vec::new();
    for (receiver, spec) in to.iter().enumerate() {
        for (index, plane) in spec.planes.iter().enumerate() {
            let share = share(plane, receiver, to.len());
            for (sender, heads) in sources(from, receiver, index, plane)? {
                let token_bytes = heads.len() * plane.head_bytes();
                if token_bytes > PAYLOAD_BYTES_MAX {
                    return Err(PlanError::Row { plane: index, bytes: token_bytes });
                }
                let row = Row::of(plane);
                parts.push(Part { sender, receiver, plane: index, heads, token_bytes, row, share });
            }
        }
    }
    Ok(Plan { parts, layers: first.layers, senders: from.len(), receivers: to.len() })
}

fn share(plane: &Plane, receiver: usize, receivers: usize) -> Share {
    match plane.sharding {
        Sharding::Replicated => Share { index: receiver as u32, count: receivers as u32 },
        Sharding::Heads(_) => Share::WHOLE,
    }
}

/// What rank `from` of a group with caches `ranks` passes on to the others: its shares of the replicated planes. Sender
/// and receiver are both ranks of the group. Empty where nothing is replicated or there is nobody else.
pub fn relay(ranks: &[KvSpec], from: usize) -> Vec<Part> {
    let Some(spec) = ranks.get(from) else { return Vec::new() };
    let replicated = |plane: &&(usize, &Plane)| plane.1.sharding == Sharding::Replicated;
    let planes: Vec<_> = spec.planes.iter().enumerate().collect();
    (0..ranks.len())
        .filter(|receiver| *receiver != from)
        .flat_map(|receiver| planes.iter().filter(replicated).map(move |plane| (receiver, plane)))
        .filter(|(_, (_, plane))| !plane.heads().is_empty())
        .map(|(receiver, (index, plane))| Part {
            sender: from,
            receiver,
            plane: *index,
            heads: plane.heads(),
            token_bytes: plane.token_bytes(),
            row: Row::of(plane),
            share: share(plane, from, ranks.len()),
        })
        .collect()
}

/// Payload bytes of `tokens` of `parts` over `layers`.
pub fn bytes(parts: &[Part], layers: usize, tokens: &Range<u32>) -> u64 {
    parts.iter().map(|part| part.token_bytes as u64 * part.share.count_within(tokens)).sum::<u64>()
        * layers as u64
}

impl Plan {
    /// What `sender` sends to `receiver`.
    pub fn between(&self, sender: usize, receiver: usize) -> Vec<Part> {
        self.parts.iter().filter(|part| part.sender == sender && part.receiver == receiver).cloned().collect()
    }

    /// Senders that connect to `receiver`, ascending. Never none: a receiver that wants no heads hears the end of the
    /// session from sender 0.
    pub fn senders_of(&self, receiver: usize) -> Vec<usize> {
        let mut senders: Vec<usize> =
            self.parts.iter().filter(|part| part.receiver == receiver).map(|part| part.sender).collect();
        senders.sort_unstable();
        senders.dedup();
        if senders.is_empty() {
            senders.push(0);
        }
        senders
    }

    /// Receivers that `sender` connects to, ascending.
    pub fn receivers_of(&self, sender: usize) -> Vec<usize> {
        (0..self.receivers).filter(|receiver| self.senders_of(*receiver).contains(&sender)).collect()
    }

    /// Number of senders planned for.
    pub fn senders(&self) -> usize {
        self.senders
    }

    /// Payload bytes of `tokens` from `sender` to `receiver` over all layers.
    pub fn bytes(&self, sender: usize, receiver: usize, tokens: &Range<u32>) -> u64 {
        bytes(&self.between(sender, receiver), self.layers, tokens)
    }
}

impl Part {
    /// The rectangles of this part in one layer of `tokens`.
    pub fn pieces(&self, layer: usize, tokens: &Range<u32>) -> impl Iterator<Item = Piece> + use<> {
        let (plane, heads) = (self.plane, self.heads.clone());
        self.share.within(tokens).map(move |tokens| Piece { layer, plane, heads: heads.clone(), tokens })
    }
}

/// Cuts off the first tokens of `piece` whose rows of `token_bytes` fit `budget_bytes`, at least one; the rest stays in
/// `piece`. `None` when nothing is left.
pub fn cut(piece: &mut Piece, token_bytes: usize, budget_bytes: usize) -> Option<Piece> {
    if piece.tokens.is_empty() {
        return None;
    }
    let fit = u32::try_from((budget_bytes / token_bytes.max(1)).max(1)).unwrap_or(u32::MAX);
    let end = piece.tokens.start.saturating_add(fit).min(piece.tokens.end);
    let head = Piece { tokens: piece.tokens.start..end, ..piece.clone() };
    piece.tokens.start = end;
    Some(head)
}

/// The spec as one line, equal exactly when the caches are: `2 layers k 8x64 bf16 0..4, v 8x64 bf16 0..4`.
pub fn describe(spec: &KvSpec) -> String {
    let planes: Vec<String> = spec
        .planes
        .iter()
        .map(|plane| match &plane.sharding {
            Sharding::Heads(heads) => format!("{} {}..{}", describe_plane(plane), heads.start, heads.end),
            Sharding::Replicated => format!("{} replicated", describe_plane(plane)),
        })
        .collect();
    format!("{} layers {}", spec.layers, planes.join(", "))
}

fn describe_plane(plane: &Plane) -> String {
    format!("{} {}x{} {}", plane.name, plane.heads_total, plane.dim, plane.dtype)
}

fn same_cache(sender: usize, from: &KvSpec, receiver: usize, to: &KvSpec) -> Result<(), PlanError> {
    let counts = [("layers", from.layers, to.layers), ("planes", from.planes.len(), to.planes.len())];
    for (what, sender_has, receiver_has) in counts {
        if sender_has != receiver_has {
            return Err(PlanError::Count { what, sender, sender_has, receiver, receiver_has });
        }
    }
    for (plane, (a, b)) in from.planes.iter().zip(&to.planes).enumerate() {
        let replicated = |plane: &Plane| plane.sharding == Sharding::Replicated;
        let (sender_has, receiver_has) = (describe_plane(a), describe_plane(b));
        if sender_has != receiver_has || replicated(a) != replicated(b) {
            return Err(PlanError::Plane { plane, sender, sender_has, receiver, receiver_has });
        }
        for heads in [a.heads(), b.heads()] {
            if heads.start > heads.end || heads.end > a.heads_total {
                let (start, end, total) = (heads.start, heads.end, a.heads_total);
                return Err(PlanError::Heads { plane, start, end, total });
            }
        }
    }
    Ok(())
}

/// Which senders give `receiver` the heads of its `plane`: consecutive ranges, ascending, each head once.
fn sources(
    from: &[KvSpec],
    receiver: usize,
    index: usize,
    plane: &Plane,
) -> Result<Vec<(usize, Range<usize>)>, PlanError> {
    let wanted = plane.heads();
    if plane.sharding == Sharding::Replicated {
        return Ok(if wanted.is_empty() { Vec::new() } else { vec![(receiver % from.len(), wanted)] });
    }
    let mut ranges: Vec<(usize, Range<usize>)> = Vec::new();
    for head in wanted {
        let sender = from
            .iter()
            .position(|spec| spec.planes[index].heads().contains(&head))
            .ok_or(PlanError::Missing { plane: index, head, receiver })?;
        match ranges.last_mut() {
            Some((last, range)) if *last == sender => range.end = head + 1,
            _ => ranges.push((sender, head..head + 1)),
        }
    }
    Ok(ranges)
}
