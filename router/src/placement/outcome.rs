//! What placement decides: who does what and why, or what a request waits for.

use crate::inference::Decision;

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
