//! The gateway over real HTTP, in front of a mock cluster: what clients of OpenAI's interface see.

mod answers;
mod batches;
mod cancel;
mod errors;
mod harmony;
mod interfaces;
mod latency;
mod mock;
mod openapi;
mod scores;
mod status;
mod tls;
mod tools;
