//! gpt-oss (20b, 120b): a sink for every query head, every other layer slides, softmax routing, experts with biases and a
//! clamped gate.
//! Source: <https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_oss>

use backend::{Glu, Routing, Score};

use crate::attention::{Attention, Default, Grouped, by_type, window_or};
use crate::config::Base;
use crate::experts::{ExpertNames, Experts, chosen};
use crate::fields::Fields;
use crate::rope::{RopeConfig, Rotary};
use crate::{Config, ModelError};

const DEFAULT: Default = Default { head_dim: Some(64), kv_heads: Some(8) };
const WINDOW: u32 = 128;
const LIMIT: f64 = 7.0;
const SLOPE: f64 = 1.702;

/// Reads the configuration.
pub(super) fn read(fields: &mut Fields) -> Result<Config, ModelError> {
    let base = Base::read(fields, "gpt_oss")?;
    let bias = fields.flag("attention_bias", true)?;
    let window = window_or(fields, WINDOW)?;
    let windows = by_type(fields, window, base.layers, |layer| layer % 2 == 0)?;
    let heads = Grouped {
        qkv_bias: bias,
        o_bias: bias,
        windows,
        sinks: true,
        ..Grouped::read(fields, &base, DEFAULT)?
    };
    let rope = RopeConfig::read(fields, base.positions, Rotary::Whole(heads.head_dim))?;
    let experts = experts(fields, base.layers)?;
    // The context before it was stretched, which rope_scaling says too.
    fields.harmless(&["initial_context_length"]);
    Ok(Config { experts: Some(experts), ..base.config(fields, Attention::Grouped(heads), rope, 0)? })
}

fn experts(fields: &mut Fields, layers: usize) -> Result<Experts, ModelError> {
    let (experts, top_k) = chosen(fields, ["num_local_experts", "num_experts"], layers)?;
    if let Some(again) = fields.opt_size("experts_per_token")?.filter(|again| *again != top_k) {
        let reason = format!("{again}, but num_experts_per_tok is {top_k}");
        return Err(fields.error("experts_per_token", reason));
    }
    let limit = fields.opt_positive("swiglu_limit")?.unwrap_or(LIMIT) as f32;
    let slope = fields.opt_positive("swiglu_alpha")?.unwrap_or(SLOPE) as f32;
    Ok(Experts {
        // A softmax over the chosen ones is what normalised weights of a softmax over all are.
        routing: Routing {
            experts,
            top_k,
            score: Score::Softmax,
            groups: None,
            normalise: true,
            normalise_eps: 0.0,
            scale: 1.0,
        },
        width: fields.size("intermediate_size")?,
        shared_width: 0,
        choice_bias: false,
        biases: true,
        glu: Glu::Clamped { limit, slope },
        layers: vec![true; layers],
        names: ExpertNames::Together,
    })
}
