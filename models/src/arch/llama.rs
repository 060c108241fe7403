//! Llama 1 to 3.3 and what is built like them (SmolLM, TinyLlama, Yi).
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama>

use crate::config::Default;
use crate::fields::Fields;
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: None };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let attention_bias = fields.flag("attention_bias", false)?;
    Ok(Config {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: fields.flag("mlp_bias", false)?,
        ..Config::dense(fields, "llama", DEFAULT)?
    })
}
