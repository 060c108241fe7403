//! The ranks of a tensor-parallel group in lock-step: how they meet ([`rendezvous`]), what the leader tells them and
//! what they answer ([`plan`]), over which links ([`link`]), and how they know each other ([`Trust`]).

#[cfg(test)]
mod certificates;
mod codec;
mod group;
mod link;
mod mesh;
pub(crate) mod plan;
pub mod rendezvous;
mod trust;
pub(crate) mod wire;

pub use group::{Group, TpError, unmet};
pub(crate) use link::Frame;
pub use rendezvous::Member;
pub use trust::{Sealing, Trust};
