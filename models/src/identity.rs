//! What router, prefill and decode nodes compare when they meet: are these the same model? `graph` and `vocab` must be
//! equal for a handoff; `weights` may differ where the operator says so.

use std::fmt::Write;

use sha2::{Digest, Sha256};
use vocab::Vocab;

use crate::{Checkpoint, Config, ModelError};

/// Pages of a tensor that the identity of weights reads at most, and of all tensors together.
const PAGES_PER_TENSOR: usize = 16;
const PAGES_TOTAL: usize = 1 << 14;
const PAGE_BYTES: usize = 4096;

/// SHA-256 in hex, except `none` for the vocabulary of a model without a tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The architecture's numbers.
    pub graph: String,
    /// Ids to bytes, and special ids.
    pub vocab: String,
    /// Content and format of the weights.
    pub weights: String,
}

impl Identity {
    /// The identity of the model in `checkpoint`, with the tokenizer beside it.
    pub fn read(checkpoint: &Checkpoint) -> Result<Identity, ModelError> {
        let vocab = match checkpoint.dir().join("tokenizer.json").exists() {
            true => Vocab::read(checkpoint.dir())?.identity(),
            false => "none".into(),
        };
        Ok(Identity { graph: graph(checkpoint.config()), vocab, weights: weights(checkpoint)? })
    }
}

/// Hash of the numbers that decide what is computed, however a file writes them. What only concerns serving (context
/// length, end tokens) or storage (tied tables, element types) is left out.
pub fn graph(config: &Config) -> String {
    let c = config;
    let rope = c.rope.table(c.head_dim);
    let mut text = format!(
        "decoder 1 vocab {} hidden {} layers {} heads {} kv_heads {} head_dim {} ffn {} silu eps {:.4e} \
         qkv_bias {} o_bias {} mlp_bias {} qk_norm {} rope {:?} {:.4e}",
        c.vocab_size,
        c.hidden,
        c.layers,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.ffn,
        c.norm_eps,
        c.qkv_bias,
        c.o_bias,
        c.mlp_bias,
        c.qk_norm,
        rope.style,
        rope.factor,
    );
    // The table rather than its recipe: formats name the recipes differently, or store the table.
    for freq in rope.inv_freq.iter() {
        let _ = write!(text, " {freq:.4e}");
    }
    for window in &c.windows {
        let _ = write!(text, " {}", window.map_or(0, |window| window));
    }
    hex(Sha256::digest(text))
}

/// Hash of the tensor table (names, types, shapes; not which file holds what) and of a sample of every tensor: all
/// of a tensor of up to 16 pages of 4 KiB, else its first page, its last, and others evenly between. With very many tensors the
/// pages of each are fewer, at least one. Another training, quantisation or merge changes every page and is always seen; a
/// flipped bit on a page between the sampled ones is not. 64 MiB of a 140 GB checkpoint are read.
pub fn weights(checkpoint: &Checkpoint) -> Result<String, ModelError> {
    let tensors = checkpoint.tensors();
    let pages = (PAGES_TOTAL / tensors.len().max(1)).clamp(1, PAGES_PER_TENSOR);
    let mut hash = Sha256::new();
    hash.update(b"weights 1\n");
    if let Some(seed) = checkpoint.seed() {
        hash.update(format!("dummy {seed}\n"));
    }
    for (name, tensor) in tensors {
        hash.update(format!("{name} {} {:?}\n", tensor.dtype, tensor.shape));
        let len = checkpoint.file_len(tensor);
        for start in sample(len as usize, pages) {
            let start = start as u64;
            hash.update(checkpoint.file_bytes(tensor, start..len.min(start + PAGE_BYTES as u64))?);
        }
    }
    Ok(hex(hash.finalize()))
}

/// Where the pages to read of a tensor of `len` bytes begin; each is `PAGE_BYTES`, or the rest of the tensor. All of it
/// where it has no more than `pages`.
fn sample(len: usize, pages: usize) -> Vec<usize> {
    if len <= pages * PAGE_BYTES {
        return (0..len).step_by(PAGE_BYTES).collect();
    }
    let last = len - PAGE_BYTES;
    match pages {
        1 => vec![last / 2],
        _ => (0..pages).map(|page| (last as u128 * page as u128 / (pages as u128 - 1)) as usize).collect(),
    }
}

fn hex(digest: impl IntoIterator<Item = u8>) -> String {
    digest.into_iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_span_the_tensor_within_the_bound() {
        assert_eq!(sample(0, 16), Vec::<usize>::new());
        assert_eq!(sample(PAGE_BYTES + 1, 16), [0, PAGE_BYTES]);
        for len in [16 * PAGE_BYTES, 16 * PAGE_BYTES + 1, 1 << 20, 999_999_999] {
            let pages = sample(len, 16);
            assert_eq!((pages.len(), pages[0], pages[15]), (16, 0, len - PAGE_BYTES));
            assert!(pages.windows(2).all(|pair| pair[1] >= pair[0] + PAGE_BYTES), "{pages:?}");
        }
        assert_eq!(sample(1 << 20, 1), [(1 << 19) - 2048]);
    }

    #[test]
    fn the_graph_is_the_math_and_nothing_else() {
        let json = r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096, "rope_theta": 10000.0}"#;
        let of = |json: &str| graph(&Config::parse("c", json.as_bytes()).unwrap());
        let base = of(json);
        assert_eq!(base.len(), 64);
        let same = [
            (
                "\"rope_theta\": 10000.0",
                "\"rope_parameters\": {\"rope_theta\": 10000, \"rope_type\": \"default\"}",
            ),
            ("4096", "8192"),
            (
                "\"num_attention_heads\": 4",
                "\"num_attention_heads\": 4, \"num_key_value_heads\": 4, \"head_dim\": 16",
            ),
            (
                "\"vocab_size\": 512",
                "\"vocab_size\": 512, \"tie_word_embeddings\": true, \"eos_token_id\": 3",
            ),
        ];
        for (from, to) in same {
            assert_eq!(of(&json.replace(from, to)), base, "{to}");
        }
        let other = [
            ("\"rope_theta\": 10000.0", "\"rope_theta\": 500000.0"),
            ("\"vocab_size\": 512", "\"vocab_size\": 513"),
            ("\"vocab_size\": 512", "\"vocab_size\": 512, \"rms_norm_eps\": 1e-5"),
            ("\"vocab_size\": 512", "\"vocab_size\": 512, \"attention_bias\": true"),
            ("160", "161"),
        ];
        for (from, to) in other {
            assert_ne!(of(&json.replace(from, to)), base, "{to}");
        }
    }
}
