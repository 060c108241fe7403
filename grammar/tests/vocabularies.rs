//! Structured output needs nothing but a vocabulary, whatever file it comes from: the same schema over a tokenizer.json, a
//! tiktoken.model and the vocabularies of GGUF files.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use grammar::{Compiler, lark};
use serde_json::json;
use vocab::Vocab;

/// Tokens of several bytes; all of their parts but single bytes are tokens, too.
const WORDS: [&str; 9] = ["{\"", "tr", "ue", "true", "fa", "\":", " \"", "na", "ok"];

/// Each byte, then [`WORDS`].
fn tokens() -> Vec<Vec<u8>> {
    (0..=255).map(|byte| vec![byte]).chain(WORDS.map(|word| word.as_bytes().to_vec())).collect()
}

/// Bytes as byte-level BPE shows them.
fn shown(bytes: &[u8]) -> String {
    let plain = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u8> = (0..=255).filter(|byte| !plain(byte)).collect();
    let one = |byte: &u8| match others.iter().position(|other| other == byte) {
        Some(at) => char::from_u32(256 + at as u32).unwrap(),
        None => char::from(*byte),
    };
    bytes.iter().map(one).collect()
}

/// Pairs whose join is a word.
fn merges() -> Vec<String> {
    let cut = |word: &&str| match *word {
        "true" => "tr ue".into(),
        word => format!("{} {}", shown(&word.as_bytes()[..1]), shown(&word.as_bytes()[1..])),
    };
    WORDS.iter().map(cut).collect()
}

fn tokenizer_json(dir: &Path) {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..).zip(tokens()).map(|(id, token): (u32, _)| (shown(&token), id.into())).collect();
    let json = json!({
        "added_tokens": [{"id": vocab.len(), "content": "<|im_end|>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges()}
    });
    fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
}

fn tiktoken(dir: &Path) {
    let base64 = |bytes: &[u8]| -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let three = |part: &[u8]| {
            let word = (0..3).fold(0, |word, at| word << 8 | u32::from(*part.get(at).unwrap_or(&0)));
            let digit = |at: usize| match at > part.len() {
                true => '=',
                false => char::from(DIGITS[(word >> (18 - 6 * at)) as usize & 63]),
            };
            (0..4).map(digit).collect::<String>()
        };
        bytes.chunks(3).map(three).collect()
    };
    let lines = tokens()
        .iter()
        .zip(0..)
        .map(|(token, rank)| format!("{} {rank}\n", base64(token)))
        .collect::<String>();
    fs::write(dir.join("tiktoken.model"), lines).unwrap();
    let end = tokens().len();
    let config =
        json!({"added_tokens_decoder": {end.to_string(): {"content": "<|im_end|>", "special": true}}});
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(dir.join("config.json"), json!({"vocab_size": end + 1}).to_string()).unwrap();
}

/// A GGUF file of nothing but metadata.
#[derive(Default)]
struct Gguf {
    pairs: u64,
    bytes: Vec<u8>,
}

impl Gguf {
    fn string(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.pairs += 1;
        self.string(&format!("tokenizer.ggml.{key}"));
        self.bytes.extend(kind.to_le_bytes());
    }

    fn text(&mut self, key: &str, text: &str) {
        self.key(key, 8);
        self.string(text);
    }

    fn texts(&mut self, key: &str, texts: &[String]) {
        self.key(key, 9);
        self.bytes.extend(8u32.to_le_bytes());
        self.bytes.extend((texts.len() as u64).to_le_bytes());
        texts.iter().for_each(|text| self.string(text));
    }

    /// Numbers of four bytes: `kind` 5 is i32, 6 is f32.
    fn numbers(&mut self, key: &str, kind: u32, numbers: &[[u8; 4]]) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((numbers.len() as u64).to_le_bytes());
        self.bytes.extend(numbers.concat());
    }

    fn write(&self, dir: &Path) {
        let head = [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &self.pairs.to_le_bytes()];
        fs::write(dir.join("model.gguf"), [&head.concat()[..], &self.bytes].concat()).unwrap();
    }
}

fn byte_level_gguf(dir: &Path) {
    let mut gguf = Gguf::default();
    let all: Vec<String> = tokens().iter().map(|token| shown(token)).chain(["<|im_end|>".into()]).collect();
    gguf.text("model", "gpt2");
    gguf.text("pre", "qwen2");
    gguf.texts("tokens", &all);
    let kinds: Vec<[u8; 4]> =
        all.iter().map(|token| (if token == "<|im_end|>" { 3i32 } else { 1 }).to_le_bytes()).collect();
    gguf.numbers("token_type", 5, &kinds);
    gguf.texts("merges", &merges());
    gguf.write(dir);
}

/// SentencePiece: bytes have names, and a space is U+2581.
fn pieces_gguf(dir: &Path) {
    let mut gguf = Gguf::default();
    let single = |byte: &u8| matches!(byte, 33..=126);
    let mut all: Vec<(String, i32)> = vec![("<unk>".into(), 2), ("<|im_end|>".into(), 3)];
    all.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    all.extend((0..=255).filter(single).map(|byte| (char::from(byte).to_string(), 1)));
    all.push(("\u{2581}".into(), 1));
    all.extend(WORDS.map(|word| (word.replace(' ', "\u{2581}"), 1)));
    gguf.text("model", "llama");
    gguf.texts("tokens", &all.iter().map(|(text, _)| text.clone()).collect::<Vec<_>>());
    gguf.numbers("scores", 6, &(0..all.len()).map(|at| (-(at as f32)).to_le_bytes()).collect::<Vec<_>>());
    gguf.numbers("token_type", 5, &all.iter().map(|(_, kind)| kind.to_le_bytes()).collect::<Vec<_>>());
    gguf.write(dir);
}

/// Writes a vocabulary into a directory.
type Make = fn(&Path);

/// The ids of `text`, longest first.
fn ids(vocab: &Vocab, text: &str) -> Vec<u32> {
    let (mut rest, mut ids) = (text.as_bytes(), Vec::new());
    while !rest.is_empty() {
        let fits = |id: &u32| {
            !vocab.is_special(*id)
                && vocab.bytes(*id).is_some_and(|bytes| !bytes.is_empty() && rest.starts_with(bytes))
        };
        let length = |id: &u32| vocab.bytes(*id).map_or(0, <[u8]>::len);
        let best = (0..vocab.len() as u32).filter(fits).max_by_key(length);
        let id = best.unwrap_or_else(|| panic!("no token at {:?}", String::from_utf8_lossy(rest)));
        ids.push(id);
        rest = &rest[length(&id)..];
    }
    ids
}

#[test]
fn a_schema_holds_for_every_kind_of_vocabulary() {
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"], "additionalProperties": false});
    let lark = lark::grammar(&lark::json(&schema));
    let kinds: [(&str, Make); 4] = [
        ("tokenizer.json", tokenizer_json),
        ("tiktoken.model", tiktoken),
        ("byte-level gguf", byte_level_gguf),
        ("sentencepiece gguf", pieces_gguf),
    ];
    for (kind, make) in kinds {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let vocab = Vocab::read(dir.path()).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let end =
            vocab.special_ids().iter().copied().find(|id| vocab.bytes(*id) == Some(b"<|im_end|>")).unwrap();
        let compiler =
            Compiler::new(Arc::new(vocab.clone())).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let mut answer = compiler.compile(&lark).unwrap_or_else(|error| panic!("{kind}: {error}"));
        // Text that is more than ASCII comes byte by byte.
        let fitting = ids(&vocab, "{\"name\": \"é true\",\"ok\":true}");
        assert!(fitting.len() < "{\"name\": \"é true\",\"ok\":true}".len(), "{kind}: no token of two bytes");
        for (at, id) in fitting.iter().enumerate() {
            let mask = answer.next(&fitting[..at]).unwrap();
            let text = String::from_utf8_lossy(vocab.bytes(*id).unwrap()).into_owned();
            assert!(mask.allows(*id), "{kind}: {text:?} at {at} is refused");
            assert!(!mask.allows(end) && !mask.may_end, "{kind}: the end at {at} is allowed");
        }
        assert!(answer.next(&fitting).unwrap().must_end, "{kind}: there may be more");
        let mut answer = compiler.compile(&lark).unwrap();
        let begun = ids(&vocab, "{\"name\":\"x\",\"ok\":");
        let mask = answer.next(&begun).unwrap();
        for (text, allowed) in [("true", true), ("fa", true), ("na", false), ("\":", false), ("1", false)] {
            assert_eq!(mask.allows(ids(&vocab, text)[0]), allowed, "{kind}: {text:?}");
        }
    }
}
