//! The OpenAI-compatible gateway, and what stands behind it: text in and out, placement, dispatch.
//!
//! The router sees tokens and text, never a tensor.

pub mod inference;
pub mod text;
