//! The engine end to end in one process: threads as ranks, real sockets, the CPU backend and a small random model.

mod alone;
mod faults;
mod group;
mod handoff;
mod node;
