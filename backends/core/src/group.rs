//! A tensor-parallel group as a backend sees it: its rank, and links to the other ranks.

use std::net::TcpStream;

/// Membership of one tensor-parallel group.
#[derive(Debug)]
pub struct Group {
    /// This rank, `0` is the leader.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// How the ranks reach each other.
    pub links: Links,
}

/// What collectives travel over.
#[derive(Debug)]
pub enum Links {
    /// One rank: nothing travels.
    Alone,
    /// One connected socket per rank (`None` at this rank's own place), for backends that use sockets (CPU).
    Sockets(Vec<Option<TcpStream>>),
    /// The backend's own fabric, described by an environment-independent specification (MLX ring or jaccl host file,
    /// NCCL id).
    Native(String),
}

impl Group {
    /// A group of one.
    pub fn alone() -> Self {
        Group { rank: 0, world: 1, links: Links::Alone }
    }
}
