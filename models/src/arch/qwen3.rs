//! Qwen 3, dense: every head of q and k is normalised before the rotation, no bias, heads of their own width.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3>

use crate::config::{self, Default};
use crate::fields::Fields;
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: Some(128), kv_heads: Some(32) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let bias = fields.flag("attention_bias", false)?;
    let config = Config::dense(fields, "qwen3", DEFAULT)?;
    Ok(Config {
        qk_norm: true,
        qkv_bias: bias,
        o_bias: bias,
        windows: config::windows_by_layer(fields, config.layers)?,
        ..config
    })
}
