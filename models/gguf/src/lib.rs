//! GGUF files: a checked reader ([`Gguf`], [`Header`]), and what such a file is in Hugging Face's words: its
//! [`config_json`], and the [`place`] of each of its tensors. Called by `models` for weights and numbers, by `vocab` for
//! the vocabulary and by the router for tokenizer and template. Knows no device and no math.
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

mod config;
mod cursor;
mod error;
mod file;
mod header;
mod keys;
mod lfs;
mod metadata;
mod names;
mod rope;
mod types;

pub use config::{config_json, end_ids};
pub use error::GgufError;
pub use file::{Gguf, Tensor, find};
pub use header::{Fault, Header, TensorInfo};
pub use lfs::{LFS_POINTER, is_lfs_pointer};
pub use metadata::{List, Metadata, Value};
pub use names::{Place, place, rope_interleaved, unused};
pub use types::Type;
