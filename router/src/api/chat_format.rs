//! The wire form of `/v1/chat/completions`: `chat.completion` and `chat.completion.chunk`.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::answer::Usage;
use super::choice::{Delta, End, TokenLogprob};
use super::head::{FINGERPRINT, Head};
use super::logprobs::{finite, token_text};
use super::params::UsageIn;
use super::prompt_scores;
use super::reply::{Events, Format, Whole};
use crate::text::answer::Part;
use crate::text::pieces::Pieces;

/// Writes chats.
pub struct ChatFormat {
    head: Head,
    pieces: Arc<Pieces>,
    /// Every chunk has `usage`, null but in the last or in none.
    usage: UsageIn,
    so_far: Option<Usage>,
    /// The prompt whose tokens are scored, and how many alternatives are told of each.
    scored: Option<(Arc<[u32]>, u32)>,
}

impl ChatFormat {
    /// `pieces`: for the tokens of log probabilities. `scored`: the prompt, if its tokens are scored, with so many
    /// alternatives.
    pub fn new(head: Head, pieces: Arc<Pieces>, usage: UsageIn, scored: Option<(Arc<[u32]>, u32)>) -> Self {
        Self { head, pieces, usage, so_far: None, scored }
    }

    fn chunk(&self, choices: &[ChunkChoice], usage: Option<Usage>, out: &mut Events) {
        out.push(&Chunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            choices,
            service_tier: self.head.service_tier,
            system_fingerprint: FINGERPRINT,
            usage: (self.usage != UsageIn::No).then_some(usage.or(self.so_far)),
        });
    }

    /// The id of a call: the model's own, or one of ours.
    fn call_id(&self, choice: usize, number: usize, id: Option<&str>) -> String {
        id.map_or_else(|| format!("call_{}_{choice}_{number}", self.head.suffix()), String::from)
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

impl ChatFormat {
    /// A complete message.
    fn message(&self, index: usize, delta: &Delta) -> Value {
        let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
        let mut arguments: Vec<String> = Vec::new();
        for part in &delta.parts {
            match part {
                Part::Text(new) => text.push_str(new),
                Part::Reasoning(new) => reasoning.push_str(new),
                Part::Call { id, name } => {
                    calls.push((self.call_id(index, calls.len(), id.as_deref()), name));
                    arguments.push(String::new());
                }
                Part::Arguments(new) => arguments.last_mut().into_iter().for_each(|all| all.push_str(new)),
                Part::CallEnd => {}
            }
        }
        let nothing = text.is_empty() && !(calls.is_empty() && reasoning.is_empty());
        let content = if nothing { Value::Null } else { text.into() };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !reasoning.is_empty() {
            message["reasoning_content"] = reasoning.into();
        }
        if !calls.is_empty() {
            let calls = calls.into_iter().zip(arguments).map(|((id, name), arguments)| {
                json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            });
            message["tool_calls"] = calls.collect();
        }
        message
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice],
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    baton: Option<Value>,
}

#[derive(Serialize, Default)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

impl ChunkChoice {
    fn new(index: usize, delta: ChunkDelta) -> Self {
        Self { index, delta, logprobs: None, finish_reason: None, stop_reason: None, baton: None }
    }
}

impl Format for ChatFormat {
    fn wants_usage(&self) -> bool {
        self.usage == UsageIn::All
    }

    fn so_far(&mut self, usage: Usage) {
        self.so_far = Some(usage);
    }

    fn open(&mut self, index: usize, out: &mut Events) {
        let delta =
            ChunkDelta { role: Some("assistant"), content: Some(String::new()), ..ChunkDelta::default() };
        self.chunk(&[ChunkChoice::new(index, delta)], None, out);
    }

    fn delta(&mut self, index: usize, delta: &Delta, out: &mut Events) {
        let mut new = ChunkDelta::default();
        let mut number = delta.calls_before;
        for part in &delta.parts {
            match part {
                Part::Text(text) => new.content.get_or_insert_default().push_str(text),
                Part::Reasoning(text) => new.reasoning_content.get_or_insert_default().push_str(text),
                Part::Call { id, name } => {
                    let id = self.call_id(index, number, id.as_deref());
                    let function = json!({"name": name, "arguments": ""});
                    new.tool_calls
                        .push(json!({"index": number, "id": id, "type": "function", "function": function}));
                    number += 1;
                }
                Part::Arguments(text) => {
                    let last = number.saturating_sub(1);
                    match new.tool_calls.last_mut().filter(|call| call["index"] == last) {
                        Some(call) => {
                            let old = call["function"]["arguments"].as_str().unwrap_or_default();
                            call["function"]["arguments"] = format!("{old}{text}").into();
                        }
                        None => {
                            new.tool_calls.push(json!({"index": last, "function": {"arguments": text}}));
                        }
                    }
                }
                Part::CallEnd => {}
            }
        }
        let logprobs = self.logprobs(&delta.logprobs);
        let says_nothing =
            new.content.is_none() && new.reasoning_content.is_none() && new.tool_calls.is_empty();
        if says_nothing {
            if logprobs.is_none() {
                return;
            }
            new.content = Some(String::new());
        }
        let choice = ChunkChoice { logprobs, ..ChunkChoice::new(index, new) };
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

    fn close(&mut self, usage: Usage, out: &mut Events) {
        if self.usage != UsageIn::No {
            self.chunk(&[], Some(usage), out);
        }
        out.done();
    }

    fn whole(self, choices: Vec<Whole>, usage: Usage) -> Value {
        // Of all choices the prompt is the same.
        let scores = choices.first().map_or(&[][..], |whole| &whole.delta.prompt);
        let scored = self.scored.as_ref();
        let scored = scored.map(|(prompt, top)| prompt_scores::list(&self.pieces, prompt, scores, *top));
        let choices = choices.into_iter().enumerate().map(|(index, whole)| {
            let message = self.message(index, &whole.delta);
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
        let mut object = self.head.object("chat.completion", choices, usage);
        if let Some(scored) = scored {
            object["prompt_logprobs"] = scored;
        }
        object
    }
}
