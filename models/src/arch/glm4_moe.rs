//! GLM 4.5 to 4.7, with experts: half-rotated heads, a bias on q, k and v, routing and shared expert as DeepSeek V3.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/glm4_moe>

use crate::attention::{Attention, Default, Grouped, HeadNorm};
use crate::config::Base;
use crate::experts::Experts;
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: Some(8) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "glm4_moe")?;
    let normed = fields.flag("use_qk_norm", false)?;
    let heads = Grouped {
        qk_norm: normed.then_some(HeadNorm::Head),
        qkv_bias: fields.flag("attention_bias", false)?,
        ..Grouped::read(fields, &base, DEFAULT)?
    };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Part(heads.head_dim, 0.5))?;
    let experts = Experts::deepseek(fields, base.layers)?;
    let ffn = Base::ffn(fields)?;
    Ok(Config { experts: Some(experts), ..base.config(fields, Attention::Grouped(heads), rope, ffn)? })
}
