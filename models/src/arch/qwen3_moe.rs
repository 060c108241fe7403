//! Qwen 3 with experts (30B-A3B, 235B-A22B, Coder): the attention of Qwen 3, softmax routing, no shared expert.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_moe>

use backend::{Glu, Routing, Score};

use crate::attention::{Attention, Default, Grouped, HeadNorm, window};
use crate::config::Base;
use crate::experts::{ExpertNames, Experts, chosen};
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: None, kv_heads: Some(4) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "qwen3_moe")?;
    let bias = fields.flag("attention_bias", false)?;
    // All layers slide, or none: unlike the dense models, this family does not look at max_window_layers.
    let slides = fields.flag("use_sliding_window", false)?;
    let windows = vec![window(fields)?.filter(|_| slides); base.layers];
    fields.harmless(&["max_window_layers"]);
    let heads = Grouped {
        qk_norm: Some(HeadNorm::Head),
        qkv_bias: bias,
        o_bias: bias,
        windows,
        ..Grouped::read(fields, &base, DEFAULT)?
    };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Whole(heads.head_dim))?;
    let experts = experts(fields, base.layers)?;
    let ffn = Base::ffn(fields)?;
    Ok(Config { experts: Some(experts), ..base.config(fields, Attention::Grouped(heads), rope, ffn)? })
}

fn experts(fields: &mut Fields, layers: usize) -> Result<Experts, ModelError> {
    let (experts, top_k) = chosen(fields, ["num_experts", "num_local_experts"], layers)?;
    let every = fields.opt_size("decoder_sparse_step")?.unwrap_or(1);
    if every == 0 {
        return Err(fields.error("decoder_sparse_step", "0 is not a number of layers"));
    }
    let dense = fields.sizes("mlp_only_layers")?;
    Ok(Experts {
        routing: Routing {
            experts,
            top_k,
            score: Score::Softmax,
            groups: None,
            normalise: fields.flag("norm_topk_prob", false)?,
            normalise_eps: 0.0,
            scale: 1.0,
        },
        width: fields.size("moe_intermediate_size")?,
        shared_width: 0,
        choice_bias: false,
        biases: false,
        glu: Glu::Silu,
        layers: (0..layers)
            .map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(every))
            .collect(),
        names: ExpertNames::Mlp,
    })
}
