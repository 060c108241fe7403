//! Mistral 7B and its successors with one window for all layers, or none.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/mistral>

use crate::attention::{Attention, Default, Grouped, window};
use crate::config::Base;
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: Some(8) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "mistral")?;
    let windows = vec![window(fields)?; base.layers];
    let heads = Grouped { windows, ..Grouped::read(fields, &base, DEFAULT)? };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Whole(heads.head_dim))?;
    let ffn = Base::ffn(fields)?;
    base.config(fields, Attention::Grouped(heads), rope, ffn)
}
