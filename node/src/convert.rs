//! Between the gRPC messages and the engine's types, in both directions; every message is checked here, once.

use std::collections::BTreeMap;
use std::time::Duration;

use backend::{DType, KvSpec, Plane, Sharding};
use engine::{Event, Finish, Handoff, JobError, Refusal, Report, Request, Sampling, Score, Target, Token};
use proto::v1;
use tonic::Status;

/// A message that cannot be a request.
fn invalid(what: impl std::fmt::Display) -> Status {
    Status::invalid_argument(what.to_string())
}

/// Checks and takes over a sequence, but for its grammar, which [`crate::Grammars`] compiles.
pub(crate) fn request(sequence: Option<v1::Sequence>) -> Result<Request, Status> {
    let s = sequence.ok_or_else(|| invalid("sequence missing"))?;
    let sampling = s.sampling.ok_or_else(|| invalid("sampling missing"))?;
    if s.tokens.is_empty() {
        return Err(invalid("sequence without tokens"));
    }
    if s.tokens.len() > proto::SEQUENCE_TOKENS_MAX {
        let (got, most) = (s.tokens.len(), proto::SEQUENCE_TOKENS_MAX);
        return Err(invalid(format!("sequence of {got} tokens, at most {most}")));
    }
    if s.prediction.len() > proto::PREDICTION_TOKENS_MAX {
        let (got, most) = (s.prediction.len(), proto::PREDICTION_TOKENS_MAX);
        return Err(invalid(format!("prediction of {got} tokens, at most {most}")));
    }
    let (start, len) = (s.output_start as usize, s.tokens.len());
    if start == 0 || start > len {
        return Err(invalid(format!("output starts at {start} of {len} tokens")));
    }
    if s.max_tokens as usize <= len - start {
        return Err(invalid(format!("max_tokens {} with {} tokens of output", s.max_tokens, len - start)));
    }
    Ok(Request {
        id: s.request_id,
        attempt: s.attempt,
        tokens: s.tokens,
        output_start: start,
        max_tokens: s.max_tokens as usize,
        min_tokens: s.min_tokens as usize,
        stop_ids: s.stop_ids,
        ignore_eos: s.ignore_eos,
        sampling: self::sampling(sampling)?,
        cache_salt: s.cache_salt,
        priority: s.priority,
        grammar: None,
        prompt_logprobs: prompt_logprobs(s.prompt_logprobs)?,
        prediction: s.prediction,
    })
}

/// Alternatives to a token of the prompt, of which there may be many.
fn prompt_logprobs(top: Option<u32>) -> Result<Option<u32>, Status> {
    match top.filter(|top| *top > proto::PROMPT_LOGPROBS_MAX) {
        Some(top) => Err(invalid(format!("prompt_logprobs {top}, at most {}", proto::PROMPT_LOGPROBS_MAX))),
        None => Ok(top),
    }
}

fn sampling(s: v1::Sampling) -> Result<Sampling, Status> {
    let within = |name: &str, value: f32, low: f32, high: f32| {
        if value >= low && value <= high {
            Ok(value)
        } else {
            Err(invalid(format!("{name} {value} outside {low}..={high}")))
        }
    };
    Ok(Sampling {
        temperature: within("temperature", s.temperature, 0.0, 100.0)?,
        top_p: within("top_p", s.top_p, 0.0, 1.0)?,
        top_k: s.top_k,
        min_p: within("min_p", s.min_p, 0.0, 1.0)?,
        presence_penalty: within("presence_penalty", s.presence_penalty, -100.0, 100.0)?,
        frequency_penalty: within("frequency_penalty", s.frequency_penalty, -100.0, 100.0)?,
        repetition_penalty: within("repetition_penalty", s.repetition_penalty, f32::MIN_POSITIVE, 100.0)?,
        seed: s.seed,
        logit_bias: s.logit_bias.into_iter().collect::<BTreeMap<_, _>>(),
        logprobs: s.logprobs,
        top_logprobs: s.top_logprobs,
    })
}

/// The cache's shape as a message.
pub fn spec_message(spec: &KvSpec) -> v1::KvSpec {
    let plane = |p: &Plane| v1::KvPlane {
        name: p.name.into(),
        heads_total: p.heads_total as u32,
        dim: p.dim as u32,
        dtype: p.dtype.name().into(),
        replicated: p.sharding == Sharding::Replicated,
        head_start: p.heads().start as u32,
        head_end: p.heads().end as u32,
    };
    v1::KvSpec { layers: spec.layers as u32, planes: spec.planes.iter().map(plane).collect() }
}

/// The cache's shape from a message.
pub fn spec(message: v1::KvSpec) -> Result<KvSpec, Status> {
    /// Names of planes; a name outside this list comes from a version that we do not understand.
    const NAMES: [&str; 4] = ["k", "v", "latent", "rope"];
    let plane = |p: v1::KvPlane| {
        let name = NAMES.into_iter().find(|n| *n == p.name);
        let heads = p.head_start as usize..p.head_end as usize;
        if heads.start > heads.end || p.head_end > p.heads_total {
            return Err(invalid(format!("plane {}: heads {heads:?} of {}", p.name, p.heads_total)));
        }
        Ok(Plane {
            name: name.ok_or_else(|| invalid(format!("unknown kv plane {:?}", p.name)))?,
            heads_total: p.heads_total as usize,
            dim: p.dim as usize,
            dtype: p.dtype.parse::<DType>().map_err(invalid)?,
            sharding: if p.replicated { Sharding::Replicated } else { Sharding::Heads(heads) },
        })
    };
    Ok(KvSpec {
        layers: message.layers as usize,
        planes: message.planes.into_iter().map(plane).collect::<Result<_, _>>()?,
    })
}

/// A place for KV as a message.
pub fn handoff_message(h: &Handoff) -> v1::Handoff {
    let target = |t: &Target| v1::KvTarget {
        rank: t.rank as u32,
        addresses: t.addresses.clone(),
        spec: Some(spec_message(&t.spec)),
    };
    v1::Handoff {
        ticket: h.ticket.to_bytes().to_vec(),
        session: h.session.to_string(),
        epoch: h.epoch,
        token_start: h.tokens.start,
        token_end: h.tokens.end,
        targets: h.targets.iter().map(target).collect(),
        deadline_ms: h.deadline.as_millis() as u32,
    }
}

/// A place for KV from a message.
pub fn handoff(message: v1::Handoff) -> Result<Handoff, Status> {
    let ticket: [u8; 32] =
        message.ticket.as_slice().try_into().map_err(|_| invalid("ticket is not 256 bits"))?;
    if message.token_start > message.token_end {
        return Err(invalid(format!("handoff of tokens {}..{}", message.token_start, message.token_end)));
    }
    let target = |t: v1::KvTarget| {
        Ok::<_, Status>(Target {
            rank: t.rank as usize,
            addresses: t.addresses,
            spec: spec(t.spec.ok_or_else(|| invalid("kv target without spec"))?)?,
        })
    };
    Ok(Handoff {
        ticket: kvtransfer::Ticket::from_bytes(ticket),
        session: message.session.parse().map_err(invalid)?,
        epoch: message.epoch,
        tokens: message.token_start..message.token_end,
        targets: message.targets.into_iter().map(target).collect::<Result<_, _>>()?,
        deadline: Duration::from_millis(message.deadline_ms.into()),
    })
}

/// A token as a message.
pub fn token_message(token: &Token) -> v1::Token {
    v1::Token {
        index: token.index as u32,
        id: token.id,
        logprob: token.logprob,
        top: top_message(&token.top),
        predicted: token.predicted,
    }
}

fn top_message(top: &[(u32, f32)]) -> Vec<v1::TopLogprob> {
    top.iter().map(|&(id, logprob)| v1::TopLogprob { id, logprob }).collect()
}

/// How likely tokens of the prompt are, as a message.
pub fn scored_message(start: usize, scores: &[Score]) -> v1::Scored {
    let score = |s: &Score| v1::Score { logprob: s.logprob, rank: s.rank, top: top_message(&s.top) };
    v1::Scored { start: start as u32, scores: scores.iter().map(score).collect() }
}

/// Why an answer ended, as a message's value.
pub fn finish_message(finish: Option<Finish>) -> i32 {
    let reason = match finish {
        None => v1::FinishReason::None,
        Some(Finish::Stop) => v1::FinishReason::Stop,
        Some(Finish::Length) => v1::FinishReason::Length,
    };
    reason.into()
}

/// A refusal as a gRPC status: RESOURCE_EXHAUSTED may be asked again, INVALID_ARGUMENT never.
pub fn refusal_status(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::NoRoom { .. } => Status::resource_exhausted(refusal.to_string()),
        Refusal::Unavailable(_) => Status::unavailable(refusal.to_string()),
        Refusal::Invalid(_) => Status::invalid_argument(refusal.to_string()),
    }
}

/// A failed job as a gRPC status.
pub fn error_status(error: &JobError) -> Status {
    match error {
        JobError::Session(_) => Status::aborted(error.to_string()),
        JobError::Engine(_) => Status::unavailable(error.to_string()),
        JobError::Refused(refusal) => refusal_status(refusal),
    }
}

/// What a decode node reports of an event; `None` for events of the other role.
pub fn generate_event(event: Event) -> Option<Result<v1::GenerateEvent, Status>> {
    use v1::generate_event::Event as E;
    let event = match event {
        Event::Admitted { cached_tokens, handoff } => E::Admitted(v1::Admitted {
            cached_tokens: cached_tokens as u32,
            handoff: handoff.as_ref().map(handoff_message),
        }),
        Event::Landed { bytes, ready_after } => {
            E::Landed(v1::Landed { bytes, last_frame_to_ready_us: micros(ready_after) })
        }
        Event::Scored { start, scores } => E::Scored(scored_message(start, &scores)),
        Event::Token(token) => E::Tokens(v1::Tokens { tokens: vec![token_message(&token)] }),
        Event::FirstStep { wait, step } => {
            E::FirstStep(v1::FirstStep { wait_us: micros(wait), step_us: micros(step) })
        }
        Event::Finished { reason, output_tokens } => E::Finished(v1::Finished {
            reason: finish_message(Some(reason)),
            output_tokens: output_tokens as u32,
        }),
        Event::Preempted => E::Preempted(v1::Preempted { reason: "no room for its next token".into() }),
        Event::Failed(error) => return Some(Err(error_status(&error))),
        Event::Started { .. } | Event::Pushed { .. } => return None,
    };
    Some(Ok(v1::GenerateEvent { event: Some(event) }))
}

/// Microseconds for a message.
pub fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

/// What macOS says to a process without the permission, as if there were no way: its own words would mislead.
fn blocked(error: Option<&str>, macos: bool) -> Option<&'static str> {
    let route = error.is_some_and(|error| error.contains("No route to host"));
    (macos && route)
        .then_some("macOS blocks it: allow baton in System Settings, Privacy & Security, Local Network")
}

/// A measured link as a heartbeat has it, with what is wrong with it.
pub fn link_message(link: kvtransfer::LinkStat) -> v1::LinkReport {
    let path = link.path;
    let rate = path.bytes_per_s.or((link.gbytes_per_s > 0.0).then_some(f64::from(link.gbytes_per_s) * 1e9));
    let mut faults = kvtransfer::interface::faults(path.via.as_ref(), rate);
    faults.extend(blocked(path.error.as_deref(), cfg!(target_os = "macos")).map(str::to_owned));
    let via = path.via.map(|via| match via.mbps {
        0 => format!("{} mtu {}", via.name, via.mtu),
        mbps => format!("{} mtu {} {mbps} Mb/s", via.name, via.mtu),
    });
    v1::LinkReport {
        peer: link.peer,
        gbytes_per_s: link.gbytes_per_s,
        bytes: link.bytes,
        rtt_us: path.rtt.map_or(0, |rtt| rtt.as_micros().min(u32::MAX.into()) as u32),
        probed_gbytes_per_s: path.bytes_per_s.map_or(0.0, |rate| (rate / 1e9) as f32),
        skew_ms: path.skew_ms.unwrap_or(0),
        error: path.error.unwrap_or_default(),
        striped: link.striped,
        way: link.way.name().into(),
        via: via.unwrap_or_default(),
        faults,
    }
}

/// An engine's state as a heartbeat.
pub fn report_message(report: Report, ready: bool, draining: bool) -> v1::NodeReport {
    let b = report.blocks;
    let c = report.counters;
    v1::NodeReport {
        member_id: String::new(), // filled in by the heartbeat, which knows it
        epoch: report.epoch,
        ready,
        draining,
        running: report.running as u32,
        waiting: report.waiting as u32,
        waiting_tokens: report.waiting_tokens as u64,
        kv: Some(v1::KvBlocks {
            block_tokens: b.block_tokens,
            total: b.total,
            free: b.free,
            used: b.used,
            cached: b.cached,
            reserved: b.reserved,
            quarantined: b.quarantined,
            audit_errors: b.audit_errors,
        }),
        prefill_tokens_per_s: report.prefill_tokens_per_s,
        decode_step_ms: report.decode_step_ms,
        links: Vec::new(), // the sender knows them
        counters: Some(v1::Counters {
            requests: c.requests,
            prompt_tokens: c.prompt_tokens,
            generated_tokens: c.generated_tokens,
            cached_tokens: c.cached_tokens,
            kv_bytes: c.kv_bytes,
            preemptions: c.preemptions,
            failed_sessions: c.failed_sessions,
            kv_resumed: c.kv_resumed,
            kv_fallbacks: c.kv_fallbacks,
            kv_silent: c.kv_silent,
            kv_gpudirect_bytes: c.kv_unstaged_bytes,
            drafts: c.drafts,
            draft_tokens: c.draft_tokens,
            accepted_tokens: c.accepted_tokens,
            model_draft_tokens: c.model_draft_tokens,
            model_accepted_tokens: c.model_accepted_tokens,
            model_draft_ms: u64::try_from(c.model_draft_time.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: on a Mac the missing permission is named, elsewhere a missing route is what it says.
    #[test]
    fn the_local_network_permission_is_named_on_macs_only() {
        let error = Some("No route to host (os error 65)");
        assert!(blocked(error, true).is_some_and(|words| words.contains("Local Network")));
        assert_eq!(
            (blocked(error, false), blocked(Some("timed out"), true), blocked(None, true)),
            (None, None, None)
        );
    }
}
