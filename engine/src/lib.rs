//! What prefill and decode nodes share: requests, prefix cache, sampler, token-budget scheduler, the runner (one thread
//! owns model and KV), tensor-parallel leader and followers, and the glue to [`kvtransfer`].
//!
//! A node makes an [`engine`] handle for its services and a [`Runner`] for a thread of its own; [`Engine::submit`] takes
//! a [`Job`], [`Events`] tells how it goes.

mod draft;
mod error;
mod executor;
mod handle;
mod leader;
mod ledger;
mod options;
mod prefix;
mod rates;
mod request;
mod runner;
pub mod sampler;
mod scheduler;
pub mod score;
mod sequence;
mod serve;
pub mod tp;
mod transfer;

pub use draft::model::DraftModel;
pub use error::EngineError;
pub use handle::{Commands, Engine, Events, engine};
pub use options::EngineOptions;
pub use request::{
    Blocks, Counters, Event, Finish, Handoff, Job, JobError, Refusal, Report, Request, Sampling, Target,
    Token,
};
pub use runner::{EpochEnd, Runner};
pub use score::Score;
pub use serve::{Native, Place, Terms, serve};
