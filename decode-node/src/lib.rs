//! The decode role: policy over the engine for generation.
