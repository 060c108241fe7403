//! What is decided when a push is opened: who gets what over which paths, how its numbers travel, and what that is going to cost.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::estimate::{Last, Plan as Estimate};
use crate::layout::{self, Part, Plan, describe, plan};
use crate::limits::{PAYLOAD_BYTES_MAX, PEER_BASE, RANKS_MAX, REQUEST_BYTES_MAX, SPEC_BYTES_MAX};
use crate::receiver::Peers;
use crate::sender::PushSpec;
use crate::sender::pair::{Pair, Tail};
use crate::sender::pool::Pool;
use crate::session::PairSpec;
use crate::{Codec, Expect, SessionError, TargetSpec};

/// The model's layers and the push's pairs.
pub(super) fn prepare(
    pool: &Pool,
    spec: &PushSpec,
    opened: Instant,
) -> Result<(usize, Vec<Arc<Pair>>), SessionError> {
    let invalid = |text: String| Err(SessionError::Invalid(text));
    if spec.from_rank >= spec.from.len() || spec.from.len() > RANKS_MAX {
        return invalid(format!(
            "sender rank {} of {}, at most {RANKS_MAX}",
            spec.from_rank,
            spec.from.len()
        ));
    }
    if spec.tokens.start > spec.tokens.end {
        return invalid(format!("push of tokens {:?}", spec.tokens));
    }
    if spec.request.len() > REQUEST_BYTES_MAX {
        return invalid(format!("request id of {} bytes, at most {REQUEST_BYTES_MAX}", spec.request.len()));
    }
    let specs: Vec<_> = spec.to.iter().map(|target| target.spec.clone()).collect();
    let plan = plan(&spec.from, &specs)?;
    let receivers = plan.receivers_of(spec.from_rank);
    let codec = codec(pool, spec, &plan);
    let pairs = receivers
        .into_iter()
        .map(|receiver| Ok(Arc::new(pair(pool, spec, &plan, receiver, codec, opened)?)))
        .collect::<Result<_, SessionError>>()?;
    Ok((plan.layers, pairs))
}

/// The pairs of a rank's share with the other ranks of its group.
pub(super) fn prepare_relay(
    pool: &Pool,
    expect: &Expect,
    peers: &Peers,
    opened: Instant,
) -> Result<Vec<Arc<Pair>>, SessionError> {
    let parts = layout::relay(&peers.specs(), peers.rank);
    let sender = PEER_BASE + peers.rank as u32;
    let others = peers.targets.iter().enumerate().filter(|(rank, _)| *rank != peers.rank);
    others
        .map(|(rank, target)| {
            let parts: Vec<Part> = parts.iter().filter(|part| part.receiver == rank).cloned().collect();
            let pair = PairSpec {
                session: expect.session,
                ticket: expect.ticket.clone(),
                request: expect.request.clone(),
                attempt: expect.attempt,
                epoch: expect.epoch,
                sender,
                senders: vec![sender],
                tokens: expect.tokens.clone(),
                bytes: layout::bytes(&parts, expect.spec.layers, &expect.tokens),
                spec: described(target)?,
                deadline: expect.deadline,
                frame_bytes: pool.limits.frame_bytes.clamp(1, PAYLOAD_BYTES_MAX),
            };
            let paths = pool.lanes(&target.addresses, pair.bytes);
            Ok(Arc::new(Pair::new(pair, target.addresses.clone(), paths, parts, Codec::Exact, opened)))
        })
        .collect()
}

/// What is going to be exposed of this rank's push: of the receiver that has it last.
pub(super) fn estimate(pool: &Pool, spec: &PushSpec, pairs: &[Arc<Pair>]) -> Option<Duration> {
    let made = spec.compute_bytes_per_s?;
    let total: u64 = pairs.iter().map(|pair| pair.spec.bytes).sum();
    let of = |pair: &Arc<Pair>| {
        let wire = |codec| layer_wire_bytes(&pair.parts, codec, &spec.tokens) as f64;
        let whole = wire(Codec::Exact).max(1.0);
        let plan = Estimate {
            bytes: pair.spec.bytes,
            wire_bytes: (pair.spec.bytes as f64 * wire(pair.codec) / whole) as u64,
            last_wire_bytes: layer_wire_bytes(&pair.parts, pair.codec, &last_tokens(spec)),
            made_bytes_per_s: made * pair.spec.bytes as f64 / total.max(1) as f64,
            link_bytes_per_s: pool.about_bytes_per_s(&pair.paths)?,
        };
        plan.exposed()
    };
    pairs.iter().filter(|pair| pair.spec.bytes > 0).map(of).collect::<Option<Vec<_>>>()?.into_iter().max()
}

/// Bytes on the wire of one layer's `tokens`.
fn layer_wire_bytes(parts: &[Part], codec: Codec, tokens: &Range<u32>) -> u64 {
    let of = |part: &Part| {
        let tokens = part.share.count_within(tokens) as usize;
        codec.wire_bytes(part.row, part.heads.len(), tokens) as u64
    };
    parts.iter().map(of).sum()
}

/// The last chunk of the prompt's computation, as far as it is pushed: what full chunks leave over.
fn last_tokens(spec: &PushSpec) -> Range<u32> {
    let end = spec.tokens.end;
    let count = end.saturating_sub(1) % spec.chunk_tokens.max(1) + 1;
    end.saturating_sub(count).max(spec.tokens.start)..end
}

fn described(target: &TargetSpec) -> Result<String, SessionError> {
    let described = describe(&target.spec);
    if described.len() > SPEC_BYTES_MAX {
        let bytes = described.len();
        return Err(SessionError::Invalid(format!("spec of {bytes} bytes, at most {SPEC_BYTES_MAX}")));
    }
    Ok(described)
}

/// How this push's numbers travel: where one receiver's link is slower than its share of the cache is made, all are
/// compressed.
fn codec(pool: &Pool, spec: &PushSpec, plan: &Plan) -> Codec {
    let bytes = |receiver| plan.bytes(spec.from_rank, receiver, &spec.tokens);
    let total = (0..spec.to.len()).map(bytes).sum::<u64>().max(1) as f64;
    let choose = |receiver: usize| {
        let made = spec.compute_bytes_per_s.map(|rate| rate * bytes(receiver) as f64 / total);
        let lanes = pool.lanes(&spec.to[receiver].addresses, bytes(receiver));
        pool.limits.codec.choose(made, pool.bytes_per_s(&lanes))
    };
    (0..spec.to.len()).map(choose).max().unwrap_or(Codec::Exact)
}

fn pair(
    pool: &Pool,
    spec: &PushSpec,
    plan: &Plan,
    receiver: usize,
    codec: Codec,
    opened: Instant,
) -> Result<Pair, SessionError> {
    let target = &spec.to[receiver];
    let pair = PairSpec {
        session: spec.session,
        ticket: spec.ticket.clone(),
        request: spec.request.clone(),
        attempt: spec.attempt,
        epoch: spec.epoch,
        sender: spec.from_rank as u32,
        senders: plan.senders_of(receiver).into_iter().map(|sender| sender as u32).collect(),
        tokens: spec.tokens.clone(),
        bytes: plan.bytes(spec.from_rank, receiver, &spec.tokens),
        spec: described(target)?,
        deadline: spec.deadline,
        frame_bytes: pool.limits.frame_bytes.clamp(1, PAYLOAD_BYTES_MAX),
    };
    let (addresses, paths) = (target.addresses.clone(), pool.lanes(&target.addresses, pair.bytes));
    let (parts, last_tokens) = (plan.between(spec.from_rank, receiver), last_tokens(spec));
    let last = Last {
        wire_bytes: layer_wire_bytes(&parts, codec, &last_tokens),
        coded: codec != Codec::Exact,
        lanes: paths.len(),
        link_bytes_per_s: pool.bytes_per_s(&paths),
    };
    let tail = Tail {
        layer: plan.layers.saturating_sub(1),
        token: last_tokens.start,
        frame_bytes: last.frame_bytes(pair.frame_bytes),
    };
    let rates =
        if paths.len() > 1 { paths.iter().map(|path| pool.carries(path)).collect() } else { Vec::new() };
    Ok(Pair::new(pair, addresses, paths, parts, codec, opened).rated(rates).ending(tail))
}
