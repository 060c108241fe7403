//! The engine end to end in one process: threads as ranks, real sockets, the CPU backend and a small random model.

mod ahead;
mod alone;
mod fabric;
mod faults;
mod group;
mod handoff;
mod late;
mod node;

/// Steps are done when they are submitted, as on the CPU.
const LATE: bool = false;
