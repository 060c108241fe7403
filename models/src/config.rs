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

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: &str = r#""vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 4096"#;

    fn config(model_type: &str, more: &str) -> Result<Config, String> {
        let json = format!(r#"{{"model_type": "{model_type}", {SIZES} {more}}}"#);
        Config::parse("c", json.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn families_differ_in_these_numbers() {
        let llama = config("llama", r#", "attention_bias": true, "mlp_bias": true"#).unwrap();
        assert_eq!((llama.kv_heads, llama.head_dim), (4, 16));
        assert_eq!((llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm), (true, true, true, false));
        let qwen2 = config("qwen2", r#", "num_key_value_heads": 2"#).unwrap();
        assert_eq!(
            (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm),
            (true, false, false, false)
        );
        let qwen3 = config("qwen3", r#", "num_key_value_heads": 2"#).unwrap();
        assert_eq!((qwen3.qkv_bias, qwen3.head_dim, qwen3.qk_norm), (false, 128, true));
        let mistral = config("mistral", r#", "num_key_value_heads": 2, "head_dim": 32"#).unwrap();
        assert_eq!((mistral.head_dim, mistral.qkv_bias), (32, false));
        // Absent is the family's default, null is as many as query heads.
        assert_eq!(config("mistral", r#", "num_key_value_heads": null"#).unwrap().kv_heads, 4);
        assert_eq!(
            config("mistral", "").unwrap_err(),
            "c: num_key_value_heads: 8 does not divide 4 query heads"
        );
    }

    #[test]
    fn windows_are_per_layer() {
        let windows = |model_type: &str, more: &str| {
            config(model_type, &format!(r#", "num_key_value_heads": 2, {more}"#)).map(|config| config.windows)
        };
        let (none, some) = (Ok(vec![None; 3]), Ok(vec![Some(16); 3]));
        assert_eq!(windows("mistral", r#""sliding_window": null"#), none);
        assert_eq!(windows("mistral", r#""sliding_window": 16"#), some);
        assert_eq!(windows("mistral", r#""head_dim": 16"#), Ok(vec![Some(4096); 3]));
        assert_eq!(windows("qwen2", r#""sliding_window": 16, "use_sliding_window": false"#), none);
        assert_eq!(
            windows("qwen2", r#""sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1"#),
            Ok(vec![None, Some(16), Some(16)])
        );
        let types = r#""layer_types": ["full_attention", "sliding_attention", "full_attention"]"#;
        assert_eq!(
            windows("qwen3", &format!(r#""sliding_window": 16, "use_sliding_window": true, {types}"#)),
            Ok(vec![None, Some(16), None])
        );
        assert_eq!(windows("qwen3", types), Err("c: layer_types: sliding_attention without a window".into()));
        assert_eq!(
            windows("qwen3", r#""layer_types": ["full_attention"]"#),
            Err("c: layer_types: 1 entries for 3 layers".into())
        );
        assert_eq!(
            windows("mistral", r#""sliding_window": 0"#),
            Err("c: sliding_window: a window of 0 tokens attends to nothing".into())
        );
    }

    #[test]
    fn what_changes_the_math_and_is_not_supported_is_named() {
        let error = |model_type, more: &str| config(model_type, more).unwrap_err();
        assert_eq!(
            error("qwen3_moe", ""),
            "c: not supported yet: model_type \"qwen3_moe\" (supported: llama, mistral, qwen2, qwen3)"
        );
        assert!(error("deepseek_v3", "").contains("not supported yet: model_type \"deepseek_v3\""));
        let change = "is not supported: it may change the computation";
        assert_eq!(error("llama", r#", "sliding_window": 16"#), format!("c: sliding_window: 16 {change}"));
        assert_eq!(
            error("llama", r#", "quantization_config": {"quant_method": "fp8"}"#),
            format!("c: quantization_config: {{\"quant_method\":\"fp8\"}} {change}")
        );
        assert_eq!(
            error("llama", r#", "hidden_act": "gelu""#),
            "c: hidden_act: \"gelu\" is not supported (known: silu)"
        );
        assert_eq!(
            error("llama", r#", "num_key_value_heads": 3"#),
            "c: num_key_value_heads: 3 does not divide 4 query heads"
        );
        assert_eq!(error("llama", r#", "head_dim": 15"#), "c: head_dim: 15 is not a positive even number");
    }

    #[test]
    fn broken_files_are_named() {
        let error = |json: &str| Config::parse("c", json.as_bytes()).unwrap_err().to_string();
        assert_eq!(error("[]"), "c: not a JSON object");
        assert_eq!(error("{}"), "c: model_type: missing");
        assert_eq!(error(r#"{"model_type": "llama"}"#), "c: hidden_size: missing");
        assert!(error("{").starts_with("c: EOF while parsing"), "{}", error("{"));
        let missing = Config::read(Path::new("no/such/config.json")).unwrap_err().to_string();
        assert!(missing.starts_with("no/such/config.json: "), "{missing}");
    }

    #[test]
    fn end_tokens_are_one_or_many_and_within_the_vocabulary() {
        assert_eq!(config("llama", r#", "eos_token_id": 7"#).unwrap().eos_ids, [7]);
        assert_eq!(config("llama", r#", "eos_token_id": [9, 512, 8]"#).unwrap().eos_ids, [9, 8]);
        assert_eq!(config("llama", "").unwrap().eos_ids, Vec::<u32>::new());
    }
}
