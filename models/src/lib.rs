//! Model architectures over a backend.
