//! The sessions under faults, at every moment: never a wrong byte is reported as landed, and always an end at both ends.
//! A failing case names its seed; the same seed plays the same events.

mod common;

use common::sim::{DEADLINE, Fault, Setup, run};
use common::{Case, Rng, even, gqa_ranks, mla};
use kvtransfer::session::{Outcome, PairSpec};
use kvtransfer::{FailCode, SessionError, Ticket};

/// A session of a few ranks whose shape, order and bounds are drawn from `seed`.
fn setup(seed: u64, faults: Vec<(usize, Fault)>) -> Setup {
    let mut rng = Rng::new(seed);
    let (from, to) = match rng.below(4) {
        0 => (vec![mla(2); 1 + rng.below(2)], vec![mla(2); 1 + rng.below(3)]),
        _ => {
            let heads = 1 + rng.below(6);
            let ranks = |count: usize| gqa_ranks(2, heads, 4, &even(heads, count));
            (ranks(1 + rng.below(3)), ranks(1 + rng.below(3)))
        }
    };
    let start = rng.below(50) as u32;
    let tokens = start..start + 1 + rng.below(30) as u32;
    Setup {
        case: Case { deadline: DEADLINE, ..Case::new(from, to, tokens) },
        seed,
        faults,
        window_bytes: 1 + rng.below(3000) as u64,
        frame_bytes: 1 + rng.below(400),
        chunk: 1 + rng.below(16) as u32,
        block_tokens: [1 + rng.below(8) as u32, 1 + rng.below(8) as u32],
        lanes: 1 + rng.below(3),
        lie: |_| {},
    }
}

fn acknowledged(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Acknowledged(_))
}

#[test]
fn without_a_fault_everything_lands() {
    for seed in 0..300 {
        let report = run(&setup(seed, Vec::new()));
        assert!(report.receivers.iter().all(Result::is_ok), "seed {seed}: {:?}", report.receivers);
        assert!(report.senders.iter().all(acknowledged), "seed {seed}: {:?}", report.senders);
    }
}

/// A million events with up to four faults per session, at moments and places drawn from the seed.
#[test]
fn a_million_steps_with_faults_never_land_a_wrong_byte() {
    let (mut steps, mut failed, mut landed) = (0, 0, 0);
    for seed in 0.. {
        let mut rng = Rng::new(!seed);
        let length = 40 + rng.below(600);
        let faults = (0..1 + rng.below(4)).map(|_| (rng.below(length), Fault::draw(&mut rng))).collect();
        let report = run(&setup(seed, faults));
        steps += report.steps;
        for end in &report.receivers {
            *if end.is_ok() { &mut landed } else { &mut failed } += 1;
        }
        if steps > 1_000_000 {
            break;
        }
    }
    assert!(failed > 200 && landed > 200, "both ends must be seen often: {failed} failed, {landed} landed");
}

/// Protects: a connection that breaks at any byte, falls silent, slows down or meets a stale attempt costs time, not the
/// session.
#[test]
fn what_a_path_can_do_does_not_fail_a_session() {
    let mut resumed = 0;
    for seed in 0..1500u64 {
        let mut rng = Rng::new(!seed);
        let fault = loop {
            let fault = Fault::draw(&mut rng);
            if fault.harmless() {
                break fault;
            }
        };
        let length = run(&setup(seed, Vec::new())).steps;
        let report = run(&setup(seed, vec![(rng.below(length), fault)]));
        let landed: Result<Vec<_>, _> = report.receivers.iter().cloned().collect();
        let landed = landed
            .unwrap_or_else(|_| panic!("seed {seed} {fault:?}: {:?} {:?}", report.receivers, report.senders));
        resumed += landed.iter().map(|end| end.resumed).sum::<u32>();
    }
    assert!(resumed > 300, "{resumed} lanes came back");
}

/// Protects: a path that falls silent in mid-transfer, of which neither end hears, costs a fraction of a second where there is another
/// one, at every moment of a session; without being left it is half the deadline, 4 s.
#[test]
fn a_lane_that_falls_silent_is_left_at_once() {
    let mut moved = 0;
    for seed in 0..400u64 {
        let setup = |faults| Setup { lanes: 2 + (seed % 2) as usize, ..setup(seed, faults) };
        let length = run(&setup(Vec::new())).steps;
        let at = Rng::new(!seed).below(length);
        let report = run(&setup(vec![(at, Fault::Hang)]));
        let landed: Result<Vec<_>, _> = report.receivers.iter().cloned().collect();
        let landed = landed.unwrap_or_else(|error| panic!("seed {seed} at {at}: {error}"));
        let resumed = landed.iter().map(|end| end.resumed).sum::<u32>();
        moved += resumed;
        // A connection that is still in its handshake is given up after an eighth of the deadline; time passes in steps of a 64th.
        let after = report.after_silence.unwrap_or_default();
        assert!(after < DEADLINE / 4, "seed {seed} at {at}: {after:?}, {resumed} resumed");
    }
    assert!(moved > 100, "{moved} lanes were moved");
}

#[test]
fn a_fault_at_every_single_event_ends_both_ends() {
    let length = run(&setup(7, Vec::new())).steps;
    for fault in [Fault::Cut(0), Fault::CorruptUp, Fault::CorruptDown, Fault::Duplicate, Fault::Hang] {
        for at in 0..length {
            run(&setup(7, vec![(at, fault)]));
        }
    }
}

#[test]
fn a_cut_at_every_single_byte_of_a_frame_resumes() {
    for bytes in 0..700 {
        let report = run(&setup(3, vec![(60, Fault::Cut(bytes))]));
        assert!(report.receivers.iter().all(Result::is_ok), "after {bytes} bytes: {:?}", report.receivers);
    }
}

type Lie = fn(&mut PairSpec);

/// A session of one sender that believes something else than its receiver.
fn lying(lie: Lie) -> (Result<kvtransfer::Summary, SessionError>, Outcome) {
    let case = Case { deadline: DEADLINE, ..Case::new(vec![mla(2)], vec![mla(2)], 0..8) };
    let setup = Setup { case, lie, lanes: 1, ..setup(1, Vec::new()) };
    let mut report = run(&setup);
    (report.receivers.remove(0), report.senders.remove(0))
}

#[test]
fn a_sender_without_the_ticket_is_refused_and_the_session_goes_on_waiting() {
    let (receiver, sender) = lying(|spec| spec.ticket = Ticket::from_bytes([0; 32]));
    // The sender sees first that the receiver holds another ticket.
    assert_eq!(sender, Outcome::Failed(SessionError::Proof("receiver".into())));
    let Err(SessionError::Expired { what, .. }) = receiver else { panic!("{receiver:?}") };
    assert_eq!(what, "no sender connected");
}

#[test]
fn a_stale_sender_is_refused_by_name_and_the_session_goes_on_waiting() {
    let lies: [(Lie, &str); 6] = [
        (|spec| spec.request = "req-8".into(), "stale: request is req-8, expected req-7"),
        (|spec| spec.attempt = 0, "stale: attempt is 0, expected 1"),
        (|spec| spec.epoch = 8, "stale: epoch is 8, expected 9"),
        (|spec| spec.tokens = 0..9, "stale: token range is 0..9, expected 0..8"),
        (
            |spec| spec.spec = "1 layers".into(),
            "stale: cache is 1 layers, expected 2 layers latent 1x24 bf16 replicated, rope 1x8 bf16 replicated",
        ),
        (|spec| spec.bytes += 1, "stale: number of bytes is 1025, expected 1024"),
    ];
    for (lie, words) in lies {
        let (receiver, sender) = lying(lie);
        let peer = "receiver".to_owned();
        let reason = words.to_owned();
        let code = FailCode::Stale;
        assert_eq!(sender, Outcome::Failed(SessionError::Refused { peer, code, reason }));
        assert!(matches!(receiver, Err(SessionError::Expired { .. })), "{words}: {receiver:?}");
    }
}

#[test]
fn a_sender_that_announces_less_than_the_landing_fails_the_session() {
    let (receiver, sender) = lying(|spec| spec.bytes -= 64);
    assert!(receiver.is_err());
    assert!(!acknowledged(&sender));
}

#[test]
fn a_missing_sender_is_named() {
    let (receiver, _) = lying(|spec| spec.senders = vec![0, 3]);
    let Err(SessionError::Expired { what, .. }) = receiver else { panic!("{receiver:?}") };
    assert_eq!(what, "sender rank 3 did not connect");
}
