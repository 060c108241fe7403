//! The gRPC wire between baton's processes: messages and services compiled from the .proto files beside this crate,
//! the protocol version, and the limits of every message.

/// Messages and services of package `baton.v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("baton.v1");
}

/// Version of the gRPC messages and of the KV wire. Nodes of another version are refused at join.
pub const PROTOCOL: u32 = 4;

/// Tokens of one sequence at the most; bounds every message that carries one.
pub const SEQUENCE_TOKENS_MAX: usize = 1 << 20;

/// Tokens of a prediction at the most.
pub const PREDICTION_TOKENS_MAX: usize = 1 << 17;

/// Alternatives that are told of a token of a prompt, at the most.
pub const PROMPT_LOGPROBS_MAX: u32 = 20;

/// Bytes of one gRPC message: a longest sequence and prediction at 5 bytes a varint, and room for the rest.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

const _: () = assert!(MESSAGE_BYTES_MAX >= (SEQUENCE_TOKENS_MAX + PREDICTION_TOKENS_MAX) * 5 + (1 << 20));

/// Metadata key of every call in either direction: `bearer <cluster token>`.
pub const AUTHORIZATION: &str = "authorization";
