//! What a request was given by the [`Book`], and what it tells it: who has worked, holds, refused or failed.

use std::sync::Arc;

use cluster::Member;
use proto::v1::Role;
use tokio::time::Instant;

use super::Book;
use crate::dispatch::ledger::{GrantId, Ledger};
use crate::dispatch::prefix::Holder;
use crate::placement::Placement;

/// A place in the cluster. Dropping it gives everything back.
pub struct Grant {
    /// Who does what.
    pub placement: Placement,
    /// The prefill node, if one is used.
    pub prefill: Option<Arc<Member>>,
    /// The decode group, if one is used.
    pub decode: Option<Arc<Member>>,
    pub(super) id: GrantId,
    pub(super) prefill_holder: Holder,
    pub(super) decode_holder: Holder,
    pub(super) book: Arc<Book>,
}

impl Grant {
    /// The group has reserved room and holds `cached_tokens` of the sequence.
    pub fn admitted(&self, cached_tokens: u32, blocks: &[u64]) {
        let Some(decode) = &self.decode else { return };
        self.book.change(|state| {
            state.ledger.worked(&decode.join.node_id);
            state.ledger.sequence_admitted(&decode.join.node_id, self.id, Instant::now().into_std());
            state.prefixes.correct(self.decode_holder, blocks, cached_tokens);
        });
    }

    /// The prompt is computed: the first token is there. `cached_tokens`: what its computer said it held before.
    pub fn computed(&self, cached_tokens: Option<u32>, blocks: &[u64]) {
        let (member, holder) = match (&self.prefill, &self.decode) {
            (Some(prefill), _) => (prefill, self.prefill_holder),
            (None, Some(decode)) => (decode, self.decode_holder),
            (None, None) => return,
        };
        self.book.change(|state| {
            state.ledger.worked(&member.join.node_id);
            state.ledger.prompt_done(&member.join.node_id, self.id);
            if let Some(cached_tokens) = cached_tokens {
                state.prefixes.correct(holder, blocks, cached_tokens);
            }
            state.prefixes.record(holder, blocks);
        });
        // A prefill node that has one prompt less may start another.
        self.book.refresh();
    }

    /// The decode group holds these blocks now.
    pub fn held_by_decode(&self, blocks: &[u64]) {
        if self.decode.is_some() {
            self.book.change(|state| state.prefixes.record(self.decode_holder, blocks));
        }
    }

    /// The node of this role refused for want of room: nobody is sent there before something changes.
    pub fn refused(&self, role: Role) {
        self.blame(role, Ledger::refused);
    }

    /// A call to the node of this role failed: nobody is sent there for a moment.
    pub fn failed(&self, role: Role) {
        self.blame(role, Ledger::failed);
    }

    fn blame(&self, role: Role, note: impl FnOnce(&mut Ledger, &str, std::time::Instant)) {
        let member = match role {
            Role::Prefill => &self.prefill,
            _ => &self.decode,
        };
        if let Some(member) = member {
            let now = Instant::now().into_std();
            self.book.change(|state| note(&mut state.ledger, &member.join.node_id, now));
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.book.change(|state| {
            state.grants_open -= 1;
            for member in [&self.prefill, &self.decode].into_iter().flatten() {
                state.ledger.returned(&member.join.node_id, self.id);
            }
        });
        self.book.refresh();
    }
}
