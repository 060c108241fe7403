//! The ranks of a tensor-parallel group in lock-step: how they meet ([`rendezvous`]), what the leader tells them and
//! what they answer ([`plan`]), over which links ([`link`]).

mod codec;
mod group;
mod link;
mod mesh;
pub(crate) mod plan;
pub mod rendezvous;
pub(crate) mod wire;

pub use group::{Group, TpError, unmet};
pub(crate) use link::Frame;
pub use rendezvous::Member;
