//! A tiktoken.model (Kimi K2) as a tokenizer.json. Each line is a token, base64 of its bytes, and its rank, which is its id.
//! Source: `tokenization_kimi.py` of the model.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use crate::pieces::byte_char;
use crate::split::KIMI_K2;
use crate::tokenizer::{Around, Entry, byte_level};

/// Ids that are kept for control tokens behind the ranks.
const RESERVED: u32 = 256;

/// Longest token in bytes; pairs of every cut are tried.
const TOKEN_BYTES_MAX: usize = 1024;

#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, Added>,
}

#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Default, Deserialize)]
struct Model {
    vocab_size: Option<u32>,
}

/// The tokenizer.json of the ranks in `text`, of the added tokens in the tokenizer_config.json `config`, and of the reserved
/// ids below the vocabulary of the config.json `model`. The error is one line without the file's name.
pub(crate) fn tokenizer(text: &[u8], config: Option<&[u8]>, model: Option<&[u8]>) -> Result<Vec<u8>, String> {
    let named = |name: &str, error: serde_json::Error| format!("{name} beside it: {error}");
    let config: Config = match config {
        Some(json) => serde_json::from_slice(json).map_err(|error| named("tokenizer_config.json", error))?,
        None => Config::default(),
    };
    let model: Model = match model {
        Some(json) => serde_json::from_slice(json).map_err(|error| named("config.json", error))?,
        None => Model::default(),
    };
    let ranks = ranks(text)?;
    let base = ranks.last().map_or(0, |(rank, _)| rank + 1);
    let by_bytes: HashMap<&[u8], u32> = ranks.iter().map(|(rank, bytes)| (bytes.as_slice(), *rank)).collect();
    if by_bytes.len() < ranks.len() {
        return Err("a token is there twice".into());
    }
    let mut entries: Vec<Entry> =
        ranks.iter().map(|(rank, bytes)| Entry { id: *rank, text: shown(bytes), added: None }).collect();
    // tiktoken joins the pair whose join has the lowest rank: every pair that makes a token is a merge, in order of rank.
    let mut merges = Vec::new();
    for (_, bytes) in &ranks {
        let pairs = (1..bytes.len()).map(|at| bytes.split_at(at));
        let mut pairs: Vec<(u32, u32, &[u8], &[u8])> = pairs
            .filter_map(|(left, right)| Some((*by_bytes.get(left)?, *by_bytes.get(right)?, left, right)))
            .collect();
        pairs.sort();
        merges.extend(pairs.into_iter().map(|(_, _, left, right)| (shown(left), shown(right))));
    }
    for (id, token) in &config.added_tokens_decoder {
        if *id < base {
            return Err(format!("added token {:?} has id {id}, which is a rank", token.content));
        }
        entries.push(Entry { id: *id, text: token.content.clone(), added: Some(token.special) });
    }
    let reserved = base..base.saturating_add(RESERVED).min(model.vocab_size.unwrap_or(0));
    for id in reserved.filter(|id| !config.added_tokens_decoder.contains_key(id)) {
        entries.push(Entry { id, text: format!("<|reserved_token_{id}|>"), added: Some(true) });
    }
    Ok(byte_level(&entries, merges, KIMI_K2, false, Around::default()))
}

/// Tokens in order of rank.
fn ranks(text: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, String> {
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    let mut ranks = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parsed = line.split_once(' ').and_then(|(token, rank)| {
            let bytes = base64(token).filter(|bytes| (1..=TOKEN_BYTES_MAX).contains(&bytes.len()))?;
            Some((rank.trim().parse().ok().filter(|rank| *rank < crate::MAX_IDS)?, bytes))
        });
        ranks.push(parsed.ok_or_else(|| format!("line {}: not a token in base64 and its rank", number + 1))?);
    }
    ranks.sort();
    match ranks.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(format!("two tokens have rank {}", pair[0].0)),
        None => Ok(ranks),
    }
}

/// A token as byte-level BPE writes it.
fn shown(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| byte_char(*byte)).collect()
}

/// The bytes of a text in base64 with padding (RFC 4648, section 4); `None` when it is none.
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.len() - text.iter().rev().take(2).take_while(|c| **c == b'=').count();
    let value = |c: &u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for four in text[..digits].chunks(4) {
        let mut word = 0u32;
        for c in four {
            word = word << 6 | u32::from(value(c)?);
        }
        word <<= 6 * (4 - four.len());
        bytes.extend(&word.to_be_bytes()[1..four.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vocab;

    /// a, b, ab, and a byte that is no character.
    const RANKS: &str = "YQ== 0\nYg== 1\nYWI= 2\n/w== 3\n";

    #[test]
    fn ranks_added_tokens_and_reserved_ids_are_the_vocabulary() {
        let config = r#"{"added_tokens_decoder": {"4": {"content": "[BOS]", "special": true}, "5": {"content": "<think>"}}}"#;
        let json =
            tokenizer(RANKS.as_bytes(), Some(config.as_bytes()), Some(br#"{"vocab_size": 7}"#)).unwrap();
        let vocab = Vocab::from_tokenizer_json(&json).unwrap();
        let all: Vec<_> = (0..7).map(|id| vocab.bytes(id).unwrap()).collect();
        assert_eq!(all, [&b"a"[..], b"b", b"ab", &[0xff], b"[BOS]", b"<think>", b"<|reserved_token_6|>"]);
        assert_eq!(vocab.special_ids(), [4, 6]);
    }

    #[test]
    fn broken_lines_are_numbered() {
        let error = |text: &str| tokenizer(text.as_bytes(), None, None).unwrap_err();
        assert_eq!(error("YQ== 0\nYQ= 1"), "line 2: not a token in base64 and its rank");
        assert_eq!(error("YQ== x"), "line 1: not a token in base64 and its rank");
        assert_eq!(error("YQ== 0\nYg== 0"), "two tokens have rank 0");
        assert_eq!(error("YQ== 0\nYQ== 1"), "a token is there twice");
        let clash =
            tokenizer(RANKS.as_bytes(), Some(br#"{"added_tokens_decoder": {"2": {"content": "x"}}}"#), None);
        assert_eq!(clash.unwrap_err(), "added token \"x\" has id 2, which is a rank");
    }

    #[test]
    fn base64_of_every_length() {
        let pairs = [
            ("", &b""[..]),
            ("Zg==", b"f"),
            ("Zm8=", b"fo"),
            ("Zm9v", b"foo"),
            ("Zm9vYmE=", b"fooba"),
            ("+/8=", &[0xfb, 0xff]),
        ];
        for (text, bytes) in pairs {
            assert_eq!(base64(text).as_deref(), Some(bytes), "{text}");
        }
        assert!(["Zg", "Z===", "Z*==", "Zg=a"].iter().all(|text| base64(text).is_none()));
    }
}
