//! MiniMax M2: norms of q and k over the whole projection, partly rotated heads, sigmoid routing with a bias for the
//! choice, experts in every layer. Its modules that predict further tokens are not used.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/minimax_m2>

use backend::{Glu, Routing, Score};

use crate::attention::{Attention, Default, Grouped, HeadNorm};
use crate::config::Base;
use crate::experts::{ExpertNames, Experts, chosen};
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: Some(128), kv_heads: Some(8) };

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "minimax_m2")?;
    fields.one_of("qk_norm_type", &["per_layer"])?;
    let normed = fields.flag("use_qk_norm", true)?;
    let heads =
        Grouped { qk_norm: normed.then_some(HeadNorm::Projection), ..Grouped::read(fields, &base, DEFAULT)? };
    // 1 is full attention; the family's elder sister had others.
    let kinds = fields.value("attn_type_list").cloned();
    if let Some(kinds) = kinds.filter(|kinds| !kinds.as_array().is_some_and(|all| all.iter().all(|k| k == 1)))
    {
        return Err(fields.error("attn_type_list", format!("{kinds} is not supported (known: 1)")));
    }
    let rope = RopeConfig::read(fields, base.positions, Rotary::Part(heads.head_dim, 1.0))?;
    let experts = experts(fields, base.layers)?;
    fields.harmless(&["mtp_transformer_layers", "num_mtp_modules", "use_mtp"]);
    // Of a shared expert, which is there only with a shared_intermediate_size, and of dense layers.
    fields.harmless(&["shared_moe_mode", "mlp_intermediate_size"]);
    Ok(Config { experts: Some(experts), ..base.config(fields, Attention::Grouped(heads), rope, 0)? })
}

fn experts(fields: &mut Fields, layers: usize) -> Result<Experts, ModelError> {
    fields.one_of("scoring_func", &["sigmoid"])?;
    let (experts, top_k) = chosen(fields, ["num_local_experts", "num_experts"], layers)?;
    Ok(Experts {
        routing: Routing {
            experts,
            top_k,
            score: Score::Sigmoid,
            groups: None,
            normalise: true,
            normalise_eps: 0.0,
            scale: 1.0,
        },
        width: fields.size("intermediate_size")?,
        shared_width: 0,
        choice_bias: fields.flag("use_routing_bias", true)?,
        biases: false,
        glu: Glu::Silu,
        layers: vec![true; layers],
        names: ExpertNames::BlockSparse,
    })
}
