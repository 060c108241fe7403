//! The engine's tests once more, on a device that computes by itself: the engine runs ahead of it, to the same tokens.

#[path = "../engine/ahead.rs"]
mod ahead;
#[path = "../engine/alone.rs"]
mod alone;
#[path = "../engine/faults.rs"]
mod faults;
#[path = "../engine/group.rs"]
mod group;
#[path = "../engine/handoff.rs"]
mod handoff;
#[path = "../engine/late.rs"]
mod late;
#[path = "../engine/node.rs"]
mod node;

/// Steps are done when they are waited for.
const LATE: bool = true;
