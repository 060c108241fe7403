//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's interface. A request is written over as a chat and goes
//! the way of chats; `anthropic_format` writes the answer.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::Json;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::Gateway;
use super::anthropic_format::AnthropicFormat;
use super::body::read_body;
use super::chat::{parse, prepare, read_conversation, render};
use super::error::ApiError;
use super::fields::{Fields, quoted};
use super::head::Head;
use super::reply;
use super::run::{Asker, random, start};

/// The handler of messages.
pub async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let asker = Asker::of(&request);
    let body = read_body(request, &gateway.config.limits).await?;
    let arrived = Instant::now();
    let (params, prompt, reading) = gateway
        .on_text_thread(move |gateway| {
            let chat = to_chat(Fields::parse(&body)?, true)?;
            parse(gateway, chat).and_then(|chat| prepare(gateway, chat)).map_err(own_words)
        })
        .await?;
    let head = Head::new("msg", random()?, SystemTime::now(), Arc::clone(&gateway.model));
    let input_tokens = prompt.tokens.len() as u32;
    let mut answer = start(&gateway, &params, &[prompt], &reading, &head, arrived, &asker)?;
    let format = AnthropicFormat::new(head, input_tokens);
    if params.stream {
        answer.admitted().await?;
        Ok(reply::stream(answer, format))
    } else {
        reply::complete(answer, format).await
    }
}

/// The handler of counts.
pub async fn count(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Json<Value>, ApiError> {
    let body = read_body(request, &gateway.config.limits).await?;
    let count = gateway.on_text_thread(move |gateway| {
        let mut chat = to_chat(Fields::parse(&body)?, false)?;
        gateway.check_model(&mut chat)?;
        let (conversation, ..) = read_conversation(gateway, &mut chat).map_err(own_words)?;
        let tokens = gateway.encode_any(&render(gateway, conversation)?, false)?;
        Ok(Json(json!({"input_tokens": tokens.len()})))
    });
    count.await
}

/// What is wrong is named as the client wrote it.
fn own_words(mut error: ApiError) -> ApiError {
    const SCHEMA: (&str, &str) = ("response_format.json_schema", "output_config.format");
    match error.param.as_mut() {
        Some(param) if param == "reasoning_effort" => {
            ApiError::unsupported("thinking", "has no effect with this model")
        }
        Some(param) if param.starts_with(SCHEMA.0) => {
            *param = param.replace(SCHEMA.0, SCHEMA.1);
            ApiError { message: error.message.replace(SCHEMA.0, SCHEMA.1), ..error }
        }
        _ => error,
    }
}

/// The same request as a chat. `answers`: with what concerns the answer.
fn to_chat(mut fields: Fields, answers: bool) -> Result<Fields, ApiError> {
    let mut chat = Map::new();
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({"role": "system", "content": text("system", system)?}));
    }
    let turns = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    for (i, turn) in turns.into_iter().enumerate() {
        read_turn(&format!("messages[{i}]"), turn, &mut messages)?;
    }
    // What the assistant has begun to say is gone on with.
    let begun =
        messages.last().is_some_and(|last| last["role"] == "assistant" && last["tool_calls"].is_null());
    chat.insert("continue_final_message".into(), begun.into());
    chat.insert("messages".into(), messages.into());
    // All prompts are cached.
    fields.object("cache_control")?;
    let tools = fields.array("tools")?.unwrap_or_default();
    if !tools.is_empty() {
        let tools = tools.into_iter().enumerate().map(|(i, tool)| read_tool(&format!("tools[{i}]"), tool));
        chat.insert("tools".into(), tools.collect::<Result<Value, _>>()?);
    }
    tool_choice(&mut fields, &mut chat)?;
    thinking(&mut fields, &mut chat)?;
    if answers {
        let max = fields.take("max_tokens").ok_or_else(|| ApiError::missing("max_tokens"))?;
        chat.insert("max_tokens".into(), max);
        if let Some(mut metadata) = fields.object("metadata")? {
            metadata.string("user_id")?;
            metadata.finish()?;
        }
        if let Some(mut output) = fields.object("output_config")? {
            if let Some(mut format) = output.object("format")? {
                format
                    .word("type", &["json_schema"])?
                    .ok_or_else(|| ApiError::missing("output_config.format.type"))?;
                let schema =
                    format.take("schema").ok_or_else(|| ApiError::missing("output_config.format.schema"))?;
                format.finish()?;
                let schema = json!({"name": "answer", "strict": true, "schema": schema});
                chat.insert("response_format".into(), json!({"type": "json_schema", "json_schema": schema}));
            }
            output.refuse(&["effort"], "is not supported")?;
            output.finish()?;
        }
        if let Some(stop) = fields.array("stop_sequences")? {
            chat.insert("stop".into(), stop.into());
        }
    }
    for name in ["model", "stream", "temperature", "top_p", "top_k", "service_tier", "seed", "cache_salt"] {
        chat.extend(fields.take(name).map(|value| (name.to_string(), value)));
    }
    fields.finish()?;
    Ok(Fields::top(chat))
}

/// A text, or a list of text blocks.
fn text(path: &str, value: Value) -> Result<Value, ApiError> {
    let Value::Array(blocks) = value else { return Ok(value) };
    let blocks = blocks.into_iter().enumerate().map(|(i, block)| {
        let mut block = Fields::of(&format!("{path}[{i}]"), block)?;
        block.object("cache_control")?;
        block.array("citations")?;
        Ok(Value::Object(block.rest()))
    });
    blocks.collect()
}

/// One turn becomes one or several messages: results of tools are messages of their own.
fn read_turn(path: &str, turn: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(path, turn)?;
    let role = fields.word("role", &["user", "assistant", "system"])?;
    let role = role.ok_or_else(|| ApiError::missing(&format!("{path}.role")))?;
    let content = fields.take("content").ok_or_else(|| ApiError::missing(&format!("{path}.content")))?;
    fields.finish()?;
    let Value::Array(blocks) = content else {
        messages.push(json!({"role": role, "content": content}));
        return Ok(());
    };
    let (mut texts, mut calls, mut reasoning) = (Vec::new(), Vec::new(), String::new());
    for (i, block) in blocks.into_iter().enumerate() {
        let path = format!("{path}.content[{i}]");
        let mut block = Fields::of(&path, block)?;
        block.object("cache_control")?;
        let kind = block.string("type")?.ok_or_else(|| ApiError::missing(&format!("{path}.type")))?;
        let needed = |block: &mut Fields, name: &str| {
            block.string(name)?.ok_or_else(|| ApiError::missing(&format!("{path}.{name}")))
        };
        match (kind.as_str(), role) {
            ("text", _) => {
                texts.push(json!({"type": "text", "text": needed(&mut block, "text")?}));
                block.array("citations")?;
            }
            ("thinking", "assistant") => {
                reasoning.push_str(&needed(&mut block, "thinking")?);
                block.string("signature")?;
            }
            ("redacted_thinking", "assistant") => _ = block.string("data")?,
            ("tool_use", "assistant") => {
                let input = block.object("input")?.map(Fields::rest);
                let function = json!({"name": needed(&mut block, "name")?, "arguments": input});
                calls
                    .push(json!({"id": needed(&mut block, "id")?, "type": "function", "function": function}));
            }
            ("tool_result", "user") => {
                let id = needed(&mut block, "tool_use_id")?;
                let content = text(&format!("{path}.content"), block.take("content").unwrap_or("".into()))?;
                block.boolean("is_error")?;
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            ("image" | "document", _) => {
                let why = format!("of type '{kind}' is not supported: this model reads text only");
                return Err(ApiError::unsupported(path, &why));
            }
            _ => {
                let expected = format!("a type of block that the role '{role}' may have");
                return Err(ApiError::wrong_value(&format!("{path}.type"), expected, quoted(&kind)));
            }
        }
        block.finish()?;
    }
    let mut message = json!({"role": role, "content": texts});
    if role == "assistant" {
        if !reasoning.is_empty() {
            message["reasoning_content"] = reasoning.into();
        }
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        messages.push(message);
    } else if !texts_of(&message).is_empty() {
        messages.push(message);
    }
    Ok(())
}

fn texts_of(message: &Value) -> &[Value] {
    message["content"].as_array().map_or(&[], Vec::as_slice)
}

fn read_tool(path: &str, tool: Value) -> Result<Value, ApiError> {
    let mut fields = Fields::of(path, tool)?;
    if let Some(kind) = fields.string("type")?.filter(|kind| kind != "custom") {
        return Err(ApiError::unsupported(path, &format!("of type {} is not supported", quoted(&kind))));
    }
    fields.object("cache_control")?;
    let mut function = Map::new();
    for (from, to) in [
        ("name", "name"),
        ("description", "description"),
        ("input_schema", "parameters"),
        ("strict", "strict"),
    ] {
        function.extend(fields.take(from).map(|value| (to.to_string(), value)));
    }
    fields.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok(()) };
    let kind = choice.word("type", &["auto", "any", "tool", "none"])?;
    let value = match kind.ok_or_else(|| ApiError::missing("tool_choice.type"))? {
        "any" => json!("required"),
        "tool" => {
            let name = choice.string("name")?.ok_or_else(|| ApiError::missing("tool_choice.name"))?;
            json!({"type": "function", "function": {"name": name}})
        }
        word => json!(word),
    };
    chat.insert("tool_choice".into(), value);
    if let Some(single) = choice.boolean("disable_parallel_tool_use")? {
        chat.insert("parallel_tool_calls".into(), (!single).into());
    }
    choice.finish()
}

/// The budget is the model's own: it cannot be bounded apart from `max_tokens`.
fn thinking(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else { return Ok(()) };
    let kind = thinking.word("type", &["enabled", "disabled", "adaptive"])?;
    let kind = kind.ok_or_else(|| ApiError::missing("thinking.type"))?;
    thinking.integer("budget_tokens", 1..=i64::from(u32::MAX))?;
    thinking.finish()?;
    if kind != "adaptive" {
        let effort = if kind == "enabled" { "high" } else { "none" };
        chat.insert("reasoning_effort".into(), effort.into());
    }
    Ok(())
}
