//! How a family's heads get their keys and values: numbers of grouped-query and of multi-head latent attention.

use crate::ModelError;
use crate::config::{Base, opt_head_dim};
use crate::fields::Fields;

/// Keys and values of all layers' heads.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Each KV head serves several query heads.
    Grouped(Grouped),
    /// All heads' keys and values come from one latent per token (MLA).
    Latent(Latent),
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Grouped {
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Sliding window per layer, in tokens.
    pub windows: Vec<Option<u32>>,
    /// Bias on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// RMS norm of q and k before the rotation.
    pub qk_norm: Option<HeadNorm>,
    /// Whether each query head has a score that takes a share of the softmax without a value.
    pub sinks: bool,
}

/// Over what a norm of q and k takes its mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNorm {
    /// Each head; one scale for all of them.
    Head,
    /// All heads of the projection; a scale per element.
    Projection,
}

/// Multi-head latent attention. Source: <https://arxiv.org/abs/2405.04434>
#[derive(Clone, Debug, PartialEq)]
pub struct Latent {
    /// Elements of the latent that q comes from; `None`: q comes from the hidden state.
    pub q_rank: Option<usize>,
    /// Elements of the latent that keys and values come from.
    pub latent_dim: usize,
    /// Elements of a head's q and k without position.
    pub nope_dim: usize,
    /// Elements of a head's q, and of the shared key, that are rotated.
    pub rope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Bias on the projections into latents, and on the output projection.
    pub bias: bool,
    /// Factor of the scores.
    pub scale: f32,
}

/// What a family's Hugging Face class puts where a configuration lacks the field.
pub(crate) struct Default {
    /// `None`: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    /// `None`: as many as query heads.
    pub(crate) kv_heads: Option<usize>,
}

impl Attention {
    /// Elements that attention returns per head.
    pub fn value_dim(&self) -> usize {
        match self {
            Attention::Grouped(grouped) => grouped.head_dim,
            Attention::Latent(latent) => latent.value_dim,
        }
    }

    /// Whether the output projection has a bias.
    pub fn o_bias(&self) -> bool {
        match self {
            Attention::Grouped(grouped) => grouped.o_bias,
            Attention::Latent(latent) => latent.bias,
        }
    }
}

impl Grouped {
    /// Heads and their width; without biases, norms and windows.
    pub(crate) fn read(fields: &mut Fields, base: &Base, default: Default) -> Result<Grouped, ModelError> {
        let heads = base.heads;
        let absent = default.kv_heads.filter(|_| !fields.has("num_key_value_heads"));
        let kv_heads = fields.opt_size("num_key_value_heads")?.or(absent).unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(fields
                .error("num_key_value_heads", format!("{kv_heads} does not divide {heads} query heads")));
        }
        let hidden = base.hidden;
        let head_dim = match opt_head_dim(fields, "head_dim")?.or(default.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(2 * heads) => hidden / heads,
            None => {
                let reason =
                    format!("{hidden} is no multiple of {heads} heads of an even number of elements");
                return Err(fields.error("hidden_size", reason));
            }
        };
        Ok(Grouped {
            kv_heads,
            head_dim,
            windows: vec![None; base.layers],
            qkv_bias: false,
            o_bias: false,
            qk_norm: None,
            sinks: false,
        })
    }
}

/// Windows of the families that choose them per layer: `layer_types`, or else the first `max_window_layers` layers
/// are full and the rest slide. Without `use_sliding_window` none does.
pub(crate) fn windows_by_layer(fields: &mut Fields, layers: usize) -> Result<Vec<Option<u32>>, ModelError> {
    let used = fields.flag("use_sliding_window", false)?;
    let window = window(fields)?.filter(|_| used);
    let full = fields.opt_size("max_window_layers")?.unwrap_or(28);
    by_type(fields, window, layers, |layer| layer >= full)
}

/// Windows of the layers that `layer_types` says slide; without it, those that `slides`.
pub(crate) fn by_type(
    fields: &mut Fields,
    window: Option<u32>,
    layers: usize,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<u32>>, ModelError> {
    let Some(types) = fields.value("layer_types").cloned() else {
        return Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect());
    };
    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != layers {
        return Err(fields.error("layer_types", format!("{} entries for {layers} layers", types.len())));
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") if window.is_some() => Ok(window),
            Some("sliding_attention") => {
                Err(fields.error("layer_types", "sliding_attention without a window"))
            }
            _ => Err(fields.error("layer_types", format!("{kind} is not supported"))),
        })
        .collect()
}

/// `sliding_window`: null is none, and a configuration without the field has the default of most Hugging Face classes.
pub(crate) fn window(fields: &mut Fields) -> Result<Option<u32>, ModelError> {
    window_or(fields, 4096)
}

/// As [`window`], with a default of the family.
pub(crate) fn window_or(fields: &mut Fields, default: u32) -> Result<Option<u32>, ModelError> {
    if !fields.has("sliding_window") {
        return Ok(Some(default));
    }
    match fields.opt_size("sliding_window")? {
        Some(0) => Err(fields.error("sliding_window", "a window of 0 tokens attends to nothing")),
        window => Ok(window.map(|window| window as u32)),
    }
}
