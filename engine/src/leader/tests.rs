//! The leader's decisions against simulated ranks ([`sim`]).

mod ahead;
mod draft;
mod generation;
mod handoff;
mod room;
mod sim;
