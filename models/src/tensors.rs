//! The tensors of an architecture by their names in Hugging Face checkpoints, with shapes: what a checkpoint is checked
//! against before anything is loaded, and what a dummy one is made of.

use crate::Config;

/// One tensor that the architecture has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// `[out, in]`, or `[dim]` of a norm or bias.
    pub shape: Vec<usize>,
    /// What it does.
    pub role: Role,
}

/// What a tensor does; tells a dummy checkpoint its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Matrix of a product, or an embedding table.
    Matrix,
    /// Scale of a norm.
    Norm,
    /// Bias of a product.
    Bias,
}

/// Names of the weights outside the layers.
pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Name of `part` (`self_attn.q_proj.weight`) in `layer`.
pub(crate) fn in_layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// All tensors of the model, in the order of computation.
pub fn tensors(config: &Config) -> Vec<TensorSpec> {
    let c = config;
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let mut list = vec![spec(EMBED.into(), &[c.vocab_size, c.hidden], Role::Matrix)];
    for layer in 0..c.layers {
        let mut add = |part: &str, shape: &[usize], role| list.push(spec(in_layer(layer, part), shape, role));
        add("input_layernorm.weight", &[c.hidden], Role::Norm);
        let projections: [(&str, [usize; 2], bool); 4] = [
            ("self_attn.q_proj", [q, c.hidden], c.qkv_bias),
            ("self_attn.k_proj", [kv, c.hidden], c.qkv_bias),
            ("self_attn.v_proj", [kv, c.hidden], c.qkv_bias),
            ("self_attn.o_proj", [c.hidden, q], c.o_bias),
        ];
        let mlp: [(&str, [usize; 2], bool); 3] = [
            ("mlp.gate_proj", [c.ffn, c.hidden], c.mlp_bias),
            ("mlp.up_proj", [c.ffn, c.hidden], c.mlp_bias),
            ("mlp.down_proj", [c.hidden, c.ffn], c.mlp_bias),
        ];
        for (part, shape, bias) in projections {
            add(&format!("{part}.weight"), &shape, Role::Matrix);
            if bias {
                add(&format!("{part}.bias"), &shape[..1], Role::Bias);
            }
        }
        if c.qk_norm {
            add("self_attn.q_norm.weight", &[c.head_dim], Role::Norm);
            add("self_attn.k_norm.weight", &[c.head_dim], Role::Norm);
        }
        add("post_attention_layernorm.weight", &[c.hidden], Role::Norm);
        for (part, shape, bias) in mlp {
            add(&format!("{part}.weight"), &shape, Role::Matrix);
            if bias {
                add(&format!("{part}.bias"), &shape[..1], Role::Bias);
            }
        }
    }
    list.push(spec(NORM.into(), &[c.hidden], Role::Norm));
    if !c.tied {
        list.push(spec(HEAD.into(), &[c.vocab_size, c.hidden], Role::Matrix));
    }
    list
}

/// Whether a checkpoint may have `name` without the model using it: tables that are computed, and a stored copy of a
/// tied head.
pub(crate) fn unused(config: &Config, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || config.tied && name == HEAD
}

fn spec(name: String, shape: &[usize], role: Role) -> TensorSpec {
    TensorSpec { name, shape: shape.to_vec(), role }
}
