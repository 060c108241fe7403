//! Plans and notices as bytes, for the frames between the leader and its followers. Pure.

use backend::{Batch, Draw, Fork, Input, Rule, Run, SeqId};
use kvtransfer::{Close, Codec, SessionId, Ticket};

use super::plan::{Arrived, Export, Land, Notice, Op, Plan, PushOp, Sent, Wanted};
use super::wire::{Reader, WireError, Writer};
use crate::ledger::LeaseId;
use crate::request::{Handoff, Target};

impl Plan {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.u64(self.step);
        w.list(&self.ops, |w, op| op.encode(w));
        w.list(&self.batch.runs, |w, run| {
            w.u64(run.seq.0);
            w.u32(run.start);
            w.u32(run.len);
        });
        w.list(&self.batch.ids, |w, input| match *input {
            Input::Id(id) => numbers32(w, 0, id),
            Input::Drawn(row) => numbers32(w, 1, row),
        });
        w.list(&self.rows, |w, wanted| wanted.encode(w));
        w.list(&self.exports, |w, export| {
            w.u64(export.lease.0);
            w.u64(export.seq.0);
            w.range(&export.tokens);
        });
        w.0
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader(bytes);
        let plan = Plan {
            step: r.u64()?,
            ops: r.list(Op::decode)?,
            batch: Batch {
                runs: r.list(|r| Ok(Run { seq: SeqId(r.u64()?), start: r.u32()?, len: r.u32()? }))?,
                ids: r.list(|r| {
                    let (kind, number) = (r.u8()?, r.u32()?);
                    match kind {
                        0 => Ok(Input::Id(number)),
                        1 => Ok(Input::Drawn(number)),
                        _ => Err(WireError::Unknown { what: "input", value: kind.to_string() }),
                    }
                })?,
            },
            rows: r.list(Wanted::decode)?,
            exports: r.list(|r| {
                Ok(Export { lease: LeaseId(r.u64()?), seq: SeqId(r.u64()?), tokens: r.range()? })
            })?,
        };
        r.end()?;
        Ok(plan)
    }
}

impl Wanted {
    fn encode(&self, w: &mut Writer) {
        w.u32(self.row);
        match &self.draw {
            Draw::Logits => w.u8(0),
            Draw::Token(rule) => {
                w.u8(1);
                w.u32(rule.temperature.to_bits());
                w.u32(rule.top_k);
                w.u32(rule.top_p.to_bits());
                w.u32(rule.min_p.to_bits());
                w.u64(rule.seed);
                w.u64(rule.position);
            }
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let row = r.u32()?;
        let draw = match r.u8()? {
            0 => Draw::Logits,
            1 => Draw::Token(Rule {
                temperature: f32::from_bits(r.u32()?),
                top_k: r.u32()?,
                top_p: f32::from_bits(r.u32()?),
                min_p: f32::from_bits(r.u32()?),
                seed: r.u64()?,
                position: r.u64()?,
            }),
            kind => return Err(WireError::Unknown { what: "draw", value: kind.to_string() }),
        };
        Ok(Wanted { row, draw })
    }
}

impl Op {
    fn encode(&self, w: &mut Writer) {
        match self {
            Op::Open { seq, tokens } => numbers(w, 0, seq.0, *tokens),
            Op::Grow { seq, tokens } => numbers(w, 1, seq.0, *tokens),
            Op::Fork { from, to, tokens, mode } => {
                numbers(w, 2, from.0, *tokens);
                w.u64(to.0);
                w.u8(u8::from(*mode == Fork::Move));
            }
            Op::Truncate { seq, tokens } => numbers(w, 3, seq.0, *tokens),
            Op::Close { seq } => numbers(w, 4, seq.0, 0),
            Op::Land(land) => {
                w.u8(5);
                w.u64(land.lease.0);
                w.u64(land.seq.0);
                w.range(&land.tokens);
                w.0.extend_from_slice(&land.session.to_bytes());
                w.0.extend_from_slice(&land.ticket.to_bytes());
                w.text(&land.request);
                w.u32(land.attempt);
                w.duration(land.deadline);
            }
            Op::Commit { lease } => numbers(w, 6, lease.0, 0),
            Op::Abort { lease } => numbers(w, 7, lease.0, 0),
            Op::Push(push) => {
                w.u8(8);
                w.u64(push.lease.0);
                w.u64(push.seq.0);
                w.range(&push.cached);
                w.text(&push.request);
                w.u32(push.attempt);
                encode_handoff(w, &push.handoff);
            }
            Op::PushClose { lease, close } => {
                numbers(w, 9, lease.0, close.token);
                w.u8(close.finish);
            }
            Op::Audit { held, total } => numbers(w, 10, u64::from(*held), *total),
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let kind = r.u8()?;
        Ok(match kind {
            0 => Op::Open { seq: SeqId(r.u64()?), tokens: r.u32()? },
            1 => Op::Grow { seq: SeqId(r.u64()?), tokens: r.u32()? },
            2 => {
                let (from, tokens) = (SeqId(r.u64()?), r.u32()?);
                let to = SeqId(r.u64()?);
                let mode = match r.u8()? {
                    0 => Fork::Share,
                    1 => Fork::Move,
                    mode => return Err(WireError::Unknown { what: "fork", value: mode.to_string() }),
                };
                Op::Fork { from, to, tokens, mode }
            }
            3 => Op::Truncate { seq: SeqId(r.u64()?), tokens: r.u32()? },
            4 => Op::Close { seq: number(r)?.into() },
            5 => Op::Land(Land {
                lease: LeaseId(r.u64()?),
                seq: SeqId(r.u64()?),
                tokens: r.range()?,
                session: SessionId::from_bytes(r.array()?),
                ticket: Ticket::from_bytes(r.array()?),
                request: r.text()?,
                attempt: r.u32()?,
                deadline: r.duration()?,
            }),
            6 => Op::Commit { lease: number(r)?.into() },
            7 => Op::Abort { lease: number(r)?.into() },
            8 => Op::Push(PushOp {
                lease: LeaseId(r.u64()?),
                seq: SeqId(r.u64()?),
                cached: r.range()?,
                request: r.text()?,
                attempt: r.u32()?,
                handoff: decode_handoff(r)?,
            }),
            9 => {
                let (lease, token) = (LeaseId(r.u64()?), r.u32()?);
                Op::PushClose { lease, close: Close { token, finish: r.u8()? } }
            }
            10 => {
                let held = r.u64()?;
                let held = held
                    .try_into()
                    .map_err(|_| WireError::Unknown { what: "block count", value: held.to_string() })?;
                Op::Audit { held, total: r.u32()? }
            }
            _ => return Err(WireError::Unknown { what: "operation", value: kind.to_string() }),
        })
    }
}

/// The number of an operation that has but one.
struct Number(u64);

impl From<Number> for SeqId {
    fn from(n: Number) -> Self {
        SeqId(n.0)
    }
}

impl From<Number> for LeaseId {
    fn from(n: Number) -> Self {
        LeaseId(n.0)
    }
}

fn numbers(w: &mut Writer, kind: u8, first: u64, second: u32) {
    w.u8(kind);
    w.u64(first);
    w.u32(second);
}

fn numbers32(w: &mut Writer, kind: u8, number: u32) {
    w.u8(kind);
    w.u32(number);
}

fn number(r: &mut Reader<'_>) -> Result<Number, WireError> {
    let first = r.u64()?;
    r.u32()?;
    Ok(Number(first))
}

fn encode_handoff(w: &mut Writer, handoff: &Handoff) {
    w.0.extend_from_slice(&handoff.ticket.to_bytes());
    w.0.extend_from_slice(&handoff.session.to_bytes());
    w.u64(handoff.epoch);
    w.range(&handoff.tokens);
    w.list(&handoff.targets, |w, target| {
        w.u32(target.rank as u32);
        w.list(&target.addresses, |w, address| w.text(address));
        w.spec(&target.spec);
    });
    w.duration(handoff.deadline);
}

fn decode_handoff(r: &mut Reader<'_>) -> Result<Handoff, WireError> {
    Ok(Handoff {
        ticket: Ticket::from_bytes(r.array()?),
        session: SessionId::from_bytes(r.array()?),
        epoch: r.u64()?,
        tokens: r.range()?,
        targets: r.list(|r| {
            Ok(Target { rank: r.u32()? as usize, addresses: r.list(Reader::text)?, spec: r.spec()? })
        })?,
        deadline: r.duration()?,
    })
}

impl Notice {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Notice::Executed { step } => numbers(&mut w, 0, *step, 0),
            Notice::Landed { lease, result, age } => {
                w.u8(1);
                w.u64(lease.0);
                w.duration(*age);
                outcome(&mut w, result, |w, arrived| {
                    w.u64(arrived.bytes);
                    w.u32(arrived.close.token);
                    w.u8(arrived.close.finish);
                });
            }
            Notice::Pushed { lease, result, age } => {
                w.u8(2);
                w.u64(lease.0);
                w.duration(*age);
                outcome(&mut w, result, |w, sent| {
                    w.u64(sent.bytes);
                    w.u8(sent.codec as u8);
                    w.list(sent.estimate.as_slice(), |w, estimate| w.duration(*estimate));
                });
            }
            Notice::Audited { disagreement } => {
                w.u8(3);
                w.list(disagreement.as_slice(), |w, text| w.text(text));
            }
            Notice::Failed { reason } => {
                w.u8(4);
                w.text(reason);
            }
        }
        w.0
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader(bytes);
        let kind = r.u8()?;
        let notice = match kind {
            0 => Notice::Executed { step: number(&mut r)?.0 },
            1 => {
                let (lease, age) = (LeaseId(r.u64()?), r.duration()?);
                let result = taken(&mut r, |r| {
                    Ok(Arrived { bytes: r.u64()?, close: Close { token: r.u32()?, finish: r.u8()? } })
                })?;
                Notice::Landed { lease, result, age }
            }
            2 => {
                let (lease, age) = (LeaseId(r.u64()?), r.duration()?);
                let result = taken(&mut r, |r| {
                    let (bytes, number) = (r.u64()?, r.u8()?);
                    let codec = Codec::from_number(number)
                        .ok_or(WireError::Unknown { what: "codec", value: number.to_string() })?;
                    Ok(Sent { bytes, codec, estimate: r.list(Reader::duration)?.pop() })
                })?;
                Notice::Pushed { lease, result, age }
            }
            3 => Notice::Audited { disagreement: r.list(Reader::text)?.pop() },
            4 => Notice::Failed { reason: r.text()? },
            _ => return Err(WireError::Unknown { what: "notice", value: kind.to_string() }),
        };
        r.end()?;
        Ok(notice)
    }
}

fn outcome<T>(w: &mut Writer, result: &Result<T, String>, good: impl FnOnce(&mut Writer, &T)) {
    match result {
        Ok(value) => {
            w.u8(1);
            good(w, value);
        }
        Err(reason) => {
            w.u8(0);
            w.text(reason);
        }
    }
}

fn taken<T>(
    r: &mut Reader<'_>,
    good: impl FnOnce(&mut Reader<'_>) -> Result<T, WireError>,
) -> Result<Result<T, String>, WireError> {
    Ok(if r.u8()? == 1 { Ok(good(r)?) } else { Err(r.text()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend::{DType, KvSpec, Plane, Sharding};
    use proptest::prelude::*;
    use std::time::Duration;

    fn handoff() -> Handoff {
        let latent = Plane {
            name: "latent",
            heads_total: 1,
            dim: 512,
            dtype: DType::F16,
            sharding: Sharding::Replicated,
        };
        let mut spec = KvSpec::gqa(3, 8, 2..4, 64, DType::BF16);
        spec.planes.push(latent);
        Handoff {
            ticket: Ticket::from_bytes([9; 32]),
            session: SessionId::from_bytes([8; 16]),
            epoch: u64::MAX,
            tokens: 64..500,
            targets: vec![Target { rank: 1, addresses: vec!["a:1".into(), "[::1]:2".into()], spec }],
            deadline: Duration::from_micros(12_345),
        }
    }

    fn plan() -> Plan {
        let mut batch = Batch::default();
        batch.push(SeqId(1), 7, &[1, 2, 3]);
        batch.push(SeqId(2), 0, &[u32::MAX]);
        batch.push_drawn(SeqId(3), 9, 2);
        let (lease, seq) = (LeaseId(5), SeqId(6));
        Plan {
            step: 17,
            ops: vec![
                Op::Open { seq, tokens: 3 },
                Op::Grow { seq, tokens: 4 },
                Op::Fork { from: seq, to: SeqId(7), tokens: 64, mode: Fork::Share },
                Op::Fork { from: seq, to: SeqId(8), tokens: 64, mode: Fork::Move },
                Op::Truncate { seq, tokens: 64 },
                Op::Close { seq },
                Op::Land(Land {
                    lease,
                    seq,
                    tokens: 0..9,
                    session: SessionId::from_bytes([1; 16]),
                    ticket: Ticket::from_bytes([2; 32]),
                    request: "r\u{e9}".into(),
                    attempt: 2,
                    deadline: Duration::from_secs(3),
                }),
                Op::Commit { lease },
                Op::Abort { lease },
                Op::Push(PushOp {
                    lease,
                    seq,
                    cached: 64..128,
                    request: String::new(),
                    attempt: 0,
                    handoff: handoff(),
                }),
                Op::PushClose { lease, close: Close { token: 77, finish: 2 } },
                Op::Audit { held: 4, total: 9 },
            ],
            batch,
            rows: vec![
                Wanted { row: 2, draw: Draw::Logits },
                Wanted {
                    row: 4,
                    draw: Draw::Token(Rule {
                        temperature: 0.7,
                        top_k: 20,
                        top_p: 0.95,
                        min_p: 0.01,
                        seed: u64::MAX,
                        position: 10,
                    }),
                },
            ],
            exports: vec![Export { lease, seq, tokens: 7..10 }],
        }
    }

    fn notices() -> Vec<Notice> {
        let (lease, age) = (LeaseId(3), Duration::from_micros(4));
        let arrived = Arrived { bytes: 1 << 40, close: Close { token: 5, finish: 1 } };
        vec![
            Notice::Executed { step: 9 },
            Notice::Landed { lease, result: Ok(arrived), age },
            Notice::Landed { lease, result: Err("late".into()), age },
            Notice::Pushed {
                lease,
                result: Ok(Sent { bytes: 7, codec: Codec::Int8, estimate: Some(age) }),
                age,
            },
            Notice::Pushed { lease, result: Err("lost".into()), age },
            Notice::Audited { disagreement: None },
            Notice::Audited { disagreement: Some("1 of 2".into()) },
            Notice::Failed { reason: "device".into() },
        ]
    }

    #[test]
    fn plans_and_notices_survive_their_bytes() {
        assert_eq!(Plan::decode(&plan().encode()), Ok(plan()));
        for notice in notices() {
            assert_eq!(Notice::decode(&notice.encode()), Ok(notice));
        }
    }

    #[test]
    fn every_shortened_frame_is_refused() {
        let bytes = plan().encode();
        for end in 0..bytes.len() {
            assert!(Plan::decode(&bytes[..end]).is_err(), "{end} of {} bytes", bytes.len());
        }
        let mut long = bytes;
        long.push(0);
        assert_eq!(Plan::decode(&long), Err(WireError::Long(1)));
    }

    proptest! {
        // Whatever arrives, reading ends with a value or an error, and without taking memory that was not sent.
        #[test]
        fn no_bytes_break_the_reader(at in 0usize..400, with: u8) {
            let mut bytes = plan().encode();
            let at = at % bytes.len();
            bytes[at] = with;
            let _ = Plan::decode(&bytes);
            for notice in notices() {
                let mut bytes = notice.encode();
                let at = at % bytes.len();
                bytes[at] = with;
                let _ = Notice::decode(&bytes);
            }
        }
    }
}
