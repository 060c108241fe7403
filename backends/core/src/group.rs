//! A tensor-parallel group as a backend sees it: its rank, and links to the other ranks.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

/// A connection with another rank, as it is or encrypted. It blocks or not as its socket does. What a write has taken may still
/// be on its way to the socket: it has left when a flush succeeds.
pub trait RankLink: Read + Write + fmt::Debug + Send {
    /// The socket below, to wait for, to watch and to shut.
    fn socket(&self) -> &TcpStream;

    /// Whether others on the network cannot read along.
    fn is_sealed(&self) -> bool {
        false
    }
}

impl RankLink for TcpStream {
    fn socket(&self) -> &TcpStream {
        self
    }
}

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
    /// One connection per rank (`None` at this rank's own place), for backends that use sockets (CPU).
    Sockets(Vec<Option<Box<dyn RankLink>>>),
    /// The backend's own fabric, described by an environment-independent specification (MLX ring or jaccl host file,
    /// NCCL id).
    Native(String),
}

impl Group {
    /// A group of one.
    pub fn alone() -> Self {
        Group { rank: 0, world: 1, links: Links::Alone }
    }

    /// Groups of `world` ranks of one process, joined by loopback sockets, in order of rank.
    pub fn local(world: usize) -> io::Result<Vec<Group>> {
        if world == 1 {
            return Ok(vec![Group::alone()]);
        }
        let mut links: Vec<Vec<Option<Box<dyn RankLink>>>> =
            (0..world).map(|_| (0..world).map(|_| None).collect()).collect();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let pairs = (0..world).flat_map(|low| (low + 1..world).map(move |high| (low, high)));
        for (low, high) in pairs {
            let near = TcpStream::connect(listener.local_addr()?)?;
            let far = loop {
                let (far, peer) = listener.accept()?;
                // Anyone may connect to a loopback port: only our own connection counts.
                if peer == near.local_addr()? {
                    break far;
                }
            };
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            links[low][high] = Some(Box::new(near));
            links[high][low] = Some(Box::new(far));
        }
        let group = |(rank, links)| Group { rank, world, links: Links::Sockets(links) };
        Ok(links.into_iter().enumerate().map(group).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_ranks_reach_each_other_and_nobody_else() {
        let mut groups = Group::local(3).unwrap();
        let socket = |groups: &mut Vec<Group>, from: usize, to: usize| match &mut groups[from].links {
            Links::Sockets(links) => links[to].take(),
            other => panic!("{other:?}"),
        };
        for (rank, group) in groups.iter().enumerate() {
            assert_eq!((group.rank, group.world), (rank, 3));
        }
        for (from, to) in [(0, 1), (0, 2), (1, 2)] {
            let mut near = socket(&mut groups, from, to).unwrap();
            let mut far = socket(&mut groups, to, from).unwrap();
            near.write_all(&[from as u8, to as u8]).unwrap();
            let mut got = [0; 2];
            far.read_exact(&mut got).unwrap();
            assert_eq!(got, [from as u8, to as u8]);
        }
        assert!((0..3).all(|rank| socket(&mut groups, rank, rank).is_none()));
        assert!(matches!(Group::local(1).unwrap()[0].links, Links::Alone));
    }
}
