//! `POST /v1/responses` and `/v1/responses/input_tokens`, and `GET` and `DELETE` of one: OpenAI's newer interface. A request is
//! written over as a chat, with the conversation that `previous_response_id` names in front, and goes the way of chats;
//! `responses_format` writes the answer and keeps it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::extract::{Path, Query, Request, State};
use axum::response::Response;
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use super::Gateway;
use super::body::read_body;
use super::chat::{parse, prepare, read_conversation, render};
use super::error::ApiError;
use super::fields::{Fields, quoted};
use super::form::read_form;
use super::head::Head;
use super::quota::Caller;
use super::reply;
use super::responses_format::{Echo, ResponsesFormat};
use super::run::{Asker, random, start};
use super::translated::Translated;

type Default = fn() -> Value;

/// Fields that are repeated in the response as they came, and their values where a request leaves them out.
const ECHOED: [(&str, Default); 17] = [
    ("instructions", || Value::Null),
    ("max_output_tokens", || Value::Null),
    ("max_tool_calls", || Value::Null),
    ("metadata", || json!({})),
    ("parallel_tool_calls", || json!(true)),
    ("previous_response_id", || Value::Null),
    ("reasoning", || json!({"effort": null, "summary": null})),
    ("service_tier", || json!("default")),
    ("store", || json!(true)),
    ("temperature", || Value::Null),
    ("text", || json!({"format": {"type": "text"}})),
    ("tool_choice", || json!("auto")),
    ("tools", || json!([])),
    ("top_logprobs", || json!(0)),
    ("top_p", || Value::Null),
    ("truncation", || json!("disabled")),
    ("user", || Value::Null),
];

/// The handler.
pub async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let asker = Asker::of(&request);
    let owner = owner(asker.caller.as_ref());
    let body = read_body(request, &gateway.config.limits).await?;
    let arrived = Instant::now();
    let (params, prompt, reading, echo) = gateway
        .on_text_thread(move |gateway| {
            let (chat, echo) = to_chat(gateway, owner, Fields::parse(&body)?)?;
            let (params, prompt, reading) = chat.serve(|chat| prepare(gateway, parse(gateway, chat)?))?;
            Ok((params, prompt, reading, echo))
        })
        .await?;
    let head = Head::new("resp_", random()?, SystemTime::now(), Arc::clone(&gateway.model));
    let mut answer = start(&gateway, &params, &[prompt], &reading, &head, arrived, &asker)?;
    let format = ResponsesFormat::new(head, echo, Arc::clone(&gateway));
    if params.stream {
        answer.admitted().await?;
        Ok(reply::stream(answer, format))
    } else {
        reply::complete(answer, format).await
    }
}

/// What an answer to this would read, in tokens.
pub async fn count(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Json<Value>, ApiError> {
    let owner = owner(Asker::of(&request).caller.as_ref());
    let body = read_body(request, &gateway.config.limits).await?;
    let count = gateway.on_text_thread(move |gateway| {
        let (chat, _) = to_chat(gateway, owner, Fields::parse(&body)?)?;
        chat.serve(|mut chat| {
            gateway.check_model(&mut chat)?;
            let (conversation, ..) = read_conversation(gateway, &mut chat)?;
            read_form(&mut chat)?;
            chat.finish()?;
            let tokens = gateway.encode_any(&render(gateway, conversation)?, false)?;
            Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens.len()})))
        })
    });
    count.await
}

/// One kept response.
pub async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Option<Extension<Arc<Caller>>>,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    // It is told as it was kept, and whole.
    for (name, value) in &query {
        match name.as_str() {
            "stream" if value == "false" => {}
            "stream" | "starting_after" | "include" | "include[]" | "include_obfuscation" => {
                return Err(ApiError::unsupported(name, "is not supported here"));
            }
            _ => return Err(ApiError::unknown(name.chars().take(64).collect::<String>())),
        }
    }
    let key = format!("{}{id}", owner(caller.as_deref()));
    let kept = gateway.responses.get(&key).ok_or_else(|| no_response(&id))?;
    Ok(Json(kept.response.clone()))
}

/// Forgets one.
pub async fn delete(
    State(gateway): State<Arc<Gateway>>,
    caller: Option<Extension<Arc<Caller>>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let key = format!("{}{id}", owner(caller.as_deref()));
    if !gateway.responses.remove(&key) {
        return Err(no_response(&id));
    }
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

/// Before the id of what is kept: nobody comes to what was kept for another.
fn owner(caller: Option<&Arc<Caller>>) -> String {
    caller.map(|caller| format!("{} ", caller.owner)).unwrap_or_default()
}

fn no_response(id: &str) -> ApiError {
    ApiError::not_found("response_not_found", format!("Response with id {} not found.", quoted(id)))
}

/// The same request as a chat, and what its response repeats.
fn to_chat(gateway: &Gateway, owner: String, mut fields: Fields) -> Result<(Translated, Echo), ApiError> {
    let mut echoed = Map::new();
    for (name, default) in ECHOED {
        echoed.insert(name.into(), fields.peek(name).cloned().unwrap_or_else(default));
    }
    let mut chat = Translated::default();
    chat.same("messages", "input");
    chat.same("tool_choice.function", "tool_choice");
    if let Some(text) = fields.string("instructions")? {
        chat.message(json!({"role": "system", "content": text}), "instructions");
    }
    // Instructions are of one response only.
    let instructions = chat.messages().len();
    if let Some(id) = fields.string("previous_response_id")? {
        let kept = gateway.responses.get(&format!("{owner}{id}"));
        let kept = kept.ok_or_else(|| ApiError::previous_not_found(&id))?;
        kept.messages.iter().for_each(|message| chat.kept_message(message.clone(), "previous_response_id"));
    }
    read_input(&mut fields, &mut chat, instructions)?;
    let messages = chat.messages()[instructions..].to_vec();
    for (i, tool) in fields.array("tools")?.unwrap_or_default().into_iter().enumerate() {
        read_tool(&format!("tools[{i}]"), tool, &mut chat)?;
    }
    if let Some(mut text) = fields.object("text")? {
        if let Some(format) = text.object("format")? {
            read_format(format, &mut chat)?;
        }
        text.only("verbosity", &json!("medium"), "is not supported")?;
        text.finish()?;
    }
    if let Some(mut reasoning) = fields.object("reasoning")? {
        if let Some(effort) = reasoning.take("effort") {
            chat.set("reasoning_effort", effort, "reasoning.effort");
        }
        reasoning.refuse(&["summary", "generate_summary"], "is not supported: reasoning is given in full")?;
        reasoning.finish()?;
    }
    let store = fields.boolean("store")?.unwrap_or(true);
    fields.only("background", &json!(false), "is not supported")?;
    fields.only("truncation", &json!("disabled"), "is not supported")?;
    fields.only("top_logprobs", &json!(0), "is not supported here")?;
    include(&mut fields)?;
    fields.refuse(&["conversation", "prompt", "max_tool_calls", "n", "best_of"], "is not supported")?;
    if let Some(mut options) = fields.object("stream_options")? {
        options.boolean("include_obfuscation")?; // pads events; there is nothing to pad here
        options.finish()?;
    }
    let max = fields.integer("max_output_tokens", 1..=i64::from(u32::MAX))?;
    // Everything else is what chats know; what they do not know they refuse by the same name.
    fields.refuse(
        &["max_tokens", "messages", "response_format", "stop", "logprobs", "prompt_logprobs"],
        "is not supported here",
    )?;
    if let Some(max) = max {
        chat.set("max_tokens", max.into(), "max_output_tokens");
    }
    chat.extend(fields.rest());
    Ok((chat, Echo { fields: echoed, messages, store, owner }))
}

fn include(fields: &mut Fields) -> Result<(), ApiError> {
    let items = fields.array("include")?.unwrap_or_default();
    // Reasoning is never encrypted here: it is in the response already.
    match items.iter().find(|item| *item != "reasoning.encrypted_content") {
        Some(item) => Err(ApiError::unsupported("include", &format!("of {item} is not supported"))),
        None => Ok(()),
    }
}

/// `instructions`: messages that are no part of the conversation.
fn read_input(fields: &mut Fields, chat: &mut Translated, instructions: usize) -> Result<(), ApiError> {
    let items = match fields.take("input").ok_or_else(|| ApiError::missing("input"))? {
        Value::String(text) => {
            chat.message(json!({"role": "user", "content": text}), "input");
            return Ok(());
        }
        Value::Array(items) => items,
        other => return Err(ApiError::wrong_type("input", "a string or an array of items", &other)),
    };
    if items.is_empty() && chat.messages().len() == instructions {
        return Err(ApiError::wrong_value("input", "at least one item", "none"));
    }
    for (i, item) in items.into_iter().enumerate() {
        read_item(&format!("input[{i}]"), item, chat)?;
    }
    Ok(())
}

/// One item is a message, or a part of the assistant's message that is being put together.
fn read_item(path: &str, item: Value, chat: &mut Translated) -> Result<(), ApiError> {
    let mut item = Fields::of(path, item)?;
    let kind = item.string("type")?.unwrap_or_else(|| "message".into());
    item.string("id")?;
    item.string("status")?;
    let needed = |item: &mut Fields, name: &str| {
        item.string(name)?.ok_or_else(|| ApiError::missing(&format!("{path}.{name}")))
    };
    match kind.as_str() {
        "message" => {
            let role = needed(&mut item, "role")?;
            let content = item.take("content").ok_or_else(|| ApiError::missing(&item.name("content")))?;
            let content = parts(&format!("{path}.content"), content)?;
            match chat.assistant() {
                Some(last) if role == "assistant" && last["content"] == "" => {
                    last["content"] = content;
                    chat.part("content", &item.name("content"));
                }
                _ => chat.message(json!({"role": role, "content": content}), path),
            }
        }
        "function_call" => {
            let [id, name, arguments] = ["call_id", "name", "arguments"].map(|name| needed(&mut item, name));
            if chat.assistant().is_none() {
                chat.message(json!({"role": "assistant", "content": ""}), path);
            }
            chat.call(id?, name?, arguments?.into(), path, ["call_id", "name", "arguments"]);
        }
        "function_call_output" => {
            let id = needed(&mut item, "call_id")?;
            let output = item.take("output").ok_or_else(|| ApiError::missing(&item.name("output")))?;
            let output = parts(&format!("{path}.output"), output)?;
            chat.message(json!({"role": "tool", "tool_call_id": id, "content": output}), path);
            chat.part("content", &item.name("output"));
        }
        "reasoning" => {
            let summary = item.array("summary")?.unwrap_or_default();
            let content = item.array("content")?.unwrap_or(summary);
            item.string("encrypted_content")?;
            let text: String = content.iter().filter_map(|part| part["text"].as_str()).collect();
            chat.message(json!({"role": "assistant", "content": "", "reasoning_content": text}), path);
        }
        other => {
            let why = format!("of type {} is not supported", quoted(other));
            return Err(ApiError::unsupported(path, &why));
        }
    }
    item.finish()
}

/// Texts by any of their names become text parts of a chat.
fn parts(path: &str, content: Value) -> Result<Value, ApiError> {
    let Value::Array(items) = content else { return Ok(content) };
    let part = |(i, item): (usize, Value)| {
        let path = format!("{path}[{i}]");
        let mut part = Fields::of(&path, item)?;
        let kind = part.string("type")?.ok_or_else(|| ApiError::missing(&format!("{path}.type")))?;
        let text = match kind.as_str() {
            "input_text" | "output_text" | "text" => part.string("text")?,
            "refusal" => part.string("refusal")?,
            "input_image" | "input_file" | "input_audio" => {
                let why = format!("of type '{kind}' is not supported: this model reads text only");
                return Err(ApiError::unsupported(path, &why));
            }
            other => {
                return Err(ApiError::wrong_value(&part.name("type"), "a type of text", quoted(other)));
            }
        };
        part.array("annotations")?;
        part.array("logprobs")?;
        part.finish()?;
        let text = text.ok_or_else(|| ApiError::missing(&format!("{path}.text")))?;
        Ok(json!({"type": "text", "text": text}))
    };
    items.into_iter().enumerate().map(part).collect()
}

/// Flat here, nested in chats.
fn read_tool(path: &str, tool: Value, chat: &mut Translated) -> Result<(), ApiError> {
    let mut fields = Fields::of(path, tool)?;
    let kind = fields.string("type")?.ok_or_else(|| ApiError::missing(&format!("{path}.type")))?;
    if kind != "function" {
        let why = format!("of type {} is not supported: only functions are", quoted(&kind));
        return Err(ApiError::unsupported(path, &why));
    }
    let mut function = Map::new();
    for name in ["name", "description", "parameters", "strict"] {
        function.extend(fields.take(name).map(|value| (name.to_string(), value)));
    }
    fields.finish()?;
    chat.tool(function, path, "parameters");
    Ok(())
}

/// The same of the form of an answer.
fn read_format(mut format: Fields, chat: &mut Translated) -> Result<(), ApiError> {
    let kind = format.take("type").ok_or_else(|| ApiError::missing("text.format.type"))?;
    let mut nested = Map::from_iter([("type".to_string(), kind)]);
    if nested["type"] == "json_schema" {
        let schema = format.take("schema").ok_or_else(|| ApiError::missing("text.format.schema"))?;
        let mut inner = format.rest();
        inner.insert("schema".into(), schema);
        nested.insert("json_schema".into(), inner.into());
    } else {
        nested.extend(format.rest());
    }
    chat.set("response_format", nested.into(), "text.format");
    chat.same("response_format.json_schema", "text.format");
    Ok(())
}
