//! Mistral 7B and its successors with one window for all layers, or none.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/mistral>

use crate::config::{self, Default};
use crate::fields::Fields;
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: Some(8) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let config = Config::dense(fields, "mistral", DEFAULT)?;
    Ok(Config { windows: vec![config::window(fields)?; config.layers], ..config })
}
