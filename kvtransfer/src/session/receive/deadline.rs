//! How long a session waits, and for whom. Pure.

use std::time::Instant;

use super::{Action, Pair, Receiving};
use crate::SessionError;
use crate::session::millis;

impl Receiving {
    /// Looks at the deadlines.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        if now < self.next_tick() {
            return Vec::new();
        }
        let deadline = self.expect.deadline;
        let expired = |what: String| SessionError::Expired { what, ms: millis(deadline) };
        let lanes = || self.pairs.iter().flat_map(|(rank, pair)| pair.open().map(move |lane| (rank, lane)));
        let silent = lanes().find(|(_, lane)| lane.conn.is_some() && now >= lane.heard + deadline);
        let gone = lanes().find_map(|(rank, lane)| {
            lane.lost
                .as_ref()
                .filter(|(since, _)| now >= *since + self.resume)
                .map(|(_, reason)| (rank, reason))
        });
        let error = match (silent, gone, self.missing()) {
            (Some((rank, _)), ..) => expired(format!("nothing came from sender rank {rank}")),
            (_, Some((rank, reason)), _) => {
                SessionError::Lost { peer: format!("sender rank {rank}"), reason: reason.clone() }
            }
            (.., Some(rank)) => expired(format!("sender rank {rank} did not connect")),
            _ => expired("no sender connected".to_owned()),
        };
        self.fail(error)
    }

    /// When [`Receiving::tick`] may find something.
    pub fn next_tick(&self) -> Instant {
        let deadline = self.expect.deadline;
        let Some(first) = self.first_pair else { return self.began + deadline };
        let ends = self.pairs.values().flat_map(Pair::open).map(|lane| match &lane.lost {
            Some((since, _)) => *since + self.resume,
            None => lane.heard + deadline,
        });
        let missing = self.senders.is_empty() || self.missing().is_some();
        ends.chain(missing.then_some(first + deadline)).min().unwrap_or(self.last_frame + deadline)
    }

    /// A sender that has not connected, of those that are known.
    fn missing(&self) -> Option<&u32> {
        self.senders.iter().chain(&self.peers).find(|rank| !self.pairs.contains_key(rank))
    }
}
