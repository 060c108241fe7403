//! Families, windows and errors of `config.json`.

use super::*;
use crate::{Grouped, HeadNorm};

const SIZES: &str = r#""vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 4096"#;

fn config(model_type: &str, more: &str) -> Result<Config, String> {
    let json = format!(r#"{{"model_type": "{model_type}", {SIZES} {more}}}"#);
    Config::parse("c", json.as_bytes()).map_err(|error| error.to_string())
}

/// Numbers of a family with grouped queries.
fn grouped(model_type: &str, more: &str) -> Result<Grouped, String> {
    match config(model_type, more)?.attention {
        Attention::Grouped(grouped) => Ok(grouped),
        Attention::Latent(_) => panic!("latent attention"),
    }
}

#[test]
fn families_differ_in_these_numbers() {
    let more = r#", "attention_bias": true, "mlp_bias": true"#;
    let llama = grouped("llama", more).unwrap();
    assert_eq!((llama.kv_heads, llama.head_dim), (4, 16));
    assert_eq!((llama.qkv_bias, llama.o_bias, llama.qk_norm), (true, true, None));
    assert!(config("llama", more).unwrap().mlp_bias);
    let qwen2 = grouped("qwen2", r#", "num_key_value_heads": 2"#).unwrap();
    assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm), (true, false, None));
    let qwen3 = grouped("qwen3", r#", "num_key_value_heads": 2"#).unwrap();
    assert_eq!((qwen3.qkv_bias, qwen3.head_dim, qwen3.qk_norm), (false, 128, Some(HeadNorm::Head)));
    let mistral = grouped("mistral", r#", "num_key_value_heads": 2, "head_dim": 32"#).unwrap();
    assert_eq!((mistral.head_dim, mistral.qkv_bias), (32, false));
    // Absent is the family's default, null is as many as query heads.
    assert_eq!(grouped("mistral", r#", "num_key_value_heads": null"#).unwrap().kv_heads, 4);
    assert_eq!(config("mistral", "").unwrap_err(), "c: num_key_value_heads: 8 does not divide 4 query heads");
}

const DEEPSEEK: &str = r#", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "q_lora_rank": 48, "moe_intermediate_size": 48, "n_routed_experts": 16, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5"#;

const QWEN3_MOE: &str = r#", "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 48"#;

#[test]
fn experts_are_where_the_family_puts_them() {
    let experts = |model_type, more: &str| config(model_type, more).unwrap().experts.unwrap();
    let sparse = |more: &str| experts("qwen3_moe", &format!("{QWEN3_MOE}{more}")).layers;
    assert_eq!(sparse(""), [true; 3]);
    assert_eq!(sparse(r#", "mlp_only_layers": [1]"#), [true, false, true]);
    assert_eq!(sparse(r#", "decoder_sparse_step": 2"#), [false, true, false]);
    let deepseek = experts("deepseek_v3", DEEPSEEK);
    assert_eq!((&deepseek.layers[..], deepseek.shared_width), (&[false, true, true][..], 96));
    assert_eq!((deepseek.routing.groups, deepseek.routing.scale), (Some((4, 2)), 2.5));
    let frequent = DEEPSEEK.replace("\"first_k_dense_replace\": 1", "\"moe_layer_freq\": 2");
    assert_eq!(experts("deepseek_v3", &frequent).layers, [true, false, true]);
    let one = DEEPSEEK
        .replace("\"n_group\": 4", "\"n_group\": 1")
        .replace("\"topk_group\": 2", "\"topk_group\": 1");
    assert_eq!(experts("kimi_k2", &one).routing.groups, None);
}

#[test]
fn mscale_squared_scales_the_scores_of_latent_attention() {
    let scale = |more: &str| match config("deepseek_v3", &format!("{DEEPSEEK}{more}")).unwrap().attention {
        Attention::Latent(latent) => latent.scale,
        Attention::Grouped(_) => panic!("grouped queries"),
    };
    let plain = 32f64.powf(-0.5);
    assert_eq!(scale(""), plain as f32);
    let yarn = r#", "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64"#;
    let mscale = 0.1 * 40f64.ln() + 1.0;
    let want = (plain * mscale * mscale) as f32;
    let got = scale(&format!(r#"{yarn}, "mscale": 1.0, "mscale_all_dim": 1.0}}"#));
    assert!((got / want - 1.0).abs() < 1e-6, "{got} {want}");
    assert_eq!(scale(&format!("{yarn}}}")), plain as f32);
}

#[test]
fn a_part_of_a_head_may_be_rotated() {
    let dim = |model_type, more: &str| config(model_type, more).map(|config| config.rope.dim);
    let glm = DEEPSEEK
        .replace("\"n_group\": 4", "\"n_group\": 1")
        .replace("\"topk_group\": 2", "\"topk_group\": 1");
    let glm = glm[..].split_once("\"q_lora_rank\": 48").map(|(_, rest)| rest.to_owned()).unwrap();
    let glm =
        |more: &str| dim("glm4_moe", &format!(r#", "num_key_value_heads": 2, "head_dim": 32{glm}{more}"#));
    assert_eq!(glm(""), Ok(16));
    assert_eq!(glm(r#", "partial_rotary_factor": 0.25"#), Ok(8));
    assert_eq!(glm(r#", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}"#), Ok(8));
    assert_eq!(
        glm(r#", "partial_rotary_factor": 0.1"#),
        Err("c: partial_rotary_factor: 3 of 32 elements".into())
    );
    let minimax =
        r#", "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 3"#;
    let minimax = |more: &str| dim("minimax_m2", &format!("{minimax}{more}"));
    assert_eq!(minimax(r#", "rotary_dim": 16, "attn_type_list": [1, 1, 1]"#), Ok(16));
    assert_eq!(
        minimax(r#", "rotary_dim": 16, "partial_rotary_factor": 0.25"#),
        Err("c: partial_rotary_factor: 16 or 8 elements?".into())
    );
}

#[test]
fn a_text_model_is_found_within_another() {
    let inner = DEEPSEEK.replace("\"topk_group\": 2", "\"topk_group\": 4");
    let inner =
        format!(r#"{{"model_type": "kimi_k2", {SIZES} {inner}, "use_cache": true, "eos_token_id": 5}}"#);
    let outer =
        format!(r#"{{"model_type": "kimi_k25", "text_config": {inner}, "vision_config": {{"depth": 2}}}}"#);
    let config = Config::parse("c", outer.as_bytes()).unwrap();
    assert_eq!((config.names_front, config.hidden, &config.eos_ids[..]), ("language_model.", 64, &[5][..]));
    let odd = outer.replace("use_cache", "attn_softcap");
    let error = Config::parse("c", odd.as_bytes()).unwrap_err().to_string();
    assert_eq!(error, "c: text_config.attn_softcap: true is not supported: it may change the computation");
}

#[test]
fn parameters_are_counted_with_and_without_idle_experts() {
    let llama = config("llama", r#", "tie_word_embeddings": true"#).unwrap().parameters();
    let layer = 4 * 64 * 64 + 3 * 64 * 160 + 2 * 64;
    assert_eq!((llama.total, llama.active), (512 * 64 + 3 * layer + 64, llama.total));
    let moe = config("qwen3_moe", &format!(r#"{QWEN3_MOE}, "mlp_only_layers": [0]"#)).unwrap().parameters();
    assert_eq!(moe.total - moe.active, 2 * 5 * 3 * 48 * 64);
}

#[test]
fn windows_are_per_layer() {
    let windows = |model_type: &str, more: &str| {
        grouped(model_type, &format!(r#", "num_key_value_heads": 2, {more}"#)).map(|grouped| grouped.windows)
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
    let oss = r#""num_local_experts": 4, "num_experts_per_tok": 2"#;
    assert_eq!(windows("gpt_oss", oss), Ok(vec![Some(128), None, Some(128)]));
    assert_eq!(
        windows("gpt_oss", &format!(r#"{oss}, "sliding_window": 16, {types}"#)),
        Ok(vec![None, Some(16), None])
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
        error("gemma3", ""),
        "c: not supported yet: model_type \"gemma3\" (supported: deepseek_v3, glm4_moe, gpt_oss, kimi_k2, kimi_k25, llama, \
         minimax_m2, mistral, qwen2, qwen3, qwen3_moe)"
    );
    let deepseek = |from: &str, to: &str| error("deepseek_v3", &DEEPSEEK.replace(from, to));
    assert_eq!(
        deepseek("\"n_group\": 4", "\"n_group\": 3"),
        "c: n_group: 3 groups of 16 experts: each needs as many, at least 2"
    );
    assert_eq!(
        deepseek("\"topk_group\": 2", "\"topk_group\": 2, \"scoring_func\": \"softmax\""),
        "c: scoring_func: \"softmax\" is not supported (known: sigmoid)"
    );
    assert_eq!(
        deepseek("\"num_experts_per_tok\": 3", "\"num_experts_per_tok\": 9"),
        "c: topk_group: 2 of 4 groups of 4 for 9 experts of a token"
    );
    assert_eq!(
        deepseek("\"q_lora_rank\": 48", "\"num_key_value_heads\": 2"),
        "c: num_key_value_heads: 2 is not supported beside 4"
    );
    assert_eq!(
        deepseek("\"q_lora_rank\": 48", "\"index_topk\": 2048"),
        "c: index_topk: 2048 is not supported: it may change the computation"
    );
    let change = "is not supported: it may change the computation";
    assert_eq!(error("llama", r#", "sliding_window": 16"#), format!("c: sliding_window: 16 {change}"));
    assert_eq!(
        error("llama", r#", "quantization_config": {"quant_method": "hqq"}"#),
        "c: quantization_config.quant_method: \"hqq\" is not supported (known: fp8, modelopt, compressed-tensors, awq, gptq, mxfp4)"
    );
    assert_eq!(
        error("llama", r#", "hidden_act": "gelu""#),
        "c: hidden_act: \"gelu\" is not supported (known: silu, swish)"
    );
    assert_eq!(
        error("llama", r#", "num_key_value_heads": 3"#),
        "c: num_key_value_heads: 3 does not divide 4 query heads"
    );
    assert_eq!(
        error("llama", r#", "head_dim": 15"#),
        "c: head_dim: 15 is not an even number between 2 and 65536"
    );
}

#[test]
fn absurd_numbers_are_refused_before_anything_is_made_of_them() {
    let error = |model_type, more: &str, from: &str, to: &str| {
        let json = format!(r#"{{"model_type": "{model_type}", {SIZES} {more}}}"#).replace(from, to);
        Config::parse("c", json.as_bytes()).unwrap_err().to_string()
    };
    let many = "\"num_hidden_layers\": 2000000000";
    assert_eq!(
        error("llama", "", "\"num_hidden_layers\": 3", many),
        "c: num_hidden_layers: 2000000000 is above 1024"
    );
    assert_eq!(
        error("deepseek_v3", DEEPSEEK, "\"n_routed_experts\": 16", "\"n_routed_experts\": 4096, \"x\": 0"),
        "c: n_routed_experts: 4096 is above 2048"
    );
    let wide = config("llama", r#", "num_key_value_heads": 1, "head_dim": 65536"#).unwrap();
    let huge = Config { vocab_size: 1 << 30, hidden: 1 << 30, heads: 1 << 30, ..wide };
    assert!(huge.parameters().total > 1 << 60);
    let absurd = Config { heads: 1 << 46, ..huge };
    assert_eq!(absurd.parameters().total, u64::MAX);
}

/// Numbers of the published configurations, and the sizes that the authors give, in billions of parameters; the active
/// ones with both tables of ids.
#[test]
fn large_models_have_their_published_sizes() {
    let latent = r#""kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": true,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rms_norm_eps": 1e-6,
        "attention_bias": false, "attention_dropout": 0.0, "auto_map": {}, "ep_size": 1, "hidden_act": "silu",
        "initializer_range": 0.02, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "aux_loss_alpha": 0.001, "seq_aux": true"#;
    let deepseek = format!(
        r#"{latent}, "model_type": "deepseek_v3", "vocab_size": 129280, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 163840, "rope_theta": 10000,
        "rope_scaling": {{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}},
        "quantization_config": {{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}}"#
    );
    let kimi = format!(
        r#"{latent}, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827, "max_position_embeddings": 262144, "rope_theta": 50000.0,
        "rope_scaling": {{"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}}"#
    );
    let minimax = r#""model_type": "minimax_m2", "vocab_size": 200064, "hidden_size": 3072, "head_dim": 128,
        "intermediate_size": 1536, "mlp_intermediate_size": 8192, "num_hidden_layers": 62, "num_attention_heads": 48,
        "num_key_value_heads": 8, "num_local_experts": 256, "num_experts_per_tok": 8, "rotary_dim": 64,
        "rope_theta": 5000000, "max_position_embeddings": 196608, "scoring_func": "sigmoid", "use_qk_norm": true,
        "qk_norm_type": "per_layer", "use_routing_bias": true, "shared_intermediate_size": 0, "use_mtp": true,
        "shared_moe_mode": "sigmoid", "num_mtp_modules": 3, "mtp_transformer_layers": 1, "sliding_window": null,
        "layernorm_mlp_beta": 1.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0"#;
    let glm = r#""model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "partial_rotary_factor": 0.5, "n_routed_experts": 128, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "norm_topk_prob": true,
        "routed_scaling_factor": 1.0, "attention_bias": true, "use_qk_norm": false, "rope_theta": 1000000,
        "rope_scaling": null, "max_position_embeddings": 131072, "num_nextn_predict_layers": 1"#;
    let qwen = r#""model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "max_window_layers": 94, "use_sliding_window": false, "sliding_window": null,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "output_router_logits": false"#;
    for (name, fields, total, active) in [
        ("DeepSeek V3", &deepseek[..], 671.0, 37.6),
        ("Kimi K2", &kimi, 1026.0, 32.9),
        ("MiniMax M2", minimax, 228.7, 11.0),
        ("GLM 4.5 Air", glm, 106.9, 13.4),
        ("Qwen3 235B-A22B", qwen, 235.1, 22.2),
    ] {
        let config = Config::parse("c", format!("{{{fields}}}").as_bytes()).unwrap();
        let parameters = config.parameters();
        let near = |got: u64, want: f64| (got as f64 / 1e9 / want - 1.0).abs() < 0.01;
        assert!(near(parameters.total, total), "{name}: {parameters:?}");
        assert!(near(parameters.active, active), "{name}: {parameters:?}");
    }
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
