//! The KV wire, both ends: a prefill rank pushes the cache of a prompt, layer by layer, to the decode ranks.
//!
//! [`Receiver`] (one per decode rank process) expects sessions and lands their bytes; [`Sender`] (one per prefill rank
//! process) opens them. Both know bytes and [`backend::KvSpec`] only.

pub mod codec;
pub mod coverage;
pub mod crc;
pub mod error;
pub mod estimate;
pub mod frame;
pub mod id;
pub mod interface;
pub mod layout;
pub mod limits;
pub mod message;
pub mod meter;
pub mod pace;
pub mod proof;
pub mod receiver;
pub mod sender;
pub mod session;
pub mod transport;
pub mod turned;
pub mod wire;

mod spin;
mod sync;

pub use codec::{Codec, CodecPolicy};
pub use error::{FailCode, SessionError};
pub use id::{SessionId, Ticket};
pub use layout::PlanError;
pub use limits::Limits;
pub use receiver::{Expect, Landed, Peers, Receiver, Refused, Summary};
pub use sender::{LinkStat, Push, PushSpec, Pushed, Sender, TargetSpec};
pub use transport::ucx::Ways;
pub use turned::{OnTurned, Turned};

/// How the prompt's computation ended: travels with the end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Close {
    /// The first sampled token.
    pub token: u32,
    /// Why it ends the answer, in the engine's numbers; 0: it does not.
    pub finish: u8,
}
