//! Llama 1 to 3.3 and what is built like them (SmolLM, TinyLlama, Yi).
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama>

use crate::attention::{Attention, Default, Grouped};
use crate::config::Base;
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: None };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "llama")?;
    let bias = fields.flag("attention_bias", false)?;
    let heads = Grouped { qkv_bias: bias, o_bias: bias, ..Grouped::read(fields, &base, DEFAULT)? };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Whole(heads.head_dim))?;
    let (ffn, mlp_bias) = (Base::ffn(fields)?, fields.flag("mlp_bias", false)?);
    Ok(Config { mlp_bias, ..base.config(fields, Attention::Grouped(heads), rope, ffn)? })
}
