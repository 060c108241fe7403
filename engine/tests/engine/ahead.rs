//! A device that computes by itself always has its next step before it has ended one; one that computes as it is called
//! is not run ahead of.

use backend::DType;
use engine::{Request, Sampling};

use crate::late::Call;
use crate::node::{Node, Spec, direct, request};

/// Submissions and waits of each rank of a node while it answers `asked`.
fn calls(world: usize, late: bool, asked: &Request) -> Vec<Vec<Call>> {
    let node = Node::start(&Spec { late, ..Spec::world(world) }.with(|o| o.draft_max = 0));
    assert_eq!(node.generate(asked).ids(), direct(asked, DType::F32), "{world} ranks, {}", asked.id);
    node.quiet();
    let calls = node.calls.iter().map(|calls| calls.lock().expect("no panic").clone()).collect();
    drop(node);
    calls
}

/// Protects: planning and submitting a step happen while the one before runs, on the leader and on followers.
#[test]
fn every_step_is_submitted_before_the_one_before_is_waited_for() {
    let sampling = Sampling { temperature: 0.8, top_p: 0.9, seed: 7, ..Sampling::default() };
    for asked in [request(1, 30, 6), Request { sampling, ..request(2, 30, 6) }] {
        for world in [1, 2] {
            let all = calls(world, true, &asked);
            // The prompt in one step, then a step for each token but the last.
            let mut wanted = vec![Call::Submitted { step: 1, in_flight: false }];
            for step in 2..=6 {
                wanted.extend([Call::Submitted { step, in_flight: true }, Call::Waited(step - 1)]);
            }
            wanted.push(Call::Waited(6));
            assert_eq!(all[0][..wanted.len()], wanted, "{world} ranks");
            // Followers submit the same; when they look back depends on when the next plan comes.
            let submitted = |calls: &[Call]| -> Vec<Call> {
                calls.iter().copied().filter(|call| matches!(call, Call::Submitted { .. })).collect()
            };
            assert!(all.iter().all(|calls| submitted(calls) == submitted(&all[0])));
        }
    }
}

/// Protects: a token that the host draws is known before the step that takes it, and where the next step would only wait
/// for the device, every token is.
#[test]
fn no_step_is_submitted_before_its_tokens_are_known() {
    let sampling = Sampling { repetition_penalty: 1.2, ..Sampling::default() };
    for (late, asked) in [(true, Request { sampling, ..request(1, 30, 4) }), (false, request(1, 30, 4))] {
        let all = calls(2, late, &asked);
        let step = |step| [Call::Submitted { step, in_flight: false }, Call::Waited(step)];
        assert_eq!(all[0][..8], (1..=4).flat_map(step).collect::<Vec<_>>(), "late: {late}");
    }
}
