//! Lists that every step makes anew, kept between steps for their memory: a running model allocates nothing in a step.
//! Each is taken for an operation and put back behind it.

use backend::SeqId;

use crate::attend::{Plan, Rows};

/// The lists of a device's steps.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    /// Token ids of all rows.
    pub(crate) ids: Vec<u32>,
    /// Sequences of the batch, to look for one that comes twice.
    pub(crate) sequences: Vec<SeqId>,
    /// Tasks of attention.
    pub(crate) plan: Plan,
    /// Runs of the batch, none: see [`emptied`].
    pub(crate) runs: Vec<Rows<'static>>,
}

/// The memory of a list of runs, without what it holds: that lives no longer than its step. An iterator that becomes a list
/// of the same kind stays where it was, so this costs nothing.
pub(crate) fn emptied(runs: Vec<Rows<'_>>) -> Vec<Rows<'static>> {
    let without = |Rows { row, start, len, .. }| Rows { table: &[], row, start, len };
    let mut kept: Vec<Rows<'static>> = runs.into_iter().map(without).collect();
    kept.clear();
    kept
}
