//! Promise: a GGUF file is all that a model needs: `inspect`, `logits` and `up` take the file, any part of a split one, or
//! its directory, and chat has the template and the tokenizer that are in it.

use serde_json::{Value, json};

use crate::harness::{Cluster, baton, folder, output};

/// In two parts, as gguf-split makes them.
const CASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/qwen2-gguf-mixed");
const PART: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/qwen2-gguf-mixed/model-mixed-00001-of-00002.gguf");

#[test]
fn a_file_and_its_directory_are_the_same_model() {
    let inspected = |model: &str| {
        let (ok, json, stderr) =
            output(&mut baton(&["inspect", model, "--json", "--ranks=2", "--memory=1GB"]));
        assert!(ok, "{stderr}");
        let mut facts: Value = serde_json::from_str(&json).expect("JSON");
        facts["model"] = Value::Null;
        facts
    };
    let facts = inspected(PART);
    assert_eq!(facts, inspected(CASE));
    assert_eq!((&facts["architecture"], &facts["context_tokens"]), (&json!("qwen2"), &json!(1024)));
    // 2 layers of 2 planes of 2 heads of 16 numbers.
    assert_eq!(facts["kv"]["token_bytes"], 256);
    let formats: Vec<&str> = facts["formats"]
        .as_array()
        .expect("formats")
        .iter()
        .filter_map(|entry| entry["format"].as_str())
        .collect();
    for format in ["Q5_0", "Q5_1", "Q8_0", "Q4_1", "Q4_0", "bf16", "f16", "f32"] {
        assert!(formats.contains(&format), "{format} among {formats:?}");
    }

    let folder = folder("gguf-logits");
    let logits = |model: &str, tp: &str| {
        let out = folder.join("out.safetensors");
        let flags =
            [format!("--model={model}"), format!("--golden={CASE}/golden.json"), format!("--tp={tp}")];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let place = format!("--out={}", out.display());
        let (ok, _, stderr) = output(&mut baton(&[&["logits", &place][..], &flags].concat()));
        assert!(ok, "{stderr}");
        std::fs::read(&out).expect("logits")
    };
    assert!(logits(PART, "1") == logits(CASE, "2"), "a file on one rank, its directory on two");
}

/// Ollama keeps its files under names without an ending, beside others that are no models.
#[tokio::test]
async fn a_blob_of_ollamas_is_known_by_how_it_begins() {
    const FILE: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama-gguf-q4_k_m/model-q4_k_m.gguf");
    let folder = folder("ollama-blobs");
    let blob = folder.join("sha256-3f1c");
    std::fs::copy(FILE, &blob).expect("a copy");
    std::fs::write(folder.join("sha256-77aa"), "MIT License").expect("another blob");
    let blob = blob.display().to_string();
    let inspected = |model: &str| {
        let (ok, json, stderr) = output(&mut baton(&["inspect", model, "--json"]));
        assert!(ok, "{stderr}");
        let mut facts: Value = serde_json::from_str(&json).expect("JSON");
        facts["model"] = Value::Null;
        facts
    };
    assert_eq!(inspected(&blob), inspected(FILE));
    let other = folder.join("sha256-77aa").display().to_string();
    let (ok, _, stderr) = output(&mut baton(&["inspect", &other]));
    assert!(!ok && stderr.contains("neither a model's directory nor a GGUF file"), "{stderr}");

    let cluster = Cluster::up(&[&format!("--model={blob}")]).await;
    let asked = json!({
        "model": "sha256-3f1c", "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 8, "temperature": 0
    });
    let (status, answer) = cluster.post("/v1/chat/completions", &asked).await;
    assert_eq!(status, 200, "{answer}");
}

#[tokio::test]
async fn a_file_is_served_with_its_own_template_and_tokenizer() {
    let cluster = Cluster::up(&[&format!("--model={PART}")]).await;
    let (status, models) = cluster.get("/v1/models").await;
    assert!(status == 200 && models.contains("\"model-mixed\""), "{models}");
    let mut asked = json!({
        "model": "model-mixed", "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 8, "temperature": 0
    });
    let (status, answer) = cluster.post("/v1/chat/completions", &asked).await;
    assert_eq!(status, 200, "{answer}");
    // The template adds an end of line; a token is a byte.
    assert_eq!(answer["usage"]["prompt_tokens"], 6, "{answer}");
    asked["max_tokens"] = json!(20);
    asked["response_format"] = json!({
        "type": "json_schema",
        "json_schema": { "name": "answer", "strict": true, "schema": { "type": "string", "enum": ["yes", "no"] } }
    });
    let (status, answer) = cluster.post("/v1/chat/completions", &asked).await;
    assert_eq!(status, 200, "{answer}");
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(["\"yes\"", "\"no\""].contains(&text.trim()), "{text:?}");
    // What the file's context does not hold is refused by the router, before anything is computed.
    asked["messages"][0]["content"] = json!("a".repeat(1100));
    let (status, answer) = cluster.post("/v1/chat/completions", &asked).await;
    assert_eq!(status, 400, "{answer}");
}
