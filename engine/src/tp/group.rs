//! One epoch of a group as one of its ranks holds it.

use crate::request::Target;
use crate::tp::plan::Plan;

/// Why a group cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum TpError {
    /// A rank failed or cannot be reached any more.
    #[error("rank {rank} lost: {reason}")]
    Lost {
        /// Which.
        rank: usize,
        /// What happened.
        reason: String,
    },
}

/// One epoch of a group.
pub struct Group {
    /// This rank; 0 leads.
    pub rank: usize,
    /// Changes whenever the ranks meet anew.
    pub epoch: u64,
    /// Every rank's cache and KV addresses.
    pub targets: Vec<Target>,
    /// Blocks that every rank's store has.
    pub blocks: u32,
}

impl Group {
    /// A group of one rank.
    pub fn alone(epoch: u64, target: Target, blocks: u32) -> Self {
        Group { rank: 0, epoch, targets: vec![target], blocks }
    }

    /// Tells the followers what to do.
    pub(crate) fn tell(&mut self, _plan: &Plan) -> Result<(), TpError> {
        Ok(())
    }

    /// Tells the followers that it is over.
    pub(crate) fn end(&mut self, _reason: Option<String>) {}
}
