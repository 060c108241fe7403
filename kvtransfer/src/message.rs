//! The payloads of all frames but data. Everything has a bound; whatever does not parse exactly is an error.

use std::ops::Range;

use crate::error::FailCode;
use crate::frame::{FrameError, Kind};
use crate::limits::{
    CONTROL_BYTES_MAX, HELLO_BYTES_MAX, RANKS_MAX, REASON_BYTES_MAX, REQUEST_BYTES_MAX, SPEC_BYTES_MAX,
};
use crate::{Close, SessionId};

/// A frame that is not data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// See [`Hello`].
    Hello(Box<Hello>),
    /// See [`Kind::Challenge`].
    Challenge {
        /// Fresh.
        nonce: [u8; 32],
        /// The receiver's proof.
        proof: [u8; 32],
    },
    /// See [`Kind::Proof`].
    Proof {
        /// The sender's proof.
        proof: [u8; 32],
    },
    /// The sender may have sent `limit_bytes` of payload in all.
    Credit {
        /// Never shrinks.
        limit_bytes: u64,
        /// What has landed so far.
        received_bytes: u64,
        /// In so many data frames.
        received_frames: u64,
        /// Largest payload that the receiver takes.
        frame_bytes: u32,
    },
    /// See [`Kind::Done`].
    Done {
        /// Data frames sent on this lane.
        frames: u64,
        /// Payload bytes sent on this lane.
        bytes: u64,
        /// Lanes of this sender that say Done.
        lanes: u16,
        /// How the computation ended.
        close: Close,
    },
    /// See [`Kind::Ack`].
    Ack {
        /// Payload bytes of this lane.
        bytes: u64,
    },
    /// See [`Kind::Fail`].
    Fail {
        /// Kind of reason.
        code: FailCode,
        /// In words.
        reason: String,
    },
    /// See [`Kind::Ping`].
    Ping,
    /// See [`Kind::Pong`].
    Pong {
        /// What has landed so far.
        received_bytes: u64,
        /// In so many data frames.
        received_frames: u64,
    },
    /// See [`Kind::Probed`].
    Probed {
        /// Milliseconds since 1970.
        unix_ms: u64,
        /// What has come so far.
        received_bytes: u64,
    },
}

/// A sender's first words. All of it is covered by both proofs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The session.
    pub session: SessionId,
    /// Epoch of the decode group.
    pub epoch: u64,
    /// The request's attempt.
    pub attempt: u32,
    /// This sender's rank.
    pub sender: u32,
    /// Which of the sender's connections to this receiver, from 0.
    pub lane: u16,
    /// Counts the lane's connections: a later one takes the place of an earlier one, and goes on where that ended.
    pub connection: u32,
    /// Ranks of all senders that connect to this receiver, ascending; every one of them says the same.
    pub senders: Vec<u32>,
    /// Positions that will be sent.
    pub tokens: Range<u32>,
    /// Bytes of cache that this sender will send to this receiver, on all lanes.
    pub bytes: u64,
    /// Fresh.
    pub nonce: [u8; 32],
    /// The router's id of the request.
    pub request: String,
    /// The receiver's spec as the sender knows it, see [`crate::layout::describe`].
    pub spec: String,
}

const HELLO_FIXED_BYTES: usize = 16 + 8 + 4 + 4 + 2 + 4 + 8 + 8 + 32;
const _: () = assert!(
    HELLO_BYTES_MAX >= HELLO_FIXED_BYTES + 2 + 4 * RANKS_MAX + 2 + REQUEST_BYTES_MAX + 2 + SPEC_BYTES_MAX
);
const _: () = assert!(CONTROL_BYTES_MAX >= 4 + REASON_BYTES_MAX);

impl Message {
    /// The kind of its frame.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Challenge { .. } => Kind::Challenge,
            Message::Proof { .. } => Kind::Proof,
            Message::Credit { .. } => Kind::Credit,
            Message::Done { .. } => Kind::Done,
            Message::Ack { .. } => Kind::Ack,
            Message::Fail { .. } => Kind::Fail,
            Message::Ping => Kind::Ping,
            Message::Pong { .. } => Kind::Pong,
            Message::Probed { .. } => Kind::Probed,
        }
    }

    /// A Fail with `reason` cut to its bound.
    pub fn fail(code: FailCode, reason: &str) -> Self {
        let mut end = reason.len().min(REASON_BYTES_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        Message::Fail { code, reason: reason[..end].to_owned() }
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Message::Hello(hello) => hello.encode(&mut out),
            Message::Challenge { nonce, proof } => {
                out.extend_from_slice(nonce);
                out.extend_from_slice(proof);
            }
            Message::Proof { proof } => out.extend_from_slice(proof),
            Message::Credit { limit_bytes, received_bytes, received_frames, frame_bytes } => {
                out.extend_from_slice(&limit_bytes.to_le_bytes());
                out.extend_from_slice(&received_bytes.to_le_bytes());
                out.extend_from_slice(&received_frames.to_le_bytes());
                out.extend_from_slice(&frame_bytes.to_le_bytes());
            }
            Message::Done { frames, bytes, lanes, close } => {
                out.extend_from_slice(&frames.to_le_bytes());
                out.extend_from_slice(&bytes.to_le_bytes());
                out.extend_from_slice(&lanes.to_le_bytes());
                out.extend_from_slice(&close.token.to_le_bytes());
                out.push(close.finish);
            }
            Message::Ack { bytes } => out.extend_from_slice(&bytes.to_le_bytes()),
            Message::Fail { code, reason } => {
                out.extend_from_slice(&(*code as u16).to_le_bytes());
                put_text(&mut out, reason);
            }
            Message::Ping => {}
            Message::Probed { unix_ms, received_bytes } => {
                out.extend_from_slice(&unix_ms.to_le_bytes());
                out.extend_from_slice(&received_bytes.to_le_bytes());
            }
            Message::Pong { received_bytes, received_frames } => {
                out.extend_from_slice(&received_bytes.to_le_bytes());
                out.extend_from_slice(&received_frames.to_le_bytes());
            }
        }
        out
    }

    /// Parses the payload of a frame of `kind`.
    pub fn decode(kind: Kind, payload: &[u8]) -> Result<Self, FrameError> {
        let mut input = Input(payload);
        let message = match kind {
            Kind::Hello => Message::Hello(Box::new(Hello::decode(&mut input)?)),
            Kind::Challenge => Message::Challenge { nonce: input.array()?, proof: input.array()? },
            Kind::Proof => Message::Proof { proof: input.array()? },
            Kind::Credit => Message::Credit {
                limit_bytes: input.u64()?,
                received_bytes: input.u64()?,
                received_frames: input.u64()?,
                frame_bytes: input.u32()?,
            },
            Kind::Done => Message::Done {
                frames: input.u64()?,
                bytes: input.u64()?,
                lanes: input.u16()?,
                close: Close { token: input.u32()?, finish: input.array::<1>()?[0] },
            },
            Kind::Ack => Message::Ack { bytes: input.u64()? },
            Kind::Fail => Message::Fail {
                code: FailCode::from_number(input.u16()?),
                reason: input.text(REASON_BYTES_MAX)?,
            },
            Kind::Ping => Message::Ping,
            Kind::Probed => Message::Probed { unix_ms: input.u64()?, received_bytes: input.u64()? },
            Kind::Pong => Message::Pong { received_bytes: input.u64()?, received_frames: input.u64()? },
            Kind::Data => return Err(FrameError::Message("is data")),
            Kind::Offer | Kind::Choose | Kind::Address | Kind::Fetch | Kind::Fetched => {
                return Err(FrameError::Message("is not for a session"));
            }
        };
        if input.0.is_empty() { Ok(message) } else { Err(FrameError::Message("too long")) }
    }
}

impl Hello {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.session.to_bytes());
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.attempt.to_le_bytes());
        out.extend_from_slice(&self.sender.to_le_bytes());
        out.extend_from_slice(&self.lane.to_le_bytes());
        out.extend_from_slice(&self.connection.to_le_bytes());
        out.extend_from_slice(&self.tokens.start.to_le_bytes());
        out.extend_from_slice(&self.tokens.end.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&(self.senders.len() as u16).to_le_bytes());
        for sender in &self.senders {
            out.extend_from_slice(&sender.to_le_bytes());
        }
        put_text(out, &self.request);
        put_text(out, &self.spec);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, FrameError> {
        let session = SessionId::from_bytes(input.array()?);
        let epoch = input.u64()?;
        let attempt = input.u32()?;
        let sender = input.u32()?;
        let (lane, connection) = (input.u16()?, input.u32()?);
        let tokens = input.u32()?..input.u32()?;
        let bytes = input.u64()?;
        let nonce = input.array()?;
        let count = usize::from(input.u16()?);
        if count > RANKS_MAX {
            return Err(FrameError::Message("has too many senders"));
        }
        let senders = (0..count).map(|_| input.u32()).collect::<Result<_, _>>()?;
        let request = input.text(REQUEST_BYTES_MAX)?;
        let spec = input.text(SPEC_BYTES_MAX)?;
        Ok(Hello {
            session,
            epoch,
            attempt,
            sender,
            lane,
            connection,
            senders,
            tokens,
            bytes,
            nonce,
            request,
            spec,
        })
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// What is left of a payload.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(FrameError::Message("too short"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn u16(&mut self) -> Result<u16, FrameError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, bytes_max: usize) -> Result<String, FrameError> {
        let bytes = usize::from(self.u16()?);
        if bytes > bytes_max {
            return Err(FrameError::Message("has too long a text"));
        }
        let (text, rest) = self.0.split_at_checked(bytes).ok_or(FrameError::Message("too short"))?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_| FrameError::Message("has a text that is not UTF-8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        vec![
            Message::Hello(Box::new(Hello {
                session: SessionId::from_bytes([3; 16]),
                epoch: 1 << 40,
                attempt: 2,
                sender: 5,
                lane: 1,
                connection: 3,
                senders: vec![1, 5],
                tokens: 64..3000,
                bytes: 1 << 33,
                nonce: [9; 32],
                request: "req-1".into(),
                spec: "2 layers k 8x64 bf16 0..4".into(),
            })),
            Message::Challenge { nonce: [1; 32], proof: [2; 32] },
            Message::Proof { proof: [4; 32] },
            Message::Credit { limit_bytes: 7, received_bytes: 6, received_frames: 4, frame_bytes: 5 },
            Message::Done { frames: 1, bytes: 2, lanes: 2, close: Close { token: 3, finish: 4 } },
            Message::Ack { bytes: 8 },
            Message::Fail { code: FailCode::Stale, reason: "attempt 1, expected 2".into() },
            Message::Ping,
            Message::Pong { received_bytes: 9, received_frames: 1 },
            Message::Probed { unix_ms: 1 << 40, received_bytes: 4 },
        ]
    }

    #[test]
    fn messages_survive_the_wire_and_no_other_length_parses() {
        for message in all() {
            let bytes = message.encode();
            assert_eq!(Message::decode(message.kind(), &bytes), Ok(message.clone()));
            for short in 0..bytes.len() {
                assert!(
                    Message::decode(message.kind(), &bytes[..short]).is_err(),
                    "{message:?} cut to {short}"
                );
            }
            let long = [&bytes[..], &[0]].concat();
            assert_eq!(Message::decode(message.kind(), &long), Err(FrameError::Message("too long")));
        }
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let Message::Fail { reason, .. } = Message::fail(FailCode::Other, &"ß".repeat(REASON_BYTES_MAX))
        else {
            panic!("not a Fail");
        };
        assert!(reason.len() <= REASON_BYTES_MAX && reason.chars().all(|c| c == 'ß'));
    }
}
