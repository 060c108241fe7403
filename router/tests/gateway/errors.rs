//! Every refusal: its status, and OpenAI's envelope with the parameter that is wrong.

use std::time::Duration;

use router::inference::{FinishReason, InferenceError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::mock::{Gateway, Step, config, finished, says, script, started, template_config, token};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

/// Status, code and parameter.
async fn refusal(gateway: &Gateway, path: &str, body: &Value) -> (u16, String, String) {
    let (status, answer) = gateway.ask(path, body).await;
    let error = &answer["error"];
    assert!(error["message"].is_string() && error["type"].is_string(), "{answer}");
    let text = |key: &str| error[key].as_str().unwrap_or("null").to_string();
    (status, text("code"), text("param"))
}

#[tokio::test]
async fn wrong_requests_are_told_what_is_wrong() {
    let gateway = Gateway::new(|_| says("x")).await;
    let user = json!([{"role": "user", "content": "x"}]);
    let chats = [
        (json!({"messages": user, "model": null}), "missing_required_parameter", "model"),
        (json!({}), "missing_required_parameter", "messages"),
        (json!({"messages": []}), "invalid_value", "messages"),
        (json!({"messages": user, "model": 1}), "invalid_type", "model"),
        (json!({"messages": user, "temperature": "hot"}), "invalid_type", "temperature"),
        (json!({"messages": user, "temperature": -1}), "invalid_value", "temperature"),
        (json!({"messages": user, "top_logprobs": 2}), "invalid_value", "top_logprobs"),
        (json!({"messages": user, "logprobs": 2}), "invalid_type", "logprobs"),
        (json!({"messages": user, "logprobs": true, "top_logprobs": 21}), "invalid_value", "top_logprobs"),
        (json!({"messages": user, "chat_template": "x"}), "unsupported_parameter", "chat_template"),
        (
            json!({"messages": user, "chat_template_kwargs": {"messages": [1]}}),
            "unsupported_parameter",
            "chat_template_kwargs.messages",
        ),
        (
            json!({"messages": user, "response_format": {"type": "json_schema"}}),
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (json!({"messages": user, "reasoning_effort": "extreme"}), "invalid_value", "reasoning_effort"),
        (json!({"messages": user, "functions": [{"name": "f"}]}), "unsupported_parameter", "functions"),
        (json!({"messages": user, "tool_choice": "required"}), "invalid_value", "tool_choice"),
        (json!({"messages": user, "guided_regex": "("}), "invalid_value", "guided_regex"),
        (json!({"messages": user, "guided_json": {"type": "robot"}}), "invalid_value", "guided_json"),
        (json!({"messages": user, "guided_choice": []}), "invalid_value", "guided_choice"),
        (json!({"messages": user, "guided_grammar": "root ::= ("}), "invalid_value", "guided_grammar"),
        (
            json!({"messages": user, "guided_regex": "a", "structured_outputs": {"choice": ["a"]}}),
            "unsupported_parameter",
            "structured_outputs.choice",
        ),
        (
            json!({"messages": user, "guided_regex": "a", "ignore_eos": true}),
            "unsupported_parameter",
            "guided_regex",
        ),
        (json!({"messages": user, "suffix": "x"}), "unsupported_parameter", "suffix"),
        (json!({"messages": user, "temprature": 1}), "unknown_parameter", "temprature"),
        (json!({"messages": user, "prompt": "x"}), "unknown_parameter", "prompt"),
    ];
    for (body, code, param) in chats {
        assert_eq!(refusal(&gateway, CHAT, &body).await, (400, code.into(), param.into()), "{body}");
    }
    let completions = [
        (json!({}), "missing_required_parameter", "prompt"),
        (json!({"prompt": ""}), "invalid_value", "prompt"),
        (json!({"prompt": []}), "invalid_value", "prompt"),
        (json!({"prompt": [1, 100000]}), "invalid_value", "prompt[1]"),
        (json!({"prompt": "x", "best_of": 1, "n": 2}), "invalid_value", "best_of"),
        (json!({"prompt": "x", "best_of": 2, "stream": true}), "unsupported_parameter", "best_of"),
        (json!({"prompt": ["x", "y"], "best_of": 9}), "invalid_value", "prompt"),
        (json!({"prompt": "x", "suffix": "y"}), "unsupported_parameter", "suffix"),
        (
            json!({"prompt": "x", "stream": true, "prompt_logprobs": 1}),
            "unsupported_parameter",
            "prompt_logprobs",
        ),
        (json!({"prompt": "x", "prompt_logprobs": -1}), "invalid_value", "prompt_logprobs"),
        (json!({"prompt": ["x", "y"], "n": 9}), "invalid_value", "prompt"),
        (json!({"prompt": "x", "max_completion_tokens": 4}), "unknown_parameter", "max_completion_tokens"),
    ];
    for (body, code, param) in completions {
        assert_eq!(refusal(&gateway, COMPLETION, &body).await, (400, code.into(), param.into()), "{body}");
    }
    let said = [
        (
            json!({"prompt": "x", "n": 17}),
            "Invalid value for 'n': expected an integer from 1 to 16, but got 17.",
        ),
        (
            json!({"prompt": vec!["x"; 9], "n": 2}),
            "Invalid value for 'prompt': expected at most 16 choices of one request, but got 9 prompts with 2 each.",
        ),
        (
            json!({"prompt": "x", "guided_json": {"type": "array", "uniqueItems": true}}),
            "Invalid value for 'guided_json': answers cannot be held to it: Unimplemented keys: [\"uniqueItems\"].",
        ),
    ];
    for (body, message) in said {
        assert_eq!(gateway.ask(COMPLETION, &body).await.1["error"]["message"], message);
    }
    assert!(gateway.cluster.seen.lock().unwrap().is_empty(), "nothing of it reached the cluster");
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let gateway = Gateway::new(|_| says("x")).await;
    let body = json!({"model": "gpt-9", "prompt": "x"});
    assert_eq!(refusal(&gateway, COMPLETION, &body).await, (404, "model_not_found".into(), "model".into()));
}

#[tokio::test]
async fn what_does_not_fit_the_context_is_told_with_both_numbers() {
    let gateway = Gateway::new(|_| says("x")).await;
    let long = vec![40; 600];
    let (status, body) = gateway.ask(COMPLETION, &json!({"prompt": long})).await;
    let message = body["error"]["message"].as_str().unwrap();
    assert_eq!((status, &body["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert!(
        message.contains("maximum context length is 600") && message.contains("has 600 tokens"),
        "{message}"
    );
    let (_, body) = gateway.ask(COMPLETION, &json!({"prompt": [40, 41], "max_tokens": 599})).await;
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("has 2 tokens") && message.contains("599 tokens of output"), "{message}");
    // So long that it is not even tokenized.
    let (status, body) =
        gateway.ask(CHAT, &json!({"messages": [{"role": "user", "content": "x".repeat(60_000)}]})).await;
    let message = body["error"]["message"].as_str().unwrap();
    assert_eq!((status, &body["error"]["param"]), (400, &json!("messages")));
    assert!(message.contains("at least"), "{message}");
}

#[tokio::test]
async fn what_is_no_request_is_answered_in_the_same_form() {
    let gateway = Gateway::new(|_| says("x")).await;
    let url = |path: &str| format!("{}{path}", gateway.url);
    let json_type = ("content-type", "application/json");
    let post = |body: &str| {
        gateway.client.post(url(COMPLETION)).header(json_type.0, json_type.1).body(body.to_string())
    };
    let large = format!("{{\"prompt\": \"{}\"}}", "x".repeat(config().limits.body_bytes));
    let cases = [
        (post("{\"prompt\": "), 400, "invalid_json"),
        (post("[1]"), 400, "invalid_type"),
        (post(""), 400, "invalid_json"),
        (post(&large), 413, "request_too_large"),
        (gateway.client.post(url(COMPLETION)).body("{\"prompt\": \"x\"}"), 415, "null"),
        (gateway.client.get(url(COMPLETION)), 405, "method_not_allowed"),
        (gateway.client.get(url("/v2/x")), 404, "unknown_url"),
        (gateway.client.get(url("/v1/models/%ff")), 400, "invalid_url"),
        (gateway.client.delete(url("/v1/responses/%c3")), 400, "invalid_url"),
    ];
    for (request, status, code) in cases {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status);
        assert!(response.headers().contains_key("x-request-id"));
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"].as_str().unwrap_or("null"), code, "{body}");
    }
}

/// Protects: whoever was told a wrong address learns the right one.
#[tokio::test]
async fn a_path_beside_the_right_one_names_it() {
    let gateway = Gateway::new(|_| says("x")).await;
    for (path, meant) in [
        ("/chat/completions", CHAT),
        ("/completions", COMPLETION),
        ("/v1/v1/messages", "/v1/messages"),
        ("/api/v1/models/", "/v1/models"),
        ("/v1/tokenize", "/tokenize"),
        ("/api/chat", CHAT),
        ("/completion", COMPLETION),
    ] {
        let (status, answer) = gateway.ask(path, &json!({})).await;
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 404 && message.ends_with(&format!("Did you mean {meant}?")), "{path}: {answer}");
    }
    let (_, answer) = gateway.ask("/v1/moderations", &json!({})).await;
    assert_eq!(answer["error"]["message"], "Unknown request URL: POST /v1/moderations.");
}

/// What a client gets that sends all before it reads.
async fn sent_whole(gateway: &Gateway, request: &[u8]) -> String {
    let mut connection = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
    connection.write_all(request).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Protects: a client learns why, also one that sends far too much before it reads; and its connection ends then.
#[tokio::test]
async fn a_refusal_is_seen_whatever_was_sent() {
    const BYTES: usize = 40 << 20;
    let gateway = Gateway::new(|_| says("x")).await;
    let post = |path: &str, head: &str| {
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{head}\r\n");
        [head.into_bytes(), vec![b'x'; BYTES]].concat()
    };
    let length = format!("content-length: {BYTES}\r\n");
    let chunked = format!("transfer-encoding: chunked\r\n\r\n{BYTES:x}\r\n");
    for (request, status, code) in [
        (post(CHAT, &length), "413", "request_too_large"),
        (post(CHAT, chunked.trim_end_matches("\r\n")), "413", "request_too_large"),
        (post("/v1/messages", &length), "413", "request_too_large"),
        (post("/v2/x", &length), "404", "unknown_url"),
    ] {
        let answer = sent_whole(&gateway, &request).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}")) && head.contains("connection: close"),
            "{head}"
        );
        let body: Value = serde_json::from_str(body).expect("an error");
        assert!(body["error"]["code"] == code || body["error"]["type"] == code, "{body}");
    }
}

/// Protects: who asks before sending too much is not told to go on.
#[tokio::test]
async fn a_body_that_is_announced_too_large_is_not_asked_for() {
    let gateway = Gateway::new(|_| says("x")).await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         expect: 100-continue\r\n\r\n",
        config().limits.body_bytes + 1
    );
    let answer = sent_whole(&gateway, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn a_head_beyond_its_bounds_is_refused() {
    let gateway = Gateway::new(|_| says("x")).await;
    for head in ["a: b\r\n".repeat(101), format!("a: {}\r\n", "b".repeat(10 << 20))] {
        let request = format!("GET /live HTTP/1.1\r\nhost: x\r\n{head}\r\n");
        let answer = sent_whole(&gateway, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{} bytes: {answer}", head.len());
    }
}

fn failures() -> [(InferenceError, u16, &'static str); 4] {
    [
        (InferenceError::Overloaded { retry_after: Duration::from_millis(1500) }, 429, "overloaded"),
        (InferenceError::Unavailable("no decode group".into()), 503, "service_unavailable"),
        (InferenceError::Invalid("larger than any store".into()), 400, "invalid_request"),
        (InferenceError::Internal("oh".into()), 500, "internal_error"),
    ]
}

#[tokio::test]
async fn a_refusal_of_the_cluster_is_a_status_even_for_a_stream() {
    for (error, status, code) in failures() {
        let steps = vec![Step::Fail(error)];
        let gateway = Gateway::new(move |_| steps.clone()).await;
        for stream in [false, true] {
            let response = gateway.post(COMPLETION, &json!({"prompt": "x", "stream": stream})).await;
            assert_eq!(response.status(), status, "stream: {stream}");
            let retry =
                response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_string());
            let expected = match status {
                429 => Some("2"),
                503 => Some("5"),
                _ => None,
            };
            assert_eq!(retry.as_deref(), expected);
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["error"]["code"], code);
        }
    }
}

#[tokio::test]
async fn a_failure_within_a_stream_is_an_event_and_cancels_the_other_choices() {
    let mut gateway = Gateway::new(|request| {
        let fails =
            vec![started(), token(0, 40), Step::Wait, Step::Fail(InferenceError::Unavailable("gone".into()))];
        if request.id.ends_with("-0") { fails } else { vec![started(), token(0, 41), Step::Wait, Step::Wait] }
    })
    .await;
    gateway.go();
    gateway.go();
    let mut events = gateway.events(COMPLETION, &json!({"prompt": "x", "stream": true, "n": 2})).await;
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let error: Value = serde_json::from_str(&events.pop().unwrap()).unwrap();
    assert_eq!(
        (&error["error"]["message"], &error["error"]["code"]),
        (&json!("gone"), &json!("service_unavailable"))
    );
    let gone = [gateway.gone().await, gateway.gone().await];
    assert!(gone.iter().all(|(_, ended)| !ended));
}

#[tokio::test]
async fn a_sequence_without_an_end_and_tokens_out_of_order_are_failures() {
    for steps in
        [vec![started(), token(0, 40)], vec![started(), token(1, 40), finished(FinishReason::Stop, 1)]]
    {
        let gateway = Gateway::new(move |_| steps.clone()).await;
        let body = json!({"prompt": "x"});
        assert_eq!(refusal(&gateway, COMPLETION, &body).await, (500, "internal_error".into(), "null".into()));
    }
}

#[tokio::test]
async fn a_template_refuses_in_its_own_words() {
    let config = template_config("refuses", "{{ raise_exception('roles must alternate') }}");
    let gateway = Gateway::with(config, |_| script(&[40], FinishReason::Length)).await;
    let (status, body) = gateway.ask(CHAT, &json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!((status, &body["error"]["message"]), (400, &json!("roles must alternate")));
}
