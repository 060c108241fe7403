//! The OpenAI-compatible gateway.
