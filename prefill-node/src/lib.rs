//! The prefill role: policy over the engine for prompts.
