//! What `inspect` found, as text for people and JSON for programs. Pure.

use std::fmt::Write;

use hub::Bytes;
use models::Parameters;
use serde_json::{Value, json};

/// What one rank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    pub weight_bytes: u64,
    pub kv_bytes: u64,
}

/// What is known of a model.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As the user named it.
    pub model: String,
    /// Of a model on the hub.
    pub commit: Option<String>,
    /// Whether its files are on this machine.
    pub fetched: bool,
    pub architecture: String,
    pub parameters: Parameters,
    pub layers: usize,
    pub weight_bytes: u64,
    /// Formats of the weights, and bytes in each.
    pub formats: Vec<(String, u64)>,
    /// Longest sequence, in tokens.
    pub context: usize,
    pub kv_dtype: &'static str,
    /// Of the whole model.
    pub kv_token_bytes: u64,
    /// Tokens that every rank has room for.
    pub tokens: usize,
    pub ranks: Vec<Rank>,
    /// Of each rank's machine; `None` when nobody said and this machine does not tell.
    pub memory_bytes: Option<u64>,
}

impl Rank {
    fn bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.kv_bytes)
    }
}

impl Facts {
    /// Whether every rank has the memory, as far as known.
    pub fn fits(&self) -> bool {
        self.memory_bytes.is_none_or(|memory| self.ranks.iter().all(|rank| rank.bytes() <= memory))
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let commit = self.commit.as_ref().map_or(String::new(), |commit| format!(" at {commit}"));
        let fetched = if self.fetched { "" } else { " (not fetched; headers only)" };
        let mut line = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<14} {value}");
        };
        line("model", format!("{}{commit}{fetched}", self.model));
        line("architecture", format!("{}, {} layers", self.architecture, self.layers));
        let Parameters { total, active } = self.parameters;
        let shown = if active < total {
            format!("{}, {} active per token", count(total), count(active))
        } else {
            count(total)
        };
        line("parameters", shown);
        let formats: Vec<_> =
            self.formats.iter().map(|(format, bytes)| format!("{format} {}", Bytes(*bytes))).collect();
        line("weights", format!("{}: {}", Bytes(self.weight_bytes), formats.join(", ")));
        line("context", format!("{} tokens", self.context));
        let all = self.kv_token_bytes.saturating_mul(self.tokens as u64);
        let kv = format!(
            "{} per token in {}, {} for {} tokens",
            Bytes(self.kv_token_bytes),
            self.kv_dtype,
            Bytes(all),
            self.tokens
        );
        line("KV cache", kv);
        let _ = writeln!(
            text,
            "\nRANK  WEIGHTS    KV         TOGETHER   {}",
            self.memory_bytes.map_or(String::new(), |memory| format!("OF {}", Bytes(memory))).trim_end()
        );
        for (number, rank) in self.ranks.iter().enumerate() {
            let fits = match self.memory_bytes {
                Some(memory) if rank.bytes() <= memory => {
                    format!("fits, {} left", Bytes(memory - rank.bytes()))
                }
                Some(memory) => format!("does not fit: {} too much", Bytes(rank.bytes() - memory)),
                None => String::new(),
            };
            let columns =
                [rank.weight_bytes, rank.kv_bytes, rank.bytes()].map(|bytes| Bytes(bytes).to_string());
            let line = format!("{number:<5} {:<10} {:<10} {:<10} {fits}", columns[0], columns[1], columns[2]);
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text.push_str("\nEvery rank needs some memory more for activations, and the system for itself.\n");
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        let rank = |rank: &Rank| -> Value {
            json!({
                "weight_bytes": rank.weight_bytes,
                "kv_bytes": rank.kv_bytes,
                "bytes": rank.bytes(),
                "fits": self.memory_bytes.map(|memory| rank.bytes() <= memory),
            })
        };
        let format = |(format, bytes): &(String, u64)| json!({ "format": format, "bytes": bytes });
        let value = json!({
            "model": self.model,
            "commit": self.commit,
            "fetched": self.fetched,
            "architecture": self.architecture,
            "layers": self.layers,
            "parameters": { "total": self.parameters.total, "active": self.parameters.active },
            "weight_bytes": self.weight_bytes,
            "formats": self.formats.iter().map(format).collect::<Vec<_>>(),
            "context_tokens": self.context,
            "kv": { "dtype": self.kv_dtype, "token_bytes": self.kv_token_bytes, "tokens": self.tokens },
            "memory_bytes": self.memory_bytes,
            "ranks": self.ranks.iter().map(rank).collect::<Vec<_>>(),
            "fits": self.memory_bytes.map(|_| self.fits()),
        });
        format!("{value:#}\n")
    }
}

/// `596.0 M`, `235 B`, `1.03 T`.
fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        0..1_000_000 => format!("{number}"),
        1_000_000..1_000_000_000 => format!("{:.1} M", value / 1e6),
        1_000_000_000..1_000_000_000_000 => format!("{:.1} B", value / 1e9),
        _ => format!("{:.2} T", value / 1e12),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            model: "org/name".into(),
            commit: Some("abc".into()),
            fetched: false,
            architecture: "qwen3_moe".into(),
            parameters: Parameters { total: 235_100_000_000, active: 22_000_000_000 },
            layers: 94,
            weight_bytes: 470_200_000_000,
            formats: vec![("bf16".into(), 470_000_000_000), ("f32".into(), 200_000_000)],
            context: 40_960,
            kv_dtype: "bf16",
            kv_token_bytes: 192_512,
            tokens: 8_192,
            ranks: vec![
                Rank { weight_bytes: 120_000_000_000, kv_bytes: 400_000_000 },
                Rank { weight_bytes: 130_000_000_000, kv_bytes: 400_000_000 },
            ],
            memory_bytes: Some(128_000_000_000),
        }
    }

    /// The sums are shown, and the rank that is too small is named.
    #[test]
    fn text() {
        let facts = facts();
        assert!(!facts.fits());
        assert_eq!(
            facts.text(),
            "model          org/name at abc (not fetched; headers only)\n\
             architecture   qwen3_moe, 94 layers\n\
             parameters     235.1 B, 22.0 B active per token\n\
             weights        470.20 GB: bf16 470.00 GB, f32 200.0 MB\n\
             context        40960 tokens\n\
             KV cache       192.5 kB per token in bf16, 1.58 GB for 8192 tokens\n\
             \n\
             RANK  WEIGHTS    KV         TOGETHER   OF 128.00 GB\n\
             0     120.00 GB  400.0 MB   120.40 GB  fits, 7.60 GB left\n\
             1     130.00 GB  400.0 MB   130.40 GB  does not fit: 2.40 GB too much\n\
             \n\
             Every rank needs some memory more for activations, and the system for itself.\n"
        );
    }

    #[test]
    fn json() {
        let value: Value = serde_json::from_str(&facts().json()).expect("JSON");
        assert_eq!(value["ranks"][1]["fits"], false);
        assert_eq!(value["parameters"]["active"], 22_000_000_000u64);
        let unknown: Value =
            serde_json::from_str(&Facts { memory_bytes: None, ..facts() }.json()).expect("JSON");
        assert_eq!((&unknown["fits"], &unknown["ranks"][0]["fits"]), (&Value::Null, &Value::Null));
    }
}
