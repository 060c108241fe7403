//! Qwen 1.5, 2 and 2.5, dense: a bias on q, k and v.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2>

use crate::attention::{Attention, Default, Grouped, windows_by_layer};
use crate::config::Base;
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: Some(32) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "qwen2")?;
    let windows = windows_by_layer(fields, base.layers)?;
    let heads = Grouped { qkv_bias: true, windows, ..Grouped::read(fields, &base, DEFAULT)? };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Whole(heads.head_dim))?;
    let ffn = Base::ffn(fields)?;
    base.config(fields, Attention::Grouped(heads), rope, ffn)
}
