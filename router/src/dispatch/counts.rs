//! What dispatch counts: decisions, migrations, refusals. Read by the metrics page.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::inference::Decision;
use crate::placement::Reason;

/// Why a request went on elsewhere, or again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The call to the prefill node broke.
    PrefillLost,
    /// The KV session between the two failed.
    Session,
    /// The call to the decode group broke, or the group restarts.
    DecodeLost,
    /// The group gave the sequence up for want of room.
    Preempted,
    /// A node stopped reporting, or its join token was revoked.
    LeaseExpired,
    /// A node kept the call and said nothing for too long.
    Stalled,
    /// A node said what it must not say.
    Protocol,
}

impl Cause {
    /// All causes, in the order of their numbers.
    pub const ALL: [Cause; 7] = [
        Cause::PrefillLost,
        Cause::Session,
        Cause::DecodeLost,
        Cause::Preempted,
        Cause::LeaseExpired,
        Cause::Stalled,
        Cause::Protocol,
    ];

    /// The label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::PrefillLost => "prefill_lost",
            Cause::Session => "session",
            Cause::DecodeLost => "decode_lost",
            Cause::Preempted => "preempted",
            Cause::LeaseExpired => "lease_expired",
            Cause::Stalled => "stalled",
            Cause::Protocol => "protocol",
        }
    }
}

/// Totals since start. All are monotonic.
#[derive(Debug, Default)]
pub struct Counts {
    decisions: [[AtomicU64; Reason::ALL.len()]; 2],
    migrations: [AtomicU64; Cause::ALL.len()],
    refusals_prefill: AtomicU64,
    refusals_decode: AtomicU64,
    overloaded: AtomicU64,
    finished: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
}

impl Counts {
    pub(super) fn decided(&self, decision: Decision, reason: Reason) {
        add(&self.decisions[decision as usize][reason as usize]);
    }

    pub(super) fn migrated(&self, cause: Cause) {
        add(&self.migrations[cause as usize]);
    }

    pub(super) fn refused_by_prefill(&self) {
        add(&self.refusals_prefill);
    }

    pub(super) fn refused_by_decode(&self) {
        add(&self.refusals_decode);
    }

    pub(super) fn was_overloaded(&self) {
        add(&self.overloaded);
    }

    pub(super) fn has_finished(&self) {
        add(&self.finished);
    }

    pub(super) fn has_failed(&self) {
        add(&self.failed);
    }

    pub(super) fn was_cancelled(&self) {
        add(&self.cancelled);
    }

    /// Placements, by who computes the prompt and why. A migrated request counts once for each.
    pub fn decisions(&self) -> impl Iterator<Item = (Decision, Reason, u64)> + '_ {
        [Decision::Handoff, Decision::Local].into_iter().flat_map(move |decision| {
            Reason::ALL.into_iter().map(move |reason| {
                (decision, reason, get(&self.decisions[decision as usize][reason as usize]))
            })
        })
    }

    /// Placements of one kind.
    pub fn decisions_of(&self, decision: Decision, reason: Reason) -> u64 {
        get(&self.decisions[decision as usize][reason as usize])
    }

    /// Migrations by cause.
    pub fn migrations(&self) -> impl Iterator<Item = (Cause, u64)> + '_ {
        Cause::ALL.into_iter().map(|cause| (cause, get(&self.migrations[cause as usize])))
    }

    /// Migrations of one cause.
    pub fn migrations_of(&self, cause: Cause) -> u64 {
        get(&self.migrations[cause as usize])
    }

    /// Calls that prefill nodes did not accept.
    pub fn refusals_prefill(&self) -> u64 {
        get(&self.refusals_prefill)
    }

    /// Reservations that decode groups did not grant.
    pub fn refusals_decode(&self) -> u64 {
        get(&self.refusals_decode)
    }

    /// Requests turned away: queue full, or too long in it.
    pub fn overloaded(&self) -> u64 {
        get(&self.overloaded)
    }

    /// Requests answered to their end.
    pub fn finished(&self) -> u64 {
        get(&self.finished)
    }

    /// Requests that ended with an error.
    pub fn failed(&self) -> u64 {
        get(&self.failed)
    }

    /// Requests whose client left.
    pub fn cancelled(&self) -> u64 {
        get(&self.cancelled)
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: every label counts for itself.
    #[test]
    fn counters_do_not_mix() {
        let counts = Counts::default();
        counts.decided(Decision::Local, Reason::Sooner);
        counts.migrated(Cause::Preempted);
        for (decision, reason, count) in counts.decisions() {
            assert_eq!(count, u64::from((decision, reason) == (Decision::Local, Reason::Sooner)));
        }
        for (cause, count) in counts.migrations() {
            assert_eq!(count, u64::from(cause == Cause::Preempted));
        }
        assert!(Reason::ALL.iter().enumerate().all(|(index, &reason)| reason as usize == index));
        assert!(Cause::ALL.iter().enumerate().all(|(index, &cause)| cause as usize == index));
    }
}
