//! The wire form of `/v1/messages`: `message` objects, and the events of a stream: one block after the other.

use serde_json::{Value, json};

use super::answer::Usage;
use super::choice::{Delta, End};
use super::error::ApiError;
use super::head::Head;
use super::reply::{Events, Format, Whole};
use crate::text::answer::Part;

/// Writes messages. There is one choice.
pub struct AnthropicFormat {
    head: Head,
    input_tokens: u32,
    /// The kind of the open block, and its number.
    open: Option<&'static str>,
    blocks: usize,
    calls: usize,
    end: Option<(End, Option<Value>)>,
}

impl AnthropicFormat {
    /// `input_tokens`: of the prompt.
    pub fn new(head: Head, input_tokens: u32) -> Self {
        Self { head, input_tokens, open: None, blocks: 0, calls: 0, end: None }
    }

    fn message(&self, content: Vec<Value>, end: Option<&End>, usage: Value) -> Value {
        json!({
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": &*self.head.model,
            "content": content,
            "stop_reason": end.map(stop_reason),
            "stop_sequence": end.and_then(stop_sequence),
            "usage": usage,
        })
    }

    fn call_id(&self, number: usize, id: Option<&str>) -> String {
        id.map_or_else(|| format!("toolu_{}_{number}", self.head.suffix()), String::from)
    }

    /// Opens a block, unless one of the kind is open.
    fn block(&mut self, kind: &'static str, start: Value, out: &mut Events) {
        if self.open == Some(kind) && kind != "tool_use" {
            return;
        }
        self.close_block(out);
        self.open = Some(kind);
        let data = json!({"type": "content_block_start", "index": self.blocks, "content_block": start});
        out.push_named("content_block_start", &data);
    }

    fn delta_event(&self, delta: Value, out: &mut Events) {
        let data = json!({"type": "content_block_delta", "index": self.blocks, "delta": delta});
        out.push_named("content_block_delta", &data);
    }

    fn close_block(&mut self, out: &mut Events) {
        let Some(kind) = self.open.take() else { return };
        if kind == "thinking" {
            self.delta_event(json!({"type": "signature_delta", "signature": ""}), out);
        }
        let data = json!({"type": "content_block_stop", "index": self.blocks});
        out.push_named("content_block_stop", &data);
        self.blocks += 1;
    }
}

/// Anthropic counts apart what was read from a cache.
fn usage_of(usage: &Usage) -> Value {
    let cached = usage.prompt_tokens_details.cached_tokens.min(usage.prompt_tokens);
    json!({
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    })
}

fn stop_reason(end: &End) -> &'static str {
    match end {
        End::Stop | End::StopId(_) => "end_turn",
        End::StopString(_) => "stop_sequence",
        End::Length => "max_tokens",
        End::ToolCalls => "tool_use",
    }
}

fn stop_sequence(end: &End) -> Option<&str> {
    if let End::StopString(text) = end { Some(text) } else { None }
}

impl Format for AnthropicFormat {
    fn open(&mut self, _: usize, out: &mut Events) {
        let usage = json!({"input_tokens": self.input_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0, "output_tokens": 0});
        let message = self.message(Vec::new(), None, usage);
        out.push_named("message_start", &json!({"type": "message_start", "message": message}));
        out.push_named("ping", &json!({"type": "ping"}));
    }

    fn delta(&mut self, _: usize, delta: &Delta, out: &mut Events) {
        for part in &delta.parts {
            match part {
                Part::Text(text) => {
                    self.block("text", json!({"type": "text", "text": ""}), out);
                    self.delta_event(json!({"type": "text_delta", "text": text}), out);
                }
                Part::Reasoning(text) => {
                    let start = json!({"type": "thinking", "thinking": "", "signature": ""});
                    self.block("thinking", start, out);
                    self.delta_event(json!({"type": "thinking_delta", "thinking": text}), out);
                }
                Part::Call { id, name } => {
                    let id = self.call_id(self.calls, id.as_deref());
                    self.calls += 1;
                    self.block(
                        "tool_use",
                        json!({"type": "tool_use", "id": id, "name": name, "input": {}}),
                        out,
                    );
                }
                Part::Arguments(text) => {
                    self.delta_event(json!({"type": "input_json_delta", "partial_json": text}), out);
                }
                Part::CallEnd => self.close_block(out),
            }
        }
    }

    fn end(&mut self, _: usize, end: &End, timings: Option<Value>, out: &mut Events) {
        self.close_block(out);
        self.end = Some((end.clone(), timings));
    }

    fn close(&mut self, usage: Usage, out: &mut Events) {
        let (end, timings) = self.end.take().unwrap_or((End::Stop, None));
        let mut data = json!({
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason(&end), "stop_sequence": stop_sequence(&end)},
            "usage": usage_of(&usage),
        });
        if let Some(timings) = timings {
            data["baton"] = timings;
        }
        out.push_named("message_delta", &data);
        out.push_named("message_stop", &json!({"type": "message_stop"}));
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.push_named("error", &error.anthropic());
    }

    fn whole(self, choices: Vec<Whole>, usage: Usage) -> Value {
        let Some(whole) = choices.into_iter().next() else { return Value::Null };
        let mut content: Vec<Value> = Vec::new();
        let mut arguments = String::new();
        let mut calls = 0;
        for part in &whole.delta.parts {
            match part {
                Part::Text(text) => content.push(json!({"type": "text", "text": text})),
                Part::Reasoning(text) => {
                    content.push(json!({"type": "thinking", "thinking": text, "signature": ""}));
                }
                Part::Call { id, name } => {
                    let id = self.call_id(calls, id.as_deref());
                    calls += 1;
                    arguments.clear();
                    content.push(json!({"type": "tool_use", "id": id, "name": name, "input": {}}));
                }
                Part::Arguments(text) => arguments.push_str(text),
                Part::CallEnd => {
                    // What broke off is no JSON: then there is no input.
                    if let Some(call) = content.last_mut() {
                        call["input"] = serde_json::from_str(&arguments).unwrap_or_else(|_| json!({}));
                    }
                }
            }
        }
        let mut message = self.message(content, Some(&whole.end), usage_of(&usage));
        if let Some(timings) = whole.timings {
            message["baton"] = timings;
        }
        message
    }
}
