//! One epoch of a group as one of its ranks holds it: links to the others, and what all of them agreed on.

use std::convert::Infallible;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use backend::Links;

use super::link::{Halves, Link};
use super::plan::{Notice, Plan};
use super::{Frame, wire::WireError};
use crate::handle::{Command, Commands};
use crate::request::Target;

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
    /// It left as the leader proved itself.
    #[error(
        "tensor-parallel link: left instead of proving itself: it may hold another token than this leader"
    )]
    Unproved,
    /// It talks in clear where links are encrypted.
    #[error(
        "tensor-parallel link: in clear, but links of this group are encrypted: every rank needs a certificate of the cluster and the same --rank-encryption"
    )]
    InClear,
    /// The other end is not let in by TLS.
    #[error("tensor-parallel link: TLS: {0}")]
    Tls(std::io::Error),
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
    /// See [`Group::watch`].
    watch: Option<Watch>,
    /// Whether this rank has left the epoch.
    left: Arc<AtomicBool>,
}

/// For a backend whose collectives may hang.
#[derive(Clone, Copy)]
struct Watch {
    /// Starts this process anew.
    renew: fn(&str),
    /// Longest time for the backend's own fabric to come up between ranks that have met.
    join_max: Duration,
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
            watch: None,
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
        let shut =
            sockets.iter().flatten().map(|link| link.socket().try_clone()).collect::<Result<_, _>>()?;
        let (shut, control) = (Arc::new(shut), Control::Met(control));
        Ok(Group { rank, epoch, targets, blocks, links, shut, control, watch: None, left: Arc::default() })
    }

    /// For a backend whose collectives may hang when a rank is lost: a rank that has not left the epoch [`WEDGED_AFTER`] a
    /// loss, or whose fabric is not there `join_max` after the ranks have met, is started anew by `renew`, from another
    /// thread.
    pub(crate) fn watch(&mut self, renew: fn(&str), join_max: Duration) {
        self.watch = Some(Watch { renew, join_max });
    }

    /// Watches over the backend's own fabric coming up, until the guard is dropped.
    pub(crate) fn joining(&self) -> Option<Joining> {
        let Watch { renew, join_max } = self.watch.filter(|_| self.is_native())?;
        let (joined, ended) = mpsc::channel();
        // The guard sends nothing; it is gone when the fabric is there.
        let is_there = move || ended.recv_timeout(join_max) != Err(RecvTimeoutError::Timeout);
        let reason = format!("the ranks' fabric did not come up in {} s", join_max.as_secs_f32());
        Some(Joining { watching: watch_over(renew, is_there, reason), _joined: joined })
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
            let (watch, left) = (self.watch, self.left.clone());
            running.push(Link::start(halves, move |frame| {
                if let Err(error) = &frame {
                    close_all(&shut);
                    if let Some(Watch { renew, .. }) = watch {
                        let reason = format!("rank {rank} lost: {error}");
                        tracing::warn!("{reason}");
                        let left = left.clone();
                        let has_left = move || {
                            std::thread::sleep(WEDGED_AFTER);
                            left.load(Ordering::Acquire)
                        };
                        watch_over(renew, has_left, format!("{reason}; the device hangs"));
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
pub(crate) struct Joining {
    _joined: mpsc::Sender<Infallible>,
    /// Ends with the guard.
    #[cfg_attr(not(test), expect(dead_code, reason = "waited for in tests"))]
    watching: Option<JoinHandle<()>>,
}

/// Starts this rank anew for `reason` unless `is_well`, which waits as long as it may take, says that it needs not.
fn watch_over(
    renew: fn(&str),
    is_well: impl FnOnce() -> bool + Send + 'static,
    reason: String,
) -> Option<JoinHandle<()>> {
    let watch = move || {
        if !is_well() {
            renew(&reason);
        }
    };
    // Without a thread nothing watches; the runner ends by itself unless the device hangs.
    let started = std::thread::Builder::new().name("tp-watch".into()).spawn(watch);
    started.inspect_err(|error| tracing::error!("nothing watches over a lost group: {error}")).ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use backend::{DType, KvSpec};
    use std::sync::Mutex;

    /// A group of two whose fabric has not come up yet.
    fn native(renew: fn(&str), join_max: Duration) -> Group {
        let spec = KvSpec::gqa(1, 1, 0..1, 8, DType::F32);
        let target = |rank| Target { rank, addresses: Vec::new(), spec: spec.clone() };
        let links = Links::Native("10.0.0.1:1\t\n10.0.0.2:1\t\n".into());
        let mut group = Group::met(0, 1, vec![target(0), target(1)], 4, links, Vec::new()).unwrap();
        group.watch(renew, join_max);
        group
    }

    #[test]
    fn a_fabric_that_does_not_come_up_starts_the_rank_anew() {
        static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let group = native(|reason| SAID.lock().unwrap().push(reason.into()), Duration::from_millis(20));
        let mut joining = group.joining().expect("a watch");
        joining.watching.take().unwrap().join().unwrap();
        assert_eq!(*SAID.lock().unwrap(), ["the ranks' fabric did not come up in 0.02 s"]);
    }

    #[test]
    fn a_fabric_that_is_there_is_watched_no_more() {
        let group = native(|reason| panic!("started anew: {reason}"), Duration::from_secs(3600));
        let mut joining = group.joining().expect("a watch");
        let watching = joining.watching.take().unwrap();
        drop(joining);
        watching.join().unwrap();
    }

    #[test]
    fn sockets_are_not_watched() {
        let spec = KvSpec::gqa(1, 1, 0..1, 8, DType::F32);
        let target = Target { rank: 0, addresses: Vec::new(), spec };
        let mut group = Group::alone(1, target, 4);
        group.watch(|_| (), Duration::from_secs(1));
        assert!(group.joining().is_none());
    }
}
