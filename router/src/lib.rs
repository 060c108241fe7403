//! The OpenAI-compatible gateway, and what stands behind it: text in and out, placement, dispatch.
//!
//! The router sees tokens and text, never a tensor.

pub mod api;
pub mod batch;
pub mod dispatch;
pub mod inference;
pub mod key_file;
pub mod metrics;
pub mod placement;
pub mod text;

pub use api::{GatewayConfig, Limits, ServeError, TlsFiles, serve};
