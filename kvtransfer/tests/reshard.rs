//! Any split to any split: the plan gives every head of every receiver exactly once, from the lowest rank that holds it,
//! and the sessions deliver exactly the right bytes whatever the blocks, chunks, frames and windows.

mod common;

use std::ops::Range;

use backend::{DType, KvSpec, Plane, Sharding};
use common::sim::{Setup, run};
use common::{Case, gqa_ranks, mla};
use kvtransfer::layout::{PlanError, plan, relay};
use kvtransfer::session::Outcome;
use proptest::collection::vec;
use proptest::prelude::*;

/// Ranges of `heads` over 1..=6 ranks that together hold all: even, uneven, overlapping, or fewer heads than ranks.
fn senders(heads: usize) -> impl Strategy<Value = Vec<Range<usize>>> {
    (vec(0..=heads, 0..6), vec((0..3usize, 0..3usize), 6)).prop_map(move |(mut cuts, grow)| {
        cuts.extend([0, heads]);
        cuts.sort_unstable();
        let ranges = cuts.windows(2).map(|pair| pair[0]..pair[1]).take(6).collect::<Vec<_>>();
        let last = ranges.len() - 1;
        ranges
            .into_iter()
            .enumerate()
            .map(|(rank, range)| {
                let end = if rank == last { heads } else { range.end };
                range.start.saturating_sub(grow[rank].0)..(end + grow[rank].1).min(heads)
            })
            .collect()
    })
}

/// Any ranges, empty ones among them.
fn receivers(heads: usize) -> impl Strategy<Value = Vec<Range<usize>>> {
    vec((0..=heads, 0..=heads), 1..=6)
        .prop_map(|pairs| pairs.into_iter().map(|(a, b)| a.min(b)..a.max(b)).collect())
}

fn splits() -> impl Strategy<Value = (usize, Vec<Range<usize>>, Vec<Range<usize>>)> {
    (1..=9usize).prop_flat_map(|heads| (Just(heads), senders(heads), receivers(heads)))
}

fn specs(heads: usize, ranges: &[Range<usize>], latent: bool) -> Vec<KvSpec> {
    let mut specs = gqa_ranks(2, heads, 3, ranges);
    if latent {
        let plane = mla(1).planes[0].clone();
        specs.iter_mut().for_each(|spec| spec.planes.push(plane.clone()));
    }
    specs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_head_is_planned_once((heads, from, to) in splits(), latent: bool) {
        let (from_specs, to_specs) = (specs(heads, &from, latent), specs(heads, &to, latent));
        let plan = plan(&from_specs, &to_specs).unwrap();
        for (receiver, spec) in to_specs.iter().enumerate() {
            for (index, plane) in spec.planes.iter().enumerate() {
                for head in plane.heads() {
                    let parts: Vec<_> = plan
                        .parts
                        .iter()
                        .filter(|p| p.receiver == receiver && p.plane == index && p.heads.contains(&head))
                        .collect();
                    prop_assert_eq!(parts.len(), 1, "receiver {} plane {} head {}", receiver, index, head);
                    if plane.sharding != Sharding::Replicated {
                        let lowest = from.iter().position(|range| range.contains(&head));
                        prop_assert_eq!(Some(parts[0].sender), lowest);
                    }
                }
            }
            let tokens = 100..700;
            let planned: u64 = (0..from.len()).map(|sender| plan.bytes(sender, receiver, &tokens)).sum();
            let passed: u64 = (0..to.len())
                .flat_map(|rank| relay(&to_specs, rank))
                .filter(|part| part.receiver == receiver)
                .map(|part| part.token_bytes as u64 * part.share.count_within(&tokens) * 2)
                .sum();
            prop_assert_eq!(planned + passed, spec.token_bytes() as u64 * 600);
            prop_assert!(!plan.senders_of(receiver).is_empty());
        }
    }

    #[test]
    fn the_right_bytes_arrive(
        (heads, from, to) in splits(),
        latent: bool,
        start in 0..40u32,
        tokens in 0..40u32,
        seed: u64,
        chunk in 1..20u32,
        block_tokens in [1..9u32, 1..9u32],
        frame_bytes in 1..300usize,
        window_bytes in 1..2000u64,
        lanes in 1..4usize,
    ) {
        let case = Case {
            deadline: common::sim::DEADLINE,
            ..Case::new(specs(heads, &from, latent), specs(heads, &to, latent), start..start + tokens)
        };
        let wanted: Vec<u64> = case.to.iter().map(|spec| spec.token_bytes() as u64 * u64::from(tokens)).collect();
        let setup = Setup {
            case, seed, faults: Vec::new(), window_bytes, frame_bytes, chunk, block_tokens, lanes, lie: |_| {},
        };
        let report = run(&setup);
        prop_assert!(report.receivers.iter().all(Result::is_ok), "{:?}\n{:?}", report.receivers, report.senders);
        for (result, wanted) in report.receivers.iter().zip(wanted) {
            let summary = result.as_ref().unwrap();
            prop_assert_eq!((summary.bytes, summary.close), (wanted, common::CLOSE));
        }
        prop_assert!(report.senders.iter().all(|end| matches!(end, Outcome::Acknowledged(_))));
    }
}

#[test]
fn unlike_caches_are_refused_with_both_values() {
    let whole = |dtype| vec![KvSpec::gqa(2, 4, 0..4, 8, dtype)];
    assert_eq!(
        plan(&whole(DType::BF16), &whole(DType::F16)).unwrap_err().to_string(),
        "plane 0: sender rank 0 has k 4x8 bf16, receiver rank 0 has k 4x8 f16"
    );
    let deeper = vec![KvSpec::gqa(3, 4, 0..4, 8, DType::BF16)];
    assert_eq!(
        plan(&whole(DType::BF16), &deeper).unwrap_err().to_string(),
        "layers: sender rank 0 has 2, receiver rank 0 has 3"
    );
    let part = gqa_ranks(2, 4, 8, &[0..2, 3..4]);
    assert_eq!(plan(&part, &whole(DType::BF16)), Err(PlanError::Missing { plane: 0, head: 2, receiver: 0 }));
    let beyond = vec![KvSpec::gqa(2, 4, 0..5, 8, DType::BF16)];
    assert!(matches!(plan(&whole(DType::BF16), &beyond), Err(PlanError::Heads { end: 5, total: 4, .. })));
    assert_eq!(plan(&[], &beyond), Err(PlanError::NoRanks("sender")));
    let wide = Plane { dim: 4 << 20, ..mla(1).planes[0].clone() };
    let wide = vec![KvSpec { layers: 1, planes: vec![wide] }];
    assert!(matches!(plan(&wide, &wide), Err(PlanError::Row { .. })));
}

#[test]
fn replicated_planes_spread_over_the_senders() {
    let plan = plan(&vec![mla(1); 2], &vec![mla(1); 4]).unwrap();
    let senders: Vec<_> = (0..4).map(|receiver| plan.senders_of(receiver)).collect();
    assert_eq!(senders, [[0], [1], [0], [1]]);
}
