//! The readers that meet strangers' files, with good files to start from.

use gguf::{Gguf, Header, config_json};
use vocab::{TokenizerJson, Vocab};

use crate::writer::Writer;

/// A reader.
pub struct Target {
    /// On the command line.
    pub name: &'static str,
    /// Good files.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Reads the first bytes of a file of so many bytes; whether it was taken.
    pub read: fn(&[u8], u64) -> bool,
    /// Bytes of memory that one byte of a file may take, and those that any file may.
    memory: (u64, u64),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "safetensors", seeds: safetensors, read: read_safetensors, memory: (64, 1 << 16) },
    Target { name: "quantised", seeds: quantised, read: read_quantised, memory: (512, 1 << 18) },
    Target { name: "gguf", seeds: gguf, read: read_gguf, memory: (64, 1 << 16) },
    Target { name: "gguf-model", seeds: gguf, read: read_gguf_model, memory: (4096, 1 << 21) },
    Target { name: "tokenizer", seeds: tokenizer, read: read_tokenizer, memory: (512, 1 << 20) },
    Target { name: "config", seeds: config, read: read_config, memory: (256, 1 << 20) },
];

impl Target {
    /// The target of that name.
    pub fn named(name: &str) -> Option<&'static Target> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// The same seeds and bounds for another reader.
    pub fn with(&self, name: &'static str, read: fn(&[u8], u64) -> bool) -> Target {
        Target { name, read, ..*self }
    }

    /// Most bytes of memory for a file of `len` bytes.
    pub fn bytes_max(&self, len: u64) -> u64 {
        self.memory.0 * len + self.memory.1
    }
}

fn read_safetensors(bytes: &[u8], len: u64) -> bool {
    let Ok(table) = models::safetensors_table("f", bytes, len) else { return false };
    // What was promised: places inside the file, none twice.
    let mut places: Vec<_> = table.iter().map(|entry| (entry.range.start, entry.range.end)).collect();
    places.sort_unstable();
    assert!(places.iter().all(|(start, end)| start <= end && *end <= len));
    let taken: Vec<_> = places.iter().filter(|(start, end)| start < end).collect();
    assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    true
}

/// What the tensors of a file are under every configuration that quantises.
fn read_quantised(bytes: &[u8], len: u64) -> bool {
    let sizes = r#""vocab_size":8,"hidden_size":8,"intermediate_size":8,"num_hidden_layers":1,"num_attention_heads":1,"max_position_embeddings":8"#;
    let taken = METHODS.iter().map(|method| {
        let config = format!(r#"{{"model_type":"llama",{sizes},{method}}}"#);
        let config = models::Config::parse("c", config.as_bytes()).expect("a good configuration");
        let Ok(weights) = models::safetensors_weights("f", bytes, len, &config) else { return false };
        // Numbers of a group of 8 codes of 2 bits are 8 bytes where the file has 2.
        let held = weights.iter().fold(0u64, |all, (_, bytes)| all.saturating_add(*bytes));
        assert!(held <= len.saturating_mul(4), "{held} bytes of a file of {len}: {weights:?}");
        weights
            .iter()
            .any(|(name, _)| ["fp8", "fp4", "bit", "int4"].iter().any(|format| name.contains(format)))
    });
    // Each is tried.
    taken.filter(|taken| *taken).count() > 0
}

/// How checkpoints of [`quantised`] say what they are.
const METHODS: [&str; 10] = [
    r#""quantization":{"bits":4,"group_size":8}"#,
    r#""quantization_config":{"quant_method":"fp8","weight_block_size":[2,8]}"#,
    r#""quantization_config":{"quant_method":"modelopt","quant_algo":"FP8"}"#,
    r#""quantization":{"mode":"nvfp4","a.w":{"mode":"mxfp4"}}"#,
    r#""quantization":{"mode":"mxfp8"}"#,
    r#""quantization_config":{"quant_method":"modelopt","quant_algo":"NVFP4","group_size":8}"#,
    r#""quantization_config":{"quant_method":"awq","bits":4,"group_size":8}"#,
    r#""quantization_config":{"quant_method":"gptq","bits":2,"group_size":8}"#,
    r#""quantization_config":{"quant_method":"mxfp4"}"#,
    r#""quantization_config":{"quant_method":"compressed-tensors","config_groups":{
        "a":{"weights":{"num_bits":4,"type":"int","strategy":"group","group_size":8}},
        "b":{"weights":{"num_bits":8,"type":"int","strategy":"channel"}},
        "c":{"weights":{"num_bits":8,"type":"float","strategy":"channel"}},
        "d":{"weights":{"num_bits":4,"type":"float","strategy":"group","group_size":16}}}}"#,
];

fn read_gguf(bytes: &[u8], len: u64) -> bool {
    let Ok(header) = Header::parse("f", bytes, len) else { return false };
    let mut places: Vec<_> =
        header.tensors.iter().map(|tensor| (tensor.range.start, tensor.range.end)).collect();
    places.sort_unstable();
    assert!(places.iter().all(|(start, end)| start < end && *end <= len));
    assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    true
}

/// What follows on a header that was read: numbers, vocabulary, end tokens.
fn read_gguf_model(bytes: &[u8], len: u64) -> bool {
    let Ok(header) = Header::parse("f", bytes, len) else { return false };
    // Rotary divisors come from the file as well: any bits do.
    let divisors = bytes.chunks_exact(4).take(8).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let gguf = Gguf::without_file(
        header,
        bytes.last().is_some_and(|last| last % 2 == 0).then(|| divisors.collect()),
    );
    let config = config_json(&gguf).map(|config| models::Config::parse("f", config.to_string().as_bytes()));
    let json = TokenizerJson::of_gguf(&gguf);
    let vocab = json.map(|json| Vocab::from_tokenizer_json(&json));
    let ends = gguf::end_ids(gguf.metadata());
    matches!((config, vocab, ends), (Ok(Ok(_)), Ok(Ok(_)), Ok(_)))
}

fn read_tokenizer(bytes: &[u8], _: u64) -> bool {
    Vocab::from_tokenizer_json(bytes).is_ok()
}

fn read_config(bytes: &[u8], _: u64) -> bool {
    models::Config::parse("f", bytes).is_ok()
}

fn safetensors() -> Vec<Vec<u8>> {
    let file = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend([0; 64]);
        bytes
    };
    vec![
        file(
            r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"c":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[40,40]}}"#,
        ),
        file(r#"{"x":{"dtype":"U32","shape":[],"data_offsets":[60,64]}}"#),
    ]
}

/// A matrix for each of [`METHODS`], and more of the last.
fn quantised() -> Vec<Vec<u8>> {
    let file = |tensors: &[(&str, &str, &[u64], u64)]| {
        let (mut lines, mut end) = (Vec::new(), 0);
        for (name, dtype, shape, item) in tensors {
            let start = end;
            end += shape.iter().product::<u64>() * item;
            lines.push(format!(
                r#""w.{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
            ));
        }
        let header = format!("{{{}}}", lines.join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.resize(bytes.len() + end as usize, 0);
        bytes
    };
    vec![
        file(&[("weight", "U32", &[8, 2], 4), ("scales", "F16", &[8, 2], 2), ("biases", "F16", &[8, 2], 2)]),
        file(&[
            ("experts.d_blocks", "U8", &[2, 4, 1, 16], 1),
            ("experts.d_scales", "U8", &[2, 4, 1], 1),
            ("experts.d_bias", "F32", &[2, 4], 4),
        ]),
        file(&[("weight", "F8_E4M3", &[4, 16], 1), ("weight_scale_inv", "F32", &[2, 2], 4)]),
        file(&[
            ("weight", "F8_E4M3", &[4, 16], 1),
            ("weight_scale", "F32", &[], 4),
            ("input_scale", "F32", &[], 4),
        ]),
        file(&[
            ("qweight", "I32", &[16, 1], 4),
            ("qzeros", "I32", &[2, 1], 4),
            ("scales", "F16", &[2, 8], 2),
        ]),
        file(&[
            ("qweight", "I32", &[1, 16], 4),
            ("qzeros", "I32", &[2, 1], 4),
            ("scales", "F16", &[2, 16], 2),
            ("g_idx", "I32", &[16], 4),
        ]),
        file(&[
            ("weight_packed", "I32", &[8, 2], 4),
            ("weight_scale", "BF16", &[8, 2], 2),
            ("weight_zero_point", "I32", &[1, 2], 4),
            ("weight_shape", "I64", &[2], 8),
        ]),
        file(&[("weight_packed", "I32", &[8, 4], 4), ("weight_scale", "BF16", &[8, 1], 2)]),
        file(&[("weight", "I8", &[4, 16], 1), ("weight_scale", "BF16", &[4, 1], 2)]),
        file(&[("weight", "F8_E4M3", &[4, 16], 1), ("weight_scale", "BF16", &[4, 1], 2)]),
        file(&[("weight", "U32", &[4, 4], 4), ("scales", "U8", &[4, 2], 1)]),
        file(&[("weight", "U32", &[4, 8], 4), ("scales", "U8", &[4, 1], 1)]),
        file(&[
            ("weight", "U8", &[4, 8], 1),
            ("weight_scale", "F8_E4M3", &[4, 2], 1),
            ("weight_scale_2", "F32", &[], 4),
        ]),
        file(&[("weight_packed", "U8", &[4, 8], 1), ("weight_scale", "U8", &[4, 1], 1)]),
    ]
}

fn gguf() -> Vec<Vec<u8>> {
    let base = |architecture: &str| {
        let key = |key: &str| format!("{architecture}.{key}");
        Writer::new(architecture)
            .count(&key("block_count"), 2)
            .count(&key("context_length"), 4096)
            .count(&key("embedding_length"), 64)
            .count(&key("feed_forward_length"), 160)
            .count(&key("attention.head_count"), 4)
            .counts(&key("attention.head_count_kv"), &[2, 2])
            .number(&key("attention.layer_norm_rms_epsilon"), 1e-6)
            .number(&key("rope.freq_base"), 1e6)
            .count(&key("rope.dimension_count"), 16)
            .flag("tokenizer.ggml.add_bos_token", true)
            .count("tokenizer.ggml.bos_token_id", 3)
            .count("tokenizer.ggml.eos_token_id", 3)
            .texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<|end|>"])
            .counts("tokenizer.ggml.token_type", &[1, 1, 1, 3])
            .ones("token_embd.weight", &[4, 64])
    };
    let bpe = base("llama").text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "llama-bpe");
    let pieces = base("qwen2")
        .text("tokenizer.ggml.model", "llama")
        .numbers("tokenizer.ggml.scores", &[-1.0, -2.0, -3.0, 0.0]);
    let latent = base("deepseek2")
        .count("deepseek2.attention.q_lora_rank", 48)
        .count("deepseek2.attention.kv_lora_rank", 32)
        .count("deepseek2.attention.key_length", 48)
        .count("deepseek2.attention.value_length", 32)
        .count("deepseek2.attention.key_length_mla", 32)
        .count("deepseek2.attention.value_length_mla", 24)
        .count("deepseek2.expert_count", 8)
        .count("deepseek2.expert_used_count", 2)
        .count("deepseek2.expert_feed_forward_length", 48)
        .text("deepseek2.rope.scaling.type", "yarn")
        .number("deepseek2.rope.scaling.factor", 40.0)
        .number("deepseek2.rope.scaling.yarn_log_multiplier", 0.1)
        .count("deepseek2.expert_gating_func", 2)
        .text("tokenizer.ggml.model", "gpt2")
        .texts("tokenizer.ggml.merges", &["a b"])
        .ones("blk.1.exp_probs_b.bias", &[8]);
    [bpe.texts("tokenizer.ggml.merges", &["a b"]).tensor("q", &[2, 32], 8, vec![7; 68]), pieces, latent]
        .iter()
        .map(Writer::bytes)
        .collect()
}

fn tokenizer() -> Vec<Vec<u8>> {
    let level = r#"{"added_tokens":[{"id":2,"content":"<|end|>","special":true}],"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[["a","b"]]}}"#;
    let unigram = r#"{"decoder":{"type":"Metaspace"},"model":{"type":"Unigram","byte_fallback":true,"vocab":[["<0x0A>",-1.0],["▁a",-2]]}}"#;
    vec![level.into(), unigram.into()]
}

fn config() -> Vec<Vec<u8>> {
    let sizes = r#""vocab_size":512,"hidden_size":64,"intermediate_size":160,"num_hidden_layers":3,"num_attention_heads":4,"max_position_embeddings":4096"#;
    let latent = r#""kv_lora_rank":32,"qk_nope_head_dim":16,"qk_rope_head_dim":16,"v_head_dim":24,"q_lora_rank":48,"moe_intermediate_size":48,"n_routed_experts":16,"num_experts_per_tok":3,"n_group":4,"topk_group":2,"n_shared_experts":2,"first_k_dense_replace":1,"routed_scaling_factor":2.5"#;
    let scaling =
        r#""rope_scaling":{"type":"yarn","factor":8,"mscale":1.0,"original_max_position_embeddings":64}"#;
    vec![
        format!(r#"{{"model_type":"llama",{sizes},"eos_token_id":[1,2],{scaling}}}"#).into(),
        format!(r#"{{"model_type":"deepseek_v3",{sizes},{latent}}}"#).into(),
        format!(r#"{{"model_type":"qwen3","num_key_value_heads":2,{sizes},"quantization":{{"bits":4,"group_size":32,"a":false}}}}"#)
            .into(),
        format!(r#"{{"model_type":"llama",{sizes},{}}}"#, METHODS[4]).into(),
        format!(r#"{{"model_type":"llama",{sizes},{}}}"#, METHODS[5]).into(),
    ]
}
