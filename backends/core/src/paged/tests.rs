//! Blocks are conserved, and nobody touches what another holds.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const A: SeqId = SeqId(1);
const B: SeqId = SeqId(2);

fn usage(free: u32, used: u32, quarantined: u32) -> KvUsage {
    KvUsage { total: free + used + quarantined, free, used, quarantined }
}

/// A block that a sender still reads is not handed out again until the lease ends.
#[test]
fn leased_blocks_of_a_closed_sequence_are_quarantined() {
    let mut pages = Pages::new(1, 2, 4);
    pages.open(A, 8).unwrap();
    pages.fill(A, 0..1, 0..8).unwrap();
    let lease = pages.lease(A, 0..1, 2..4, Access::Read).unwrap();
    pages.close(A).unwrap();
    assert_eq!(pages.usage(), usage(1, 0, 1));
    assert_eq!(pages.open(B, 8), Err(KvError::Full { wanted_blocks: 2, free_blocks: 1 }));
    pages.release(lease);
    assert_eq!(pages.usage(), usage(2, 0, 0));
    pages.open(B, 8).unwrap();
}

/// What a reader was promised is not rewritten; positions after it are.
#[test]
fn leased_positions_are_not_writable() {
    let mut pages = Pages::new(2, 2, 4);
    pages.open(A, 8).unwrap();
    pages.fill(A, 0..2, 0..3).unwrap();
    let lease = pages.lease(A, 0..1, 0..3, Access::Read).unwrap();
    assert_eq!(pages.writable(A, 0..1, 2..4), Err(KvError::Leased { seq: A, start: 2, end: 4 }));
    pages.writable(A, 1..2, 2..4).unwrap();
    pages.writable(A, 0..1, 3..8).unwrap();
    pages.release(lease);
    pages.writable(A, 0..1, 2..4).unwrap();
}

/// A landing is alone on its positions, is lost when its sequence closes, and finishes them when committed.
#[test]
fn write_leases_are_exclusive() {
    let mut pages = Pages::new(1, 2, 4);
    pages.open(A, 8).unwrap();
    let lease = pages.lease(A, 0..1, 1..6, Access::Write).unwrap();
    assert_eq!(pages.readable(A, 0..1, 0..2), Err(KvError::Leased { seq: A, start: 0, end: 2 }));
    pages.lease(A, 0..1, 5..8, Access::Write).unwrap_err();
    pages.fork(A, B, 4, Fork::Share).unwrap_err();
    pages.commit(lease, A).unwrap();
    pages.filled(A, 0..1, 1..6).unwrap();
    assert_eq!(
        pages.filled(A, 0..1, 1..7),
        Err(KvError::Range { what: "tokens", start: 1, end: 7, limit_start: 1, limit_end: 6 })
    );
    let lease = pages.lease(A, 0..1, 1..6, Access::Write).unwrap();
    pages.close(A).unwrap();
    pages.open(A, 0).unwrap();
    assert_eq!(pages.commit(lease, A), Err(KvError::Unknown(A)));
    assert_eq!(pages.usage(), usage(2, 0, 0));
}

/// Shared prefixes are counted once and are read-only for both.
#[test]
fn forks_share_whole_blocks() {
    let mut pages = Pages::new(1, 4, 4);
    pages.open(A, 12).unwrap();
    pages.fill(A, 0..1, 0..9).unwrap();
    pages.fork(A, B, 6, Fork::Share).unwrap_err();
    pages.fork(A, B, 8, Fork::Share).unwrap();
    assert_eq!(pages.usage(), usage(1, 3, 0));
    assert_eq!(pages.table(B).unwrap(), &pages.table(A).unwrap()[..2]);
    pages.filled(B, 0..1, 0..8).unwrap();
    assert_eq!(pages.writable(A, 0..1, 7..9), Err(KvError::Shared { seq: A, start: 7, end: 9 }));
    pages.writable(A, 0..1, 8..12).unwrap();
    pages.close(A).unwrap();
    assert_eq!(pages.usage(), usage(2, 2, 0));
    pages.writable(B, 0..1, 0..8).unwrap();
}

#[derive(Clone, Debug)]
enum Op {
    Open(u64, u32),
    Grow(u64, u32),
    Fork(u64, u64, u32, bool),
    Truncate(u64, u32),
    Close(u64),
    Fill(u64, u32),
    Lease(u64, u32, u32, bool),
    Release(usize),
    Commit(usize, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (seq, tokens) = (|| 0u64..4, || 0u32..40);
    prop_oneof![
        (seq(), tokens()).prop_map(|(s, t)| Op::Open(s, t)),
        (seq(), tokens()).prop_map(|(s, t)| Op::Grow(s, t)),
        (seq(), seq(), 0u32..6, any::<bool>()).prop_map(|(a, b, n, m)| Op::Fork(a, b, n * 4, m)),
        (seq(), tokens()).prop_map(|(s, t)| Op::Truncate(s, t)),
        seq().prop_map(Op::Close),
        (seq(), tokens()).prop_map(|(s, t)| Op::Fill(s, t)),
        (seq(), tokens(), tokens(), any::<bool>()).prop_map(|(s, a, b, w)| Op::Lease(
            s,
            a.min(b),
            a.max(b),
            w
        )),
        (0usize..8).prop_map(Op::Release),
        ((0usize..8), seq()).prop_map(|(l, s)| Op::Commit(l, s)),
    ]
}

proptest! {
    /// Whatever is done in whatever order: blocks are never lost, never in two hands unless shared, and never
    /// handed out while leased.
    #[test]
    fn blocks_are_conserved(ops in prop::collection::vec(op(), 1..80)) {
        let mut pages = Pages::new(2, 12, 4);
        let mut leases: Vec<(LeaseId, Vec<u32>)> = Vec::new();
        for op in ops {
            let before: HashSet<u32> = pages.sequences.values().flat_map(|s| s.table.clone()).collect();
            let leased: HashSet<u32> = leases.iter().flat_map(|(_, blocks)| blocks.clone()).collect();
            let was = pages.usage();
            let failed = match op.clone() {
                Op::Open(s, t) => pages.open(SeqId(s), t).is_err(),
                Op::Grow(s, t) => pages.grow(SeqId(s), t).is_err(),
                Op::Fork(a, b, t, m) => {
                    pages.fork(SeqId(a), SeqId(b), t, if m { Fork::Move } else { Fork::Share }).is_err()
                }
                Op::Truncate(s, t) => pages.truncate(SeqId(s), t).is_err(),
                Op::Close(s) => pages.close(SeqId(s)).is_err(),
                Op::Fill(s, t) => pages.fill(SeqId(s), 0..2, 0..t).is_err(),
                Op::Lease(s, a, b, w) => {
                    let access = if w { Access::Write } else { Access::Read };
                    match pages.lease(SeqId(s), 0..2, a..b, access) {
                        Ok(id) => { leases.push((id, pages.leased_blocks(id).to_vec())); false }
                        Err(_) => true,
                    }
                }
                Op::Release(i) if i < leases.len() => { pages.release(leases.remove(i).0); false }
                Op::Commit(i, s) if i < leases.len() => {
                    let _ = pages.commit(leases.remove(i).0, SeqId(s));
                    false
                }
                Op::Release(_) | Op::Commit(..) => true,
            };
            let now = pages.usage();
            prop_assert_eq!(now.total, now.free + now.used + now.quarantined);
            if failed {
                prop_assert_eq!(now, was, "{:?} failed and changed something", op);
            }
            let held: HashSet<u32> = pages.sequences.values().flat_map(|s| s.table.clone()).collect();
            prop_assert_eq!(held.len() as u32, now.used);
            for fresh in held.difference(&before) {
                prop_assert!(!leased.contains(fresh), "block {} handed out under a lease", fresh);
            }
            let free: HashSet<u32> = pages.free.iter().copied().collect();
            prop_assert_eq!(free.len(), pages.free.len());
            prop_assert!(free.is_disjoint(&held));
            for (index, block) in pages.blocks.iter().enumerate() {
                let owners = pages.sequences.values().flat_map(|s| &s.table).filter(|b| **b == index as u32);
                prop_assert_eq!(owners.count() as u32, block.sequences);
                if block.is_leased() {
                    prop_assert!(!free.contains(&(index as u32)));
                }
            }
        }
        for seq in 0..4 {
            let _ = pages.close(SeqId(seq));
        }
        for (lease, _) in leases {
            pages.release(lease);
        }
        prop_assert_eq!(pages.usage(), KvUsage { total: 12, free: 12, used: 0, quarantined: 0 });
    }
}
