//! `/openapi.json` is true: what it lists is served and read, and its ranges are the ranges.

use serde_json::{Map, Value, json};

use crate::mock::{Gateway, batch_config, says};

/// A value that the schema allows.
fn example(schema: &Value) -> Value {
    let kind = match &schema["type"] {
        Value::Array(kinds) => &kinds[0],
        kind => kind,
    };
    match (schema.get("example"), schema.get("const"), schema.get("enum"), schema.get("anyOf")) {
        (Some(value), ..) | (_, Some(value), ..) => value.clone(),
        (_, _, Some(values), _) => values[0].clone(),
        (_, _, _, Some(all)) => example(&all[0]),
        _ => match kind.as_str() {
            Some("string") => "a".into(),
            Some("boolean") => false.into(),
            Some("integer") => {
                schema.get("maximum").filter(|max| max.as_i64() < Some(100)).cloned().unwrap_or(json!(3))
            }
            Some("number") => schema["maximum"].clone(),
            Some("array") if schema.get("minItems").is_some() => json!([example(&schema["items"])]),
            Some("array") => json!([]),
            _ => json!({}),
        },
    }
}

/// What parameters need beside themselves, or of themselves, where an example cannot be guessed.
fn request(name: &str, schema: &Value, base: &Map<String, Value>) -> Value {
    let mut body = base.clone();
    let value = match name {
        "messages" => json!([{"role": "user", "content": "a"}]),
        "prompt" => json!("a"),
        "input" => json!("a"),
        "response_format" => json!({"type": "json_object"}),
        "guided_json" | "json_schema" => json!({"type": "object"}),
        "guided_grammar" | "grammar" => json!("root ::= \"a\""),
        "tool_choice" if base.contains_key("max_tokens") => json!({"type": "auto"}),
        "thinking" => json!({"type": "enabled", "budget_tokens": 1024}),
        "prediction" => json!({"type": "content", "content": "a"}),
        "best_of" => json!(1),
        "store" => json!(false),
        "previous_response_id" => Value::Null,
        _ => example(schema),
    };
    body.insert(name.into(), value);
    match name {
        "stream_options" => _ = body.insert("stream".into(), true.into()),
        "top_logprobs" => _ = body.insert("logprobs".into(), true.into()),
        "min_tokens" => _ = body.insert("max_tokens".into(), 200.into()),
        _ => {}
    }
    body.into()
}

#[tokio::test]
async fn every_listed_parameter_is_read_and_its_bounds_hold() {
    let gateway = Gateway::new(|_| says("x")).await;
    let document: Value = gateway.get("/openapi.json").await.json().await.unwrap();
    let user = json!([{"role": "user", "content": "a"}]);
    for (path, schema, base) in [
        ("/v1/chat/completions", "ChatRequest", json!({"messages": user})),
        ("/v1/completions", "CompletionRequest", json!({"prompt": "a"})),
        ("/v1/responses", "ResponseRequest", json!({"input": "a"})),
        ("/v1/responses/input_tokens", "InputTokensRequest", json!({"input": "a"})),
        ("/v1/messages", "MessageRequest", json!({"messages": user, "max_tokens": 9})),
    ] {
        let base = base.as_object().unwrap();
        let properties = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        for (name, schema) in properties {
            let body = request(name, schema, base);
            let response = gateway.post(path, &body).await;
            let status = response.status();
            assert_eq!(status, 200, "{path} {body}: {}", response.text().await.unwrap());
            for (bound, step) in [("minimum", -1.0), ("maximum", 1.0)] {
                let Some(limit) = schema[bound].as_f64() else { continue };
                let mut body = base.clone();
                body.insert(name.clone(), json!((limit + step) as i64));
                let (status, error) = gateway.ask(path, &body.into()).await;
                assert_eq!(status, 400, "{path} {name} beyond its {bound}: {error}");
            }
        }
        let mut body = base.clone();
        body.insert("unheard_of".into(), 1.into());
        assert_eq!(gateway.ask(path, &body.into()).await.0, 400);
    }
}

#[tokio::test]
async fn every_listed_path_is_served() {
    let gateway = Gateway::with(batch_config("openapi"), |_| says("x")).await;
    let document: Value = gateway.get("/openapi.json").await.json().await.unwrap();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let url = format!("{}{}", gateway.url, path.replace("{id}", "tiny"));
            let method: reqwest::Method = method.to_uppercase().parse().unwrap();
            let response = gateway.client.request(method, url).json(&json!({})).send().await.unwrap();
            let status = response.status().as_u16();
            let body = response.text().await.unwrap();
            assert!(!body.contains("unknown_url") && status != 405, "{path}: {body}");
            assert!(operation["responses"].get(status.to_string()).is_some(), "{path} answers {status}");
        }
    }
    let version: Value = gateway.get("/version").await.json().await.unwrap();
    assert_eq!(version["version"], document["info"]["version"]);
}
