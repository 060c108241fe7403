//! What lands: sessions of all shapes, over one connection and several, exactly and by codecs.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use backend::{DType, KvSpec, Piece};
use kvtransfer::codec::Row;
use kvtransfer::{Codec, CodecPolicy, Limits, Receiver, Sender, SessionError};

use super::{assert_lands, limits, one_receiver, whole};
use crate::common::net::{Harm, Proxy, addresses, expect_all, open, push_all, receivers, session};
use crate::common::{CLOSE, Cache, Case, even, gqa_ranks, mla};

#[test]
fn sessions_of_all_shapes_land_the_right_bytes() {
    let ranks = |count: usize| gqa_ranks(3, 4, 16, &even(4, count));
    let shapes = [
        (ranks(1), ranks(1)),
        (ranks(1), ranks(2)),
        (ranks(2), ranks(1)),
        (ranks(3), ranks(4)),
        (ranks(4), gqa_ranks(3, 4, 16, &[0..3, 1..4, 2..2])),
        (vec![mla(3); 2], vec![mla(3); 3]),
    ];
    let limits = Limits { frame_bytes: 5000, window_bytes: 20_000, ..limits() };
    for (from, to) in shapes {
        for (tokens, direct) in [(0..0, true), (7..8, true), (0..17, false), (64..900, true), (3..500, false)]
        {
            let case = Case::new(from.clone(), to.clone(), tokens.clone());
            let receivers = receivers(case.to.len(), &limits);
            let ends = expect_all(&case, &receivers, 16, direct);
            let senders: Vec<_> = (0..case.from.len()).map(|_| Sender::new(limits.clone())).collect();
            let pushed: Vec<_> = senders
                .iter()
                .enumerate()
                .map(|(rank, sender)| {
                    let (push, end) = open(&case, rank, sender, &addresses(&receivers));
                    push_all(&case, rank, &push, 100, 64, direct);
                    push.close(CLOSE);
                    end
                })
                .collect();
            let sent: u64 = pushed.iter().map(|end| end.recv().unwrap().unwrap().bytes).sum();
            let mut landed_bytes = 0;
            for (rank, landed) in ends.iter() {
                let summary = landed.result.unwrap();
                assert_eq!(summary.bytes, case.to[rank].token_bytes() as u64 * tokens.len() as u64);
                assert_eq!(summary.close, CLOSE);
                assert!(landed.landing.cache.is_right(), "rank {rank} of {tokens:?}");
                landed_bytes += summary.bytes - summary.gathered_bytes;
            }
            assert_eq!(sent, landed_bytes);
        }
    }
}

/// Protects: a latent cache goes over the link to a group once, whatever the number of ranks, and every rank has all of it.
#[test]
fn a_replicated_plane_crosses_the_link_once() {
    let tokens = 100..1500;
    for ranks in [1, 2, 4] {
        let case = Case::new(vec![mla(3)], vec![mla(3); ranks], tokens.clone());
        let receivers = receivers(ranks, &limits());
        let ends = expect_all(&case, &receivers, 16, true);
        let (push, end) = open(&case, 0, &Sender::new(limits()), &addresses(&receivers));
        push_all(&case, 0, &push, 256, 64, true);
        push.close(CLOSE);
        let whole = mla(3).token_bytes() as u64 * tokens.len() as u64;
        assert_eq!(end.recv().unwrap().unwrap().bytes, whole, "to {ranks} ranks");
        let mut over_link = 0;
        for (rank, landed) in ends.iter().take(ranks) {
            let summary = landed.result.unwrap();
            assert_eq!(summary.bytes, whole);
            assert!(landed.landing.cache.is_right(), "rank {rank} of {ranks}");
            over_link += whole - summary.gathered_bytes;
        }
        assert_eq!(over_link, whole, "to {ranks} ranks");
    }
}

/// Protects: a rank that is lost while the group gathers fails every rank's session, none is left waiting.
#[test]
fn a_group_that_loses_a_rank_fails_together() {
    let case = Case::new(vec![mla(3)], vec![mla(3); 3], 0..900);
    let mut receivers = receivers(3, &limits());
    let ends = expect_all(&case, &receivers, 16, true);
    let (push, end) = open(&case, 0, &Sender::new(limits()), &addresses(&receivers));
    push_all(&case, 0, &push, 256, 64, true);
    while push.backlog_bytes() > 0 {
        std::thread::yield_now();
    }
    receivers.pop().unwrap().stop();
    push.close(CLOSE);
    assert!(end.recv().unwrap().is_err());
    for (rank, landed) in ends.iter().take(3) {
        assert!(landed.result.is_err(), "rank {rank}");
    }
}

/// Protects: several connections carry one session, and what they bring is put together right.
#[test]
fn several_streams_carry_one_session() {
    for streams in [2, 5] {
        let limits = Limits { frame_bytes: 16 << 10, streams, ..limits() };
        let (receiver, address) = one_receiver(&limits);
        let proxy = Proxy::new(address.parse().unwrap(), Harm::None, Harm::None);
        let sender = Sender::new(limits);
        for _ in 0..3 {
            assert_lands(&whole(300), &sender, &receiver, &proxy.address);
        }
        assert!(proxy.connections.load(Ordering::SeqCst) <= 3 * streams);
    }
}

/// Protects: blocks that are large enough to be lent to the socket instead of being copied land the right bytes, session after session
/// over one connection.
#[test]
fn large_blocks_land_the_right_bytes() {
    let spec = || vec![KvSpec::gqa(2, 8, 0..8, 128, DType::BF16)];
    let (receiver, address) = one_receiver(&limits());
    let sender = Sender::new(limits());
    for _ in 0..2 {
        let case = Case::new(spec(), spec(), 0..2048);
        let ends = expect_all(&case, std::slice::from_ref(&receiver), 1024, true);
        let (push, end) = open(&case, 0, &sender, &[vec![address.clone()]]);
        push_all(&case, 0, &push, 2048, 1024, true);
        push.close(CLOSE);
        assert!(end.recv().unwrap().is_ok());
        assert!(ends.recv().unwrap().1.landing.cache.is_right());
    }
}

/// Protects: what is made last, a layer of the last chunk, goes in smaller frames than the rest.
#[test]
fn the_last_piece_goes_in_frames_of_its_own_size() {
    let (receiver, address) = one_receiver(&limits());
    let case = whole(1024);
    let ends = expect_all(&case, std::slice::from_ref(&receiver), 16, true);
    let (push, end) = open(&case, 0, &Sender::new(limits()), &[vec![address]]);
    push_all(&case, 0, &push, 512, 16, true);
    push.close(CLOSE);
    assert!(end.recv().unwrap().is_ok());
    let landed = ends.recv().unwrap().1;
    // 2 chunks of 4 layers of 2 planes of 512 KiB, a frame each; the last two of 365 KiB and the rest.
    assert_eq!(landed.result.unwrap().frames, 16 + 2);
    assert!(landed.landing.cache.is_right());
}

/// Protects: compressed sessions land what the codec makes of the cache, and say how few bytes crossed the link.
#[test]
fn a_codec_is_applied_on_the_way() {
    for codec in Codec::ALL {
        let limits = Limits { codec: CodecPolicy::Always(codec), frame_bytes: 16 << 10, ..limits() };
        let (receiver, address) = one_receiver(&limits);
        let case = whole(100);
        let (pushed, landed) = session(&case, &Sender::new(limits), &receiver, &address);
        let (pushed, summary) = (pushed.unwrap(), landed.result.unwrap());
        let row = |plane| Row { dim: 64, dtype: DType::BF16, keys: plane == 0 };
        // Frames of 16 tokens, and what is left over.
        let of = |plane| 6 * codec.wire_bytes(row(plane), 8, 16) + codec.wire_bytes(row(plane), 8, 4);
        assert_eq!(summary.wire_bytes, 4 * (of(0) + of(1)) as u64);
        assert_eq!((summary.bytes, pushed.codec), (100 * 8192, codec));
        for (plane, tokens) in [(0, 32..48), (1, 40..60), (0, 96..100)] {
            let count = tokens.len();
            let piece = Piece { layer: 2, plane, heads: 0..8, tokens };
            let (mut want, mut wire, mut exact, mut got) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            Cache::full(&case.from[0], 0..100, 16).read(&piece, &mut exact);
            codec.encode(row(plane), 8, &exact, &mut wire);
            assert!(codec.decode(row(plane), 8, count, &wire, &mut want));
            landed.landing.cache.read(&piece, &mut got);
            assert_eq!(got, want, "{codec} plane {plane}");
        }
    }
}

#[test]
fn more_pushes_than_connections_take_turns() {
    let limits = Limits { connections_max: 2, ..limits() };
    let receivers = receivers(2, &limits);
    let sender = Sender::new(limits.clone());
    let cases: Vec<_> = (0..6)
        .map(|_| Case::new(gqa_ranks(2, 4, 16, &even(4, 1)), gqa_ranks(2, 4, 16, &even(4, 2)), 0..50))
        .collect();
    let ends: Vec<_> = cases.iter().map(|case| expect_all(case, &receivers, 16, true)).collect();
    let pushed: Vec<_> = cases
        .iter()
        .map(|case| {
            let (push, end) = open(case, 0, &sender, &addresses(&receivers));
            push_all(case, 0, &push, 50, 16, false);
            push.close(CLOSE);
            end
        })
        .collect();
    assert!(pushed.iter().all(|end| end.recv().unwrap().is_ok()));
    assert!(ends.iter().flat_map(|ends| ends.iter()).all(|(_, end)| end.landing.cache.is_right()));
    let wide = Case::new(gqa_ranks(2, 4, 16, &even(4, 1)), gqa_ranks(2, 4, 16, &even(4, 3)), 0..50);
    let (push, end) = open(&wide, 0, &sender, &vec![vec!["127.0.0.1:1".to_owned()]; 3]);
    assert_eq!(end.recv().unwrap(), Err(SessionError::Busy { what: "connections of one push", max: 2 }));
    drop(push);
}

#[test]
fn a_sender_rank_without_a_share_ends_with_the_close() {
    let sender = Sender::new(limits());
    let case = Case::new(gqa_ranks(2, 2, 16, &[0..2, 0..2]), gqa_ranks(2, 2, 16, &even(2, 1)), 0..50);
    let (push, end) = open(&case, 1, &sender, &[vec!["127.0.0.1:1".into()]]);
    push_all(&case, 1, &push, 50, 16, true);
    push.close(CLOSE);
    assert_eq!(end.recv().unwrap().unwrap().bytes, 0);
    let (push, end) = open(&case, 1, &sender, &[vec!["127.0.0.1:1".into()]]);
    drop(push);
    assert_eq!(end.recv().unwrap(), Err(SessionError::Dropped));
}

#[test]
fn a_plan_that_does_not_fit_fails_the_push_with_both_values() {
    let sender = Sender::new(limits());
    let case = Case { to: vec![KvSpec::gqa(4, 8, 0..8, 64, DType::F32)], ..whole(16) };
    let (push, end) = open(&case, 0, &sender, &[vec!["127.0.0.1:1".into()]]);
    push_all(&case, 0, &push, 16, 16, true);
    push.close(CLOSE);
    assert_eq!(
        end.recv().unwrap().unwrap_err().to_string(),
        "plan: plane 0: sender rank 0 has k 8x64 bf16, receiver rank 0 has k 8x64 f32"
    );
}

#[test]
fn a_paced_sender_keeps_its_rate() {
    let (receiver, address) = one_receiver(&limits());
    let limits = Limits { rate_bytes_per_s: Some(4 << 20), frame_bytes: 64 << 10, ..limits() };
    let begun = Instant::now();
    // 128 tokens are 1 MiB: a quarter second, but for the last frame, which may leave at its beginning.
    assert_lands(&whole(128), &Sender::new(limits), &receiver, &address);
    assert!(begun.elapsed() >= Duration::from_millis(220), "{:?}", begun.elapsed());
}

#[test]
fn handles_may_be_used_from_any_thread() {
    fn anywhere<T: Send + Sync + 'static>() {}
    anywhere::<Receiver>();
    anywhere::<Sender>();
    anywhere::<kvtransfer::Push>();
}
