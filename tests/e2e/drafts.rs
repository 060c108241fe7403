//! Promise: what is guessed ahead, from passages or by a draft model, changes no answer, and operators see what it brings.

use std::fs;

use serde_json::{Value, json};

use crate::client::with_model;
use crate::harness::{baton, folder, model, output};
use crate::parts::{Parts, TOKEN, ids};

const GUESSED: &str = "vllm:spec_decode_num_draft_tokens_total";
const HELD: &str = "vllm:spec_decode_num_accepted_tokens_total";
const HELD_OF_MODEL: &str = "baton_draft_model_accepted_tokens_total";

/// Answers that repeat themselves, or their prompts, in whole, in part, or hardly.
fn asked() -> Vec<Value> {
    let again: Vec<u32> = ids(7, 20).repeat(4);
    let bias =
        |count: u32| -> Value { (1000..1000 + count).map(|id| (id.to_string(), json!(100))).collect() };
    let plain = json!({ "max_tokens": 120, "ignore_eos": true, "seed": 5 });
    let with = |more: Value| {
        let mut body = plain.clone();
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        body
    };
    vec![
        with(json!({ "prompt": again, "temperature": 0 })),
        with(json!({ "prompt": again, "temperature": 1.0, "logprobs": 2 })),
        with(json!({ "prompt": ids(9, 40), "logit_bias": bias(1) })),
        with(
            json!({ "prompt": ids(11, 40), "temperature": 1.0, "logit_bias": bias(2), "frequency_penalty": 0.1 }),
        ),
        with(json!({ "prompt": ids(13, 40), "temperature": 0.8, "n": 3 })),
        with(json!({ "prompt": ids(15, 40), "ignore_eos": false, "guided_regex": "(name: [a-c]{3}; ){8}" })),
    ]
}

/// Protects: a client that says what it expects gets the same answer, sooner, and is told how much of it was right.
#[tokio::test]
async fn a_prediction_is_counted_and_changes_nothing() {
    let mut parts = Parts::router(&[]);
    parts.prefill("p", 1, &[]);
    parts.decode("d", 2, &[]);
    parts.wait_until_ready(&["p.0", "d.0"]).await;
    let ask = |prediction: Option<String>| {
        let mut body = json!({
            "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 200, "temperature": 0.8, "seed": 4,
        });
        if let Some(text) = prediction {
            body["prediction"] = json!({"type": "content", "content": text});
        }
        with_model(&body)
    };
    let chat = async |prediction| {
        let (status, answer) = parts.post("/v1/chat/completions", &ask(prediction)).await;
        assert_eq!(status, 200, "{answer}");
        let text = answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned();
        let of = |name: &str| answer["usage"]["completion_tokens_details"][name].as_u64().expect("a number");
        (text, of("accepted_prediction_tokens"), of("rejected_prediction_tokens"))
    };
    let (text, ..) = chat(None).await;
    assert!(text.len() > 100, "{text}");
    // The decode group knows what a step takes by now; a step that the machine held up makes rows look dear for a while.
    let (mut accepted, mut rejected) = (0, 0);
    for _ in 0..10 {
        let same;
        (same, accepted, rejected) = chat(Some(text.clone())).await;
        assert_eq!(same, text);
        if accepted > rejected {
            break;
        }
    }
    assert!(accepted > 20 && accepted > rejected, "{accepted} accepted, {rejected} rejected");
    let (same, accepted, rejected) = chat(Some("What nobody ever says, 1, 2, 3.".into())).await;
    assert_eq!((same, accepted), (text.clone(), 0));
    assert!(rejected > 5, "{rejected}");
    parts.wait_until_idle().await;
}

#[tokio::test]
async fn answers_are_those_without_guesses() {
    let mut seen: Vec<Vec<Value>> = Vec::new();
    // The model itself, which is always right where a token is drawn by its rule alone.
    let draft = format!("--draft-model={}", model().display());
    for flags in [&["--draft-max=0"][..], &["--draft-max=8"], &["--draft-max=8", &draft]] {
        let mut parts = Parts::router(&[]);
        parts.prefill("p", 1, &[]);
        parts.decode("d", 2, flags);
        parts.wait_until_ready(&["p.0", "d.0"]).await;
        let mut said = Vec::new();
        for body in asked() {
            let (status, answer) = parts.post("/v1/completions", &with_model(&body)).await;
            assert_eq!(status, 200, "{answer}");
            said.push(answer["choices"].clone());
        }
        parts.wait_until_idle().await;
        let (guessed, held) = (parts.metric(GUESSED, "").await, parts.metric(HELD, "").await);
        match flags {
            ["--draft-max=0"] => assert_eq!((guessed, held), (0.0, 0.0)),
            _ => assert!(held > 20.0 && guessed >= held, "{held} of {guessed}"),
        }
        let by_model = parts.metric(HELD_OF_MODEL, "").await;
        assert_eq!(by_model > 0.0, flags.len() == 2, "{by_model} by the model, {flags:?}");
        seen.push(said);
    }
    for with in &seen[1..] {
        for (number, (without, with)) in seen[0].iter().zip(with).enumerate() {
            assert_eq!(without, with, "request {number}");
        }
    }
}

/// Protects: a draft model whose tokens are others is refused before anything is loaded, with both names and what is unlike.
#[test]
fn a_draft_model_of_other_tokens_is_refused() {
    let other = folder("other-tokens");
    for entry in fs::read_dir(model()).expect("the bundled model") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, other.join(path.file_name().expect("a name"))).expect("copies");
    }
    let path = other.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).expect("reads")).expect("JSON");
    let vocab = tokenizer["model"]["vocab"].as_object_mut().expect("words");
    let (one, two) = (vocab["a"].clone(), vocab["b"].clone());
    vocab.insert("a".into(), two);
    vocab.insert("b".into(), one);
    fs::write(&path, tokenizer.to_string()).expect("writes");
    let (own, draft) = (model().display().to_string(), other.display().to_string());
    let refused = |model: &str, draft: &str| {
        let flags = ["decode", "--model", model, "--draft-model", draft, "--token", TOKEN, "--log=off"];
        let (ok, _, stderr) = output(&mut baton(&flags));
        assert!(!ok, "{draft} guesses for {model}");
        stderr
    };
    let line = refused(&own, &draft);
    let says = format!("baton: draft model {draft} cannot guess for model {own}: token ");
    assert!(line.starts_with(&says) && line.trim_end().lines().count() == 1, "{line}");
    assert!(line.contains("\"a\"") && line.contains("\"b\""), "{line}");
    let line = refused(&own, "/nowhere/draft");
    assert!(line.contains("draft model: model /nowhere/draft: no such file"), "{line}");
}
