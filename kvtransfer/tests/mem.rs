//! A handoff within a process: the same sessions over memory, as commands use it.

mod common;

use std::sync::Arc;

use common::{CLOSE, Cache, MemExport, MemLanding, even, gqa_ranks};
use kvtransfer::SessionError;
use kvtransfer::transport::mem::transfer;

#[test]
fn a_cache_is_handed_over_resharded() {
    let (from, to) = (gqa_ranks(3, 6, 8, &even(6, 2)), gqa_ranks(3, 6, 8, &even(6, 3)));
    let sources = from
        .iter()
        .map(|spec| {
            let cache = Arc::new(Cache::full(spec, 10..200, 32));
            let export = |layer: usize| MemExport {
                cache: cache.clone(),
                layers: layer..layer + 1,
                tokens: 10..200,
                direct: true,
            };
            (spec.clone(), (0..3).map(export).collect())
        })
        .collect();
    let landings = to.iter().map(|spec| (spec.clone(), MemLanding::new(spec, 10..200, 16, true))).collect();
    let landed = transfer(sources, landings, 10..200, CLOSE).unwrap();
    assert_eq!(landed.len(), 3);
    for (end, spec) in landed.iter().zip(&to) {
        assert_eq!(end.landing.cache.spec, *spec);
        assert_eq!(end.result.as_ref().unwrap().close, CLOSE);
        assert!(end.landing.cache.is_right());
    }
}

#[test]
fn a_handover_that_cannot_be_planned_hands_the_landings_back() {
    let (from, to) = (gqa_ranks(3, 6, 8, &even(6, 1)), gqa_ranks(2, 6, 8, &even(6, 1)));
    let landing = MemLanding::new(&to[0], 0..4, 16, true);
    let sources = vec![(from[0].clone(), Vec::<MemExport>::new())];
    let landed = transfer(sources, vec![(to[0].clone(), landing)], 0..4, CLOSE).unwrap();
    assert_eq!(landed[0].result, Err(SessionError::Cancelled));
}
