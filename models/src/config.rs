//! The numbers of a model: what `config.json` says, parsed by the file of its family in `arch/`.

use std::path::Path;

use backend::DType;

use crate::fields::Fields;
use crate::{ModelError, RopeConfig, arch};

/// A dense decoder: embedding, layers of (norm, attention, norm, gated MLP), norm, head. Families differ in these
/// numbers only.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Family, as `model_type` names it.
    pub model_type: &'static str,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Epsilon of all norms.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Sliding window per layer, in tokens.
    pub windows: Vec<Option<u32>>,
    /// Bias on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// RMS norm of every head of q and k before the rotation.
    pub qk_norm: bool,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Longest context in tokens.
    pub context: usize,
    /// Element type that the weights were saved in, where the file says so.
    pub dtype: Option<DType>,
    /// Tokens that end an answer; `generation_config.json` overrides them.
    pub eos_ids: Vec<u32>,
}

impl Config {
    /// Reads `config.json` at `path`.
    pub fn read(path: &Path) -> Result<Config, ModelError> {
        let name = path.display().to_string();
        let json = std::fs::read(path).map_err(|reason| ModelError::Io { path: name.clone(), reason })?;
        Config::parse(&name, &json)
    }

    /// Parses the text of a `config.json`; `path` is for messages. A field that is not known to leave the computation
    /// alone, and is not supported, is an error that names it.
    pub fn parse(path: &str, json: &[u8]) -> Result<Config, ModelError> {
        let mut fields = Fields::parse(path, json)?;
        let Some(model_type) = fields.opt_text("model_type")? else {
            return Err(fields.error("model_type", "missing"));
        };
        let config = arch::read(&model_type, &mut fields)?;
        fields.finish()?;
        Ok(config)
    }

    /// What all dense decoders have, without biases, norms of heads and windows.
    pub(crate) fn dense(
        fields: &mut Fields,
        model_type: &'static str,
        default: Default,
    ) -> Result<Config, ModelError> {
        let (hidden, layers, heads) = (
            fields.size("hidden_size")?,
            fields.size("num_hidden_layers")?,
            fields.size("num_attention_heads")?,
        );
        let absent = default.kv_heads.filter(|_| !fields.has("num_key_value_heads"));
        let kv_heads = fields.opt_size("num_key_value_heads")?.or(absent).unwrap_or(heads);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(fields
                .error("num_key_value_heads", format!("{kv_heads} does not divide {heads} query heads")));
        }
        let head_dim = match fields.opt_size("head_dim")?.or(default.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(fields.error("hidden_size", format!("{hidden} is no multiple of {heads} heads")));
            }
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(fields.error("head_dim", format!("{head_dim} is not a positive even number")));
        }
        match fields.opt_text("hidden_act")?.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => {
                return Err(fields.error("hidden_act", format!("{other:?} is not supported (known: silu)")));
            }
        }
        let positions = fields.size("max_position_embeddings")?;
        let rope = RopeConfig::read(fields, positions)?;
        let vocab_size = fields.size("vocab_size")?;
        Ok(Config {
            model_type,
            vocab_size,
            eos_ids: eos_ids(fields, vocab_size)?,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: fields.size("intermediate_size")?,
            norm_eps: fields.opt_positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            windows: vec![None; layers],
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied: fields.flag("tie_word_embeddings", false)?,
            context: rope.context(positions),
            rope,
            dtype: dtype(fields)?,
        })
    }
}

/// What a family's Hugging Face class puts where a configuration lacks the field.
pub(crate) struct Default {
    /// `None`: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    /// `None`: as many as query heads.
    pub(crate) kv_heads: Option<usize>,
}

/// `eos_token_id`; ids that the model cannot produce are left out.
pub(crate) fn eos_ids(fields: &mut Fields, vocab_size: usize) -> Result<Vec<u32>, ModelError> {
    let mut ids = fields.ids("eos_token_id")?;
    ids.retain(|id| (*id as usize) < vocab_size);
    Ok(ids)
}

/// `torch_dtype` (or `dtype`, its later name), for information: weights say their own type.
fn dtype(fields: &mut Fields) -> Result<Option<DType>, ModelError> {
    let old = fields.opt_text("torch_dtype")?;
    Ok(fields.opt_text("dtype")?.or(old).and_then(|name| name.trim_start_matches("torch.").parse().ok()))
}

/// Windows of the families that choose them per layer: `layer_types`, or else the first `max_window_layers` layers
/// are full and the rest slide. Without `use_sliding_window` none does.
pub(crate) fn windows_by_layer(fields: &mut Fields, layers: usize) -> Result<Vec<Option<u32>>, ModelError> {
    let used = fields.flag("use_sliding_window", false)?;
    let window = window(fields)?.filter(|_| used);
    let full = fields.opt_size("max_window_layers")?.unwrap_or(28);
    let Some(types) = fields.value("layer_types").cloned() else {
        return Ok((0..layers).map(|layer| window.filter(|_| layer >= full)).collect());
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

/// `sliding_window`: null is none, and a configuration without the field has the default of the Hugging Face classes.
pub(crate) fn window(fields: &mut Fields) -> Result<Option<u32>, ModelError> {
    const DEFAULT: u32 = 4096;
    if !fields.has("sliding_window") {
        return Ok(Some(DEFAULT));
    }
    match fields.opt_size("sliding_window")? {
        Some(0) => Err(fields.error("sliding_window", "a window of 0 tokens attends to nothing")),
        window => Ok(window.map(|window| window as u32)),
    }
}
