//! The fixed head of every frame: 64 bytes, little endian, its own checksum, and one over the payload that follows.
//! Both ends of every transport; whoever lands a payload compares [`Head::payload_crc`].
//!
//! ```text
//!  0 magic "BKV", version   4 kind   5 codec   6 lane      8 session tag        16 number
//! 24 layer   28 plane      32 heads start, end            40 tokens start, end
//! 48 payload bytes         52 payload crc32c              56 zero              60 crc32c of [0, 60)
//! ```
//!
//! `codec` says how the payload is written ([`Codec`]); `lane` and the last word are 0: places for later.

use std::ops::Range;

use crate::codec::Codec;
use crate::crc;
use crate::limits::{
    ADDRESS_BYTES_MAX, CONTROL_BYTES_MAX, FETCH_BYTES_MAX, HEADER_BYTES, HELLO_BYTES_MAX, PAYLOAD_BYTES_MAX,
    WIRE_VERSION,
};

const MAGIC: [u8; 3] = *b"BKV";

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Sender: which session, which sender, a nonce.
    Hello = 1,
    /// Receiver: a nonce, and proof that it holds the ticket.
    Challenge = 2,
    /// Sender: proof that it holds the ticket.
    Proof = 3,
    /// Receiver: how many payload bytes may have been sent in all.
    Credit = 4,
    /// Sender: a rectangle of cache.
    Data = 5,
    /// Sender: that was all, with counts.
    Done = 6,
    /// Receiver: every byte of every sender has landed.
    Ack = 7,
    /// Either: the session is over, with a reason.
    Fail = 8,
    /// Sender: still here.
    Ping = 9,
    /// Receiver: so am I, and this has landed so far.
    Pong = 10,
    /// Receiver: its clock, and what has come of a probe.
    Probed = 11,
    /// Sender: how else its payloads could be read, see [`crate::transport::ucx`].
    Offer = 12,
    /// Receiver: which of the ways it takes.
    Choose = 13,
    /// Sender: where it is to be found on that way.
    Address = 14,
    /// Sender: as Data, whose payload lies elsewhere; what follows says where.
    Fetch = 15,
    /// Receiver: how many such payloads it has read.
    Fetched = 16,
}

impl Kind {
    const ALL: [Kind; 16] = [
        Kind::Hello,
        Kind::Challenge,
        Kind::Proof,
        Kind::Credit,
        Kind::Data,
        Kind::Done,
        Kind::Ack,
        Kind::Fail,
        Kind::Ping,
        Kind::Pong,
        Kind::Probed,
        Kind::Offer,
        Kind::Choose,
        Kind::Address,
        Kind::Fetch,
        Kind::Fetched,
    ];

    /// Largest payload of this kind.
    pub const fn payload_bytes_max(self) -> usize {
        match self {
            Kind::Data => PAYLOAD_BYTES_MAX,
            Kind::Hello => HELLO_BYTES_MAX,
            Kind::Address => ADDRESS_BYTES_MAX,
            Kind::Fetch => FETCH_BYTES_MAX,
            _ => CONTROL_BYTES_MAX,
        }
    }

    /// Whether a transport says it to its other end, under the session.
    pub const fn is_transports(self) -> bool {
        matches!(self, Kind::Offer | Kind::Choose | Kind::Address | Kind::Fetch | Kind::Fetched)
    }
}

/// The head of a frame. Layer, plane, heads and tokens are 0 unless it is [`Kind::Data`] or
/// [`Kind::Fetch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// What the frame is.
    pub kind: Kind,
    /// Short form of the session's name.
    pub tag: u64,
    /// Counts a sender's frames of one connection and session; 0 in a receiver's, whose messages may be repeated.
    pub number: u64,
    /// Decoder layer.
    pub layer: u32,
    /// Index into [`backend::KvSpec::planes`].
    pub plane: u32,
    /// Heads of the whole model.
    pub heads: Range<u32>,
    /// Absolute positions.
    pub tokens: Range<u32>,
    /// How the payload is written.
    pub codec: Codec,
    /// Bytes that follow.
    pub payload_bytes: u32,
    /// CRC32C of them.
    pub payload_crc: u32,
}

/// A frame that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not this protocol at all.
    #[error("not a KV frame")]
    Magic,
    /// Another version of it.
    #[error("wire version {got}, ours is {WIRE_VERSION}")]
    Version {
        /// The frame's.
        got: u8,
    },
    /// The head's checksum.
    #[error("head checksum {got:08x}, computed {want:08x}")]
    HeadChecksum {
        /// In the frame.
        got: u32,
        /// Computed.
        want: u32,
    },
    /// The payload's checksum.
    #[error("payload checksum {got:08x}, computed {want:08x}")]
    PayloadChecksum {
        /// In the frame.
        got: u32,
        /// Computed.
        want: u32,
    },
    /// A number that names no kind, codec or lane of this version.
    #[error("unknown {what} {got}")]
    Unknown {
        /// `kind`, `codec`, `lane` or `field`.
        what: &'static str,
        /// The number.
        got: u32,
    },
    /// A payload beyond its bound.
    #[error("payload of {got} bytes, at most {max}")]
    Length {
        /// Announced.
        got: usize,
        /// Bound of the kind.
        max: usize,
    },
    /// A data frame with an empty or backward range.
    #[error("{what} {start}..{end}")]
    Range {
        /// `heads` or `tokens`.
        what: &'static str,
        /// First.
        start: u32,
        /// One past the last.
        end: u32,
    },
    /// A control message that does not parse.
    #[error("message {0}")]
    Message(&'static str),
}

impl Head {
    /// The head of a frame that is not data.
    pub fn control(kind: Kind, tag: u64, number: u64, payload: &[u8]) -> Self {
        debug_assert!(payload.len() <= kind.payload_bytes_max(), "{kind:?} of {} bytes", payload.len());
        Head {
            kind,
            tag,
            number,
            layer: 0,
            plane: 0,
            heads: 0..0,
            tokens: 0..0,
            codec: Codec::Exact,
            payload_bytes: payload.len() as u32,
            payload_crc: crc32c::crc32c(payload),
        }
    }

    /// The bytes that travel.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..3].copy_from_slice(&MAGIC);
        out[3] = WIRE_VERSION;
        out[4] = self.kind as u8;
        out[5] = self.codec as u8;
        out[8..16].copy_from_slice(&self.tag.to_le_bytes());
        out[16..24].copy_from_slice(&self.number.to_le_bytes());
        let words = [
            self.layer,
            self.plane,
            self.heads.start,
            self.heads.end,
            self.tokens.start,
            self.tokens.end,
            self.payload_bytes,
            self.payload_crc,
        ];
        for (place, word) in out[24..56].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Parses and checks a head.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if bytes[..3] != MAGIC {
            return Err(FrameError::Magic);
        }
        if bytes[3] != WIRE_VERSION {
            return Err(FrameError::Version { got: bytes[3] });
        }
        let (got, want) = (word(60), crc32c::crc32c(&bytes[..60]));
        if got != want {
            return Err(FrameError::HeadChecksum { got, want });
        }
        let lane = u32::from(u16::from_le_bytes([bytes[6], bytes[7]]));
        for (what, got) in [("lane", lane), ("field", word(56))] {
            if got != 0 {
                return Err(FrameError::Unknown { what, got });
            }
        }
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| *kind as u8 == bytes[4])
            .ok_or(FrameError::Unknown { what: "kind", got: u32::from(bytes[4]) })?;
        let codec = Codec::from_number(bytes[5])
            .ok_or(FrameError::Unknown { what: "codec", got: u32::from(bytes[5]) })?;
        let head = Head {
            kind,
            codec,
            tag: long(8),
            number: long(16),
            layer: word(24),
            plane: word(28),
            heads: word(32)..word(36),
            tokens: word(40)..word(44),
            payload_bytes: word(48),
            payload_crc: word(52),
        };
        head.check()
    }

    pub(crate) fn check(self) -> Result<Self, FrameError> {
        let (got, max) = (self.payload_bytes as usize, self.kind.payload_bytes_max());
        if got > max {
            return Err(FrameError::Length { got, max });
        }
        if matches!(self.kind, Kind::Data | Kind::Fetch) {
            for (what, range) in [("heads", &self.heads), ("tokens", &self.tokens)] {
                if range.is_empty() {
                    return Err(FrameError::Range { what, start: range.start, end: range.end });
                }
            }
        }
        Ok(self)
    }

    /// Compares the checksum computed over what was received.
    pub fn check_payload(&self, crc: u32) -> Result<(), FrameError> {
        if crc == self.payload_crc || crc::is_off() {
            return Ok(());
        }
        Err(FrameError::PayloadChecksum { got: self.payload_crc, want: crc })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Head {
        Head {
            kind: Kind::Data,
            tag: 0x0102_0304_0506_0708,
            number: 9,
            layer: 3,
            plane: 1,
            heads: 4..6,
            tokens: 100..164,
            codec: Codec::Fp8,
            payload_bytes: 4096,
            payload_crc: 0xdead_beef,
        }
    }

    #[test]
    fn a_head_survives_the_wire_and_every_flipped_bit_is_seen() {
        let bytes = data().encode();
        assert_eq!(Head::decode(&bytes), Ok(data()));
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Head::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_and_ranges_are_bounded() {
        let long = Head { payload_bytes: PAYLOAD_BYTES_MAX as u32 + 1, ..data() };
        assert_eq!(
            Head::decode(&long.encode()),
            Err(FrameError::Length { got: PAYLOAD_BYTES_MAX + 1, max: PAYLOAD_BYTES_MAX })
        );
        let long = Head { kind: Kind::Hello, payload_bytes: HELLO_BYTES_MAX as u32 + 1, ..data() };
        assert!(matches!(Head::decode(&long.encode()), Err(FrameError::Length { .. })));
        let empty = Head { tokens: 5..5, ..data() };
        assert_eq!(
            Head::decode(&empty.encode()),
            Err(FrameError::Range { what: "tokens", start: 5, end: 5 })
        );
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = data().encode();
        bytes[3] = 7;
        assert_eq!(Head::decode(&bytes), Err(FrameError::Version { got: 7 }));
    }
}
