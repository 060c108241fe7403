//! End to end: the real executable in real processes. Each module protects one promise of the README.

mod harness;
mod settings;
mod up;
