//! Shapes of models that the bench writes: their numbers in GGUF's words and the list of their tensors. Pure.

use crate::blocks::{Kind, Recipe};

/// A decoder's shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub name: &'static str,
    /// As `general.architecture` names it.
    pub architecture: &'static str,
    pub layers: usize,
    pub hidden: usize,
    /// Inner width of dense layers.
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub theta: f32,
    pub experts: Option<Experts>,
    pub latent: Option<Latent>,
    /// As gpt-oss: biases, sinks, a window in every other layer, a head of its own; in 8 bits whatever is no expert.
    pub oss: bool,
}

/// A mixture of experts in every layer but the first `dense`.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    pub count: usize,
    pub used: usize,
    pub inner: usize,
    pub shared: usize,
    pub dense: usize,
}

/// Multi-head latent attention.
#[derive(Clone, Copy, Debug)]
pub struct Latent {
    pub q_rank: usize,
    pub kv_rank: usize,
    pub plain: usize,
    pub rotary: usize,
    pub value: usize,
}

/// Shapes by name. The last three are cut down: few layers, so that they fit a small machine.
pub const SHAPES: [Shape; 6] = [
    Shape {
        name: "llama-3.2-1b",
        architecture: "llama",
        layers: 16,
        hidden: 2048,
        inner: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
        theta: 500_000.0,
        experts: None,
        latent: None,
        oss: false,
    },
    Shape {
        name: "qwen3-0.6b",
        architecture: "qwen3",
        layers: 28,
        hidden: 1024,
        inner: 3072,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocabulary: 151_936,
        theta: 1_000_000.0,
        experts: None,
        latent: None,
        oss: false,
    },
    Shape {
        name: "tiny",
        architecture: "qwen3",
        layers: 2,
        hidden: 256,
        inner: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocabulary: 4096,
        theta: 10_000.0,
        experts: None,
        latent: None,
        oss: false,
    },
    // Qwen3-30B-A3B with 6 of 48 layers and half of the experts.
    Shape {
        name: "qwen3-moe",
        architecture: "qwen3moe",
        layers: 6,
        hidden: 2048,
        inner: 6144,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        vocabulary: 32_768,
        theta: 1_000_000.0,
        experts: Some(Experts { count: 64, used: 8, inner: 768, shared: 0, dense: 0 }),
        latent: None,
        oss: false,
    },
    // DeepSeek V2 Lite's widths with 5 layers, q in two products as V3 has it.
    Shape {
        name: "deepseek",
        architecture: "deepseek2",
        layers: 5,
        hidden: 2048,
        inner: 8192,
        heads: 16,
        kv_heads: 1,
        head_dim: 192,
        vocabulary: 32_768,
        theta: 10_000.0,
        experts: Some(Experts { count: 64, used: 6, inner: 1024, shared: 2, dense: 1 }),
        latent: Some(Latent { q_rank: 1024, kv_rank: 512, plain: 128, rotary: 64, value: 128 }),
        oss: false,
    },
    // gpt-oss-20b's widths with 4 of 24 layers.
    Shape {
        name: "gpt-oss",
        architecture: "gpt-oss",
        layers: 4,
        hidden: 2880,
        inner: 2880,
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 32_768,
        theta: 150_000.0,
        experts: Some(Experts { count: 32, used: 4, inner: 2880, shared: 0, dense: 0 }),
        latent: None,
        oss: true,
    },
];

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    /// Innermost first, as GGUF has it.
    pub dims: Vec<usize>,
    pub kind: Kind,
    /// How much of it one token multiplies by, of `weight`: experts are used in part, a table not at all.
    pub share: f64,
}

impl Tensor {
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn bytes(&self) -> usize {
        self.kind.bytes(self.elements())
    }
}

/// A number or word of a file's header.
#[derive(Clone, Debug)]
pub enum Value {
    Count(u32),
    Number(f32),
    Flag(bool),
    Text(String),
}

impl Shape {
    /// The shape of that name.
    pub fn named(name: &str) -> Option<Shape> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// The header's keys.
    pub fn metadata(&self) -> Vec<(String, Value)> {
        let own = |key: &str| format!("{}.{key}", self.architecture);
        let count = |key: &str, n: usize| (own(key), Value::Count(n as u32));
        let mut all = vec![
            ("general.architecture".to_owned(), Value::Text(self.architecture.to_owned())),
            ("general.name".to_owned(), Value::Text(format!("{}, random", self.name))),
            ("tokenizer.ggml.model".to_owned(), Value::Text("no_vocab".to_owned())),
            count("vocab_size", self.vocabulary),
            count("block_count", self.layers),
            count("context_length", 131_072),
            count("embedding_length", self.hidden),
            count("feed_forward_length", self.inner),
            count("attention.head_count", self.heads),
            count("attention.head_count_kv", self.kv_heads),
            (own("attention.layer_norm_rms_epsilon"), Value::Number(1e-5)),
            (own("rope.freq_base"), Value::Number(self.theta)),
        ];
        match self.latent {
            None => {
                all.push(count("attention.key_length", self.head_dim));
                all.push(count("attention.value_length", self.head_dim));
                all.push(count("rope.dimension_count", self.head_dim));
            }
            Some(latent) => {
                all.push(count("attention.key_length", latent.kv_rank + latent.rotary));
                all.push(count("attention.value_length", latent.kv_rank));
                all.push(count("attention.key_length_mla", latent.plain + latent.rotary));
                all.push(count("attention.value_length_mla", latent.value));
                all.push(count("attention.q_lora_rank", latent.q_rank));
                all.push(count("attention.kv_lora_rank", latent.kv_rank));
                all.push(count("rope.dimension_count", latent.rotary));
            }
        }
        if let Some(experts) = self.experts {
            all.push(count("expert_count", experts.count));
            all.push(count("expert_used_count", experts.used));
            all.push(count("expert_feed_forward_length", experts.inner));
            if self.oss {
                all.push(count("attention.sliding_window", 128));
            } else {
                all.push((own("expert_weights_norm"), Value::Flag(true)));
            }
            if self.latent.is_some() {
                const SIGMOID: u32 = 2;
                all.push(count("leading_dense_block_count", experts.dense));
                all.push(count("expert_shared_count", experts.shared));
                all.push((own("expert_gating_func"), Value::Count(SIGMOID)));
                all.push((own("expert_weights_scale"), Value::Number(2.5)));
            }
        }
        all
    }

    /// The tensors in `recipe`'s formats.
    pub fn tensors(&self, recipe: Recipe) -> Vec<Tensor> {
        let mut all = Vec::new();
        let mut matrix = |name: String, cols: usize, rows: usize, kind: Kind, share: f64| {
            all.push(Tensor { name, dims: vec![cols, rows], kind, share });
        };
        // Tied in most: the table is the head too.
        let (head, share) = if self.oss { (Kind::Q8_0, 0.0) } else { (recipe.head(), 1.0) };
        matrix("token_embd.weight".into(), self.hidden, self.vocabulary, head, share);
        if self.oss {
            matrix("output.weight".into(), self.hidden, self.vocabulary, head, 1.0);
        }
        matrix("output_norm.weight".into(), self.hidden, 1, Kind::Norm, 0.0);
        for layer in 0..self.layers {
            self.layer(layer, recipe, &mut all);
        }
        for tensor in &mut all {
            if tensor.kind == Kind::Norm {
                tensor.dims.truncate(1);
            }
        }
        all
    }

    fn layer(&self, layer: usize, recipe: Recipe, all: &mut Vec<Tensor>) {
        let (hidden, kind, more) = (self.hidden, recipe.matrix(), recipe.finer(layer, self.layers));
        let mut add = |part: &str, dims: &[usize], kind: Kind, share: f64| {
            let name = format!("blk.{layer}.{part}.weight");
            all.push(Tensor { name, dims: dims.to_vec(), kind, share });
        };
        add("attn_norm", &[hidden], Kind::Norm, 0.0);
        add(if self.oss { "post_attention_norm" } else { "ffn_norm" }, &[hidden], Kind::Norm, 0.0);
        match self.latent {
            None => {
                let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
                let (kind, more) = if self.oss { (Kind::Q8_0, Kind::Q8_0) } else { (kind, more) };
                add("attn_q", &[hidden, q], kind, 1.0);
                add("attn_k", &[hidden, kv], kind, 1.0);
                add("attn_v", &[hidden, kv], more, 1.0);
                add("attn_output", &[q, hidden], kind, 1.0);
                if self.architecture.starts_with("qwen3") {
                    add("attn_q_norm", &[self.head_dim], Kind::Norm, 0.0);
                    add("attn_k_norm", &[self.head_dim], Kind::Norm, 0.0);
                }
            }
            Some(latent) => {
                let Latent { q_rank, kv_rank, plain, rotary, value } = latent;
                add("attn_q_a", &[hidden, q_rank], kind, 1.0);
                add("attn_q_a_norm", &[q_rank], Kind::Norm, 0.0);
                add("attn_q_b", &[q_rank, self.heads * (plain + rotary)], kind, 1.0);
                add("attn_kv_a_mqa", &[hidden, kv_rank + rotary], kind, 1.0);
                add("attn_kv_a_norm", &[kv_rank], Kind::Norm, 0.0);
                // Rows of 128 are too short for blocks of 256.
                let heads = recipe.short();
                add("attn_k_b", &[plain, kv_rank, self.heads], heads, 1.0);
                add("attn_v_b", &[kv_rank, value, self.heads], heads, 1.0);
                add("attn_output", &[self.heads * value, hidden], kind, 1.0);
            }
        }
        match self.experts.filter(|experts| layer >= experts.dense) {
            None => {
                add("ffn_gate", &[hidden, self.inner], kind, 1.0);
                add("ffn_up", &[hidden, self.inner], kind, 1.0);
                add("ffn_down", &[self.inner, hidden], more, 1.0);
            }
            Some(experts) => {
                let Experts { count, used, inner, shared, .. } = experts;
                let share = used as f64 / count as f64;
                add("ffn_gate_inp", &[hidden, count], Kind::F32, 1.0);
                add("ffn_gate_exps", &[hidden, inner, count], kind, share);
                add("ffn_up_exps", &[hidden, inner, count], kind, share);
                add("ffn_down_exps", &[inner, hidden, count], more, share);
                if shared > 0 {
                    add("ffn_gate_shexp", &[hidden, inner * shared], kind, 1.0);
                    add("ffn_up_shexp", &[hidden, inner * shared], kind, 1.0);
                    add("ffn_down_shexp", &[inner * shared, hidden], more, 1.0);
                }
                if self.oss {
                    add("attn_sinks", &[self.heads], Kind::F32, 0.0);
                    let mut bias = |part: &str, dims: &[usize]| {
                        let name = format!("blk.{layer}.{part}.bias");
                        all.push(Tensor { name, dims: dims.to_vec(), kind: Kind::F32, share: 0.0 });
                    };
                    let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
                    for (part, width) in [
                        ("attn_q", q),
                        ("attn_k", kv),
                        ("attn_v", kv),
                        ("attn_output", hidden),
                        ("ffn_gate_inp", count),
                    ] {
                        bias(part, &[width]);
                    }
                    for (part, width) in
                        [("ffn_gate_exps", inner), ("ffn_up_exps", inner), ("ffn_down_exps", hidden)]
                    {
                        bias(part, &[width, count]);
                    }
                }
                if self.latent.is_some() {
                    // DeepSeek V3's bias on the choice of experts: ones, which choose as none does.
                    let name = format!("blk.{layer}.exp_probs_b.bias");
                    all.push(Tensor { name, dims: vec![count], kind: Kind::Norm, share: 0.0 });
                }
            }
        }
    }

    /// Multiply-adds of one query over one position of the cache, all layers.
    pub fn attended(&self) -> f64 {
        let width = match self.latent {
            None => 2 * self.head_dim,
            Some(latent) => 2 * latent.kv_rank + latent.rotary,
        };
        (self.layers * self.heads * width) as f64
    }

    /// Bytes of a position's bf16 cache.
    pub fn cache_bytes(&self) -> f64 {
        let width = match self.latent {
            None => 2 * self.kv_heads * self.head_dim,
            Some(latent) => latent.kv_rank + latent.rotary,
        };
        (self.layers * width * 2) as f64
    }
}
