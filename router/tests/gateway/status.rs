//! Health, metrics, models, keys, hosts, origins, and `/tokenize`.

use std::time::Duration;

use router::ServeError;
use router::inference::{Decision, Served, Timings, TokenEvent};
use router::key_file::{KeyFile, KeyLimits};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::mock::{CONTEXT, Gateway, PATIENCE, Step, config, encode, says};

#[tokio::test]
async fn health_is_the_clusters_and_live_is_ours() {
    let gateway = Gateway::new(|_| says("x")).await;
    *gateway.cluster.health.lock().unwrap() = Err("no decode group".into());
    let response = gateway.get("/health").await;
    assert_eq!(response.status(), 503);
    let body: serde_json::Value = response.json().await.unwrap();
    assert_eq!(
        (&body["error"]["message"], &body["error"]["code"]),
        (&json!("no decode group"), &json!("service_unavailable"))
    );
    assert_eq!(gateway.get("/live").await.status(), 200);
    let root = gateway.get("/").await.text().await.unwrap();
    assert!(root.contains(" serves tiny.\n") && root.contains("/v1/chat/completions"), "{root}");
    let healthy = Gateway::new(|_| says("x")).await;
    assert_eq!(healthy.get("/health").await.status(), 200);
}

#[tokio::test]
async fn metrics_count_what_was_served() {
    let gateway = Gateway::new(|_| says("x")).await;
    gateway.ask("/v1/completions", &json!({"prompt": "Hi"})).await;
    gateway.ask("/v1/completions", &json!({"prompt": 1})).await;
    let response = gateway.get("/metrics").await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    let text = response.text().await.unwrap();
    for line in [
        "vllm:num_requests_running{model_name=\"tiny\"} 3",
        "vllm:generation_tokens_total{model_name=\"tiny\"} 2",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"stop\"} 1",
        "baton_http_responses_total{model_name=\"tiny\",path=\"/v1/completions\",status=\"400\"} 1",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

/// What ends at a stop string, where the cluster is not heard to the end, is known as well as what the cluster ends.
#[tokio::test]
async fn how_it_was_served_is_known_of_what_a_stop_string_ends() {
    let ms = Duration::from_millis;
    let timings = Timings {
        prefill: ms(4),
        transfer_exposed: ms(5),
        transfer_estimated: ms(6),
        first_step_wait: ms(7),
        first_step: ms(8),
        ..Timings::default()
    };
    let served = Served { cached_tokens: 1, decision: Decision::Handoff, migrations: 2, timings };
    let gateway = Gateway::new(move |_| {
        let mut steps = says("a b c");
        steps.insert(3, Step::Event(TokenEvent::Served(served)));
        steps
    })
    .await;
    let ask = json!({"prompt": "Hi there", "stop": "b", "baton_timings": true});
    let (_, answer) = gateway.ask("/v1/completions", &ask).await;
    assert_eq!(answer["choices"][0]["text"], "a ");
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    let timings = &answer["choices"][0]["baton"];
    assert_eq!((&timings["prefill_ms"], &timings["decision"]), (&json!(4.0), &json!("handoff")), "{answer}");
    assert_eq!((&timings["first_step_ms"], &timings["migrations"]), (&json!(8.0), &json!(2)), "{answer}");
    let text = gateway.get("/metrics").await.text().await.unwrap();
    let tokens = encode("Hi there").len();
    for line in [
        "baton_request_decisions_total{model_name=\"tiny\",decision=\"handoff\"} 1",
        "vllm:prefix_cache_hits_total{model_name=\"tiny\"} 1",
        &format!("vllm:prefix_cache_queries_total{{model_name=\"tiny\"}} {tokens}"),
        "vllm:request_prefill_time_seconds_sum{model_name=\"tiny\"} 0.004",
        "baton_transfer_exposed_seconds_sum{model_name=\"tiny\"} 0.005",
        "baton_transfer_estimated_seconds_sum{model_name=\"tiny\"} 0.006",
        "baton_first_step_wait_seconds_sum{model_name=\"tiny\"} 0.007",
        "baton_first_step_seconds_sum{model_name=\"tiny\"} 0.008",
        "baton_request_migrations_total{model_name=\"tiny\"} 2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn models_are_listed_under_all_their_names() {
    let mut config = config();
    config.aliases = vec!["org/Tiny-1B".into()];
    let gateway = Gateway::with(config, |_| says("x")).await;
    let list: serde_json::Value = gateway.get("/v1/models").await.json().await.unwrap();
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["tiny", "org/Tiny-1B"]);
    assert_eq!(list["data"][0]["max_model_len"], CONTEXT);
    let one: serde_json::Value = gateway.get("/v1/models/org/Tiny-1B").await.json().await.unwrap();
    assert_eq!((&one["id"], &one["object"]), (&json!("org/Tiny-1B"), &json!("model")));
    let other: serde_json::Value = gateway.get("/v1/models/other").await.json().await.unwrap();
    assert_eq!(other["error"]["message"], "The model 'other' does not exist: 'tiny' is served here.");
    assert_eq!(gateway.ask("/v1/completions", &json!({"model": "org/Tiny-1B", "prompt": "x"})).await.0, 200);
}

#[tokio::test]
async fn keys_guard_what_costs_and_nothing_else() {
    let mut config = config();
    config.keys = vec!["sk-secret".into()];
    let gateway = Gateway::with(config, |_| says("x")).await;
    for path in ["/live", "/health", "/metrics"] {
        assert_eq!(gateway.get(path).await.status(), 200, "{path}");
    }
    let body = json!({"model": "tiny", "prompt": "x"});
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        let (status, answer) = gateway.ask(path, &body).await;
        assert_eq!((status, &answer["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
    }
    assert_eq!(gateway.get("/v1/models").await.status(), 401);
    let url = format!("{}/v1/completions", gateway.url);
    let with = |key: &str| gateway.client.post(&url).bearer_auth(key).json(&body).send();
    assert_eq!(with("sk-secret").await.unwrap().status(), 200);
    assert_eq!(with("sk-secreT").await.unwrap().status(), 401);
}

/// Keys of a file have limits on what asks for work: what is used up is refused with 429 and a time, a place is free when its answer has ended or its
/// client has gone, and other keys do not notice.
#[tokio::test]
async fn keys_have_limits() {
    let folder = std::env::temp_dir().join(format!("baton-gateway-keys-{}", std::process::id()));
    let path = folder.join("keys.json");
    let key =
        |name: &str, limits: KeyLimits| KeyFile::change(&path, |file| file.create(name, limits, 1)).unwrap();
    let few = key("few", KeyLimits { requests_per_minute: Some(2), ..KeyLimits::default() });
    let short = key("short", KeyLimits { tokens_per_minute: Some(3), ..KeyLimits::default() });
    let one = key("one", KeyLimits { concurrent: Some(1), ..KeyLimits::default() });
    let mut config = config();
    config.key_file = Some(path);
    let gateway = Gateway::with(config, |_| {
        let mut steps = says("x");
        steps.insert(1, Step::Wait);
        steps
    })
    .await;
    let url = format!("{}/v1/completions", gateway.url);
    let ask = async |key: &str, body: Value| {
        gateway.client.post(&url).bearer_auth(key).json(&body).timeout(PATIENCE).send().await.unwrap()
    };
    let refused = async |response: reqwest::Response, what: &str| {
        assert_eq!(response.status(), 429);
        let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=300).contains(&wait), "{wait}");
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        assert!(body["error"]["message"].as_str().unwrap().contains(what), "{body}");
    };
    let body = json!({"model": "tiny", "prompt": "Hello there"});
    (0..3).for_each(|_| gateway.go());
    assert_eq!(ask(&few, body.clone()).await.status(), 200);
    assert_eq!(ask(&few, body.clone()).await.status(), 200);
    refused(ask(&few, body.clone()).await, "2 requests per minute").await;
    // To look costs nothing, also when nothing is left.
    let models = gateway.client.get(format!("{}/v1/models", gateway.url)).bearer_auth(&few);
    assert_eq!(models.send().await.unwrap().status(), 200);
    // One answer may go beyond its tokens; the next one waits.
    assert_eq!(ask(&short, body.clone()).await.status(), 200);
    refused(ask(&short, body.clone()).await, "3 tokens per minute").await;

    let stream = json!({"model": "tiny", "prompt": "Hello there", "stream": true});
    let first = ask(&one, stream.clone()).await;
    assert_eq!(first.status(), 200);
    refused(ask(&one, stream.clone()).await, "1 requests at once").await;
    drop(first);
    // The server notices the loss of its client a moment later.
    let begun = std::time::Instant::now();
    loop {
        let second = ask(&one, stream.clone()).await;
        if second.status() == 200 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "the place is never free");
        tokio::task::yield_now().await;
    }
    assert_eq!(gateway.client.get(format!("{}/v1/models", gateway.url)).send().await.unwrap().status(), 401);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn request_ids_come_back_or_are_made() {
    let gateway = Gateway::new(|_| says("x")).await;
    let url = format!("{}/live", gateway.url);
    let id = async |given: &str| {
        let response = gateway.client.get(&url).header("x-request-id", given).send().await.unwrap();
        response.headers()["x-request-id"].to_str().unwrap().to_string()
    };
    assert_eq!(id("abc-123").await, "abc-123");
    assert!(id("with space").await.starts_with("req_"));
    assert!(id(&"x".repeat(129)).await.starts_with("req_"));
}

#[tokio::test]
async fn only_listed_hosts_and_origins_are_served() {
    let mut config = config();
    config.allowed_hosts = vec!["localhost".into()];
    config.allowed_origins = vec!["https://chat.example".into()];
    let gateway = Gateway::with(config, |_| says("x")).await;
    let refused = gateway.get("/v1/models").await;
    assert_eq!(refused.status(), 403);
    let said = refused.text().await.unwrap();
    assert!(said.contains("'127.0.0.1' is not served here") && said.contains("--allowed-host"), "{said}");
    // Probes of HTTP/1.0 give no name; browsers always do.
    for (head, status) in [("", "200"), ("Host: evil.example\r\n", "403"), ("Host: \u{fc}\r\n", "403")] {
        let mut probe = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
        probe.write_all(format!("GET /live HTTP/1.0\r\n{head}\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{head}: {answer}");
    }
    let url = format!("{}/v1/models", gateway.url);
    let ask =
        |origin: &str| gateway.client.get(&url).header("host", "LOCALHOST:1").header("origin", origin).send();
    let allowed = ask("https://chat.example").await.unwrap();
    assert_eq!(allowed.headers()["access-control-allow-origin"], "https://chat.example");
    let other = ask("https://evil.example").await.unwrap();
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    assert_eq!(other.status(), 403);
    // A page of this server itself.
    assert_eq!(ask("http://localhost:1").await.unwrap().status(), 200);
    assert_eq!(ask("null").await.unwrap().status(), 403);
    let preflight =
        gateway.client.request(reqwest::Method::OPTIONS, format!("{}/v1/chat/completions", gateway.url));
    let preflight = preflight.header("host", "localhost").header("origin", "https://chat.example");
    let preflight = preflight.header("access-control-request-method", "POST");
    let preflight = preflight
        .header("access-control-request-headers", "authorization, content-type")
        .send()
        .await
        .unwrap();
    assert_eq!(preflight.status(), 204);
    assert_eq!(preflight.headers()["access-control-allow-headers"], "authorization, content-type");
}

/// What stands before us may have judged the other one. RFC 9112, section 3.2. Hosts are not even listed here.
#[tokio::test]
async fn a_request_names_one_host() {
    let gateway = Gateway::new(|_| says("x")).await;
    for (hosts, status) in [
        ("Host: a\r\n", "200"),
        ("Host: a\r\nHost: b\r\n", "400"),
        ("Host: a\r\nHost: a\r\n", "400"),
        ("Host: a, b\r\n", "400"),
    ] {
        let mut client = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
        let head = format!("GET /live HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{hosts}: {answer}");
        if status == "400" {
            let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
            assert_eq!(body["error"]["code"], "invalid_host", "{body}");
        }
    }
}

#[tokio::test]
async fn texts_become_ids_and_back() {
    let gateway = Gateway::new(|_| says("x")).await;
    let ids = encode("Hello 🙂");
    let (_, body) = gateway.ask("/tokenize", &json!({"prompt": "Hello 🙂", "return_token_strs": true})).await;
    assert_eq!((&body["tokens"], &body["count"]), (&json!(ids), &json!(ids.len())));
    assert_eq!((&body["max_model_len"], &body["token_strs"][0]), (&json!(CONTEXT), &json!("H")));
    let (_, body) = gateway.ask("/detokenize", &json!({"tokens": ids})).await;
    assert_eq!(body, json!({"prompt": "Hello 🙂"}));
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": false});
    let (_, body) = gateway.ask("/tokenize", &chat).await;
    assert_eq!(body["tokens"], json!(encode("<|im_start|>user\nHi<|im_end|>\n")));
    assert_eq!(gateway.ask("/detokenize", &json!({"tokens": [99999]})).await.0, 400);
    // Of the two that it takes, the one that is simpler is missed.
    let (_, body) = gateway.ask("/tokenize", &json!({"content": "Hello"})).await;
    assert_eq!(body["error"]["param"], "prompt");
}

#[tokio::test]
async fn a_folder_without_a_tokenizer_is_named() {
    let mut config = config();
    config.model_dir = crate::mock::fixture("nothing");
    let gateway = Gateway::with(config, |_| says("x")).await;
    let error = gateway.served.await.unwrap().unwrap_err();
    assert!(
        matches!(error, ServeError::Text(_)) && error.to_string().contains("fixtures/nothing"),
        "{error}"
    );
}
