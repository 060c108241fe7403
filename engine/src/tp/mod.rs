//! The ranks of a tensor-parallel group in lock-step: how they meet, what the leader tells them and what they answer.

pub(crate) mod plan;
pub(crate) mod wire;

mod group;

pub use group::{Group, TpError};
