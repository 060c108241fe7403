//! DeepSeek V3 and R1, and Kimi K2, which is the same graph with other numbers: multi-head latent attention, experts
//! chosen by groups, the first layers dense. Layers beyond `num_hidden_layers` predict further tokens and are skipped.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/deepseek_v3>

use backend::RopeStyle;

use crate::attention::{Attention, Latent};
use crate::config::{Base, opt_head_dim};
use crate::experts::Experts;
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    family(fields, "deepseek_v3")
}

/// Reads the configuration of a family with this graph.
pub(super) fn family(fields: &mut Fields, model_type: &'static str) -> Result<Config, ModelError> {
    let base = Base::read(fields, model_type)?;
    let nope_dim = fields.size("qk_nope_head_dim")?;
    let Some(rope_dim) = opt_head_dim(fields, "qk_rope_head_dim")? else {
        return Err(fields.error("qk_rope_head_dim", "missing"));
    };
    // Numbers that say the same again, in files written by newer libraries.
    let same =
        [("num_key_value_heads", base.heads), ("head_dim", rope_dim), ("qk_head_dim", nope_dim + rope_dim)];
    for (field, want) in same {
        match fields.opt_size(field)? {
            Some(got) if got != want => {
                return Err(fields.error(field, format!("{got} is not supported beside {want}")));
            }
            _ => {}
        }
    }
    let mut rope = RopeConfig::read(fields, base.positions, Rotary::Whole(rope_dim))?;
    if fields.opt_flag("rope_interleave")?.unwrap_or(true) {
        rope.style = RopeStyle::Interleaved;
    }
    let q_rank = fields.opt_size("q_lora_rank")?;
    let attention = Attention::Latent(Latent {
        q_rank: q_rank.filter(|rank| *rank > 0),
        latent_dim: fields.size("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: fields.size("v_head_dim")?,
        bias: fields.flag("attention_bias", false)?,
        scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * rope.score_factor()) as f32,
    });
    let experts = Experts::deepseek(fields, base.layers)?;
    let ffn = Base::ffn(fields)?;
    Ok(Config { experts: Some(experts), ..base.config(fields, attention, rope, ffn)? })
}
