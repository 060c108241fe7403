//! Which join tokens were revoked, as a node has heard from its router: whoever came in by one is not talked to any more. What
//! makes connections asks here when they begin, and again whenever somebody was added.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use rustls::pki_types::CertificateDer;

use super::identity::token_of;

/// Ids of revoked tokens. Nobody is ever taken off: a token that was revoked stays so.
#[derive(Debug, Default)]
pub struct Revocations {
    ids: RwLock<BTreeSet<String>>,
    version: AtomicU64,
}

impl Revocations {
    /// These tokens were revoked.
    pub fn add(&self, ids: Vec<String>) {
        let mut known = self.ids.write().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            if known.insert(id.clone()) {
                tracing::info!(token = id, "a join token was revoked: who came in by it is cut off");
                // After the set: who sees the new number sees the new token.
                self.version.fetch_add(1, Ordering::Release);
            }
        }
    }

    /// Grows with every token that is added, from 0.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Whether nobody has revoked the token that the owner of these certificates, its own first, came in by.
    pub fn stands(&self, certs: &[CertificateDer<'_>]) -> bool {
        let ids = self.ids.read().unwrap_or_else(PoisonError::into_inner);
        ids.is_empty() || token_of(certs).is_none_or(|token| !ids.contains(&token))
    }
}
