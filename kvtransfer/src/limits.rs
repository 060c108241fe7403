//! Every bound of the wire, with its unit and its reason. [`Limits`] are those that a node may choose.

use std::time::Duration;

use crate::Ticket;
use crate::codec::{Codec, CodecPolicy};
use crate::transport::ucx::Ways;

/// Version of frames, messages and their order. Compared at join and in every Hello.
pub const WIRE_VERSION: u8 = 4;

/// Bytes of the fixed head of a frame.
pub const HEADER_BYTES: usize = 64;

/// Largest block of one plane of one layer in any store: 256 tokens of 32 heads of 128 bf16 elements are 2 MiB.
pub const BLOCK_BYTES_MAX: usize = 2 << 20;

/// Largest payload of a data frame; also the largest staging buffer of a connection.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;

/// Largest frame.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + PAYLOAD_BYTES_MAX;

/// Largest payload of Hello: identities, ranges and the spec in words.
pub const HELLO_BYTES_MAX: usize = 3072;

/// Largest payload of any other frame that is not data.
pub const CONTROL_BYTES_MAX: usize = 576;

/// The address of a UCX worker: every device has its share.
pub const ADDRESS_BYTES_MAX: usize = 16 << 10;

/// Where a payload lies that is not on the connection: runs of memory with their keys.
pub const FETCH_BYTES_MAX: usize = 64 << 10;

/// Sender ranks of one session.
pub const RANKS_MAX: usize = 64;

/// Ranks of the receiving group that pass their share of replicated planes on are senders from this number on.
pub const PEER_BASE: u32 = 1 << 16;

/// Connections of one sender rank to one receiver, in one session.
pub const LANES_MAX: u16 = 16;

/// Bytes of one probe of a link.
pub const PROBE_BYTES_MAX: u64 = 64 << 20;

/// How often one lane may lose its connection in one session and go on over another.
pub const RESUMES_MAX: u32 = 16;

/// Bytes that a rank holds for the other ranks of its group before it reads on from the prefill node.
pub const RELAY_BACKLOG_BYTES_MAX: u64 = 32 << 20;

/// The router's id of a request.
pub const REQUEST_BYTES_MAX: usize = 256;

/// A spec in words, see [`crate::layout::describe`].
pub const SPEC_BYTES_MAX: usize = 2048;

/// The words of a Fail.
pub const REASON_BYTES_MAX: usize = 512;

/// What a connection may send before it has proved its ticket.
pub const UNPROVEN_BYTES_MAX: usize = 4096;

/// Token intervals per layer, plane and head that a receiver keeps: more means frames arrive scattered on purpose. Every
/// other stripe of a million tokens of a replicated plane are 4096.
pub const INTERVALS_MAX: usize = 8192;

/// Ended sessions that a receiver remembers, so that a late sender hears so at once.
pub const ENDED_MAX: usize = 1024;

const _: () = assert!(FRAME_BYTES_MAX >= HEADER_BYTES + BLOCK_BYTES_MAX);
const _: () = assert!(UNPROVEN_BYTES_MAX >= 2 * HEADER_BYTES + HELLO_BYTES_MAX + CONTROL_BYTES_MAX);

/// Bounds that a node may choose. Both ends use the same struct; each reads what concerns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Payload of a data frame that a sender aims at, at most [`PAYLOAD_BYTES_MAX`]; never below one token's row.
    pub frame_bytes: usize,
    /// How far a receiver's credit runs ahead of what has landed, per connection.
    pub window_bytes: u64,
    /// Connections in use and idle, all peers together.
    pub connections_max: usize,
    /// Sessions that a receiver expects at once.
    pub sessions_max: usize,
    /// Connections that have not proved a ticket yet.
    pub unproven_max: usize,
    /// Time to prove a ticket, from the connection's beginning or its next Hello.
    pub handshake: Duration,
    /// Time for one address to answer a connection attempt.
    pub connect: Duration,
    /// A sender closes connections that were idle for so long.
    pub idle_max: Duration,
    /// How long a lane that has lost its connection may take to come back over another.
    pub resume: Duration,
    /// Connections per path and receiver, at most [`LANES_MAX`] in all. Many bytes through shared memory take at least two.
    pub streams: usize,
    /// Both ends' secret for probes of links; without one nobody probes and no probe is answered.
    pub probe: Option<Ticket>,
    /// How numbers travel.
    pub codec: CodecPolicy,
    /// Ways that payloads may take beside their connection.
    pub ways: Ways,
    /// Pace of all payloads of a sender together; `None`: as fast as the link takes them.
    pub rate_bytes_per_s: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            frame_bytes: 1 << 20,
            window_bytes: 16 << 20,
            connections_max: 512,
            sessions_max: 1024,
            unproven_max: 64,
            handshake: Duration::from_secs(5),
            connect: Duration::from_secs(2),
            idle_max: Duration::from_secs(4 * 3600),
            resume: Duration::from_secs(3),
            streams: 1,
            probe: None,
            codec: CodecPolicy::Always(Codec::Exact),
            ways: Ways::NONE,
            rate_bytes_per_s: None,
        }
    }
}
