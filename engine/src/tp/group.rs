//! One epoch of a group as one of its ranks holds it: links to the others, and what all of them agreed on.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use backend::Links;

use super::link::{Halves, Link};
use super::plan::{Notice, Plan};
use super::{Frame, wire::WireError};
use crate::handle::{Command, Commands};
use crate::request::Target;

/// Longest time for a backend's own fabric to come up between ranks that have met.
const JOIN_MAX: Duration = Duration::from_secs(20);

/// Time for a rank to leave an epoch that another rank has left.
const WEDGED_AFTER: Duration = Duration::from_secs(1);

/// Why a group cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum TpError {
    /// A rank failed or cannot be reached any more.
    #[error("rank {rank} lost: {reason}")]
    Lost {
        /// Which.
        rank: usize,
        /// What happened.
        reason: String,
    },
    /// The leader does not take this rank; trying again would not help.
    #[error("refused by the leader: {0}")]
    Refused(String),
    /// The other end does not hold the cluster's secret.
    #[error("tensor-parallel link: the other end does not hold the cluster's token")]
    Proof,
    /// Nothing came.
    #[error("silent for {ms} ms")]
    Silent {
        /// For so long.
        ms: u64,
    },
    /// The other end is gone.
    #[error("the link was closed")]
    Closed,
    /// Something came that must not.
    #[error("tensor-parallel link: {0}")]
    Protocol(String),
    /// The system.
    #[error("tensor-parallel link: {0}")]
    Io(#[from] std::io::Error),
    /// Bytes that are not what they should be.
    #[error("tensor-parallel link: {0}")]
    Wire(#[from] WireError),
    /// [`crate::Engine::stop`] was called.
    #[error("stopped")]
    Stopped,
}

/// One epoch of a group.
pub struct Group {
    /// This rank; 0 leads.
    pub rank: usize,
    /// Changes whenever the ranks meet anew.
    pub epoch: u64,
    /// Every rank's cache and KV addresses, in order of rank.
    pub targets: Vec<Target>,
    /// Blocks that every rank's store has.
    pub blocks: u32,
    /// For the backend's collectives; taken by [`Group::collective`].
    links: Links,
    /// The same sockets, to be shut when a rank is lost: a collective that waits for it ends then.
    shut: Arc<Vec<TcpStream>>,
    control: Control,
    /// Starts this process anew, see [`Group::watch`].
    renew: Option<fn(&str)>,
    /// Whether this rank has left the epoch.
    left: Arc<AtomicBool>,
}

/// Links to the other ranks: all of them on the leader, the leader's on a follower.
enum Control {
    Met(Vec<(usize, Halves)>),
    Running(Vec<Link>),
}

impl Group {
    /// A group of one rank.
    pub fn alone(epoch: u64, target: Target, blocks: u32) -> Self {
        let control = Control::Met(Vec::new());
        Group {
            rank: 0,
            epoch,
            targets: vec![target],
            blocks,
            links: Links::Alone,
            shut: Arc::default(),
            control,
            renew: None,
            left: Arc::default(),
        }
    }

    pub(super) fn met(
        rank: usize,
        epoch: u64,
        targets: Vec<Target>,
        blocks: u32,
        links: Links,
        control: Vec<(usize, Halves)>,
    ) -> Result<Self, TpError> {
        let sockets = if let Links::Sockets(sockets) = &links { sockets.as_slice() } else { &[] };
        let shut = sockets.iter().flatten().map(TcpStream::try_clone).collect::<Result<_, _>>()?;
        let (shut, control) = (Arc::new(shut), Control::Met(control));
        Ok(Group { rank, epoch, targets, blocks, links, shut, control, renew: None, left: Arc::default() })
    }

    /// For a backend whose collectives may hang when a rank is lost: a rank that has not left the epoch [`WEDGED_AFTER`] a
    /// loss is started anew by `renew`, from another thread.
    pub(crate) fn watch(&mut self, renew: fn(&str)) {
        self.renew = Some(renew);
    }

    /// Watches over the backend's own fabric coming up, until the guard is dropped: a rank that still waits for the others
    /// after [`JOIN_MAX`] is started anew.
    pub(crate) fn joining(&self) -> Option<Joining> {
        let renew = self.renew.filter(|_| self.is_native())?;
        let joined = Arc::new(AtomicBool::new(false));
        let reason = format!("the ranks' fabric did not come up in {} s", JOIN_MAX.as_secs());
        watch_over(renew, joined.clone(), JOIN_MAX, reason);
        Some(Joining(joined))
    }

    /// Whether the backend has a fabric of its own, which waits for the other ranks by itself.
    pub(crate) fn is_native(&self) -> bool {
        matches!(self.links, Links::Native(_))
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.targets.len()
    }

    /// The group as its backend needs it; `None` for one rank.
    pub(crate) fn collective(&mut self) -> Option<backend::Group> {
        let links = std::mem::replace(&mut self.links, Links::Alone);
        (self.world() > 1).then(|| backend::Group { rank: self.rank, world: self.world(), links })
    }

    /// Lets the links run: frames of other ranks arrive as commands from now on.
    pub(crate) fn run(&mut self, commands: &Commands) -> Result<(), TpError> {
        let Control::Met(links) = &mut self.control else { return Ok(()) };
        let mut running = Vec::new();
        for (rank, halves) in std::mem::take(links) {
            let (epoch, sender, shut) = (self.epoch, commands.sender(), self.shut.clone());
            let (renew, left) = (self.renew, self.left.clone());
            running.push(Link::start(halves, move |frame| {
                if let Err(error) = &frame {
                    close_all(&shut);
                    if let Some(renew) = renew {
                        let reason = format!("rank {rank} lost: {error}");
                        tracing::warn!("{reason}");
                        watch_over(renew, left.clone(), WEDGED_AFTER, format!("{reason}; the device hangs"));
                    }
                }
                // A runner that has ended needs no frames.
                let _ = sender.send(Command::Frame { epoch, rank, frame });
            })?);
        }
        self.control = Control::Running(running);
        Ok(())
    }

    /// Tells the followers what to do.
    pub(crate) fn tell(&self, plan: &Plan) -> Result<(), TpError> {
        let Control::Running(links) = &self.control else { return Ok(()) };
        if links.is_empty() {
            return Ok(());
        }
        let frame = Frame::Plan(plan.encode());
        for (index, link) in links.iter().enumerate() {
            link.send(&frame)
                .map_err(|error| TpError::Lost { rank: index + 1, reason: error.to_string() })?;
        }
        Ok(())
    }

    /// Tells the leader, from any thread.
    pub(crate) fn answer(&self) -> impl Fn(Notice) + Send + Sync + 'static {
        let link = match &self.control {
            Control::Running(links) => links.first().map(Link::sender),
            Control::Met(_) => None,
        };
        move |notice: Notice| {
            // A leader that is lost is told nothing; the link's reader says that it is lost.
            let _ = link.as_ref().map(|link| link.send(&Frame::Notice(notice.encode())));
        }
    }

    /// Leaves the group, and tells the followers why if this is the leader.
    pub(crate) fn end(&mut self, reason: &str) {
        self.left.store(true, Ordering::Release);
        if let Control::Running(links) = &mut self.control {
            for link in links.drain(..).filter(|_| self.rank == 0) {
                // Best effort: a follower that does not hear it sees the link closed.
                let _ = link.send(&Frame::End(reason.to_owned()));
            }
        }
        close_all(&self.shut);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end("the leader left");
    }
}

/// A fabric that is coming up.
pub(crate) struct Joining(Arc<AtomicBool>);

impl Drop for Joining {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Starts this rank anew unless it is `done` by itself after `wait`.
fn watch_over(renew: fn(&str), done: Arc<AtomicBool>, wait: Duration, reason: String) {
    let watch = move || {
        std::thread::sleep(wait);
        if !done.load(Ordering::Acquire) {
            renew(&reason);
        }
    };
    // Without a thread nothing watches; the runner ends by itself unless the device hangs.
    let started = std::thread::Builder::new().name("tp-watch".into()).spawn(watch);
    if let Err(error) = started {
        tracing::error!("nothing watches over a lost group: {error}");
    }
}

fn close_all(sockets: &[TcpStream]) {
    for socket in sockets {
        // A socket that is closed already needs no closing.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// For opening a backend before its ranks have met: links that lead nowhere, on which every collective fails until
/// [`backend::Backend::regroup`], which [`crate::Runner`] does when they have.
pub fn unmet(rank: usize, world: usize) -> std::io::Result<backend::Group> {
    Ok(backend::Group::local(world)?.swap_remove(rank))
}
