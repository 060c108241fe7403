//! The wire form of `/v1/chat/completions`: `chat.completion` and `chat.completion.chunk`.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::answer::Usage;
use super::choice::{Delta, End, TokenLogprob};
use super::head::Head;
use super::logprobs::{finite, token_text};
use super::reply::{Events, Format, Whole};
use crate::text::ToolCall;
use crate::text::pieces::Pieces;

/// Writes chats.
pub struct ChatFormat {
    head: Head,
    pieces: Arc<Pieces>,
    /// Every chunk has `usage`, null but in the last.
    include_usage: bool,
}

impl ChatFormat {
    /// `pieces`: for the tokens of log probabilities.
    pub fn new(head: Head, pieces: Arc<Pieces>, include_usage: bool) -> Self {
        Self { head, pieces, include_usage }
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>, out: &mut Events) {
        out.push(&Chunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            choices,
            usage: self.include_usage.then_some(usage),
        });
    }

    fn call(&self, choice: usize, number: usize, call: &ToolCall) -> Value {
        json!({
            "id": format!("call_{}_{choice}_{number}", self.head.suffix()),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        })
    }

    fn logprobs(&self, entries: &[TokenLogprob]) -> Option<Value> {
        if entries.is_empty() {
            return None;
        }
        let one = |id: u32, logprob: f32| {
            let bytes = self.pieces.bytes(id);
            Map::from_iter([
                ("token".to_string(), token_text(&self.pieces, id).into()),
                ("logprob".to_string(), finite(logprob)),
                ("bytes".to_string(), bytes.into()),
            ])
        };
        let content: Vec<Value> = entries
            .iter()
            .map(|entry| {
                let mut value = one(entry.id, entry.logprob);
                let top = entry.top.iter().map(|&(id, logprob)| Value::Object(one(id, logprob)));
                value.insert("top_logprobs".into(), top.collect());
                Value::Object(value)
            })
            .collect();
        Some(json!({"content": content, "refusal": null}))
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: ChunkDelta<'a>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    baton: Option<Value>,
}

#[derive(Serialize, Default)]
struct ChunkDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

impl<'a> ChunkChoice<'a> {
    fn new(index: usize, delta: ChunkDelta<'a>) -> Self {
        Self { index, delta, logprobs: None, finish_reason: None, stop_reason: None, baton: None }
    }
}

impl Format for ChatFormat {
    fn open(&mut self, index: usize, out: &mut Events) {
        let delta = ChunkDelta { role: Some("assistant"), content: Some(""), ..ChunkDelta::default() };
        self.chunk(&[ChunkChoice::new(index, delta)], None, out);
    }

    fn delta(&mut self, index: usize, delta: &Delta, out: &mut Events) {
        let calls = delta.calls.iter().enumerate().map(|(i, call)| {
            let number = delta.calls_before + i;
            let mut value = self.call(index, number, call);
            value["index"] = number.into();
            value
        });
        let calls: Vec<Value> = calls.collect();
        let has_text = !delta.text.is_empty() || calls.is_empty();
        let new = ChunkDelta { role: None, content: has_text.then_some(&delta.text), tool_calls: calls };
        let choice = ChunkChoice { logprobs: self.logprobs(&delta.logprobs), ..ChunkChoice::new(index, new) };
        self.chunk(&[choice], None, out);
    }

    fn end(&mut self, index: usize, end: &End, timings: Option<Value>, out: &mut Events) {
        let choice = ChunkChoice {
            finish_reason: Some(end.as_str()),
            stop_reason: end.stop_reason(),
            baton: timings,
            ..ChunkChoice::new(index, ChunkDelta::default())
        };
        self.chunk(&[choice], None, out);
    }

    fn usage(&mut self, usage: Usage, out: &mut Events) {
        self.chunk(&[], Some(usage), out);
    }

    fn whole(self, choices: Vec<Whole>, usage: Usage) -> Value {
        let choices = choices.into_iter().enumerate().map(|(index, whole)| {
            let calls: Vec<Value> =
                whole.delta.calls.iter().enumerate().map(|(i, call)| self.call(index, i, call)).collect();
            let only_calls = !calls.is_empty() && whole.delta.text.is_empty();
            let content = if only_calls { Value::Null } else { whole.delta.text.into() };
            let mut message = json!({"role": "assistant", "content": content, "refusal": null});
            if !calls.is_empty() {
                message["tool_calls"] = calls.into();
            }
            let mut choice = json!({
                "index": index,
                "message": message,
                "logprobs": self.logprobs(&whole.delta.logprobs),
                "finish_reason": whole.end.as_str(),
                "stop_reason": whole.end.stop_reason(),
            });
            if let Some(timings) = whole.timings {
                choice["baton"] = timings;
            }
            choice
        });
        let choices: Vec<Value> = choices.collect();
        self.head.object("chat.completion", choices, usage)
    }
}
