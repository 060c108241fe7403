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
use super::translated::Translated;

/// The handler of messages.
pub async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Result<Response, ApiError> {
    let asker = Asker::of(&request);
    let body = read_body(request, &gateway.config.limits).await?;
    let arrived = Instant::now();
    let (params, prompt, reading) = gateway
        .on_text_thread(move |gateway| {
            to_chat(Fields::parse(&body)?, true)?.serve(|chat| prepare(gateway, parse(gateway, chat)?))
        })
        .await?;
    let head = Head::new("msg_", random()?, SystemTime::now(), Arc::clone(&gateway.model));
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
        to_chat(Fields::parse(&body)?, false)?.serve(|mut chat| {
            gateway.check_model(&mut chat)?;
            let (conversation, ..) = read_conversation(gateway, &mut chat)?;
            let tokens = gateway.encode_any(&render(gateway, conversation)?, false)?;
            Ok(Json(json!({"input_tokens": tokens.len()})))
        })
    });
    count.await
}

/// The same request as a chat. `answers`: with what concerns the answer.
fn to_chat(mut fields: Fields, answers: bool) -> Result<Translated, ApiError> {
    let mut chat = Translated::default();
    if let Some(system) = fields.take("system") {
        chat.message(json!({"role": "system", "content": text("system", system)?}), "system");
        chat.part("content", "system");
    }
    let turns = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    for (i, turn) in turns.into_iter().enumerate() {
        read_turn(&format!("messages[{i}]"), turn, &mut chat)?;
    }
    // What the assistant has begun to say is gone on with.
    let begun = chat.assistant().is_some_and(|last| last["tool_calls"].is_null());
    chat.set("continue_final_message", begun.into(), "messages");
    // All prompts are cached.
    fields.object("cache_control")?;
    for (i, tool) in fields.array("tools")?.unwrap_or_default().into_iter().enumerate() {
        read_tool(&format!("tools[{i}]"), tool, &mut chat)?;
    }
    tool_choice(&mut fields, &mut chat)?;
    effort(&mut fields, &mut chat)?;
    if answers {
        let max = fields.take("max_tokens").ok_or_else(|| ApiError::missing("max_tokens"))?;
        chat.set("max_tokens", max, "max_tokens");
        if let Some(mut metadata) = fields.object("metadata")? {
            metadata.string("user_id")?;
            metadata.finish()?;
        }
        if let Some(stop) = fields.array("stop_sequences")? {
            chat.set("stop", stop.into(), "stop_sequences");
        }
    }
    for name in ["model", "stream", "temperature", "top_p", "top_k", "service_tier", "seed", "cache_salt"] {
        chat.extend(fields.take(name).map(|value| (name.to_string(), value)));
    }
    fields.finish()?;
    Ok(chat)
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
fn read_turn(path: &str, turn: Value, chat: &mut Translated) -> Result<(), ApiError> {
    let mut fields = Fields::of(path, turn)?;
    let role = fields.word("role", &["user", "assistant", "system"])?;
    let role = role.ok_or_else(|| ApiError::missing(&format!("{path}.role")))?;
    let content = fields.take("content").ok_or_else(|| ApiError::missing(&format!("{path}.content")))?;
    fields.finish()?;
    let Value::Array(blocks) = content else {
        chat.message(json!({"role": role, "content": content}), path);
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
                let input = block.object("input")?.map(Fields::rest).unwrap_or_default();
                calls.push((path.clone(), needed(&mut block, "id")?, needed(&mut block, "name")?, input));
            }
            ("tool_result", "user") => {
                let id = needed(&mut block, "tool_use_id")?;
                let content = text(&format!("{path}.content"), block.take("content").unwrap_or("".into()))?;
                block.boolean("is_error")?;
                chat.message(json!({"role": "tool", "tool_call_id": id, "content": content}), &path);
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
    if texts.is_empty() && role != "assistant" {
        return Ok(());
    }
    let mut message = json!({"role": role, "content": texts});
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.into();
    }
    chat.message(message, path);
    for (path, id, name, input) in calls {
        chat.call(id, name, input.into(), &path, ["id", "name", "input"]);
    }
    Ok(())
}

fn read_tool(path: &str, tool: Value, chat: &mut Translated) -> Result<(), ApiError> {
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
    chat.tool(function, path, "input_schema");
    Ok(())
}

fn tool_choice(fields: &mut Fields, chat: &mut Translated) -> Result<(), ApiError> {
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok(()) };
    let kind = choice.word("type", &["auto", "any", "tool", "none"])?;
    let value = match kind.ok_or_else(|| ApiError::missing("tool_choice.type"))? {
        "any" => json!("required"),
        "tool" => {
            let name = choice.string("name")?.ok_or_else(|| ApiError::missing("tool_choice.name"))?;
            json!({"type": "function", "name": name})
        }
        word => json!(word),
    };
    chat.set("tool_choice", value, "tool_choice");
    if let Some(single) = choice.boolean("disable_parallel_tool_use")? {
        chat.set("parallel_tool_calls", (!single).into(), "tool_choice.disable_parallel_tool_use");
    }
    choice.finish()
}

/// Reads `thinking` and `output_config`. The budget is the model's own: it cannot be bounded apart from `max_tokens`.
fn effort(fields: &mut Fields, chat: &mut Translated) -> Result<(), ApiError> {
    if let Some(mut thinking) = fields.object("thinking")? {
        let kind = thinking.word("type", &["enabled", "disabled", "adaptive"])?;
        let kind = kind.ok_or_else(|| ApiError::missing("thinking.type"))?;
        thinking.integer("budget_tokens", 1..=i64::from(u32::MAX))?;
        thinking.finish()?;
        match kind {
            "enabled" => chat.set("reasoning_effort", "high".into(), "thinking"),
            "disabled" => chat.set("reasoning_effort", "none".into(), "thinking"),
            _ => {}
        }
    }
    let Some(mut output) = fields.object("output_config")? else { return Ok(()) };
    if let Some(word) = output.word("effort", &["low", "medium", "high", "xhigh", "max"])?
        && !chat.is("reasoning_effort", "none")
    {
        // Chats have no word for more.
        let word = if word == "max" { "xhigh" } else { word };
        chat.set("reasoning_effort", word.into(), "output_config.effort");
    }
    if let Some(mut format) = output.object("format")? {
        format.word("type", &["json_schema"])?.ok_or_else(|| ApiError::missing(&format.name("type")))?;
        let schema = format.take("schema").ok_or_else(|| ApiError::missing(&format.name("schema")))?;
        format.finish()?;
        let schema = json!({"name": "answer", "strict": true, "schema": schema});
        let format = json!({"type": "json_schema", "json_schema": schema});
        chat.set("response_format", format, "output_config.format");
        chat.same("response_format.json_schema", "output_config.format");
    }
    output.finish()
}
