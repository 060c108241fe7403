//! Answers, streamed and not, of chats and completions.

use router::inference::{FinishReason, Sampling, Token, TokenEvent};
use serde_json::{Value, json};

use crate::mock::{END, Gateway, Step, content, encode, finished, says, script, started, tokenizer};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

fn chat(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi 🙂"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Protects: nodes get what is expected as tokens, for every choice, and usage says what became of them.
#[tokio::test]
async fn a_prediction_reaches_the_nodes_and_is_counted() {
    let gateway = Gateway::new(|_| says("Hello")).await;
    let expected = encode("Hello there");
    for content in [json!("Hello there"), json!([{"type": "text", "text": "Hello there"}])] {
        let body = chat(json!({"n": 2, "prediction": {"type": "content", "content": content}}));
        let (status, body) = gateway.ask(CHAT, &body).await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(gateway.last().prediction[..], expected[..]);
        let details = &body["usage"]["completion_tokens_details"];
        assert_eq!(details["accepted_prediction_tokens"], 0);
        assert_eq!(details["rejected_prediction_tokens"], 2 * expected.len());
    }
    let long = "a ".repeat(3000);
    let body = chat(json!({"prediction": {"type": "content", "content": long}}));
    assert_eq!(gateway.ask(CHAT, &body).await.1["error"]["param"], "prediction");
}

#[tokio::test]
async fn a_chat_is_rendered_tokenized_and_answered() {
    let gateway = Gateway::new(|_| says("Hello 🙂 world")).await;
    let (status, body) = gateway.ask(CHAT, &chat(json!({"seed": 7}))).await;
    assert_eq!(status, 200, "{body}");
    let prompt = encode("<|im_start|>user\nHi 🙂<|im_end|>\n<|im_start|>assistant\n");
    let output = encode("Hello 🙂 world").len() + 1;
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "message": {"role": "assistant", "content": "Hello 🙂 world", "refusal": null},
            "logprobs": null, "finish_reason": "stop", "stop_reason": null}])
    );
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": prompt.len(), "completion_tokens": output, "total_tokens": prompt.len() + output,
            "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details":
                {"reasoning_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}})
    );
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("tiny")));
    let seen = gateway.last();
    assert_eq!((&*seen.tokens, seen.max_tokens as usize), (&prompt[..], 600 - prompt.len()));
    assert_eq!((seen.stop_ids, seen.ignore_eos, body["id"].as_str()), (vec![END], false, Some(&*seen.id)));
    // The fixture's generation_config.json says `do_sample: false`.
    assert_eq!(seen.sampling, Sampling { seed: 7, ..Sampling::default() });
}

#[tokio::test]
async fn a_streamed_chat_has_role_deltas_finish_usage_and_done() {
    let gateway = Gateway::new(|_| says("Hello 🙂 world")).await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = gateway.chunks(CHAT, &body).await;
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(content(&chunks), "Hello 🙂 world");
    assert!(
        chunks.iter().all(|chunk| !chunk["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap_or("")
            .contains('\u{fffd}'))
    );
    let [.., finish, usage] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(
        (&finish["choices"][0]["finish_reason"], &finish["choices"][0]["delta"]),
        (&json!("stop"), &json!({}))
    );
    assert_eq!((&finish["usage"], &usage["choices"]), (&Value::Null, &json!([])));
    assert_eq!(usage["usage"]["completion_tokens"], encode("Hello 🙂 world").len() + 1);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk")
    );
}

#[tokio::test]
async fn without_stream_options_no_usage_is_streamed() {
    let gateway = Gateway::new(|_| script(&encode("Hello"), FinishReason::Length)).await;
    let chunks = gateway.chunks(CHAT, &chat(json!({"stream": true}))).await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_stop_string_over_token_boundaries_is_cut_off_in_either_form() {
    let mut gateway = Gateway::new(|_| says("Hello world, and more")).await;
    let body = chat(json!({"stop": ["o wor", "never"]}));
    let (_, whole) = gateway.ask(CHAT, &body).await;
    assert_eq!(whole["choices"][0]["message"]["content"], "Hell");
    assert_eq!(
        (&whole["choices"][0]["finish_reason"], &whole["choices"][0]["stop_reason"]),
        (&json!("stop"), &json!("o wor"))
    );
    assert!(!gateway.gone().await.1, "what was still to come is cancelled");
    let mut streamed = body;
    streamed["stream"] = true.into();
    assert_eq!(content(&gateway.chunks(CHAT, &streamed).await), "Hell");
}

#[tokio::test]
async fn chat_logprobs_have_tokens_bytes_and_alternatives() {
    let ids = encode("Hi");
    let said = ids.clone();
    let gateway = Gateway::new(move |_| script(&said, FinishReason::Length)).await;
    let (_, body) = gateway.ask(CHAT, &chat(json!({"logprobs": true, "top_logprobs": 2}))).await;
    let entries = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), ids.len());
    assert_eq!(
        entries[0],
        json!({"token": "H", "logprob": -0.25, "bytes": [72], "top_logprobs": [
            {"token": "H", "logprob": -0.25, "bytes": [72]},
            {"token": "<|im_end|>", "logprob": -1.5, "bytes": b"<|im_end|>"}]})
    );
    let seen = gateway.last().sampling;
    assert_eq!((seen.logprobs, seen.top_logprobs), (true, 2));
    let chunks = gateway.chunks(CHAT, &chat(json!({"logprobs": true, "stream": true}))).await;
    let count: usize = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(count, ids.len());
}

#[tokio::test]
async fn completions_take_several_prompts_and_choices() {
    let gateway = Gateway::new(|request| {
        script(&[request.tokens[0], request.sampling.seed as u32], FinishReason::Length)
    })
    .await;
    let body = json!({"model": "tiny", "prompt": [[40, 41], [42]], "n": 2, "seed": 64, "max_tokens": 2, "echo": true});
    let (status, body) = gateway.ask(COMPLETION, &body).await;
    assert_eq!(status, 200, "{body}");
    let text = |index: usize| body["choices"][index]["text"].as_str().unwrap();
    let decode = |ids: &[u32]| crate::mock::tokenizer().decode(ids, true);
    assert_eq!(text(0), decode(&[40, 41, 40, 64]));
    assert_eq!(text(1), decode(&[40, 41, 40, 65]));
    assert_eq!(text(2), decode(&[42, 42, 64]));
    assert_eq!(text(3), decode(&[42, 42, 65]));
    let usage = &body["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(3), &json!(8)));
    let ids: Vec<String> =
        gateway.cluster.seen.lock().unwrap().iter().map(|request| request.id.clone()).collect();
    assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), 4, "{ids:?}");
}

#[tokio::test]
async fn a_completion_streams_its_echo_first_and_stops_at_sixteen_tokens() {
    let gateway = Gateway::new(|_| script(&encode(" world"), FinishReason::Length)).await;
    let body = json!({"prompt": "Hello", "stream": true, "echo": true});
    let chunks = gateway.chunks(COMPLETION, &body).await;
    let texts: Vec<&str> = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!((texts[0], texts.concat().as_str()), ("Hello", "Hello world"));
    assert_eq!(gateway.last().max_tokens, 16);
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
}

#[tokio::test]
async fn completion_logprobs_have_offsets() {
    let gateway = Gateway::new(|_| script(&encode("Hi"), FinishReason::Length)).await;
    let (_, body) = gateway.ask(COMPLETION, &json!({"prompt": "x", "logprobs": 2})).await;
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({"text_offset": [0, 1], "token_logprobs": [-0.25, -0.25], "tokens": ["H", "i"],
            "top_logprobs": [{"H": -0.25, "<|im_end|>": -1.5}, {"i": -0.25, "<|im_end|>": -1.5}]})
    );
}

#[tokio::test]
async fn parameters_reach_the_cluster() {
    let gateway = Gateway::new(|_| says("x")).await;
    let body = chat(json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "repetition_penalty": 1.5, "seed": 9, "logit_bias": {"7": 1}, "max_completion_tokens": 33, "min_tokens": 2,
        "ignore_eos": true, "cache_salt": "mine", "priority": 3, "user": "u", "metadata": {}, "service_tier": "auto",
        "chat_template_kwargs": {"enable_thinking": false}}));
    assert_eq!(gateway.ask(CHAT, &body).await.0, 200);
    let seen = gateway.last();
    let sampling = Sampling {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 5,
        min_p: 0.1,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        repetition_penalty: 1.5,
        seed: 9,
        logit_bias: vec![(7, 1.0)],
        ..Sampling::default()
    };
    assert_eq!(seen.sampling, sampling);
    assert_eq!((seen.max_tokens, seen.min_tokens, seen.ignore_eos, seen.stop_ids), (33, 2, true, vec![]));
    assert_eq!((seen.cache_salt, seen.priority), (b"mine".to_vec(), -3));
    let prompt = "<|im_start|>user\nHi 🙂<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    assert_eq!(*seen.tokens, encode(prompt));
}

#[tokio::test]
async fn timings_are_told_if_asked_for() {
    let gateway = Gateway::new(|_| says("x")).await;
    let (_, body) = gateway.ask(CHAT, &chat(json!({"baton_timings": true}))).await;
    let timings = &body["choices"][0]["baton"];
    assert_eq!((&timings["decision"], &timings["prefill_ms"]), (&json!("handoff"), &json!(5.0)));
    assert!(timings["prepare_ms"].as_f64().unwrap() > 0.0 && timings["ttft_ms"].as_f64().unwrap() > 0.0);
    let chunks = gateway.chunks(CHAT, &chat(json!({"baton_timings": true, "stream": true}))).await;
    assert_eq!(chunks.last().unwrap()["choices"][0]["baton"]["migrations"], 0);
}

#[tokio::test]
async fn choices_without_a_seed_draw_differently() {
    let gateway = Gateway::new(|_| says("x")).await;
    let (_, body) = gateway.ask(CHAT, &chat(json!({"n": 2}))).await;
    assert_eq!(body["choices"].as_array().unwrap().len(), 2);
    gateway.ask(CHAT, &chat(json!({}))).await;
    let seeds: std::collections::BTreeSet<u64> =
        gateway.cluster.seen.lock().unwrap().iter().map(|request| request.sampling.seed).collect();
    assert_eq!(seeds.len(), 3);
}

#[tokio::test]
async fn the_likeliest_of_many_are_given_and_all_are_counted() {
    let gateway = Gateway::new(|request| {
        // By choice: the third is the likeliest, then the first.
        let logprob = [-2.0, -3.0, -1.0][(request.sampling.seed - 7) as usize];
        let token = |index, id| {
            Step::Event(TokenEvent::Token(Token {
                index,
                id,
                logprob: Some(logprob),
                top: Vec::new(),
                predicted: false,
            }))
        };
        let id = 40 + request.sampling.seed as u32;
        vec![started(), token(0, id), token(1, id), finished(FinishReason::Length, 2)]
    })
    .await;
    let body = json!({"prompt": "x", "n": 2, "best_of": 3, "seed": 7, "max_tokens": 2});
    let (status, body) = gateway.ask("/v1/completions", &body).await;
    assert_eq!(status, 200, "{body}");
    let text = |id| tokenizer().decode(&[id, id], false);
    let given: Vec<_> =
        body["choices"].as_array().unwrap().iter().map(|c| (&c["index"], &c["text"])).collect();
    assert_eq!(given, [(&json!(0), &json!(text(49))), (&json!(1), &json!(text(47)))]);
    assert_eq!(
        (&body["usage"]["completion_tokens"], &body["choices"][0]["logprobs"]),
        (&json!(6), &Value::Null)
    );
}

#[tokio::test]
async fn a_completion_of_no_tokens_asks_no_node() {
    let gateway = Gateway::new(|_| says("x")).await;
    let body = json!({"prompt": "Hello", "echo": true, "max_tokens": 0});
    let (status, body) = gateway.ask("/v1/completions", &body).await;
    let choice = &body["choices"][0];
    assert_eq!((status, &choice["text"], &choice["finish_reason"]), (200, &json!("Hello"), &json!("length")));
    assert!(gateway.cluster.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn usage_can_be_in_every_event() {
    let gateway = Gateway::new(|_| says("a b")).await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = json!({"prompt": "Hello", "stream": true, "stream_options": options});
    let chunks = gateway.chunks("/v1/completions", &body).await;
    let counts: Vec<_> =
        chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&(encode("a b").len() as u64 + 1)), "{counts:?}");
}
