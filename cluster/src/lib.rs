//! How a process joins, reports and leaves; shared process start-up.
//!
//! Nodes use [`client`] to be members, the router uses [`service`] over the pure table in [`membership`]. Every process
//! uses [`process`], [`server`], [`channel`] and [`auth`]: nothing is served or called without the cluster token.

pub mod admission;
pub mod auth;
pub mod channel;
pub mod client;
mod doorway;
pub mod membership;
pub mod process;
pub mod refusals;
pub mod server;
pub mod service;
pub mod small_file;
pub mod traces;
pub mod trust;

pub use admission::Refusal;
pub use auth::{ClusterToken, TokenError, require_loopback_or_insecure};
pub use channel::{NodeChannel, connect_lazy};
pub use client::{JoinError, JoinEvent, follow_revocations, join, join_all};
pub use membership::{Member, Membership, MembershipConfig};
pub use refusals::{Door, Refusals};
pub use service::{ClusterService, Members, Snapshot};
/// Cancelled when the process is to stop. From [`process::shutdown_on_signals`], or made by a test.
pub use tokio_util::sync::CancellationToken as Shutdown;
pub use trust::{Authority, EnrollError, Enrolment, JoinToken, Tokens, enroll};
