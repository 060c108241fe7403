//! A prompt computed by one node and continued by another is the prompt computed and continued by one: bit for bit.

use backend::DType;
use engine::{Event, Finish, Request};

use crate::node::{Node, Outcome, Spec, Trip, direct, request, seeded};

#[test]
fn any_split_block_and_chunk_size_gives_the_models_own_tokens() {
    let cases = [
        (1, 1, DType::F32, 16, 16, 40),
        (1, 2, DType::BF16, 32, 16, 64),
        (2, 1, DType::F32, 16, 64, 17),
        (2, 4, DType::F32, 64, 32, 33),
    ];
    for (p_world, d_world, dtype, p_block, d_block, chunk) in cases {
        let p =
            Spec { dtype, ..Spec::world(p_world).blocks_of(p_block, 128) }.with(|o| o.chunk_tokens = chunk);
        let d = Spec { dtype, ..Spec::world(d_world).blocks_of(d_block, 128) };
        let (p, d) = (Node::start(&p), Node::start(&d));
        let asked = [request(1, 1, 6), request(2, 33, 8), seeded(3, 100, 12, 5), seeded(4, 300, 6, 6)];
        for asked in asked {
            let trip = Trip::make(&p, &d, &asked);
            let context = format!("{p_world} -> {d_world} {dtype} {} tokens", asked.tokens.len());
            assert_eq!(trip.ids(), direct(&asked, dtype), "{context}");
            assert_eq!(trip.decode.finish(), Finish::Length, "{context}");
            let Some(Event::Pushed { bytes, .. }) = trip.prefill.end else { panic!("{context}") };
            assert_eq!(bytes, trip.decode.bytes, "{context}");
        }
        p.quiet();
        d.quiet();
    }
}

#[test]
fn only_what_the_decode_group_lacks_travels() {
    let (p, d) = (Node::start(&Spec::default()), Node::start(&Spec::default().blocks_of(32, 64)));
    let first = seeded(1, 100, 30, 4);
    let answer = Trip::make(&p, &d, &first).ids();
    // The next turn: what was said, the answer, and more.
    let mut second = first.clone();
    second.tokens.extend(&answer);
    second.tokens.extend(request(9, 40, 1).tokens);
    second.output_start = second.tokens.len();
    let trip = Trip::make(&p, &d, &second);
    assert_eq!(trip.ids(), direct(&second, DType::F32));
    // The group holds 129 computed positions in blocks of 32, the prefill node 100 in blocks of 16.
    assert_eq!((trip.decode.cached, trip.prefill.cached), (128, 96));
    let token_bytes =
        trip.decode.handoff.as_ref().map(|h| h.targets[0].spec.token_bytes()).unwrap_or_default();
    assert_eq!(trip.decode.bytes, (second.tokens.len() - 128) as u64 * token_bytes as u64);
}

/// Protects: what a push was estimated to expose can be compared with what it did. Only the first one's is not told: nobody knows yet how
/// fast prompts are computed here.
#[test]
fn every_push_but_the_first_tells_what_it_was_estimated_to_expose() {
    for world in [1, 2] {
        let (p, d) = (Node::start(&Spec::world(world)), Node::start(&Spec::world(world)));
        for (index, tokens) in [70, 90, 33, 300].into_iter().enumerate() {
            let trip = Trip::make(&p, &d, &seeded(index as u32, tokens, 2, 7));
            let Some(Event::Pushed { exposed, estimate, .. }) = trip.prefill.end else {
                panic!("not pushed")
            };
            assert_eq!(estimate.is_some(), index > 0, "push {index} of {world} ranks, exposed {exposed:?}");
            // 100 KiB over loopback, however busy the machine is.
            assert!(
                estimate.is_none_or(|estimate| !estimate.is_zero() && estimate.as_secs() < 60),
                "{estimate:?}"
            );
        }
    }
}

#[test]
fn a_prefix_on_either_side_alone_changes_no_token() {
    for (p_cache, d_cache) in [(true, false), (false, true)] {
        let p = Node::start(&Spec::default().with(|o| o.prefix_cache = p_cache));
        let d = Node::start(&Spec::default().with(|o| o.prefix_cache = d_cache));
        let first = request(3, 150, 10);
        Trip::make(&p, &d, &first);
        let second = Request { tokens: [first.tokens.clone(), request(5, 50, 1).tokens].concat(), ..first };
        let second = Request { output_start: 200, ..second };
        let trip = Trip::make(&p, &d, &second);
        assert_eq!(trip.ids(), direct(&second, DType::F32), "caches {p_cache} {d_cache}");
        assert_eq!((trip.prefill.cached > 0, trip.decode.cached > 0), (p_cache, d_cache));
    }
}

#[test]
fn sixteen_trips_at_once() {
    let (p, d) = (Node::start(&Spec::world(2)), Node::start(&Spec::world(2)));
    std::thread::scope(|scope| {
        for i in 0..16 {
            let (p, d) = (&p, &d);
            scope.spawn(move || {
                let asked = seeded(i % 5, 20 + 17 * i as usize, 12, i.into());
                assert_eq!(Trip::make(p, d, &asked).ids(), direct(&asked, DType::F32), "trip {i}");
            });
        }
    });
    p.quiet();
    d.quiet();
}

#[test]
fn an_answer_of_one_token_ends_with_its_landing() {
    let (p, d) = (Node::start(&Spec::default()), Node::start(&Spec::default()));
    let mut asked = request(7, 50, 20);
    asked.stop_ids = vec![direct(&request(7, 50, 1), DType::F32)[0]];
    let trip = Trip::make(&p, &d, &asked);
    assert_eq!(trip.ids(), asked.stop_ids);
    assert_eq!(trip.prefill.tokens[0].finish, Some(Finish::Stop));
    let Some(Event::Finished { reason, output_tokens, .. }) = trip.decode.end else {
        panic!("{:?}", trip.decode)
    };
    assert_eq!((reason, output_tokens), (Finish::Stop, 1));
}

#[test]
fn the_first_token_does_not_wait_for_a_slow_link() {
    // 300 tokens of 3 layers x 2 planes x 4 heads x 16 x 4 bytes are 460,800 bytes: more than four seconds at this pace.
    let p = Node::start(&Spec::default().with(|o| o.pace = Some(100_000)));
    let d = Node::start(&Spec::default());
    let asked = request(2, 300, 4);
    let mut landing = d.submit(engine::Job::Land(asked.clone()));
    let mut decode = Outcome::default();
    decode.take(landing.blocking_recv().expect("an answer"));
    let mut events = p.submit(engine::Job::Prefill(asked.clone(), decode.handoff.clone()));
    let mut prefill = Outcome::default();
    while prefill.tokens.is_empty() {
        prefill.take(events.blocking_recv().expect("a token"));
    }
    assert!(prefill.end.is_none());
    assert_eq!(prefill.ids(), direct(&asked, DType::F32)[..1]);
    // The client leaves: both nodes give everything back though the link is still busy.
    drop(events);
    drop(landing);
    p.quiet();
    d.quiet();
}
