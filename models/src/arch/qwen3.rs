//! Qwen 3, dense: every head of q and k is normalised before the rotation, no bias, heads of their own width.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3>

use crate::attention::{Attention, Default, Grouped, HeadNorm, windows_by_layer};
use crate::config::Base;
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: Some(128), kv_heads: Some(32) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "qwen3")?;
    let bias = fields.flag("attention_bias", false)?;
    let heads = Grouped {
        qk_norm: Some(HeadNorm::Head),
        qkv_bias: bias,
        o_bias: bias,
        windows: windows_by_layer(fields, base.layers)?,
        ..Grouped::read(fields, &base, DEFAULT)?
    };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Whole(heads.head_dim))?;
    let ffn = Base::ffn(fields)?;
    base.config(fields, Attention::Grouped(heads), rope, ffn)
}
