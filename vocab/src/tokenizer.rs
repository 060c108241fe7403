//! A model's tokenizer as one tokenizer.json, whatever file it comes from: the file itself, a tiktoken.model, or the
//! vocabulary in a GGUF file. The router tokenizes with it, and [`crate::Vocab`] reads ids and bytes from it, so that both
//! mean the same.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use gguf::Gguf;
use serde_json::{Value, json};

use crate::split::Split;
use crate::text_file::text_file;
use crate::{VocabError, gguf_file, tiktoken};

/// A tokenizer.json.
#[derive(Clone, Debug)]
pub struct TokenizerJson {
    /// The file that it was made of, for messages.
    pub path: PathBuf,
    /// Its text.
    pub json: Vec<u8>,
}

impl TokenizerJson {
    /// The tokenizer of the model at `path`: a directory (its tokenizer.json, else its tiktoken.model with
    /// tokenizer_config.json, else its only GGUF file) or a GGUF file. `None` where a directory has none of them.
    pub fn read(path: &Path) -> Result<Option<TokenizerJson>, VocabError> {
        let own = path.join("tokenizer.json");
        if let Some(json) = file(&own)? {
            return Ok(Some(TokenizerJson { path: own, json }));
        }
        let ranks = path.join("tiktoken.model");
        if let Some(text) = file(&ranks)? {
            let config = file(&path.join("tokenizer_config.json"))?;
            let model = file(&path.join("config.json"))?;
            let json = tiktoken::tokenizer(&text, config.as_deref(), model.as_deref())
                .map_err(|reason| VocabError::Format { path: ranks.display().to_string(), reason })?;
            return Ok(Some(TokenizerJson { path: ranks, json }));
        }
        match path.exists().then(|| gguf::find(path)).transpose()?.flatten() {
            Some(file) => {
                let json = TokenizerJson::of_gguf(&Gguf::open(&file)?)?;
                Ok(Some(TokenizerJson { path: file, json }))
            }
            None => Ok(None),
        }
    }

    /// The text of a tokenizer.json that means what the vocabulary of `gguf` means.
    pub fn of_gguf(gguf: &Gguf) -> Result<Vec<u8>, VocabError> {
        gguf_file::tokenizer(gguf.metadata())
    }
}

/// The bytes of a file, where there is one.
fn file(path: &Path) -> Result<Option<Vec<u8>>, VocabError> {
    match text_file(path) {
        Ok(bytes) if gguf::is_lfs_pointer(&bytes) => {
            Err(VocabError::Format { path: path.display().to_string(), reason: gguf::LFS_POINTER.into() })
        }
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(reason) => Err(VocabError::Io { path: path.display().to_string(), reason }),
    }
}

/// One entry of a vocabulary, as a tokenizer.json has it.
pub(crate) struct Entry {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Found in texts before anything is split: its text is itself. `Some(true)` for a control token.
    pub(crate) added: Option<bool>,
}

/// Tokens around every text, as ids and texts.
#[derive(Default)]
pub(crate) struct Around {
    pub(crate) begin: Option<(u32, String)>,
    pub(crate) end: Option<(u32, String)>,
}

/// A tokenizer.json of byte-level BPE.
pub(crate) fn byte_level(
    entries: &[Entry],
    merges: Vec<(String, String)>,
    split: Split,
    compose: bool,
    around: Around,
) -> Vec<u8> {
    let mut steps: Vec<Value> = split
        .patterns
        .iter()
        .map(|pattern| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false }))
        .collect();
    let level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    steps.push(level.clone());
    let mut json = frame(entries, merges, around);
    json["normalizer"] = if compose { json!({ "type": "NFC" }) } else { Value::Null };
    json["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": steps });
    json["decoder"] = level;
    json["model"]["ignore_merges"] = json!(split.whole_words);
    json.to_string().into_bytes()
}

/// A tokenizer.json of SentencePiece's BPE. `prefix`: texts begin with a space.
pub(crate) fn sentencepiece(
    entries: &[Entry],
    merges: Vec<(String, String)>,
    unknown: Option<String>,
    prefix: bool,
    around: Around,
) -> Vec<u8> {
    let mut json = frame(entries, merges, around);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
    json["normalizer"] = match prefix {
        true => json!({
            "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "\u{2581}" }, spaces],
        }),
        false => spaces,
    };
    let mut steps = vec![
        json!({ "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json["decoder"] = json!({ "type": "Sequence", "decoders": steps });
    json["model"]["unk_token"] = json!(unknown);
    json["model"]["fuse_unk"] = json!(true);
    json["model"]["byte_fallback"] = json!(true);
    json.to_string().into_bytes()
}

/// What both have.
fn frame(entries: &[Entry], merges: Vec<(String, String)>, around: Around) -> Value {
    let vocab: serde_json::Map<String, Value> =
        entries.iter().map(|entry| (entry.text.clone(), entry.id.into())).collect();
    let added: Vec<Value> = entries
        .iter()
        .filter_map(|entry| {
            Some(json!({
                "id": entry.id, "content": entry.text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": entry.added?,
            }))
        })
        .collect();
    let merges: Vec<Value> = merges.into_iter().map(|(left, right)| json!([left, right])).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": post_processor(around),
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

fn post_processor(around: Around) -> Value {
    let tokens: Vec<&(u32, String)> = [&around.begin, &around.end].into_iter().flatten().collect();
    if tokens.is_empty() {
        return Value::Null;
    }
    let special = |(_, text): &(u32, String)| json!({ "SpecialToken": { "id": text, "type_id": 0 } });
    let texts = |names: &[&str]| -> Vec<Value> {
        let text = |name: &&str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        let (begin, end) = (around.begin.iter().map(special), around.end.iter().map(special));
        begin.chain(names.iter().map(text)).chain(end).collect()
    };
    let named =
        tokens.iter().map(|(id, text)| (text.clone(), json!({ "id": text, "ids": [id], "tokens": [text] })));
    json!({
        "type": "TemplateProcessing",
        "single": texts(&["A"]),
        "pair": texts(&["A", "B"]),
        "special_tokens": named.collect::<serde_json::Map<_, _>>(),
    })
}
