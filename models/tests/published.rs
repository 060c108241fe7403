//! The configurations of models as their makers publish them are read, with the numbers that their cards state; a field
//! that would change the computation is refused by its name.
#![recursion_limit = "256"]

use backend::DType;
use models::{Config, Ints, Mlx, Quantisation, kv_specs};
use serde_json::{Value, json};

/// Fields that most files have and that change nothing.
fn with_rest(mut config: Value) -> Value {
    let rest = json!({
        "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true
    });
    for (name, value) in rest.as_object().unwrap() {
        config.as_object_mut().unwrap().entry(name).or_insert(value.clone());
    }
    config
}

fn read(config: &Value) -> Result<Config, String> {
    Config::parse("config.json", config.to_string().as_bytes()).map_err(|error| error.to_string())
}

fn changed(config: &Value, changes: Value) -> Value {
    let mut config = config.clone();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

/// Checks parameters, of all and of a token, and the bytes of cache that a token takes in bf16.
fn holds(name: &str, config: &Value, total: u64, active: u64, kv_bytes: usize) -> Config {
    let config = read(config).unwrap_or_else(|error| panic!("{name}: {error}"));
    let parameters = config.parameters();
    assert_eq!((parameters.total, parameters.active), (total, active), "{name}");
    let whole = kv_specs(&config, DType::BF16, 1).unwrap();
    assert_eq!(whole[0].token_bytes(), kv_bytes, "{name}");
    for world in [2, 4] {
        assert_eq!(kv_specs(&config, DType::BF16, world).unwrap().len(), world, "{name}");
    }
    config
}

/// For dense models.
fn dense(name: &str, config: &Value, total: u64, kv_bytes: usize) -> Config {
    holds(name, config, total, total, kv_bytes)
}

fn llama(sizes: [usize; 5], tied: bool, factor: f64) -> Value {
    let [hidden, ffn, layers, heads, kv_heads] = sizes;
    with_rest(json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": hidden / heads, "hidden_size": hidden,
        "intermediate_size": ffn, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": tied,
        "rope_scaling": {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "vocab_size": 128256
    }))
}

#[test]
fn llama_and_mistral() {
    dense("Llama 3.1 8B", &llama([4096, 14336, 32, 32, 8], false, 8.0), 8_030_261_248, 131_072);
    dense("Llama 3.1 70B", &llama([8192, 28672, 80, 64, 8], false, 8.0), 70_553_706_496, 327_680);
    dense("Llama 3.2 1B", &llama([2048, 8192, 16, 32, 8], true, 32.0), 1_235_814_400, 32_768);
    let mistral = with_rest(json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000
    }));
    dense("Mistral 7B v0.1", &mistral, 7_241_732_096, 131_072);
    let third = changed(&mistral, json!({"sliding_window": null, "vocab_size": 32768, "rope_theta": 1e6}));
    dense("Mistral 7B v0.3", &third, 7_248_023_552, 131_072);
}

fn qwen(model_type: &str, sizes: [usize; 5], more: Value) -> Value {
    let [hidden, ffn, layers, heads, kv_heads] = sizes;
    let base = with_rest(json!({
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": hidden, "intermediate_size": ffn,
        "max_position_embeddings": 40960, "max_window_layers": layers, "model_type": model_type,
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 151936
    }));
    changed(&base, more)
}

fn qwen3(sizes: [usize; 5]) -> Value {
    qwen("qwen3", sizes, json!({"attention_bias": false, "head_dim": 128, "rope_scaling": null}))
}

fn qwen3_moe(sizes: [usize; 5], width: usize) -> Value {
    let more = json!({
        "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128, "mlp_only_layers": [],
        "moe_intermediate_size": width, "norm_topk_prob": true, "num_experts": 128, "num_experts_per_tok": 8,
        "output_router_logits": false, "rope_scaling": null, "router_aux_loss_coef": 0.001
    });
    qwen("qwen3_moe", sizes, more)
}

#[test]
fn qwen_dense() {
    let more = json!({"max_position_embeddings": 32768, "sliding_window": 131072, "vocab_size": 152064});
    dense("Qwen2.5 7B", &qwen("qwen2", [3584, 18944, 28, 28, 4], more), 7_615_616_512, 57_344);
    dense("Qwen3 8B", &qwen3([4096, 12288, 36, 32, 8]), 8_190_735_360, 147_456);
    dense("Qwen3 32B", &qwen3([5120, 25600, 64, 64, 8]), 32_762_123_264, 262_144);
}

/// FP8 as Qwen and DeepSeek publish it.
fn fp8() -> Value {
    json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]})
}

#[test]
fn qwen_experts_in_every_format() {
    let small = qwen3_moe([2048, 6144, 48, 32, 4], 768);
    holds("Qwen3 30B A3B", &small, 30_532_122_624, 3_353_032_704, 98_304);
    let large = qwen3_moe([4096, 12288, 94, 64, 4], 1536);
    holds("Qwen3 235B A22B", &large, 235_093_634_560, 22_190_763_520, 192_512);
    let coded = changed(
        &fp8(),
        json!({"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"]}),
    );
    let coded = read(&changed(&large, json!({"quantization_config": coded}))).unwrap();
    assert_eq!(coded.quantisation, Some(Quantisation::Fp8 { block: Some((128, 128)) }));
    // MLX writes the same under both names, and gives routers more bits.
    let mlx = json!({
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}, "model.embed_tokens": false
    });
    let config = read(&changed(&small, json!({"quantization": mlx, "quantization_config": mlx}))).unwrap();
    let Some(Quantisation::Mlx { all, overrides }) = config.quantisation else { panic!("not MLX's") };
    assert_eq!(all, Mlx::Affine { bits: 4, group: 64 });
    assert_eq!(overrides["model.layers.0.mlp.gate"], Some(Mlx::Affine { bits: 8, group: 64 }));
    assert_eq!(overrides["model.embed_tokens"], None);
}

fn deepseek(more: Value) -> Value {
    let base = with_rest(json!({
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": fp8(),
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "seq_aux": true, "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
        "v_head_dim": 128, "vocab_size": 129280
    }));
    changed(&base, more)
}

fn kimi(more: Value) -> Value {
    let kimi = deepseek(json!({
        "architectures": ["DeepseekV3ForCausalLM"], "bos_token_id": 163584, "eos_token_id": 163585,
        "first_k_dense_replace": 1, "max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1,
        "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840
    }));
    changed(&kimi, more)
}

/// Kimi K2 Thinking's: experts only.
fn int4() -> Value {
    json!({
        "config_groups": {"group_0": {"input_activations": null, "output_activations": null, "targets": ["Linear"],
            "weights": {"actorder": null, "block_structure": null, "dynamic": false, "group_size": 32, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": true, "type": "int"}}},
        "format": "pack-quantized", "kv_cache_scheme": null, "quant_method": "compressed-tensors",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        "quantization_status": "compressed"
    })
}

#[test]
fn latents() {
    // 61 layers of 512 + 64 numbers.
    let bytes = 70_272;
    let v3 = holds("DeepSeek V3", &deepseek(json!({})), 671_026_419_200, 37_552_297_472, bytes);
    assert_eq!(v3.quantisation, Some(Quantisation::Fp8 { block: Some((128, 128)) }));
    let scaled = changed(&fp8(), json!({"scale_fmt": "ue8m0"}));
    read(&deepseek(json!({"quantization_config": scaled}))).expect("DeepSeek V3.1");
    let k2 = holds("Kimi K2", &kimi(json!({})), 1_026_408_232_448, 32_861_500_928, bytes);
    assert_eq!(k2.quantisation, Some(Quantisation::Fp8 { block: Some((128, 128)) }));
    let int4_of = |config: &Value| read(config).unwrap().quantisation;
    let thinking = kimi(json!({"quantization_config": int4(), "max_position_embeddings": 262144}));
    assert_eq!(
        int4_of(&thinking),
        Some(Quantisation::Compressed {
            block: None,
            ints: vec![Ints { bits: 4, group: Some(32) }],
            fp4: vec![]
        })
    );
    // The text model inside one that sees pictures.
    let text = kimi(json!({"quantization_config": int4(), "model_type": "kimi_k2"}));
    let seeing = json!({
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": "bfloat16",
        "text_config": text, "vision_config": {"vt_hidden_size": 1152}, "media_placeholder_token_id": 163605,
        "pad_token_id": 163839, "bos_token_id": 163584, "eos_token_id": 163585, "ignore_index": -100,
        "use_unified_vision_chunk": true, "tie_word_embeddings": false,
        "video_placeholder": "<|kimi_k25_video_placeholder|>"
    });
    assert_eq!(
        int4_of(&seeing),
        Some(Quantisation::Compressed {
            block: None,
            ints: vec![Ints { bits: 4, group: Some(32) }],
            fp4: vec![]
        })
    );
}

fn minimax(more: Value) -> Value {
    let base = with_rest(json!({
        "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": vec![1; 62],
        "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"}, "bos_token_id": null,
        "eos_token_id": null, "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536,
        "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 196608, "mlp_intermediate_size": 8192, "model_type": "minimax_m2",
        "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62,
        "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3, "output_router_logits": false,
        "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6, "rope_theta": 5000000, "rotary_dim": 64,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": null,
        "tie_word_embeddings": false, "use_mtp": true, "use_qk_norm": true, "use_routing_bias": true,
        "vocab_size": 200064,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8",
            "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
    }));
    changed(&base, more)
}

#[test]
fn minimax_and_glm() {
    let m2 = holds("MiniMax M2", &minimax(json!({})), 228_689_764_864, 11_030_553_088, 253_952);
    assert_eq!(m2.quantisation, Some(Quantisation::Fp8 { block: Some((128, 128)) }));
    // As newer libraries write it.
    let newer = minimax(json!({
        "rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5},
        "partial_rotary_factor": 0.5, "dtype": "bfloat16", "is_encoder_decoder": false, "attention_bias": false,
        "max_position_embeddings": 204800
    }));
    assert_eq!(read(&newer).map(|config| config.rope.style), Ok(m2.rope.style));

    let glm = with_rest(json!({
        "architectures": ["Glm4MoeForCausalLM"], "attention_bias": true, "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": 3, "head_dim": 128, "hidden_size": 5120, "intermediate_size": 12288,
        "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1536, "n_group": 1,
        "n_routed_experts": 160, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 96,
        "num_experts_per_tok": 8, "num_hidden_layers": 92, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
        "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": null,
        "rope_theta": 1000000, "routed_scaling_factor": 2.5, "tie_word_embeddings": false, "topk_group": 1,
        "use_qk_norm": true, "vocab_size": 151552
    }));
    holds("GLM 4.5", &glm, 352_797_829_024, 33_632_266_144, 376_832);
    holds(
        "GLM 4.6",
        &changed(&glm, json!({"max_position_embeddings": 202752})),
        352_797_829_024,
        33_632_266_144,
        376_832,
    );
    let air = changed(
        &glm,
        json!({
            "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "n_routed_experts": 128, "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "use_qk_norm": false
        }),
    );
    holds("GLM 4.5 Air", &air, 106_852_251_264, 13_424_129_664, 188_416);
}

/// As its makers publish it: of 36 layers, or 24.
fn gpt_oss(layers: usize, experts: usize) -> Value {
    let types: Vec<&str> =
        (0..layers).map(|at| if at % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect();
    with_rest(json!({
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "eos_token_id": 200002,
        "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": types, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": layers, "num_key_value_heads": 8, "num_local_experts": experts,
        "output_router_logits": false, "pad_token_id": 199999, "rms_norm_eps": 1e-5,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert":
            ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
            "original_max_position_embeddings": 4096, "truncate": false},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": false, "vocab_size": 201088
    }))
}

/// The card says 116.83 and 5.13, 20.91 and 3.61 thousand million; the active ones without one table of ids, 0.58.
#[test]
fn gpt_oss_large_and_small() {
    let large = holds("gpt-oss 120b", &gpt_oss(36, 128), 116_829_156_672, 5_711_982_912, 73_728);
    assert_eq!(large.quantisation, Some(Quantisation::Fp4 { group: 32 }));
    assert_eq!(large.context, 131_072);
    holds("gpt-oss 20b", &gpt_oss(24, 32), 20_914_757_184, 4_187_440_704, 49_152);
}

#[test]
fn what_would_change_the_computation_is_named() {
    let llama = llama([4096, 14336, 32, 32, 8], false, 8.0);
    let qwen = qwen3_moe([2048, 6144, 48, 32, 4], 768);
    let cases = [
        (changed(&llama, json!({"final_logit_softcapping": 30.0})), "final_logit_softcapping"),
        (changed(&llama, json!({"attention_multiplier": 0.0078125})), "attention_multiplier"),
        (changed(&llama, json!({"hidden_act": "gelu"})), "hidden_act"),
        (changed(&llama, json!({"no_rope_layers": [1, 1, 1, 0]})), "no_rope_layers"),
        (changed(&llama, json!({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}})), "rope_type"),
        (changed(&qwen, json!({"shared_expert_intermediate_size": 512})), "shared_expert_intermediate_size"),
        (deepseek(json!({"scoring_func": "softmax"})), "scoring_func"),
        (deepseek(json!({"topk_method": "greedy"})), "topk_method"),
        (deepseek(json!({"index_topk": 2048})), "index_topk"),
        (minimax(json!({"attn_type_list": [0, 1]})), "attn_type_list"),
        (changed(&gpt_oss(24, 32), json!({"experts_per_token": 2})), "experts_per_token"),
        (changed(&gpt_oss(2, 32), json!({"layer_types": vec!["chunked_attention"; 2]})), "layer_types"),
        (minimax(json!({"shared_intermediate_size": 1536})), "shared_intermediate_size"),
        (changed(&llama, json!({"quantization_config": {"quant_method": "hqq", "bits": 4}})), "quant_method"),
        (changed(&llama, json!({"quantization_config": changed(&fp8(), json!({"fmt": "e5m2"}))})), "fmt"),
        (
            kimi(
                json!({"quantization_config": changed(&int4(), json!({"transform_config": {"config_groups": {"u": {}}}}))}),
            ),
            "transform_config",
        ),
    ];
    for (config, field) in cases {
        let error = read(&config).expect_err(field);
        assert!(error.starts_with("config.json: ") && error.contains(field), "{field}: {error}");
    }
}
