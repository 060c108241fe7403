//! A rank's life: meet the others, lead or follow until the epoch ends, meet again. Called by a node on a thread of its
//! own, after the model is loaded.

use std::net::TcpListener;
use std::time::Duration;

use backend::{Backend, BackendError};

use crate::error::EngineError;
use crate::handle::Commands;
use crate::runner::{EpochEnd, Runner};
use crate::tp::{Group, TpError, Trust, rendezvous};

/// Wait before a follower dials its leader again: from the first to the last, doubling.
const RETRY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

/// Time for the last answers of a process that is started anew.
const PARTING: Duration = Duration::from_millis(100);

/// This rank's place in its group.
#[derive(Debug)]
pub enum Place {
    /// A group of one.
    Alone,
    /// Rank 0 of several: the others dial `listener`.
    Lead {
        /// Where the group meets.
        listener: TcpListener,
        /// Number of ranks.
        world: usize,
    },
    /// Another rank of several.
    Follow {
        /// `host:port` of the leader's listener.
        leader: String,
        /// This rank, from 1.
        rank: usize,
    },
}

/// What a group agrees on before it works.
#[derive(Clone, Debug)]
pub struct Terms {
    /// How its ranks know each other.
    pub trust: Trust,
    /// Version of the program.
    pub version: String,
    /// Identity of the model: architecture, vocabulary and weights.
    pub identity: String,
    /// Epoch of the leader's first group; unlike any that an earlier process of it used, e.g. drawn.
    pub first_epoch: u64,
    /// For a backend with a fabric of its own.
    pub native: Option<Native>,
}

/// A backend's own fabric between its ranks.
#[derive(Clone, Debug)]
pub struct Native {
    /// What this rank's backend tells those of the others.
    pub about: String,
    /// Longest time for the fabric to come up between ranks that have met.
    pub join_max: Duration,
    /// Starts this process anew, for the given reason: such a fabric is joined once per process. Does not return.
    pub renew: fn(&str),
}

/// Runs the rank until [`crate::Engine::stop`]; a follower also, after [`crate::Engine::drain`], until its group ends.
/// Whenever the group is lost its jobs fail and the ranks meet anew, with the weights still loaded. Errors when this
/// rank's own device fails, when it cannot be part of another group without being started anew, or when the leader
/// refuses it.
pub fn serve<B: Backend>(
    runner: &mut Runner<B>,
    place: &Place,
    terms: &Terms,
    commands: &Commands,
) -> Result<(), EngineError> {
    let mut epoch = terms.first_epoch;
    let mut retry = RETRY[0];
    // A follower that is to end does not wait for another group: its leader ends, too.
    let follows = matches!(place, Place::Follow { .. });
    let stop = || commands.stopping() || (follows && commands.draining());
    while !stop() {
        let rank = if let Place::Follow { rank, .. } = place { *rank } else { 0 };
        let mut member = runner.member(rank, &terms.version, &terms.identity);
        member.native = terms.native.as_ref().map(|native| native.about.clone());
        let met = match place {
            Place::Alone => Ok(Group::alone(epoch, member.target, member.blocks)),
            Place::Lead { listener, world } => {
                rendezvous::lead(listener, &terms.trust, *world, epoch, &member, &stop)
            }
            Place::Follow { leader, .. } => rendezvous::join(leader, &terms.trust, &member, &stop),
        };
        epoch += 1;
        let mut group = match met {
            Ok(group) => group,
            Err(TpError::Stopped) => break,
            Err(error @ (TpError::Refused(_) | TpError::Proof)) => return Err(error.into()),
            Err(error) => {
                if stop() {
                    break;
                }
                tracing::warn!("rank {rank} does not meet its group yet: {error}");
                commands.wait(retry, "the group of ranks is not complete");
                retry = (retry * 2).min(RETRY[1]);
                continue;
            }
        };
        retry = RETRY[0];
        tracing::info!(
            "rank {rank} of {} in epoch {}, {} kv blocks",
            group.world(),
            group.epoch,
            group.blocks
        );
        if let Some(native) = &terms.native {
            group.watch(native.renew, native.join_max);
        }
        let ended = match place {
            Place::Follow { .. } => runner.follow(group, commands),
            Place::Alone | Place::Lead { .. } => runner.lead(group, commands),
        };
        match ended {
            EpochEnd::Stopped => break,
            EpochEnd::Lost(
                error @ (EngineError::Group(_) | EngineError::Backend(BackendError::Group { .. })),
            ) => {
                if stop() {
                    break;
                }
                tracing::warn!("the group is lost and meets anew: {error}");
                if let Some(native) = &terms.native {
                    // The jobs' ends are on their way to whoever asked for them.
                    std::thread::sleep(PARTING);
                    (native.renew)(&error.to_string());
                }
            }
            EpochEnd::Lost(error) => return Err(error),
        }
    }
    Ok(())
}
