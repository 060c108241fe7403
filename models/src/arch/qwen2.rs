//! Qwen 1.5, 2 and 2.5, dense: a bias on q, k and v.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2>

use crate::config::{self, Default};
use crate::fields::Fields;
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: Some(32) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let config = Config::dense(fields, "qwen2", DEFAULT)?;
    Ok(Config { qkv_bias: true, windows: config::windows_by_layer(fields, config.layers)?, ..config })
}
