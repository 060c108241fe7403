//! Reads the vocabulary of a Hugging Face `tokenizer.json`. How text is split into tokens is the router's business.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use crate::Token;
use crate::pieces::Style;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    /// Absent in old files, which are BPE.
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    vocab: Pieces,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pieces {
    /// BPE: piece to id.
    Ids(HashMap<String, u32>),
    /// Unigram: pieces with scores, in order of id.
    Scores(Vec<(String, f64)>),
}

/// All tokens of the file, added ones included. The error is one line.
pub(crate) fn tokens(json: &[u8]) -> Result<Vec<Token>, String> {
    let file: File = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let kind = file.model.kind.as_deref().unwrap_or("BPE");
    if !matches!(kind, "BPE" | "Unigram") {
        return Err(format!("model type {kind:?} is not supported: expected \"BPE\" or \"Unigram\""));
    }
    let style = style(&file)?;
    let added: HashMap<u32, &str> =
        file.added_tokens.iter().map(|added| (added.id, added.content.as_str())).collect();
    let mut tokens: Vec<Token> = file
        .added_tokens
        .iter()
        // Added tokens are literal text, whatever the style.
        .map(|added| Token { id: added.id, bytes: added.content.clone().into(), special: added.special })
        .collect();
    let mut push = |piece: &str, id: u32| {
        // An added token is often in the model's vocabulary as well: then it must have the same name.
        match added.get(&id) {
            None => tokens.push(Token { id, bytes: style.bytes(piece), special: false }),
            Some(name) if *name == piece => {}
            Some(name) => return Err(format!("token id {id} means both {piece:?} and {name:?}")),
        }
        Ok(())
    };
    match &file.model.vocab {
        Pieces::Ids(ids) => ids.iter().try_for_each(|(piece, id)| push(piece, *id))?,
        Pieces::Scores(list) => (0..).zip(list).try_for_each(|(id, (piece, _))| push(piece, id))?,
    }
    Ok(tokens)
}

/// The style that the decoder (or, without one, the pre-tokenizer) tells.
fn style(file: &File) -> Result<Style, String> {
    let mut parts = Vec::new();
    flatten(&file.decoder, "decoders", &mut parts);
    let has = |name: &str| parts.iter().any(|part| part["type"] == name);
    let replaces_space =
        parts.iter().any(|part| part["type"] == "Replace" && part["pattern"]["String"] == "\u{2581}");
    if has("ByteLevel") {
        return Ok(Style::ByteLevel);
    }
    if has("ByteFallback") || has("Metaspace") || replaces_space {
        return Ok(Style::SentencePiece { byte_fallback: has("ByteFallback") || file.model.byte_fallback });
    }
    if parts.is_empty() {
        flatten(&file.pre_tokenizer, "pretokenizers", &mut parts);
        if parts.iter().any(|part| part["type"] == "ByteLevel") {
            return Ok(Style::ByteLevel);
        }
    }
    let names: Vec<_> = parts.iter().map(|part| part["type"].as_str().unwrap_or("?")).collect();
    Err(format!(
        "decoder [{}] is not supported: expected ByteLevel, ByteFallback or Metaspace",
        names.join(", ")
    ))
}

/// The steps of a `Sequence`, or the one step.
fn flatten<'v>(step: &'v Value, list: &str, out: &mut Vec<&'v Value>) {
    match &step[list] {
        Value::Array(steps) => steps.iter().for_each(|step| flatten(step, list, out)),
        _ if step.is_object() => out.push(step),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use crate::Vocab;

    const BYTE_LEVEL: &str = r#"{
        "added_tokens": [{"id": 2, "content": "<|end|>", "special": true}, {"id": 3, "content": "<think>", "special": false}],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "model": {"type": "BPE", "vocab": {"Ġa": 0, "ðŁ": 1, "<|end|>": 2}, "merges": [["x", "y"]]}
    }"#;

    #[test]
    fn byte_level_bpe() {
        let vocab = Vocab::from_tokenizer_json(BYTE_LEVEL.as_bytes()).unwrap();
        assert_eq!(vocab.len(), 4);
        assert_eq!(vocab.bytes(0), Some(&b" a"[..]));
        assert_eq!(vocab.bytes(1), Some(&[0xf0, 0x9f][..]));
        assert_eq!(vocab.bytes(3), Some(&b"<think>"[..]));
        assert_eq!(vocab.special_ids(), [2]);
    }

    #[test]
    fn sentencepiece_bpe_and_unigram_mean_the_same() {
        let bpe = r#"{
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]},
            "model": {"type": "BPE", "byte_fallback": true, "vocab": {"<0x0A>": 0, "▁a": 1}, "merges": []}
        }"#;
        let unigram = r#"{
            "decoder": {"type": "Metaspace"},
            "model": {"type": "Unigram", "byte_fallback": true, "vocab": [["<0x0A>", -1.0], ["▁a", -2]]}
        }"#;
        let bpe = Vocab::from_tokenizer_json(bpe.as_bytes()).unwrap();
        let unigram = Vocab::from_tokenizer_json(unigram.as_bytes()).unwrap();
        assert_eq!(bpe.bytes(0), Some(&b"\n"[..]));
        assert_eq!(bpe.bytes(1), Some(&b" a"[..]));
        assert_eq!(bpe.identity(), unigram.identity());
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let error = |json: &str| Vocab::from_tokenizer_json(json.as_bytes()).unwrap_err();
        let word_piece = r#"{"model": {"type": "WordPiece", "vocab": {}}}"#;
        assert_eq!(
            error(word_piece),
            "model type \"WordPiece\" is not supported: expected \"BPE\" or \"Unigram\""
        );
        let ctc = r#"{"decoder": {"type": "CTC"}, "model": {"type": "BPE", "vocab": {}}}"#;
        assert_eq!(
            error(ctc),
            "decoder [CTC] is not supported: expected ByteLevel, ByteFallback or Metaspace"
        );
        let clash = BYTE_LEVEL.replace("\"<|end|>\": 2", "\"b\": 2");
        assert_eq!(error(&clash), "token id 2 means both \"b\" and \"<|end|>\"");
        assert!(error("{").contains("EOF"), "{}", error("{"));
    }
}
