//! Where a tensor that has a Hugging Face name lies in a GGUF file. Source: gguf-py's `tensor_mapping.py`.

use crate::{Gguf, GgufError};

/// A tensor, or one matrix of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name in the GGUF file.
    pub tensor: String,
    /// Which matrix of a stack of experts; `None`: all of the tensor.
    pub expert: Option<usize>,
}

/// Parts of a layer in both words; `.weight` and `.bias` follow.
const PARTS: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    // kv_b_proj in two stacks of one matrix per head, as MLX names them: [heads, kv_lora_rank, qk_nope_head_dim], turned
    // over, and [heads, v_head_dim, kv_lora_rank].
    ("self_attn.embed_q", "attn_k_b"),
    ("self_attn.unembed_out", "attn_v_b"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.router", "ffn_gate_inp"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
];

/// Projections of an expert in both words.
const EXPERTS: &[(&str, &str)] = &[
    ("gate_proj", "ffn_gate_exps"),
    ("up_proj", "ffn_up_exps"),
    ("down_proj", "ffn_down_exps"),
    ("w1", "ffn_gate_exps"),
    ("w3", "ffn_up_exps"),
    ("w2", "ffn_down_exps"),
];

/// Biases of routers; Hugging Face has them outside of any linear.
const ROUTER_BIASES: [&str; 2] =
    ["mlp.gate.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"];

/// Where the tensor that Hugging Face calls `name` lies in a file of `architecture`; `None` for a name that no family has.
/// `model.layers.3.mlp.experts.7.up_proj.weight` is matrix 7 of `blk.3.ffn_up_exps.weight`.
pub fn place(architecture: &str, name: &str) -> Option<Place> {
    let whole = |tensor: String| Some(Place { tensor, expert: None });
    match name {
        "model.embed_tokens.weight" => return whole("token_embd.weight".into()),
        "model.norm.weight" => return whole("output_norm.weight".into()),
        "lm_head.weight" => return whole("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    if ROUTER_BIASES.contains(&rest) {
        return whole(format!("blk.{layer}.exp_probs_b.bias"));
    }
    if rest == "self_attn.sinks" {
        return whole(format!("blk.{layer}.attn_sinks.weight"));
    }
    let (part, kind) = rest.rsplit_once('.')?;
    if kind != "weight" && kind != "bias" {
        return None;
    }
    let expert =
        ["mlp.experts.", "block_sparse_moe.experts."].iter().find_map(|head| part.strip_prefix(head));
    if let Some(expert) = expert {
        let (expert, projection) = expert.split_once('.')?;
        let (_, stack) = EXPERTS.iter().find(|(hf, _)| *hf == projection)?;
        return Some(Place {
            tensor: format!("blk.{layer}.{stack}.{kind}"),
            expert: Some(expert.parse().ok()?),
        });
    }
    let (hf, own) = PARTS.iter().find(|(hf, _)| *hf == part)?;
    let own = match *hf {
        "post_attention_layernorm" if ["glm4moe", "gpt-oss"].contains(&architecture) => "post_attention_norm",
        _ => own,
    };
    whole(format!("blk.{layer}.{own}.{kind}"))
}

/// Whether a model of `layers` layers does without the tensor `name` of its file: tables that are computed, a stored copy of
/// a tied head, and layers behind the last, which predict further tokens.
pub fn unused(name: &str, layers: usize, tied: bool) -> bool {
    if name == "rope_freqs.weight"
        || name.ends_with(".attn_rot_embd.weight")
        || tied && name == "output.weight"
    {
        return true;
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    layer.and_then(|(layer, _)| layer.parse::<usize>().ok()).is_some_and(|layer| layer >= layers)
}

/// Whether the rows of each head of q and k (weights and biases) are in pairs `(2 i, 2 i + 1)` that rotate together, where
/// Hugging Face's have `(i, i + n)`: files of the architecture `llama` are written so.
pub fn rope_interleaved(gguf: &Gguf) -> Result<bool, GgufError> {
    Ok(gguf.architecture()? == "llama")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_families() {
        let of = |architecture: &str, name: &str| {
            place(architecture, name).map(|place| match place.expert {
                Some(expert) => format!("{}[{expert}]", place.tensor),
                None => place.tensor,
            })
        };
        let pairs = [
            ("llama", "model.embed_tokens.weight", "token_embd.weight"),
            ("llama", "lm_head.weight", "output.weight"),
            ("llama", "model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
            ("qwen2", "model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
            ("qwen3", "model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight"),
            ("qwen3", "model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("glm4moe", "model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
            ("gpt-oss", "model.layers.0.self_attn.sinks", "blk.0.attn_sinks.weight"),
            ("gpt-oss", "model.layers.1.mlp.router.bias", "blk.1.ffn_gate_inp.bias"),
            ("gpt-oss", "model.layers.1.mlp.experts.2.down_proj.bias", "blk.1.ffn_down_exps.bias[2]"),
            ("qwen3moe", "model.layers.1.mlp.gate.weight", "blk.1.ffn_gate_inp.weight"),
            ("qwen3moe", "model.layers.1.mlp.experts.12.down_proj.weight", "blk.1.ffn_down_exps.weight[12]"),
            (
                "minimax-m2",
                "model.layers.1.block_sparse_moe.experts.0.w3.weight",
                "blk.1.ffn_up_exps.weight[0]",
            ),
            (
                "minimax-m2",
                "model.layers.1.block_sparse_moe.e_score_correction_bias",
                "blk.1.exp_probs_b.bias",
            ),
            ("deepseek2", "model.layers.9.mlp.gate.e_score_correction_bias", "blk.9.exp_probs_b.bias"),
            ("deepseek2", "model.layers.9.mlp.shared_experts.up_proj.weight", "blk.9.ffn_up_shexp.weight"),
            ("deepseek2", "model.layers.9.self_attn.kv_a_proj_with_mqa.weight", "blk.9.attn_kv_a_mqa.weight"),
            ("deepseek2", "model.layers.9.self_attn.embed_q.weight", "blk.9.attn_k_b.weight"),
        ];
        for (architecture, hf, own) in pairs {
            assert_eq!(of(architecture, hf).as_deref(), Some(own), "{architecture} {hf}");
        }
        for name in
            ["model.layers.x.mlp.gate.weight", "model.layers.1.mlp.gate.scales", "model.layers.1", "x"]
        {
            assert_eq!(of("llama", name), None, "{name}");
        }
    }

    #[test]
    fn layers_behind_the_last_and_tables_are_not_used() {
        let yes = [
            "rope_freqs.weight",
            "blk.2.attn_q.weight",
            "blk.0.attn_rot_embd.weight",
            "blk.2.nextn.enorm.weight",
        ];
        assert!(yes.iter().all(|name| unused(name, 2, false)));
        assert!(!["blk.1.attn_q.weight", "output.weight", "other"].iter().any(|name| unused(name, 2, false)));
        assert!(unused("output.weight", 2, true));
    }
}
