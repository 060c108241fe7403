//! The families' tokenizers in the words of GGUF files: what cuts text into words is a name there, and must cut as the
//! original's own patterns do. And SentencePiece's, whose fixture holds what the library itself makes of the texts.

#[path = "../../models/gguf/tests/gguf/writer.rs"]
#[allow(dead_code)]
mod writer;

use std::path::PathBuf;

use gguf::{Gguf, Header};
use router::text::{ModelText, Tokenizer};
use serde_json::Value;
use vocab::{TokenizerJson, Vocab};
use writer::Writer;

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name].iter().collect()
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("a fixture")
}

/// The vocabulary of a tokenizer.json as a GGUF file has it.
fn as_gguf(tokenizer: &Value, pre: &str) -> Gguf {
    let bytes = written(tokenizer, pre).bytes();
    Gguf::without_file(Header::parse("f", &bytes, bytes.len() as u64).expect("a header"), None)
}

fn written(tokenizer: &Value, pre: &str) -> Writer {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let id = |value: &Value| value.as_u64().expect("an id") as usize;
    let mut tokens: Vec<(String, u32)> = Vec::new();
    let mut put = |id: usize, text: String, kind: u32| {
        if tokens.len() <= id {
            // Ids that nothing has are padding.
            let unused = (tokens.len()..=id).map(|id| (format!("[PAD{id}]"), 5));
            tokens.extend(unused.collect::<Vec<_>>());
        }
        tokens[id] = (text, kind);
    };
    for (piece, number) in tokenizer["model"]["vocab"].as_object().expect("pieces") {
        put(id(number), piece.clone(), 1);
    }
    for token in tokenizer["added_tokens"].as_array().expect("tokens") {
        put(id(&token["id"]), text(&token["content"]), if token["special"] == true { 3 } else { 4 });
    }
    tokens.extend((0..3).map(|number| (format!("[END{number}]"), 5)));
    let merges = tokenizer["model"]["merges"].as_array().expect("merges").iter().map(|merge| match merge {
        Value::Array(pair) => format!("{} {}", text(&pair[0]), text(&pair[1])),
        line => text(line),
    });
    let merges: Vec<String> = merges.collect();
    Writer::new("llama")
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", pre)
        .texts("tokenizer.ggml.tokens", &tokens.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>())
        .counts("tokenizer.ggml.token_type", &tokens.iter().map(|(_, kind)| *kind).collect::<Vec<_>>())
        .texts("tokenizer.ggml.merges", &merges.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn names_cut_text_as_the_originals_patterns_do() {
    for (family, pre) in [
        ("deepseek_v3", "deepseek-v3"),
        ("kimi_k2", "kimi-k2"),
        ("llama", "glm4"),
        ("qwen3", "qwen2"),
        ("llama", "llama-bpe"),
        ("gpt_oss", "gpt-4o"),
    ] {
        let original = json(fixture(family).join("tokenizer.json"));
        let made = TokenizerJson::of_gguf(&as_gguf(&original, pre)).expect("a vocabulary");
        let tokenizer = Tokenizer::from_bytes(&made).expect("a tokenizer");
        for case in json(fixture(family).join("golden_text.json"))["encode"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("a text");
            let ids = tokenizer.encode(text, false).expect("encodable");
            assert_eq!(serde_json::json!(ids), case["ids"], "{family} {pre}: {text:?}");
        }
        let identity = |json: &[u8]| Vocab::from_tokenizer_json(json).expect("a vocabulary").identity();
        assert_eq!(
            identity(&made),
            identity(original.to_string().as_bytes()),
            "{family}: padding is no token"
        );
    }
}

#[test]
fn names_that_are_not_known_are_listed() {
    let original = json(fixture("llama").join("tokenizer.json"));
    let error = TokenizerJson::of_gguf(&as_gguf(&original, "viking")).expect_err("unknown").to_string();
    assert!(
        error.starts_with("f: tokenizer.ggml.pre: \"viking\" is not supported (known: default, llama-bpe,"),
        "{error}"
    );
}

#[test]
fn sentencepiece_gives_the_librarys_ids() {
    let model = ModelText::load(&fixture("sentencepiece")).expect("a model's text");
    for case in json(fixture("sentencepiece").join("golden_text.json"))["encode"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("a text");
        for (special, want) in [(false, "ids"), (true, "ids_special")] {
            let ids = model.tokenizer.encode(text, special).expect("encodable");
            assert_eq!(serde_json::json!(ids), case[want], "{text:?}");
        }
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
        assert_eq!(model.tokenizer.decode(&ids, true), case["decoded"].as_str().expect("a text"));
    }
}

#[test]
fn defaults_come_from_the_file() {
    let model = ModelText::load(&fixture("llama_gguf/model.gguf")).expect("a model's text");
    let names: Vec<_> = model.defaults.eos_ids.iter().filter_map(|id| model.tokenizer.name(*id)).collect();
    assert_eq!(names, ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]);
    assert!(model.templates.exist());
    let missing = ModelText::load(&fixture("none")).expect_err("missing").to_string();
    assert!(missing.ends_with("neither tokenizer.json, tiktoken.model nor a GGUF file"), "{missing}");
}

/// Protects: `<|end|>`, which ends answers of other models, ends only a message of gpt-oss.
#[test]
fn gpt_oss_ends_where_its_answers_do() {
    let original = json(fixture("gpt_oss").join("tokenizer.json"));
    let id = |name: &str| {
        let tokens = original["added_tokens"].as_array().expect("tokens");
        let token = tokens.iter().find(|token| token["content"] == name).expect("a token");
        token["id"].as_u64().expect("an id") as u32
    };
    let config = json(fixture("gpt_oss").join("tokenizer_config.json"));
    let bytes = written(&original, "gpt-4o")
        .text("tokenizer.chat_template", config["chat_template"].as_str().expect("a template"))
        .count("tokenizer.ggml.eos_token_id", id("<|return|>"))
        .bytes();
    let path = std::env::temp_dir().join(format!("gpt-oss-{}.gguf", std::process::id()));
    std::fs::write(&path, bytes).expect("written");
    let model = ModelText::load(&path);
    std::fs::remove_file(&path).expect("removed");
    let ends = model.expect("a model's text").defaults.eos_ids;
    assert_eq!(ends, ["<|return|>", "<|endoftext|>", "<|call|>"].map(id));
}
