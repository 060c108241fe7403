//! The vocabulary in a GGUF file's metadata as a tokenizer.json: byte-level BPE (`gpt2`) and SentencePiece's (`llama`).

use std::collections::HashMap;

use gguf::Metadata;

use crate::VocabError;
use crate::split::split;
use crate::tokenizer::{Around, Entry, byte_level, sentencepiece};

/// Kinds of tokens (`tokenizer.ggml.token_type`).
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER: u64 = 4;
const UNUSED: u64 = 5;

/// Longest token in bytes; the longest known are 256 spaces.
const TOKEN_BYTES_MAX: usize = 1024;

/// Qwen's published vocabularies are larger than this. Their tokenizers compose characters (NFC), which a GGUF file does
/// not say.
const QWEN_TOKENS_MIN: usize = 150_000;

/// The text of a tokenizer.json that means what the vocabulary in `metadata` means. Errors when there is none, or one of a
/// kind that is not supported.
pub(crate) fn tokenizer(metadata: &Metadata) -> Result<Vec<u8>, VocabError> {
    // Some writers put the whole file there.
    if let Some(json) = metadata.text("tokenizer.huggingface.json")? {
        return Ok(json.into());
    }
    let missing = |key: &str| metadata.error(key, "missing");
    let key = "tokenizer.ggml.tokens";
    let tokens = metadata.texts(key)?.ok_or_else(|| missing(key))?;
    // Every cut of a token is tried as a merge.
    if let Some(token) = tokens.iter().find(|token| token.len() > TOKEN_BYTES_MAX) {
        return Err(metadata
            .error(key, format!("a token of {} bytes, at most {TOKEN_BYTES_MAX}", token.len()))
            .into());
    }
    let key = "tokenizer.ggml.token_type";
    let kinds: Vec<u64> = match metadata.numbers(key)? {
        Some(kinds) if kinds.len() != tokens.len() => {
            return Err(metadata.error(key, format!("{} for {} tokens", kinds.len(), tokens.len())).into());
        }
        Some(kinds) => kinds.into_iter().map(|kind| kind as u64).collect(),
        None => vec![NORMAL; tokens.len()],
    };
    let entries: Vec<Entry> = (0..)
        .zip(tokens.iter().zip(&kinds))
        .filter(|(_, (_, kind))| **kind != UNUSED)
        .map(|(id, (text, kind))| Entry { id, text: text.clone(), added: added(*kind) })
        .collect();
    let mut seen = HashMap::new();
    for entry in &entries {
        if let Some(before) = seen.insert(entry.text.as_str(), entry.id) {
            let reason = format!("{:?} is both {before} and {}", entry.text, entry.id);
            return Err(metadata.error("tokenizer.ggml.tokens", reason).into());
        }
    }
    let key = "tokenizer.ggml.model";
    match metadata.text(key)?.ok_or_else(|| missing(key))? {
        "gpt2" => bpe(metadata, &entries, tokens),
        "llama" => pieces(metadata, &entries, tokens, &kinds),
        other => {
            let reason = format!("{other:?} is not supported (known: gpt2, llama)");
            Err(metadata.error(key, reason).into())
        }
    }
}

fn added(kind: u64) -> Option<bool> {
    match kind {
        CONTROL | UNKNOWN => Some(true),
        USER => Some(false),
        _ => None,
    }
}

fn bpe(metadata: &Metadata, entries: &[Entry], tokens: &[String]) -> Result<Vec<u8>, VocabError> {
    let key = "tokenizer.ggml.pre";
    let name = metadata.text(key)?.unwrap_or("default");
    let split = split(name).map_err(|reason| metadata.error(key, reason))?;
    let key = "tokenizer.ggml.merges";
    let lines = metadata.texts(key)?.ok_or_else(|| metadata.error(key, "missing"))?;
    let mut merges = Vec::with_capacity(lines.len());
    for line in lines {
        // The left part may begin with a space, and be nothing else.
        let at = line.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let Some(at) = at else {
            return Err(metadata.error(key, format!("{line:?} is no pair")).into());
        };
        merges.push((line[..at].to_owned(), line[at + 1..].to_owned()));
    }
    let around = around(metadata, tokens, split.begin)?;
    let compose = name == "qwen2" && tokens.len() >= QWEN_TOKENS_MIN;
    Ok(byte_level(entries, merges, split, compose, around))
}

/// SentencePiece merges whatever pair makes the piece of the highest score: its merges are all pairs whose join is a piece,
/// best first. Order as transformers' conversion has it.
fn pieces(
    metadata: &Metadata,
    entries: &[Entry],
    tokens: &[String],
    kinds: &[u64],
) -> Result<Vec<u8>, VocabError> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata.numbers(key)?.ok_or_else(|| metadata.error(key, "missing"))?;
    if scores.len() != tokens.len() {
        return Err(metadata.error(key, format!("{} for {} tokens", scores.len(), tokens.len())).into());
    }
    let normal = (0usize..).zip(tokens).filter(|(id, _)| kinds[*id] == NORMAL);
    let ids: HashMap<&str, usize> = normal.clone().map(|(id, text)| (text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, text) in normal {
        let pairs = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let mut pairs: Vec<(&str, &str)> =
            pairs.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right)).collect();
        pairs.sort_by_key(|(left, right)| (ids[left], ids[right]));
        merges.extend(pairs.into_iter().map(|(left, right)| (scores[id], left, right)));
    }
    let chars = |text: &str| text.chars().count();
    merges.sort_by(|a, b| {
        let lengths = |merge: &(f64, &str, &str)| (chars(merge.1), chars(merge.2));
        b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a)))
    });
    let merges = merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect();
    let unknown = kinds.iter().position(|kind| *kind == UNKNOWN).map(|id| tokens[id].clone());
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(sentencepiece(entries, merges, unknown, prefix, around(metadata, tokens, true)?))
}

fn around(metadata: &Metadata, tokens: &[String], begin: bool) -> Result<Around, VocabError> {
    let token = |flag: &str, default: bool, key: &str| -> Result<Option<(u32, String)>, VocabError> {
        if !metadata.flag(flag)?.unwrap_or(default) {
            return Ok(None);
        }
        let Some(id) = metadata.count(key)? else { return Ok(None) };
        match usize::try_from(id).ok().and_then(|at| tokens.get(at)) {
            Some(text) => Ok(Some((id as u32, text.clone()))),
            None => Err(metadata.error(key, format!("{id} of {} tokens", tokens.len())).into()),
        }
    };
    Ok(Around {
        begin: token("tokenizer.ggml.add_bos_token", begin, "tokenizer.ggml.bos_token_id")?,
        end: token("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id")?,
    })
}
