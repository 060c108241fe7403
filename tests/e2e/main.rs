//! End to end: the real executable in real processes. Each module protects one promise of the README.

mod batch;
mod chat;
mod client;
mod drafts;
mod errors;
mod families;
mod faults;
mod forms;
mod gguf;
mod harness;
mod hub;
mod joining;
mod keys;
mod parity;
mod parts;
mod priority;
mod rolling;
mod routers;
mod scores;
mod settings;
mod traces;
mod trust;
mod up;
