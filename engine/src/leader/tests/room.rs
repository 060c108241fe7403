//! Room in the store: what is refused, shared, given up, and given back.

use kvtransfer::Close;
use proptest::prelude::*;
use tokio::sync::mpsc::UnboundedReceiver;

use super::sim::{Sim, events, expected, handoff, next_token, options, refusal, request, tokens};
use crate::options::EngineOptions;
use crate::request::{Event, Job, Refusal, Request};
use crate::sequence::Stage;

#[test]
fn jobs_that_can_never_run_are_refused_with_both_numbers() {
    let mut sim = Sim::new(1, 8, options());
    let mut refused = |job| {
        let (_, mut receiver) = sim.submit(job);
        refusal(&events(&mut receiver)).to_string()
    };
    let long = vec![0; 64];
    assert_eq!(
        refused(Job::Generate(request(&long, 1))),
        "64 tokens leave no room for output in a context of 64"
    );
    assert_eq!(refused(Job::Generate(request(&[32], 1))), "token 32 in a vocabulary of 32");
    assert_eq!(refused(Job::Land(request(&long[..30], 1))), "30 tokens need 9 kv blocks of 8");
    assert_eq!(refused(Job::Generate(request(&[1], 0))), "0 of 0 output tokens are there already");
    assert_eq!(refused(Job::Prefill(request(&[1, 2], 1), handoff(0..1))), "handoff of tokens 0..1 of 2");
}

#[test]
fn no_room_now_is_refused_and_nothing_of_it_remains() {
    let mut sim = Sim::new(1, 8, options());
    let (job, mut first) = sim.submit(Job::Land(request(&[1; 20], 4)));
    let (_, mut second) = sim.submit(Job::Land(request(&[2; 8], 4)));
    assert_eq!(refusal(&events(&mut second)), &Refusal::NoRoom { tokens: 12 });
    sim.run();
    assert_eq!(sim.blocks().reserved, 6);
    assert!(matches!(events(&mut first)[..], [Event::Admitted { handoff: Some(_), .. }]));
    sim.core.cancel(job);
    sim.run();
    assert_eq!(sim.blocks().free, 8);
    let (_, mut second) = sim.submit(Job::Land(request(&[2; 8], 4)));
    sim.run();
    assert!(matches!(events(&mut second)[..], [Event::Admitted { handoff: Some(_), .. }]));
}

#[test]
fn the_youngest_of_the_lowest_priority_is_preempted_and_continues_to_the_same_tokens() {
    let mut sim = Sim::new(1, 12, options());
    let asked: Vec<Request> = (0..3).map(|i| request(&[i; 7], 20)).collect();
    let mut receivers: Vec<_> = asked.iter().map(|r| sim.submit(Job::Generate(r.clone())).1).collect();
    sim.run();
    let first = events(&mut receivers[0]);
    assert_eq!(tokens(&first), expected(&asked[0]));
    let last = events(&mut receivers[2]);
    assert!(matches!(last.last(), Some(Event::Preempted)), "{last:?}");
    let mut rest = asked[2].clone();
    rest.tokens.extend(tokens(&last));
    let (_, mut receiver) = sim.submit(Job::Generate(rest));
    sim.run();
    let mut all = tokens(&last);
    all.extend(tokens(&events(&mut receiver)));
    assert_eq!(all, expected(&asked[2]));
    assert!(sim.core.totals.counters.preemptions >= 1);
}

#[test]
fn running_sequences_share_what_they_have_computed() {
    let mut sim = Sim::new(1, 32, options());
    let prompt: Vec<u32> = (0..30).collect();
    let (_, _first) = sim.submit(Job::Generate(request(&prompt, 20)));
    for _ in 0..4 {
        sim.step();
    }
    let (_, mut second) = sim.submit(Job::Generate(request(&prompt, 20)));
    assert!(matches!(events(&mut second)[..], [Event::Admitted { cached_tokens: 28, .. }]));
    sim.run();
    assert_eq!(tokens(&events(&mut second)), expected(&request(&prompt, 20)));
}

#[test]
fn a_prefix_that_cannot_be_copied_for_lack_of_room_makes_room() {
    let mut sim = Sim::with_store(1, 12, options(), false);
    sim.submit(Job::Generate(request(&[1; 32], 4)));
    sim.run();
    assert_eq!(sim.blocks().cached, 8);
    // Nine blocks beside the eight, of which it has seven, are more than there are.
    let mut other = [1; 33];
    other[28..].fill(2);
    let (_, mut receiver) = sim.submit(Job::Generate(request(&other, 4)));
    sim.run();
    let events = events(&mut receiver);
    assert!(matches!(events[0], Event::Admitted { cached_tokens: 0, .. }), "{:?}", events[0]);
    assert_eq!(tokens(&events), expected(&request(&other, 4)));
}

/// A conversation's next turn: nothing is copied, and no room is needed for a copy.
#[test]
fn what_goes_on_from_a_kept_sequence_takes_it_over() {
    let mut sim = Sim::with_store(1, 12, options(), false);
    sim.submit(Job::Generate(request(&[1; 32], 4)));
    sim.run();
    let (_, mut receiver) = sim.submit(Job::Generate(request(&[1; 33], 4)));
    sim.run();
    let events = events(&mut receiver);
    assert!(matches!(events[0], Event::Admitted { cached_tokens: 32, .. }), "{:?}", events[0]);
    assert_eq!(tokens(&events), expected(&request(&[1; 33], 4)));
    // Nine full blocks of 37 tokens are kept; nobody holds the eight of before.
    assert_eq!((sim.blocks().cached, sim.blocks().used), (9, 0));
}

#[test]
fn tenants_share_nothing() {
    let mut sim = Sim::new(1, 32, options());
    let with_salt = |salt: &[u8]| Request { cache_salt: salt.to_vec(), ..request(&[1; 20], 2) };
    sim.submit(Job::Generate(with_salt(b"a")));
    sim.run();
    let (_, mut other) = sim.submit(Job::Generate(with_salt(b"b")));
    assert!(matches!(events(&mut other)[..], [Event::Admitted { cached_tokens: 0, .. }]));
    let (_, mut same) = sim.submit(Job::Generate(with_salt(b"a")));
    assert!(matches!(events(&mut same)[..], [Event::Admitted { cached_tokens: 16, .. }]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    // Whatever is asked, cancelled, landed and lost, in whatever order: every job ends, the book equals every rank's
    // store, and in the end no block is held but by the prefix cache.
    #[test]
    fn nothing_leaks(
        ops in prop::collection::vec((0u8..8, 0u32..3, 1usize..40, 0u64..12), 1..60),
        ranks in 1usize..3,
        cache: bool,
        shares: bool,
        ahead: bool,
    ) {
        let options = EngineOptions { prefix_cache: cache, ..options() };
        let mut sim = Sim::with_store(ranks, 20, options, shares).ahead(ahead);
        let mut receivers: Vec<(u64, Request, UnboundedReceiver<Event>, bool)> = vec![];
        for (op, family, len, pick) in ops {
            let text: Vec<u32> = (0..len as u32).map(|i| (i * (family + 1)) % 32).collect();
            let asked = request(&text, 1 + pick as usize);
            match op {
                0 => {
                    let (job, receiver) = sim.submit(Job::Generate(asked.clone()));
                    receivers.push((job, asked, receiver, true));
                }
                1 => {
                    let (job, receiver) = sim.submit(Job::Land(asked.clone()));
                    receivers.push((job, asked, receiver, true));
                }
                2 => {
                    let start = (pick as u32).min(len as u32 - 1);
                    let job = Job::Prefill(asked.clone(), handoff(start..len as u32));
                    let (job, receiver) = sim.submit(job);
                    receivers.push((job, asked, receiver, false));
                }
                3 => sim.core.cancel(pick + 1),
                4 => {
                    sim.landings.retain(|lease| sim.core.leases.contains_key(lease));
                    if let Some(lease) = sim.landings.first().copied() {
                        // A job may have been cancelled in a plan that is not carried out yet.
                        let token = next_token(&sim.landing_tokens[&lease]);
                        sim.land(Close { token, finish: 0 });
                    }
                }
                5 => {
                    sim.pushes.retain(|lease| sim.core.leases.contains_key(lease));
                    if !sim.pushes.is_empty() {
                        sim.pushed();
                    }
                }
                _ => { sim.step(); }
            }
            prop_assert_eq!(sim.core.fault(), None);
        }
        for _ in 0..50 {
            sim.run();
            sim.pushes.retain(|lease| sim.core.leases.contains_key(lease));
            while !sim.pushes.is_empty() {
                sim.pushed();
            }
            let landing: Vec<u64> = sim.core.sequences.values()
                .filter(|s| s.stage == Stage::Landing).map(|s| s.job).collect();
            landing.into_iter().for_each(|job| sim.core.cancel(job));
        }
        sim.run();
        prop_assert!(sim.core.idle());
        let blocks = sim.blocks();
        prop_assert_eq!((blocks.used, blocks.reserved, blocks.quarantined), (0, 0, 0));
        if !cache {
            prop_assert_eq!(blocks.free, blocks.total);
        }
        for (_, asked, mut receiver, generates) in receivers {
            let events = events(&mut receiver);
            let got = tokens(&events);
            let mut wanted = expected(&Request { max_tokens: 40, ..asked.clone() });
            if events.iter().any(|e| matches!(e, Event::Landed { .. })) {
                wanted.remove(0);
            }
            prop_assert_eq!(&got[..], &wanted[..got.len()], "job of {:?}, {}", asked.tokens, generates);
        }
    }
}
