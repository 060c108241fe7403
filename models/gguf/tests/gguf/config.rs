//! Metadata of each architecture becomes the config.json of its Hugging Face original; keys that change the math and cannot
//! be said there are errors.

use gguf::{Gguf, Header, config_json, end_ids};
use serde_json::{Value, json};

use crate::writer::Writer;

fn open(writer: &Writer, rope_freqs: Option<Vec<f32>>) -> Gguf {
    let bytes = writer.bytes();
    Gguf::without_file(Header::parse("f", &bytes, bytes.len() as u64).unwrap(), rope_freqs)
}

fn config(writer: &Writer) -> Value {
    config_json(&open(writer, None)).unwrap()
}

fn error(writer: &Writer) -> String {
    config_json(&open(writer, None)).unwrap_err().to_string()
}

/// What every architecture has: 4 heads of 64 elements, 2 layers.
fn base(architecture: &str) -> Writer {
    let key = |key: &str| format!("{architecture}.{key}");
    Writer::new(architecture)
        .count(&key("block_count"), 2)
        .count(&key("context_length"), 4096)
        .count(&key("embedding_length"), 64)
        .count(&key("feed_forward_length"), 160)
        .count(&key("attention.head_count"), 4)
        .count(&key("attention.head_count_kv"), 2)
        .number(&key("attention.layer_norm_rms_epsilon"), 1e-6)
        .number(&key("rope.freq_base"), 1e6)
        .ones("token_embd.weight", &[32, 64])
        .ones("output.weight", &[32, 64])
}

/// `config` has all of `want`.
fn check(config: &Value, want: Value) {
    for (key, value) in want.as_object().unwrap() {
        assert_eq!(&config[key], value, "{key} of {config}");
    }
}

#[test]
fn dense_families() {
    let llama = config(&base("llama").text("tokenizer.ggml.pre", "x").text("ollama.version", "1"));
    check(
        &llama,
        json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": null, "max_position_embeddings": 4096,
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
        }),
    );
    let mistral = config(&base("llama").count("llama.attention.sliding_window", 1024));
    check(&mistral, json!({ "model_type": "mistral", "sliding_window": 1024 }));
    check(
        &config(&base("llama").count("llama.attention.sliding_window", 4096)),
        json!({ "model_type": "llama" }),
    );
    let mut tied = base("qwen2");
    tied.tensors.pop();
    check(
        &config(&tied),
        json!({ "model_type": "qwen2", "tie_word_embeddings": true, "use_sliding_window": false }),
    );
    let qwen3 =
        base("qwen3").count("qwen3.attention.key_length", 128).count("qwen3.attention.value_length", 128);
    check(
        &config(&qwen3.counts("qwen3.rope.dimension_sections", &[1, 2, 3])),
        json!({ "model_type": "qwen3", "head_dim": 128 }),
    );
    let per_layer = base("qwen2");
    let keys = per_layer.keys.iter().filter(|(key, _)| !key.ends_with("head_count_kv")).cloned().collect();
    let per_layer = Writer { keys, ..per_layer };
    let equal = per_layer.clone().counts("qwen2.attention.head_count_kv", &[2, 2]);
    check(&config(&equal), json!({ "num_key_value_heads": 2 }));
    assert_eq!(
        error(&per_layer.counts("qwen2.attention.head_count_kv", &[2, 1])),
        "f: qwen2.attention.head_count_kv: layers that differ are not supported"
    );
}

#[test]
fn families_of_experts() {
    let experts = |architecture: &str| {
        let key = |key: &str| format!("{architecture}.{key}");
        base(architecture)
            .count(&key("expert_count"), 8)
            .count(&key("expert_used_count"), 3)
            .count(&key("expert_feed_forward_length"), 48)
    };
    let qwen = experts("qwen3moe").ones("blk.1.ffn_gate.weight", &[4]);
    check(
        &config(&qwen),
        json!({
            "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
            "norm_topk_prob": true, "mlp_only_layers": [1],
        }),
    );
    let glm = experts("glm4moe")
        .count("glm4moe.nextn_predict_layers", 1)
        .count("glm4moe.attention.key_length", 32)
        .count("glm4moe.attention.value_length", 32)
        .count("glm4moe.rope.dimension_count", 16)
        .count("glm4moe.expert_gating_func", 2)
        .count("glm4moe.expert_shared_count", 1)
        .number("glm4moe.expert_weights_scale", 2.5)
        .count("glm4moe.leading_dense_block_count", 1);
    check(
        &config(&glm),
        json!({
            "model_type": "glm4_moe", "num_hidden_layers": 1, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5,
            "n_group": 1, "first_k_dense_replace": 1, "use_qk_norm": false, "head_dim": 32,
        }),
    );
    let minimax = experts("minimax-m2")
        .count("minimax-m2.rope.dimension_count", 8)
        .count("minimax-m2.expert_gating_func", 2);
    check(
        &config(&minimax.ones("blk.0.exp_probs_b.bias", &[8])),
        json!({
            "model_type": "minimax_m2", "rotary_dim": 8, "intermediate_size": 48, "num_local_experts": 8,
            "qk_norm_type": "per_layer", "use_routing_bias": true,
        }),
    );
    let oss = experts("gpt-oss")
        .count("gpt-oss.attention.sliding_window", 16)
        .text("gpt-oss.rope.scaling.type", "yarn")
        .number("gpt-oss.rope.scaling.factor", 32.0)
        .count("gpt-oss.rope.scaling.original_context_length", 64);
    check(
        &config(&oss),
        json!({
            "model_type": "gpt_oss", "sliding_window": 16, "intermediate_size": 48, "num_local_experts": 8,
            "num_experts_per_tok": 3, "attention_bias": false,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64.0, "truncate": false
            },
        }),
    );
    assert_eq!(
        error(&experts("qwen3moe").count("qwen3moe.expert_gating_func", 2)),
        "f: qwen3moe.expert_gating_func: 2, expected 1"
    );
    assert_eq!(
        error(&base("llama").count("llama.expert_count", 8)),
        "f: llama.expert_count: 8 is not supported: it may change the computation"
    );
}

/// The keys of a DeepSeek V3 with `experts` experts.
fn deepseek(experts: u32) -> Writer {
    base("deepseek2")
        .count("deepseek2.rope.dimension_count", 16)
        .count("deepseek2.attention.q_lora_rank", 48)
        .count("deepseek2.attention.kv_lora_rank", 32)
        .count("deepseek2.expert_count", experts)
        .count("deepseek2.expert_used_count", 3)
        .count("deepseek2.expert_shared_count", 1)
        .count("deepseek2.expert_feed_forward_length", 48)
        .count("deepseek2.leading_dense_block_count", 1)
        .number("deepseek2.expert_weights_scale", 2.827)
        .flag("deepseek2.expert_weights_norm", true)
        .count("deepseek2.expert_gating_func", 2)
        .text("deepseek2.rope.scaling.type", "yarn")
        .number("deepseek2.rope.scaling.factor", 40.0)
        .count("deepseek2.rope.scaling.original_context_length", 4096)
        .ones("blk.1.exp_probs_b.bias", &[8])
}

fn absorbed(experts: u32) -> Writer {
    deepseek(experts)
        .count("deepseek2.attention.key_length", 48)
        .count("deepseek2.attention.value_length", 32)
        .count("deepseek2.attention.key_length_mla", 32)
        .count("deepseek2.attention.value_length_mla", 24)
}

#[test]
fn deepseek_before_and_after_the_absorbed_form() {
    let want = json!({
        "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24, "first_k_dense_replace": 1,
        "n_routed_experts": 16, "n_shared_experts": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "n_group": 4, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.827,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096.0, "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    });
    let more = |writer: Writer| {
        let key = "deepseek2.rope.scaling.yarn_log_multiplier";
        writer
            .number(key, 0.1)
            .count("deepseek2.expert_group_count", 4)
            .count("deepseek2.expert_group_used_count", 2)
    };
    check(&config(&more(absorbed(16))), want.clone());
    let old = deepseek(16)
        .count("deepseek2.attention.key_length", 32)
        .count("deepseek2.attention.value_length", 24);
    check(&config(&more(old)), want);
    assert_eq!(error(&absorbed(16)), "f: deepseek2.rope.scaling.yarn_log_multiplier: missing");
}

/// Older files leave out numbers of the two large models that the computation needs.
#[test]
fn numbers_that_older_files_leave_out_are_the_published_ones() {
    let of = |experts| {
        let mscale = "deepseek2.rope.scaling.yarn_log_multiplier";
        config(&absorbed(experts).number(mscale, 0.0707))
    };
    check(&of(256), json!({ "n_group": 8, "topk_group": 4 }));
    check(&of(384), json!({ "n_group": 1, "topk_group": 1 }));
    assert_eq!(of(384)["rope_scaling"]["beta_fast"], 1.0);
    assert_eq!(of(256)["rope_scaling"]["beta_fast"], Value::Null);
    assert_eq!(of(256)["rope_scaling"]["mscale_all_dim"], 0.707);
}

#[test]
fn rotary_scaling() {
    let scaling = |writer: &Writer| config(writer)["rope_scaling"].clone();
    let key = |writer: Writer, kind: &str| {
        writer.text("qwen2.rope.scaling.type", kind).number("qwen2.rope.scaling.factor", 4.0)
    };
    assert_eq!(scaling(&key(base("qwen2"), "linear")), json!({ "rope_type": "linear", "factor": 4.0 }));
    let yarn = key(base("qwen2"), "yarn").count("qwen2.rope.scaling.original_context_length", 1024);
    let want = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024.0 });
    assert_eq!(scaling(&yarn), want);
    assert_eq!(scaling(&base("qwen2").text("qwen2.rope.scaling.type", "none")), Value::Null);
    assert_eq!(
        error(&key(base("qwen2"), "longrope")),
        "f: qwen2.rope.scaling.type: \"longrope\" is not supported (known: none, linear, yarn)"
    );
    // A low frequency between high ones.
    let divisors = vec![1.0, 1.0, 8.0, 1.0, 8.0, 8.0, 8.0, 8.0];
    let llama = base("llama").count("llama.rope.dimension_count", 16);
    let error = config_json(&open(&llama, Some(divisors))).unwrap_err().to_string();
    assert!(error.starts_with("f: rope_freqs.weight: no recipe of Llama 3 gives these divisors"), "{error}");
    let ones = config_json(&open(&llama, Some(vec![1.0; 8]))).unwrap();
    assert_eq!(ones["rope_scaling"], Value::Null);
}

#[test]
fn what_changes_the_math_and_cannot_be_said_is_named() {
    let change = "is not supported: it may change the computation";
    let with = |key: &str| error(&base("llama").number(key, 30.0));
    assert_eq!(with("llama.attn_logit_softcapping"), format!("f: llama.attn_logit_softcapping: 30 {change}"));
    assert_eq!(with("llama.embedding_scale"), format!("f: llama.embedding_scale: 30 {change}"));
    config(&base("llama").number("llama.embedding_scale", 1.0).number("llama.attn_logit_softcapping", 0.0));
    assert_eq!(
        error(&base("llama").flag("llama.attention.causal", true).flag("llama.use_parallel_residual", true)),
        format!("f: llama.use_parallel_residual: true {change}")
    );
    assert_eq!(
        error(&base("llama").flag("llama.attention.causal", false)),
        format!("f: llama.attention.causal: false {change}")
    );
    assert_eq!(
        error(&base("llama").count("llama.rope.dimension_count", 8)),
        "f: llama.rope.dimension_count: 8 of heads of 16 is not supported here"
    );
    assert_eq!(
        error(&base("llama").text("general.type", "adapter")),
        "f: general.type: \"adapter\" is no model"
    );
    assert_eq!(
        error(&Writer::new("gpt2")),
        "f: general.architecture: \"gpt2\" is not supported (known: llama, qwen2, qwen3, qwen3moe, deepseek2, glm4moe, gpt-oss, minimax-m2)"
    );
    let missing = Writer::new("llama").count("llama.block_count", 2);
    assert_eq!(error(&missing), "f: llama.embedding_length: missing");
    assert_eq!(
        error(&missing.text("llama.embedding_length", "64")),
        "f: llama.embedding_length: \"64\" is not a whole number"
    );
}

/// Keys of other tools that change nothing are passed over, and Ollama's words for what changes something are read: with
/// or without them the model is the same.
#[test]
fn keys_that_other_tools_add_change_nothing_or_are_read() {
    let plain = base("llama");
    let more = |writer: Writer| {
        writer
            .text("general.name", "Llama")
            .text("general.basename", "llama")
            .text("general.size_label", "8B")
            .text("general.type", "model")
            .texts("general.tags", &["text-generation"])
            .count("general.file_type", 15)
            .count("general.quantization_version", 2)
            .count("general.parameter_count", 8_030_261)
            .text("ollama.version", "0.13")
            .text("quantize.imatrix.file", "imatrix.dat")
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", "llama-bpe")
            .flag("tokenizer.ggml.add_bos_token", true)
            .flag("tokenizer.ggml.add_padding_token", true)
            .count("tokenizer.ggml.padding_token_id", 0)
            .count("tokenizer.ggml.unknown_token_id", 0)
            .count("tokenizer.ggml.eos_token_id", 3)
            .texts("tokenizer.ggml.tokens", &["a", "b", "c", "<|end|>", "<|more|>"])
            .text("tokenizer.chat_template", "{{ messages }}")
    };
    let llama = more(plain.clone())
        .count("llama.vocab_size", 32)
        .count("llama.attention.head_dim", 16)
        .number("llama.attention.layer_norm_epsilon", 1e-5)
        .text("llama.rope.scaling.type", "")
        .number("llama.rope.scaling.factor", 0.0);
    let with_end = |mut config: Value, ids: &[u32]| {
        config["eos_token_id"] = json!(ids);
        config
    };
    assert_eq!(config(&llama), with_end(config(&plain), &[3]));
    let ends = llama.clone().counts("tokenizer.ggml.eos_token_ids", &[3, 4]);
    assert_eq!(config(&ends), with_end(config(&plain), &[3, 4]));
    for key in ["qwen2.rope.dimension_sections", "qwen2.rope.mrope_section"] {
        let pictures = more(base("qwen2")).counts(key, &[16, 24, 24]);
        assert_eq!(config(&pictures), with_end(config(&base("qwen2")), &[3]), "{key}");
    }
    let experts = base("qwen3moe")
        .count("qwen3moe.expert_count", 8)
        .count("qwen3moe.expert_used_count", 3)
        .ones("blk.0.ffn_gate_exps.weight", &[8, 48, 64]);
    check(&config(&experts), json!({ "moe_intermediate_size": 48, "norm_topk_prob": true }));
    let unnormed = experts.clone().flag("qwen3moe.norm_top_k_prob", false);
    check(&config(&unnormed), json!({ "norm_topk_prob": false }));
    assert_eq!(
        error(&unnormed.flag("qwen3moe.expert_weights_norm", true)),
        "f: qwen3moe.norm_top_k_prob: false, expert_weights_norm is true"
    );
    // What would change the model is named, whoever writes it.
    for (writer, want) in [
        (plain.clone().count("llama.attention.head_dim", 8), "f: llama.attention.head_dim: 8, keys have 16"),
        (
            plain.clone().counts("llama.rope.scaling.sections", &[1]),
            "f: llama.rope.scaling.sections: a list of 1 is not supported: it may change the computation",
        ),
        (
            plain.clone().count("llama.vision.block_count", 32),
            "f: llama.vision.block_count: 32 is not supported: it may change the computation",
        ),
        (
            plain.text("tokenizer.ggml.eos_token_ids", "3"),
            "f: tokenizer.ggml.eos_token_ids: \"3\" is not a list of numbers",
        ),
    ] {
        assert_eq!(error(&writer), want);
    }
}

#[test]
fn ends_are_ids_and_known_names() {
    let writer = Writer::new("x")
        .count("tokenizer.ggml.eos_token_id", 2)
        .count("tokenizer.ggml.eot_token_id", 2)
        .texts("tokenizer.ggml.tokens", &["<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>"])
        .counts("tokenizer.ggml.token_type", &[1, 3, 3, 3]);
    // The first is plain text that looks like one.
    assert_eq!(end_ids(open(&writer, None).metadata()).unwrap(), [2, 1, 3]);
    // A message's end is an answer's where nothing else is.
    let ends = |names: &[&str]| {
        let kinds = vec![3; names.len()];
        let writer = Writer::new("x").texts("tokenizer.ggml.tokens", names);
        end_ids(open(&writer.counts("tokenizer.ggml.token_type", &kinds), None).metadata()).unwrap()
    };
    assert_eq!(ends(&["<|end|>", "<|return|>", "<|call|>"]), [1, 2]);
    assert_eq!(ends(&["<|end|>", "<|return|>"]), [0, 1]);
}
