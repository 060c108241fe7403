//! Log probabilities of prompts as clients see them: OpenAI's `echo` with `logprobs`, vLLM's `prompt_logprobs`.

use router::inference::{FinishReason, GenerateRequest, Score, TokenEvent};
use serde_json::{Value, json};

use crate::mock::{Gateway, Step, encode, finished, started, token, tokenizer};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

/// Scores the prompt in two parts where that is asked, then says "Hi".
fn scored(request: &GenerateRequest) -> Vec<Step> {
    let mut steps = vec![started()];
    if let Some(top) = request.prompt_logprobs {
        let top = |id| [(id, -0.5), (40, -1.0), (41, -2.0)].into_iter().take(top as usize).collect();
        let score = |id: &u32| Score { logprob: -0.5, rank: 1, top: top(*id) };
        let scores: Vec<Score> = request.tokens[1..].iter().map(score).collect();
        let (first, rest) = scores.split_at(scores.len() / 2);
        steps.extend([first, rest].map(|part| Step::Event(TokenEvent::Scored(part.to_vec()))));
    }
    let ids = &encode("Hi")[..encode("Hi").len().min(request.max_tokens as usize)];
    steps.extend(ids.iter().enumerate().map(|(index, &id)| token(index, id)));
    steps.push(finished(FinishReason::Length, ids.len()));
    steps
}

/// Protects: lm-eval's way to score a text: the prompt's tokens, then the answer's, in four lists; and nothing of an
/// answer where none is wanted.
#[tokio::test]
async fn echo_with_logprobs_scores_the_prompt() {
    let gateway = Gateway::new(scored).await;
    let prompt = "Hello there";
    let ids = encode(prompt);
    let texts: Vec<String> = ids.iter().map(|&id| tokenizer().decode(&[id], false)).collect();
    for max_tokens in [0, 1, 2] {
        let body = json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": max_tokens});
        let (status, body) = gateway.ask(COMPLETION, &body).await;
        assert_eq!(status, 200, "{body}");
        let choice = &body["choices"][0];
        let answer = &tokenizer().decode(&encode("Hi")[..max_tokens], false);
        assert_eq!(choice["text"], format!("{prompt}{answer}"));
        let logprobs = &choice["logprobs"];
        let list = |name: &str| logprobs[name].as_array().unwrap().clone();
        assert_eq!(list("tokens").len(), ids.len() + max_tokens);
        assert_eq!(list("tokens")[..ids.len()], texts.iter().map(|text| json!(text)).collect::<Vec<_>>());
        assert_eq!(list("token_logprobs")[..2], [Value::Null, json!(-0.5)]);
        assert_eq!(list("top_logprobs")[..2], [Value::Null, json!({texts[1].as_str(): -0.5})]);
        let offsets: Vec<usize> = texts
            .iter()
            .scan(0, |at, text| Some(std::mem::replace(at, *at + text.chars().count())))
            .collect();
        assert_eq!(list("text_offset")[..ids.len()], offsets.iter().map(|at| json!(at)).collect::<Vec<_>>());
        assert_eq!(body["usage"]["completion_tokens"], max_tokens);
        assert_eq!(body["usage"]["prompt_tokens"], ids.len());
        let seen = gateway.last();
        assert_eq!((seen.prompt_logprobs, seen.max_tokens), (Some(1), max_tokens.max(1) as u32));
    }
    // Without `echo` nobody scores the prompt.
    gateway.ask(COMPLETION, &json!({"prompt": prompt, "logprobs": 1})).await;
    assert_eq!(gateway.last().prompt_logprobs, None);
}

/// Protects: a stream tells the prompt whole, in its first chunk with text.
#[tokio::test]
async fn a_stream_begins_with_the_scored_prompt() {
    let gateway = Gateway::new(scored).await;
    let prompt = "Hello there, you";
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 2, "stream": true});
    let chunks = gateway.chunks(COMPLETION, &body).await;
    let text = |chunk: &Value| chunk["choices"][0]["text"].as_str().unwrap_or_default().to_string();
    assert_eq!(text(&chunks[0]), prompt);
    let logprobs = &chunks[0]["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), encode(prompt).len());
    assert_eq!(chunks.iter().map(text).collect::<String>(), format!("{prompt}Hi"));
    // A prompt of one token has nothing to be scored, and is told as well.
    let body = json!({"prompt": [40], "echo": true, "logprobs": 0, "max_tokens": 1, "stream": true});
    let chunks = gateway.chunks(COMPLETION, &body).await;
    assert_eq!(chunks[0]["choices"][0]["logprobs"]["token_logprobs"], json!([null]));
    assert_eq!(gateway.last().prompt_logprobs, None);
}

/// Protects: vLLM's list, per choice of a completion and once for a chat, beside whatever else is asked.
#[tokio::test]
async fn prompt_logprobs_are_a_list() {
    let gateway = Gateway::new(scored).await;
    let (status, body) = gateway
        .ask(COMPLETION, &json!({"prompt": [[42, 43], [44]], "prompt_logprobs": 2, "max_tokens": 1}))
        .await;
    assert_eq!(status, 200, "{body}");
    let entry = |id: u32, logprob: f32, rank: u32| {
        let text = tokenizer().decode(&[id], false);
        json!({"logprob": logprob, "rank": rank, "decoded_token": text})
    };
    let wanted = json!([null, {"43": entry(43, -0.5, 1), "40": entry(40, -1.0, 2)}]);
    assert_eq!(body["choices"][0]["prompt_logprobs"], wanted);
    assert_eq!(body["choices"][0]["logprobs"], Value::Null);
    assert_eq!(body["choices"][1]["prompt_logprobs"], json!([null]));

    let messages = json!([{"role": "user", "content": "Hello"}]);
    let (status, body) = gateway
        .ask(CHAT, &json!({"messages": messages, "prompt_logprobs": 0, "n": 2, "max_tokens": 1}))
        .await;
    assert_eq!(status, 200, "{body}");
    let listed = body["prompt_logprobs"].as_array().unwrap();
    assert_eq!(listed.len() as u64, body["usage"]["prompt_tokens"].as_u64().unwrap());
    let id = gateway.last().tokens[1];
    assert_eq!(listed[1], json!({id.to_string(): entry(id, -0.5, 1)}));
    let (_, plain) = gateway.ask(CHAT, &json!({"messages": messages, "max_tokens": 1})).await;
    assert!(plain.get("prompt_logprobs").is_none());
}
