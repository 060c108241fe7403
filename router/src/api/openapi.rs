//! `GET /openapi.json`: what this server takes and gives. Written by hand beside the readers (`params`, `chat`, ...), which
//! refuse what is not listed here; a test sends every listed parameter and sees that it is read.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::Gateway;
use super::params::{TIERS, TOP_LOGPROBS_MAX};

/// One path: method, path, what it does, the schema of its body.
type Route = (&'static str, &'static str, &'static str, Option<&'static str>);

/// All that is served.
const ROUTES: [Route; 29] = [
    ("post", "/v1/chat/completions", "Answers a conversation.", Some("ChatRequest")),
    ("post", "/v1/completions", "Goes on with texts.", Some("CompletionRequest")),
    ("post", "/v1/responses", "Answers, and keeps the conversation.", Some("ResponseRequest")),
    ("post", "/v1/responses/input_tokens", "Counts what a response would read.", Some("InputTokensRequest")),
    ("get", "/v1/responses/{id}", "A response that was kept.", None),
    ("delete", "/v1/responses/{id}", "Forgets a response.", None),
    ("post", "/v1/messages", "Answers a conversation, Anthropic's interface.", Some("MessageRequest")),
    ("post", "/v1/messages/count_tokens", "Counts the tokens of a conversation.", Some("CountRequest")),
    ("post", "/v1/embeddings", "Refused: models served here generate text.", Some("EmbeddingRequest")),
    ("post", "/v1/files", "Takes a file in.", Some("FileUpload")),
    ("get", "/v1/files", "The key's files.", None),
    ("get", "/v1/files/{id}", "One file.", None),
    ("delete", "/v1/files/{id}", "Deletes a file.", None),
    ("get", "/v1/files/{id}/content", "What is in a file.", None),
    ("post", "/v1/batches", "Has the lines of a file answered.", Some("BatchRequest")),
    ("get", "/v1/batches", "The key's batches.", None),
    ("get", "/v1/batches/{id}", "One batch.", None),
    ("post", "/v1/batches/{id}/cancel", "Ends a batch.", None),
    ("get", "/v1/models", "The served names.", None),
    ("get", "/v1/models/{id}", "One served name.", None),
    ("post", "/tokenize", "Ids of a text or of a conversation.", Some("TokenizeRequest")),
    ("post", "/detokenize", "The text of ids.", Some("DetokenizeRequest")),
    ("get", "/", "What is served here, for people.", None),
    ("get", "/health", "Runs a step on every role.", None),
    ("get", "/live", "The process answers.", None),
    ("get", "/ping", "As /live.", None),
    ("get", "/version", "The server's version.", None),
    ("get", "/metrics", "Prometheus' view.", None),
    ("get", "/openapi.json", "This document.", None),
];

/// What Ollama and llama.cpp have elsewhere.
const ELSEWHERE: [(&str, &str); 5] = [
    ("/api/chat", "/v1/chat/completions"),
    ("/api/generate", "/v1/completions"),
    ("/api/tags", "/v1/models"),
    ("/api/show", "/v1/models"),
    ("/completion", "/v1/completions"),
];

/// The path that a client meant which was told another address: without `/v1`, with it twice, or with a slash at the end; or
/// one of another server.
pub fn meant(path: &str) -> Option<&'static str> {
    let path = path.trim_end_matches('/');
    if let Some((_, here)) = ELSEWHERE.iter().find(|(there, _)| *there == path) {
        return Some(here);
    }
    let ends = |known: &&str| known.len() > 1 && path.ends_with(known.trim_start_matches("/v1"));
    ROUTES.map(|(_, known, ..)| known).into_iter().filter(ends).max_by_key(|known| known.len())
}

/// The handler.
pub async fn handle(State(gateway): State<Arc<Gateway>>) -> Json<Value> {
    Json(document(&gateway.config.model, gateway.config.limits.sequences))
}

/// The document. `sequences`: choices of one request at most.
pub fn document(model: &str, sequences: usize) -> Value {
    let mut paths = Map::new();
    for (method, path, summary, body) in ROUTES {
        let item = paths.entry(path).or_insert_with(|| json!({}));
        item[method] = operation(method, path, summary, body);
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "baton", "version": env!("CARGO_PKG_VERSION"),
            "description": "Serves a language model on prefill nodes and decode groups."},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas(model, sequences),
        },
        "security": [{}, {"key": []}],
    })
}

fn operation(method: &str, path: &str, summary: &str, body: Option<&str>) -> Value {
    let error = |what: &str| {
        let schema = if path.starts_with("/v1/messages") { "AnthropicError" } else { "Error" };
        let schema = json!({"$ref": format!("#/components/schemas/{schema}")});
        json!({"description": what, "content": {"application/json": {"schema": schema}}})
    };
    let content = match path {
        "/metrics" => json!({"text/plain": {}, "application/openmetrics-text": {}}),
        "/" => json!({"text/plain": {}}),
        "/live" | "/ping" | "/health" => json!({}),
        "/v1/files/{id}/content" => json!({"application/octet-stream": {}}),
        _ if body.is_some() => {
            json!({"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}})
        }
        _ => json!({"application/json": {"schema": {"type": "object"}}}),
    };
    let mut responses =
        json!({"200": {"description": "It worked.", "content": content}, "401": error("No key.")});
    let mut operation = json!({"summary": summary, "operationId": format!("{method} {path}")});
    if path.contains("{id}") || path == "/v1/models/{id}" || body.is_some() {
        responses["404"] = error("There is no such thing.");
    }
    if path.contains("{id}") {
        operation["parameters"] = json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}]);
    }
    if path.starts_with("/v1/files") || path.starts_with("/v1/batches") {
        for (status, what) in [
            ("400", "A parameter is wrong."),
            ("404", "There is no such thing, or none of this key's; or files and batches are switched off."),
            ("409", "Something else must be done first."),
            ("500", "A fault of the server."),
            ("503", "Not now."),
            ("507", "The server's disk is full."),
        ] {
            responses[status] = error(what);
        }
        if method == "get" && !path.contains("{id}") {
            operation["parameters"] = list_parameters(path);
        }
    }
    if (method, path) == ("get", "/v1/responses/{id}") {
        responses["400"] = error("A parameter is not served.");
    }
    if path == "/health" {
        responses["503"] = error("A role cannot serve.");
    }
    if let Some(body) = body {
        let schema = json!({"$ref": format!("#/components/schemas/{body}")});
        let kind = if body == "FileUpload" { "multipart/form-data" } else { "application/json" };
        operation["requestBody"] = json!({"required": true, "content": {kind: {"schema": schema}}});
        for (status, what) in [
            ("400", "The request is not one that can be served; the error names the parameter."),
            ("408", "The body did not come in time."),
            ("413", "The body is too large."),
            ("415", "The body is of another type by its header."),
            ("429", "No room: try again after Retry-After."),
            ("500", "A fault of the server."),
            ("503", "No node can serve."),
        ] {
            responses[status] = error(what);
        }
    }
    operation["responses"] = responses;
    operation
}

/// Of a list with cursors.
fn list_parameters(path: &str) -> Value {
    let most = if path == "/v1/files" { 10_000 } else { 100 };
    let query = |name: &str, schema: Value| json!({"name": name, "in": "query", "schema": schema});
    let mut all = vec![
        query("after", json!({"type": "string"})),
        query("limit", json!({"type": "integer", "minimum": 1, "maximum": most})),
    ];
    if path == "/v1/files" {
        all.push(query("order", json!({"enum": ["asc", "desc"]})));
        all.push(query("purpose", json!({"type": "string"})));
    }
    all.into()
}

fn schemas(model: &str, sequences: usize) -> Value {
    let chat =
        object(&["model", "messages"], [chat_only(), tools(), shared(model, sequences, true)].concat());
    let completion =
        object(&["model", "prompt"], [completion_only(), shared(model, sequences, false)].concat());
    let text = || json!({"type": "string"});
    let messages = chat_only().into_iter().filter(|(name, _)| *name == "messages").collect::<Vec<_>>();
    let tokenize = vec![
        ("model", json!({"const": model})),
        ("prompt", text()),
        ("add_special_tokens", boolean()),
        ("return_token_strs", boolean()),
    ];
    json!({
        "ChatRequest": chat,
        "CompletionRequest": completion,
        "ResponseRequest": object(&["model", "input"], response_fields(model)),
        "InputTokensRequest": object(&["input"], input_tokens_fields(model)),
        "MessageRequest": object(&["model", "messages", "max_tokens"], message_fields(model, true)),
        "CountRequest": object(&["messages"], message_fields(model, false)),
        "EmbeddingRequest": {"type": "object"},
        "FileUpload": object(&["file", "purpose"], upload_fields()),
        "BatchRequest": object(&["input_file_id", "endpoint", "completion_window"], batch_fields()),
        "TokenizeRequest": {"anyOf": [object(&["prompt"], tokenize), object(&["messages"], messages)]},
        "DetokenizeRequest": object(&["tokens"], vec![("model", json!({"const": model})), ("tokens", ids())]),
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "object",
            "required": ["message", "type", "param", "code"], "properties": {
                "message": text(), "type": text(),
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}},
        "AnthropicError": {"type": "object", "required": ["type", "error"], "properties": {"type": {"const": "error"},
            "error": {"type": "object", "required": ["type", "message"],
                "properties": {"type": text(), "message": text()}}}},
    })
}

type Property = (&'static str, Value);

fn object(required: &[&str], properties: Vec<Property>) -> Value {
    let properties: Map<String, Value> =
        properties.into_iter().map(|(name, schema)| (name.to_string(), schema)).collect();
    json!({"type": "object", "required": required, "properties": properties, "additionalProperties": false})
}

fn boolean() -> Value {
    json!({"type": ["boolean", "null"]})
}

fn string() -> Value {
    json!({"type": ["string", "null"]})
}

fn tier() -> Value {
    let words = TIERS.iter().map(|word| json!(word)).chain([Value::Null]);
    json!({"enum": words.collect::<Vec<_>>()})
}

fn number(min: f64, max: f64) -> Value {
    json!({"type": ["number", "null"], "minimum": min, "maximum": max})
}

fn integer(min: i64, max: i64) -> Value {
    json!({"type": ["integer", "null"], "minimum": min, "maximum": max})
}

fn ids() -> Value {
    json!({"type": "array", "items": {"type": "integer", "minimum": 0}})
}

fn any_object() -> Value {
    json!({"type": ["object", "null"]})
}

/// What chats and completions have in common.
fn shared(model: &str, sequences: usize, chat: bool) -> Vec<Property> {
    let above_zero = |max: f64| json!({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": max});
    let texts = json!({"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16});
    let many = i64::from(u32::MAX);
    let mut fields = vec![
        ("model", json!({"type": "string", "example": model})),
        ("n", integer(1, sequences as i64)),
        ("stream", boolean()),
        (
            "stream_options",
            json!({"type": ["object", "null"],
            "properties": {"include_usage": boolean(), "continuous_usage_stats": boolean()}}),
        ),
        ("max_tokens", integer(if chat { 1 } else { 0 }, many)),
        ("min_tokens", integer(0, many)),
        ("stop", json!({"anyOf": [{"type": ["string", "null"], "minLength": 1}, texts]})),
        ("stop_token_ids", ids()),
        ("include_stop_str_in_output", boolean()),
        ("ignore_eos", boolean()),
        ("skip_special_tokens", boolean()),
        ("temperature", number(0.0, 2.0)),
        ("top_p", number(0.0, 1.0)),
        ("top_k", integer(-1, i64::from(i32::MAX))),
        ("min_p", number(0.0, 1.0)),
        ("presence_penalty", number(-2.0, 2.0)),
        ("frequency_penalty", number(-2.0, 2.0)),
        ("repetition_penalty", above_zero(2.0)),
        ("seed", json!({"type": ["integer", "null"]})),
        (
            "logit_bias",
            json!({"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
        ),
        ("user", string()),
        ("safety_identifier", string()),
        ("prompt_cache_key", string()),
        ("service_tier", tier()),
        ("metadata", any_object()),
        ("store", json!({"enum": [false, null]})),
        ("cache_salt", string()),
        ("priority", integer(0, i64::from(i32::MAX))),
        ("prompt_logprobs", integer(0, TOP_LOGPROBS_MAX)),
        ("baton_timings", boolean()),
        (
            "response_format",
            json!({"type": ["object", "null"], "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}}),
        ),
        ("guided_json", json!({"type": ["object", "string", "null"]})),
        ("guided_regex", string()),
        (
            "guided_choice",
            json!({"type": ["array", "null"], "items": {"type": "string", "minLength": 1}, "minItems": 1}),
        ),
        ("guided_grammar", string()),
        ("grammar", string()),
        ("json_schema", json!({"type": ["object", "string", "null"]})),
        ("structured_outputs", any_object()),
    ];
    if chat {
        fields.push(("max_completion_tokens", integer(1, many)));
    }
    fields
}

fn chat_only() -> Vec<Property> {
    let content =
        json!({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "object"}}]});
    let roles = json!({"enum": ["system", "developer", "user", "assistant", "tool", "function"]});
    let message =
        json!({"type": "object", "required": ["role"], "properties": {"role": roles, "content": content}});
    let expected = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]});
    vec![
        ("messages", json!({"type": "array", "minItems": 1, "items": message})),
        ("logprobs", boolean()),
        ("top_logprobs", integer(0, TOP_LOGPROBS_MAX)),
        (
            "prediction",
            json!({"type": ["object", "null"], "required": ["type", "content"], "additionalProperties": false,
            "properties": {"type": {"enum": ["content"]}, "content": expected}}),
        ),
        ("modalities", json!({"enum": [["text"], null]})),
        ("echo", json!({"enum": [false, null]})),
        ("include_reasoning", boolean()),
        ("reasoning_effort", json!({"enum": ["none", "minimal", "low", "medium", "high", "xhigh", null]})),
        ("add_generation_prompt", boolean()),
        ("continue_final_message", boolean()),
        ("chat_template_kwargs", any_object()),
    ]
}

fn tools() -> Vec<Property> {
    let function = json!({"type": "object", "required": ["name"],
        "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 64}}});
    let tool = json!({"type": "object", "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": function}});
    vec![
        ("tools", json!({"type": ["array", "null"], "maxItems": 128, "items": tool})),
        ("tool_choice", json!({"anyOf": [{"enum": ["auto", "none", "required", null]}, {"type": "object"}]})),
        ("parallel_tool_calls", boolean()),
    ]
}

fn completion_only() -> Vec<Property> {
    let prompt = json!({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]});
    vec![
        ("prompt", prompt),
        ("logprobs", integer(0, TOP_LOGPROBS_MAX)),
        ("echo", boolean()),
        ("add_special_tokens", boolean()),
        ("best_of", integer(1, 16)),
        ("suffix", json!({"enum": ["", null]})),
        ("use_beam_search", json!({"enum": [false, null]})),
    ]
}

fn response_fields(model: &str) -> Vec<Property> {
    let input = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]});
    let mut fields = vec![
        ("model", json!({"type": "string", "example": model})),
        ("input", input),
        ("instructions", string()),
        ("previous_response_id", string()),
        ("store", boolean()),
        ("stream", boolean()),
        ("max_output_tokens", integer(1, i64::from(u32::MAX))),
        ("temperature", number(0.0, 2.0)),
        ("top_p", number(0.0, 1.0)),
        ("metadata", any_object()),
        ("user", string()),
        ("text", any_object()),
        ("reasoning", any_object()),
        ("include", json!({"type": ["array", "null"], "items": {"const": "reasoning.encrypted_content"}})),
        ("truncation", json!({"enum": ["disabled", null]})),
        ("background", json!({"enum": [false, null]})),
        ("service_tier", tier()),
    ];
    fields.extend(tools().into_iter().filter(|(name, _)| *name != "tools"));
    fields.push(("tools", json!({"type": ["array", "null"], "items": {"type": "object"}})));
    fields
}

/// Those of a response that concern what is read.
fn input_tokens_fields(model: &str) -> Vec<Property> {
    const READ: [&str; 10] = [
        "model",
        "input",
        "instructions",
        "previous_response_id",
        "parallel_tool_calls",
        "reasoning",
        "text",
        "tool_choice",
        "tools",
        "truncation",
    ];
    response_fields(model).into_iter().filter(|(name, _)| READ.contains(name)).collect()
}

fn upload_fields() -> Vec<Property> {
    vec![
        ("file", json!({"type": "string", "format": "binary"})),
        ("purpose", json!({"const": "batch"})),
        ("expires_after[anchor]", json!({"const": "created_at"})),
        ("expires_after[seconds]", json!({"type": "integer", "minimum": 3600, "maximum": 2_592_000})),
    ]
}

fn batch_fields() -> Vec<Property> {
    let metadata = json!({"type": ["object", "null"], "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 512}});
    let seconds = json!({"type": "integer", "minimum": 3600, "maximum": 2_592_000});
    let after = json!({"type": ["object", "null"], "required": ["anchor", "seconds"], "additionalProperties": false,
        "properties": {"anchor": {"const": "created_at"}, "seconds": seconds}});
    vec![
        ("input_file_id", json!({"type": "string"})),
        ("endpoint", json!({"enum": ["/v1/chat/completions", "/v1/completions", "/v1/responses"]})),
        ("completion_window", json!({"type": "string", "example": "24h"})),
        ("metadata", metadata),
        ("output_expires_after", after),
    ]
}

fn message_fields(model: &str, answers: bool) -> Vec<Property> {
    let content = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]});
    let message = json!({"type": "object", "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": content}});
    let mut fields = vec![
        ("model", json!({"type": "string", "example": model})),
        ("messages", json!({"type": "array", "minItems": 1, "items": message})),
        (
            "system",
            json!({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "object"}}]}),
        ),
        ("tools", json!({"type": ["array", "null"], "items": {"type": "object"}})),
        ("tool_choice", any_object()),
        ("thinking", any_object()),
        ("cache_control", any_object()),
    ];
    if answers {
        fields.extend([
            ("output_config", any_object()),
            ("max_tokens", json!({"type": "integer", "minimum": 1})),
            ("stream", boolean()),
            (
                "stop_sequences",
                json!({"type": ["array", "null"], "items": {"type": "string", "minLength": 1}}),
            ),
            ("temperature", number(0.0, 2.0)),
            ("top_p", number(0.0, 1.0)),
            ("top_k", integer(-1, i64::from(i32::MAX))),
            ("metadata", any_object()),
            ("service_tier", tier()),
        ]);
    }
    fields
}
