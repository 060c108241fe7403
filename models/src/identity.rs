//! What router, prefill and decode nodes compare when they meet: are these the same model? `graph` and `vocab` must be
//! equal for a handoff; `weights` may differ where the operator says so.

use std::fmt::Write;

use backend::Glu;
use sha2::{Digest, Sha256};
use vocab::{TokenizerJson, Vocab};

use crate::{Attention, Checkpoint, Config, HeadNorm, ModelError};

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
        let vocab = match TokenizerJson::read(checkpoint.path())? {
            Some(_) => Vocab::read(checkpoint.path())?.identity(),
            None => "none".into(),
        };
        Ok(Identity { graph: graph(checkpoint.config()), vocab, weights: weights(checkpoint)? })
    }
}

/// Hash of the numbers that decide what is computed, however a file writes them. What only concerns serving (context
/// length, end tokens) or storage (tied tables, element types, quantisation, which rows pair for the rotation) is left
/// out.
pub fn graph(config: &Config) -> String {
    let c = config;
    // Some families give a width that no layer has.
    let ffn = if c.has_dense_layers() { c.ffn } else { 0 };
    let mut text = format!(
        "decoder 2 vocab {} hidden {} layers {} heads {} ffn {} silu bias {} eps {:.4e}",
        c.vocab_size, c.hidden, c.layers, c.heads, ffn, c.mlp_bias, c.norm_eps,
    );
    let rope = c.rope.table();
    let _ = write!(text, " rope {:.4e}", rope.factor);
    // The table rather than its recipe: formats name the recipes differently, or store the table.
    for freq in rope.inv_freq.iter() {
        let _ = write!(text, " {freq:.4e}");
    }
    match &c.attention {
        Attention::Grouped(g) => {
            let norm = g.qk_norm.map_or("no", |norm| match norm {
                HeadNorm::Head => "head",
                HeadNorm::Projection => "projection",
            });
            let _ = write!(
                text,
                " grouped {} of {} qkv_bias {} o_bias {} norm {norm} windows",
                g.kv_heads, g.head_dim, g.qkv_bias, g.o_bias
            );
            for window in &g.windows {
                let _ = write!(text, " {}", window.unwrap_or(0));
            }
            if g.sinks {
                text.push_str(" sinks");
            }
        }
        Attention::Latent(l) => {
            let _ = write!(
                text,
                " latent {} from {} nope {} rope {} value {} bias {} scale {:.4e}",
                l.latent_dim,
                l.q_rank.unwrap_or(0),
                l.nope_dim,
                l.rope_dim,
                l.value_dim,
                l.bias,
                l.scale
            );
        }
    }
    if let Some(e) = &c.experts {
        let r = &e.routing;
        let (groups, used) = r.groups.unwrap_or((1, 1));
        let _ = write!(
            text,
            " experts {} of {} width {} shared {} {:?} bias {} groups {used} of {groups} normalise {} {:.4e} \
             scale {:.4e} layers",
            r.top_k,
            r.experts,
            e.width,
            e.shared_width,
            r.score,
            e.choice_bias,
            r.normalise,
            r.normalise_eps,
            r.scale
        );
        for sparse in &e.layers {
            text.push_str(if *sparse { " e" } else { " d" });
        }
        if e.biases {
            text.push_str(" biases");
        }
        if let Glu::Clamped { limit, slope } = e.glu {
            let _ = write!(text, " clamped {limit:.4e} {slope:.4e}");
        }
    }
    hex(Sha256::digest(text))
}

/// Hash of the tensor table (names, formats, shapes; not which file holds what) and of a sample of every tensor: all
/// of a tensor of up to 16 pages of 4 KiB, else its first page, its last, and others evenly between. With very many tensors the
/// pages of each are fewer, and with more tensors than pages some have none. Another training, quantisation or merge changes
/// every page and is always seen; a flipped bit on a page between the sampled ones is not. 64 MiB of a 140 GB checkpoint are read.
pub fn weights(checkpoint: &Checkpoint) -> Result<String, ModelError> {
    let tensors = checkpoint.tensors();
    let count = tensors.len().max(1);
    let pages = (PAGES_TOTAL / count).clamp(1, PAGES_PER_TENSOR);
    // Every layer repeats its kinds of tensors: a step that shares no factor with their number meets all of them.
    let every = (count.div_ceil(PAGES_TOTAL)..).find(|step| step % 2 == 1 && (step % 3 != 0)).unwrap_or(1);
    let mut hash = Sha256::new();
    hash.update(b"weights 2\n");
    if let Some(seed) = checkpoint.seed() {
        hash.update(format!("dummy {seed}\n"));
    }
    for (number, (name, tensor)) in tensors.enumerate() {
        hash.update(format!("{name} {} {:?}\n", tensor.stored.format(), tensor.stored.shape));
        if checkpoint.seed().is_some() || number % every != 0 {
            continue;
        }
        for place in tensor.stored.places() {
            for start in sample(place.len() as usize, pages) {
                let start = start as u64;
                hash.update(checkpoint.file_bytes(place, start..place.len().min(start + PAGE_BYTES as u64))?);
            }
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
            (
                "\"vocab_size\": 512",
                "\"vocab_size\": 512, \"quantization\": {\"group_size\": 32, \"bits\": 4}",
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
