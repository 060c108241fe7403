//! The numbers of a GGUF file as the config.json that its Hugging Face original has: what `models` parses, whatever the
//! weights come from. One function per architecture, named as llama.cpp names it.

use serde_json::{Value, json};

use crate::keys::Keys;
use crate::rope::scaling;
use crate::{Gguf, GgufError, Metadata};

/// Architectures, as `general.architecture` names them.
const FAMILIES: &[(&str, Family)] = &[
    ("llama", llama),
    ("qwen2", qwen2),
    ("qwen3", qwen3),
    ("qwen3moe", qwen3moe),
    ("deepseek2", deepseek2),
    ("glm4moe", glm4moe),
    ("gpt-oss", gpt_oss),
    ("minimax-m2", minimax_m2),
];

/// Adds what the family has beyond [`common`].
type Family = fn(&Keys<'_>, &mut Value) -> Result<(), GgufError>;

/// Control tokens that end an answer in every model that has them. GGUF files name one or two ids, Hugging Face's
/// generation_config.json all of them. Source: llama.cpp, `llama-vocab.cpp`, special_eog_ids.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|user|>",
    "<|observation|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
];

/// Where an answer ends by the first two, the third ends one of its messages only (gpt-oss).
const MESSAGES: [&str; 3] = ["<|return|>", "<|call|>", "<|end|>"];

/// How scores of experts become weights, by `expert_gating_func`.
const SOFTMAX: u64 = 1;
const SIGMOID: u64 = 2;
const SOFTMAX_OF_CHOSEN: u64 = 3;

/// The config.json of the model in `gguf`. Errors when the architecture is none of llama (Mistral too), qwen2, qwen3,
/// qwen3moe, deepseek2, glm4moe, gpt-oss and minimax-m2, when a number is missing, and when a key may change the computation in a way
/// that a config.json cannot say.
pub fn config_json(gguf: &Gguf) -> Result<Value, GgufError> {
    let architecture = gguf.architecture()?;
    let metadata = gguf.metadata();
    match metadata.text("general.type")? {
        None | Some("model") => {}
        Some(other) => return Err(metadata.error("general.type", format!("{other:?} is no model"))),
    }
    let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == architecture) else {
        let known: Vec<_> = FAMILIES.iter().map(|(name, _)| *name).collect();
        let reason = format!("{architecture:?} is not supported (known: {})", known.join(", "));
        return Err(metadata.error("general.architecture", reason));
    };
    let keys = Keys::new(gguf, architecture);
    let mut config = common(&keys)?;
    family(&keys, &mut config)?;
    keys.finish()?;
    Ok(config)
}

/// Ids of the tokens that end an answer, without repeats: `eos`, `eot` and `eom`, Ollama's list, and control tokens of known
/// names.
pub fn end_ids(metadata: &Metadata) -> Result<Vec<u32>, GgufError> {
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        let id = metadata.count(&format!("tokenizer.ggml.{name}_token_id"))?;
        ids.extend(id.and_then(|id| u32::try_from(id).ok()));
    }
    // Ollama's: all that generation_config.json lists.
    let more = metadata.numbers("tokenizer.ggml.eos_token_ids")?.unwrap_or_default();
    ids.extend(more.into_iter().filter(|id| (0.0..=f64::from(u32::MAX)).contains(id)).map(|id| id as u32));
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = metadata.numbers("tokenizer.ggml.token_type")?.unwrap_or_default();
    const CONTROL: f64 = 3.0;
    let control = (0u32..).zip(tokens.iter().zip(types)).filter(|(_, (_, kind))| *kind == CONTROL);
    let known: Vec<(u32, &str)> = control
        .map(|(id, (token, _))| (id, token.as_str()))
        .filter(|(_, token)| ENDS.contains(token))
        .collect();
    let [end, call, message] = MESSAGES.map(|name| known.iter().find(|(_, token)| *token == name));
    ids.extend(known.iter().map(|(id, _)| *id));
    if let (Some(_), Some(_), Some((message, _))) = (end, call, message) {
        ids.retain(|id| id != message);
    }
    let mut seen = Vec::new();
    ids.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    Ok(ids)
}

/// What all families have.
fn common(keys: &Keys<'_>) -> Result<Value, GgufError> {
    let gguf = keys.gguf;
    let extra = keys.opt_count("nextn_predict_layers")?.unwrap_or(0);
    let layers = keys.count("block_count")?;
    let Some(layers) = layers.checked_sub(extra).filter(|layers| *layers > 0) else {
        return Err(
            keys.error("block_count", format!("{layers}, of which {extra} only predict further tokens"))
        );
    };
    let (hidden, heads) = (keys.count("embedding_length")?, keys.count("attention.head_count")?);
    if let Some(out) = keys.opt_count("embedding_length_out")?.filter(|out| *out != hidden) {
        return Err(keys.error("embedding_length_out", format!("{out}, embedding_length is {hidden}")));
    }
    let Some(table) = gguf.tensor("token_embd.weight") else {
        return Err(GgufError::format(gguf.path(), "tensor token_embd.weight", "missing"));
    };
    Ok(json!({
        // The rows that there are: the vocabulary may be shorter, where they are padded.
        "vocab_size": table.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.opt_count("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.opt_count("attention.head_count_kv")?.unwrap_or(heads),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")?,
        "rope_theta": keys.opt_number("rope.freq_base")?.unwrap_or(10_000.0),
        "max_position_embeddings": keys.count("context_length")?,
        "hidden_act": "silu",
        "tie_word_embeddings": gguf.tensor("output.weight").is_none(),
        "bos_token_id": gguf.metadata().count("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": end_ids(gguf.metadata())?,
    }))
}

/// Heads whose keys and values are of one width, rotated whole: `head_dim` and `rope_scaling`.
fn heads(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    let dim = head_dim(keys, config)?;
    match keys.opt_count("rope.dimension_count")? {
        Some(dims) if dims != dim => {
            Err(keys.error("rope.dimension_count", format!("{dims} of heads of {dim} is not supported here")))
        }
        _ => rope(keys, config, dim, false),
    }
}

/// As [`heads`], of which the first elements only are rotated; returns how many.
fn partial_heads(keys: &Keys<'_>, config: &mut Value) -> Result<(u64, u64), GgufError> {
    let dim = head_dim(keys, config)?;
    let dims = keys.count("rope.dimension_count")?;
    if dims == 0 || dims > dim {
        return Err(keys.error("rope.dimension_count", format!("{dims} of heads of {dim}")));
    }
    rope(keys, config, dims, false)?;
    Ok((dims, dim))
}

fn head_dim(keys: &Keys<'_>, config: &mut Value) -> Result<u64, GgufError> {
    let (hidden, heads) = (keys.count("embedding_length")?, keys.count("attention.head_count")?);
    let dim = match keys.opt_count("attention.key_length")? {
        Some(dim) => dim,
        None => match hidden.checked_div(heads) {
            Some(dim) if dim * heads == hidden => dim,
            _ => {
                return Err(keys.error("attention.head_count", format!("{heads} heads of {hidden} elements")));
            }
        },
    };
    // The second is Ollama's word.
    for key in ["attention.value_length", "attention.head_dim"] {
        if let Some(other) = keys.opt_count(key)?.filter(|other| *other != dim) {
            return Err(keys.error(key, format!("{other}, keys have {dim}")));
        }
    }
    config["head_dim"] = json!(dim);
    Ok(dim)
}

fn rope(keys: &Keys<'_>, config: &mut Value, dims: u64, mla: bool) -> Result<(), GgufError> {
    let theta = config["rope_theta"].as_f64().unwrap_or_default();
    config["rope_scaling"] = scaling(keys, theta, dims, mla)?;
    Ok(())
}

/// A window that is shorter than the context.
fn window(keys: &Keys<'_>) -> Result<Option<u64>, GgufError> {
    let context = keys.count("context_length")?;
    Ok(keys.opt_count("attention.sliding_window")?.filter(|window| *window > 0 && *window < context))
}

fn no_window(keys: &Keys<'_>) -> Result<(), GgufError> {
    match window(keys)? {
        Some(window) => {
            Err(keys.error("attention.sliding_window", format!("{window}: of which layers is not said")))
        }
        None => Ok(()),
    }
}

fn has(keys: &Keys<'_>, tensor: &str) -> bool {
    keys.gguf.tensor(tensor).is_some()
}

fn need_ffn(keys: &Keys<'_>) -> Result<(), GgufError> {
    keys.count("feed_forward_length").map(drop)
}

/// Llama, and Mistral, which is the same with a window.
fn llama(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    heads(keys, config)?;
    need_ffn(keys)?;
    let bias = has(keys, "blk.0.attn_q.bias");
    match window(keys)? {
        Some(_) if bias => return Err(keys.error("attention.sliding_window", "with biases is not supported")),
        Some(window) => {
            config["model_type"] = json!("mistral");
            config["sliding_window"] = json!(window);
        }
        None => {
            config["model_type"] = json!("llama");
            config["attention_bias"] = json!(bias);
            config["mlp_bias"] = json!(has(keys, "blk.0.ffn_gate.bias"));
        }
    }
    Ok(())
}

fn qwen2(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    heads(keys, config)?;
    need_ffn(keys)?;
    no_window(keys)?;
    config["model_type"] = json!("qwen2");
    config["use_sliding_window"] = json!(false);
    Ok(())
}

fn qwen3(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    qwen2(keys, config)?;
    config["model_type"] = json!("qwen3");
    config["attention_bias"] = json!(has(keys, "blk.0.attn_q.bias"));
    Ok(())
}

fn qwen3moe(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    heads(keys, config)?;
    no_window(keys)?;
    let layers = config["num_hidden_layers"].as_u64().unwrap_or_default();
    let dense: Vec<u64> =
        (0..layers).filter(|layer| has(keys, &format!("blk.{layer}.ffn_gate.weight"))).collect();
    let inner = match keys.opt_count("expert_feed_forward_length")? {
        Some(inner) => inner,
        // Ollama leaves it out: it is the rows of every matrix in the stack.
        None => match keys.gguf.tensors().find(|(name, _)| name.ends_with(".ffn_gate_exps.weight")) {
            Some((_, tensor)) if tensor.shape.len() == 3 => tensor.shape[1] as u64,
            _ => keys.count("expert_feed_forward_length")?,
        },
    };
    if config["intermediate_size"].is_null() {
        // Of dense layers, which there are none of then.
        config["intermediate_size"] = json!(inner);
    }
    no_scale(keys)?;
    // The second is Ollama's word.
    let (norm, again) = (keys.opt_flag("expert_weights_norm")?, keys.opt_flag("norm_top_k_prob")?);
    if let (Some(norm), Some(again)) = (norm, again)
        && norm != again
    {
        return Err(keys.error("norm_top_k_prob", format!("{again}, expert_weights_norm is {norm}")));
    }
    let norm = norm.or(again).unwrap_or(true);
    add(
        config,
        json!({
            "model_type": "qwen3_moe",
            "attention_bias": has(keys, "blk.0.attn_q.bias"),
            "use_sliding_window": false,
            "num_experts": keys.count("expert_count")?,
            "num_experts_per_tok": keys.count("expert_used_count")?,
            "moe_intermediate_size": inner,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "norm_topk_prob": norm,
        }),
    );
    gating(keys, SOFTMAX)
}

/// DeepSeek V3 and R1, and Kimi K2, which has other numbers.
fn deepseek2(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    let rotary = keys.count("rope.dimension_count")?;
    // Files from before the absorbed form give the plain widths under the other names.
    let (key, value) = (keys.count("attention.key_length")?, keys.count("attention.value_length")?);
    let key = keys.opt_count("attention.key_length_mla")?.unwrap_or(key);
    let value = keys.opt_count("attention.value_length_mla")?.unwrap_or(value);
    let Some(plain) = key.checked_sub(rotary).filter(|plain| *plain > 0) else {
        return Err(keys.error("rope.dimension_count", format!("{rotary} of keys of {key} elements")));
    };
    rope(keys, config, rotary, true)?;
    let experts = keys.count("expert_count")?;
    let scoring = match keys.opt_count("expert_gating_func")?.unwrap_or(SOFTMAX) {
        SOFTMAX => "softmax",
        SIGMOID => "sigmoid",
        other => return Err(keys.error("expert_gating_func", format!("{other} is not supported"))),
    };
    let biased = keys.gguf.tensors().any(|(name, _)| name.ends_with(".exp_probs_b.bias"));
    let mut groups = (keys.opt_count("expert_group_count")?, keys.opt_count("expert_group_used_count")?);
    // Older files lack two of the published numbers: DeepSeek V3 picks from 4 of 8 groups of its 256 experts, and the YaRN
    // of Kimi K2, with 384, has both betas 1.
    if scoring == "sigmoid" && experts == 256 && groups == (None, None) {
        groups = (Some(8), Some(4));
    }
    let yarn = &mut config["rope_scaling"];
    if experts == 384
        && yarn.is_object()
        && yarn.get("beta_fast").is_none()
        && yarn.get("beta_slow").is_none()
    {
        add(yarn, json!({ "beta_fast": 1.0, "beta_slow": 1.0 }));
    }
    add(
        config,
        json!({
            "model_type": "deepseek_v3",
            "attention_bias": false,
            "num_key_value_heads": config["num_attention_heads"],
            "q_lora_rank": keys.opt_count("attention.q_lora_rank")?.filter(|rank| *rank > 0),
            "kv_lora_rank": keys.count("attention.kv_lora_rank")?,
            "qk_nope_head_dim": plain,
            "qk_rope_head_dim": rotary,
            "v_head_dim": value,
            "first_k_dense_replace": keys.opt_count("leading_dense_block_count")?.unwrap_or(0),
            "moe_layer_freq": 1,
            "n_routed_experts": experts,
            "num_experts_per_tok": keys.count("expert_used_count")?,
            "n_shared_experts": keys.opt_count("expert_shared_count")?.unwrap_or(0),
            "moe_intermediate_size": keys.count("expert_feed_forward_length")?,
            "scoring_func": scoring,
            "topk_method": if biased { "noaux_tc" } else { "greedy" },
            "n_group": groups.0.unwrap_or(1),
            "topk_group": groups.1.unwrap_or(1),
            "norm_topk_prob": keys.opt_flag("expert_weights_norm")?.unwrap_or(false),
            "routed_scaling_factor": scale(keys)?,
        }),
    );
    Ok(())
}

fn glm4moe(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    let (dims, dim) = partial_heads(keys, config)?;
    gating(keys, SIGMOID)?;
    add(
        config,
        json!({
            "model_type": "glm4_moe",
            "attention_bias": has(keys, "blk.0.attn_q.bias"),
            "use_qk_norm": has(keys, "blk.0.attn_q_norm.weight"),
            "partial_rotary_factor": dims as f64 / dim as f64,
            "n_routed_experts": keys.count("expert_count")?,
            "num_experts_per_tok": keys.count("expert_used_count")?,
            "n_shared_experts": keys.opt_count("expert_shared_count")?.unwrap_or(0),
            "moe_intermediate_size": keys.count("expert_feed_forward_length")?,
            "first_k_dense_replace": keys.opt_count("leading_dense_block_count")?.unwrap_or(0),
            "n_group": keys.opt_count("expert_group_count")?.unwrap_or(1),
            "topk_group": keys.opt_count("expert_group_used_count")?.unwrap_or(1),
            "norm_topk_prob": keys.opt_flag("expert_weights_norm")?.unwrap_or(true),
            "routed_scaling_factor": scale(keys)?,
        }),
    );
    Ok(())
}

fn minimax_m2(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    let (dims, _) = partial_heads(keys, config)?;
    gating(keys, SIGMOID)?;
    no_scale(keys)?;
    if keys.opt_flag("expert_weights_norm")? == Some(false) {
        return Err(keys.error("expert_weights_norm", "false is not supported"));
    }
    let inner = keys.opt_count("expert_feed_forward_length")?;
    add(
        config,
        json!({
            "model_type": "minimax_m2",
            "intermediate_size": match inner {
                Some(inner) => inner,
                None => keys.count("feed_forward_length")?,
            },
            "rotary_dim": dims,
            "use_qk_norm": true,
            "qk_norm_type": "per_layer",
            "num_local_experts": keys.count("expert_count")?,
            "num_experts_per_tok": keys.count("expert_used_count")?,
            "scoring_func": "sigmoid",
            "use_routing_bias": has(keys, "blk.0.exp_probs_b.bias"),
        }),
    );
    Ok(())
}

/// Every other layer slides, the first one too, which no file says.
fn gpt_oss(keys: &Keys<'_>, config: &mut Value) -> Result<(), GgufError> {
    heads(keys, config)?;
    no_scale(keys)?;
    gating(keys, SOFTMAX_OF_CHOSEN)?;
    // The ends of the stretch are not rounded to whole dimensions, as the original's are not.
    if let Some(yarn) = config["rope_scaling"].as_object_mut() {
        yarn.insert("truncate".into(), json!(false));
    }
    let inner = keys.count("expert_feed_forward_length")?;
    add(
        config,
        json!({
            "model_type": "gpt_oss",
            "attention_bias": has(keys, "blk.0.attn_q.bias"),
            "sliding_window": keys.count("attention.sliding_window")?,
            "intermediate_size": inner,
            "num_local_experts": keys.count("expert_count")?,
            "num_experts_per_tok": keys.count("expert_used_count")?,
        }),
    );
    Ok(())
}

/// The gating function must be the family's own, where it is named.
fn gating(keys: &Keys<'_>, own: u64) -> Result<(), GgufError> {
    match keys.opt_count("expert_gating_func")? {
        Some(other) if other != own && other != 0 => {
            Err(keys.error("expert_gating_func", format!("{other}, expected {own}")))
        }
        _ => Ok(()),
    }
}

/// Factor on the experts' weights; 0 is how llama.cpp says none.
fn scale(keys: &Keys<'_>) -> Result<f64, GgufError> {
    Ok(keys.opt_number("expert_weights_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0))
}

fn no_scale(keys: &Keys<'_>) -> Result<(), GgufError> {
    match scale(keys)? {
        1.0 => Ok(()),
        other => Err(keys.error("expert_weights_scale", format!("{other} is not supported here"))),
    }
}

fn add(config: &mut Value, more: Value) {
    if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
}
