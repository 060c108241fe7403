//! The wire form of `/v1/responses`: a `response` object with its output items, and the events of a stream. A complete
//! response is kept for `previous_response_id`, if the client did not say otherwise.

use std::sync::Arc;

use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::Gateway;
use super::answer::Usage;
use super::choice::{Delta, End};
use super::error::ApiError;
use super::head::Head;
use super::reply::{Events, Format, Whole};
use super::response_store::Kept;
use crate::text::answer::Part;

/// What a response repeats of its request.
#[derive(Debug)]
pub struct Echo {
    /// Fields of the object.
    pub fields: Map<String, Value>,
    /// The conversation before the answer.
    pub messages: Vec<Value>,
    /// Whether to keep it.
    pub store: bool,
    /// Before its id: whose it is.
    pub owner: String,
}

/// Writes responses. There is one choice.
pub struct ResponsesFormat {
    head: Head,
    echo: Echo,
    gateway: Arc<Gateway>,
    items: Vec<Item>,
    sequence: u64,
    end: Option<(End, Option<Value>)>,
}

/// An output item as far as it has come.
struct Item {
    kind: Kind,
    text: String,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// More may come.
    Open,
    /// All has come.
    Done,
    /// The answer ended in the middle of it.
    Cut,
}

enum Kind {
    Message,
    Reasoning,
    Call { call_id: String, name: String },
}

impl ResponsesFormat {
    /// `gateway`: keeps the response.
    pub fn new(head: Head, echo: Echo, gateway: Arc<Gateway>) -> Self {
        Self { head, echo, gateway, items: Vec::new(), sequence: 0, end: None }
    }

    /// The object; `end` and `usage`: when it is complete.
    fn object(&self, end: Option<&End>, usage: Option<&Usage>, timings: Option<Value>) -> Value {
        let (status, incomplete) = match end {
            None => ("in_progress", Value::Null),
            Some(End::Length) => ("incomplete", json!({"reason": "max_output_tokens"})),
            Some(_) => ("completed", Value::Null),
        };
        let mut object = json!({
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": incomplete,
            "model": &*self.head.model,
            "output": self.items.iter().enumerate().map(|(i, item)| self.item(i, item)).collect::<Vec<_>>(),
            "usage": usage.map(usage_of),
        });
        if let Some(map) = object.as_object_mut() {
            map.extend(self.echo.fields.clone());
            map.extend(timings.map(|timings| ("baton".to_string(), timings)));
        }
        object
    }

    fn item_id(&self, index: usize, kind: &Kind) -> String {
        let prefix = match kind {
            Kind::Message => "msg",
            Kind::Reasoning => "rs",
            Kind::Call { .. } => "fc",
        };
        format!("{prefix}_{}_{index}", self.head.suffix())
    }

    fn item(&self, index: usize, item: &Item) -> Value {
        let id = self.item_id(index, &item.kind);
        let open = item.state == State::Open;
        let status = match item.state {
            State::Open => "in_progress",
            State::Done => "completed",
            State::Cut => "incomplete",
        };
        match &item.kind {
            Kind::Message => json!({"id": id, "type": "message", "status": status, "role": "assistant",
                "content": if open { Vec::new() } else { vec![text_part(&item.text)] }}),
            Kind::Reasoning => {
                let part = json!({"type": "reasoning_text", "text": item.text});
                json!({"id": id, "type": "reasoning", "status": status, "summary": [],
                    "content": if open { Vec::new() } else { vec![part] }})
            }
            Kind::Call { call_id, name } => json!({"id": id, "type": "function_call", "status": status,
                "call_id": call_id, "name": name, "arguments": item.text}),
        }
    }

    fn event(&mut self, kind: &str, mut data: Value, out: &mut Events) {
        data["type"] = kind.into();
        data["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        out.push_named(kind, &data);
    }

    /// Opens an item, unless one of the kind is open.
    fn begin(&mut self, kind: Kind, out: &mut Events) {
        let open = self.open_item().map(|index| &self.items[index].kind);
        let same = matches!(
            (open, &kind),
            (Some(Kind::Message), Kind::Message) | (Some(Kind::Reasoning), Kind::Reasoning)
        );
        if same {
            return;
        }
        self.finish_item(State::Done, out);
        self.items.push(Item { kind, text: String::new(), state: State::Open });
        let index = self.items.len() - 1;
        let item = self.item(index, &self.items[index]);
        let id = item["id"].clone();
        self.event("response.output_item.added", json!({"output_index": index, "item": item}), out);
        let part = match self.items[index].kind {
            Kind::Message => text_part(""),
            Kind::Reasoning => json!({"type": "reasoning_text", "text": ""}),
            Kind::Call { .. } => return,
        };
        let data = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part});
        self.event("response.content_part.added", data, out);
    }

    fn grow(&mut self, text: &str, out: &mut Events) {
        let Some(index) = self.items.len().checked_sub(1) else { return };
        self.items[index].text.push_str(text);
        let id = self.item_id(index, &self.items[index].kind);
        let mut data = json!({"item_id": id, "output_index": index, "delta": text});
        let kind = match self.items[index].kind {
            Kind::Message => "response.output_text.delta",
            Kind::Reasoning => "response.reasoning_text.delta",
            Kind::Call { .. } => "response.function_call_arguments.delta",
        };
        if !matches!(self.items[index].kind, Kind::Call { .. }) {
            data["content_index"] = 0.into();
        }
        if matches!(self.items[index].kind, Kind::Message) {
            data["logprobs"] = json!([]);
        }
        self.event(kind, data, out);
    }

    /// The place of the last item, if more may come.
    fn open_item(&self) -> Option<usize> {
        self.items.len().checked_sub(1).filter(|&index| self.items[index].state == State::Open)
    }

    /// Ends the open item, if there is one.
    fn finish_item(&mut self, state: State, out: &mut Events) {
        let Some(index) = self.open_item() else { return };
        self.items[index].state = state;
        let item = self.item(index, &self.items[index]);
        let id = item["id"].clone();
        let at = json!({"item_id": id, "output_index": index, "content_index": 0});
        let with = |more: Value| {
            let mut data = at.clone();
            if let (Some(map), Value::Object(more)) = (data.as_object_mut(), more) {
                map.extend(more);
            }
            data
        };
        let text = self.items[index].text.clone();
        match &self.items[index].kind {
            Kind::Message => {
                self.event("response.output_text.done", with(json!({"text": text, "logprobs": []})), out);
                self.event("response.content_part.done", with(json!({"part": text_part(&text)})), out);
            }
            Kind::Reasoning => {
                self.event("response.reasoning_text.done", with(json!({"text": text})), out);
                let part = json!({"type": "reasoning_text", "text": text});
                self.event("response.content_part.done", with(json!({ "part": part })), out);
            }
            Kind::Call { name, .. } => {
                let data = json!({"item_id": id, "output_index": index, "name": name, "arguments": text});
                self.event("response.function_call_arguments.done", data, out);
            }
        }
        self.event("response.output_item.done", json!({"output_index": index, "item": item}), out);
    }

    /// The answer has ended.
    fn finish(&mut self, end: &End, out: &mut Events) {
        let state = if *end == End::Length { State::Cut } else { State::Done };
        self.finish_item(state, out);
        // A call of which only whole arguments are left looks complete.
        if let Some(last) = self.items.last_mut().filter(|_| *end == End::Length) {
            last.state = state;
        }
    }

    fn take(&mut self, delta: &Delta, out: &mut Events) {
        for part in &delta.parts {
            match part {
                Part::Text(text) => {
                    self.begin(Kind::Message, out);
                    self.grow(text, out);
                }
                Part::Reasoning(text) => {
                    self.begin(Kind::Reasoning, out);
                    self.grow(text, out);
                }
                Part::Call { id, name } => {
                    let number = self.items.len();
                    let call_id =
                        id.clone().unwrap_or_else(|| format!("call_{}_{number}", self.head.suffix()));
                    self.begin(Kind::Call { call_id, name: name.clone() }, out);
                }
                Part::Arguments(text) => self.grow(text, out),
                Part::CallEnd => {
                    // Readers end what broke off too.
                    let whole = self.items.last().is_some_and(|item| is_json(&item.text));
                    self.finish_item(if whole { State::Done } else { State::Cut }, out);
                }
            }
        }
    }

    fn keep(&self, response: &Value) {
        if !self.echo.store {
            return;
        }
        let mut message = json!({"role": "assistant", "content": ""});
        for item in &self.items {
            match &item.kind {
                Kind::Message | Kind::Reasoning => {
                    let words = matches!(item.kind, Kind::Message);
                    let name = if words { "content" } else { "reasoning_content" };
                    let before = message[name].as_str().unwrap_or_default();
                    message[name] = format!("{before}{}", item.text).into();
                }
                Kind::Call { call_id, name } => {
                    // What broke off could not be sent back.
                    if !is_json(&item.text) {
                        continue;
                    }
                    let function = json!({"name": name, "arguments": item.text});
                    let call = json!({"id": call_id, "type": "function", "function": function});
                    match message["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => message["tool_calls"] = json!([call]),
                    }
                }
            }
        }
        let messages = self.echo.messages.iter().cloned().chain([message]).collect();
        self.gateway.responses.insert(
            &format!("{}{}", self.echo.owner, self.head.id),
            Kept { response: response.clone(), messages },
        );
    }
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn usage_of(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    })
}

impl Format for ResponsesFormat {
    fn open(&mut self, _: usize, out: &mut Events) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.object(None, None, None);
            self.event(kind, json!({ "response": response }), out);
        }
    }

    fn delta(&mut self, _: usize, delta: &Delta, out: &mut Events) {
        self.take(delta, out);
    }

    fn end(&mut self, _: usize, end: &End, timings: Option<Value>, out: &mut Events) {
        self.end = Some((end.clone(), timings));
        self.finish(end, out);
    }

    fn close(&mut self, usage: Usage, out: &mut Events) {
        let (end, timings) = self.end.clone().unwrap_or((End::Stop, None));
        let response = self.object(Some(&end), Some(&usage), timings);
        self.keep(&response);
        let kind = if end == End::Length { "response.incomplete" } else { "response.completed" };
        self.event(kind, json!({ "response": response }), out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        if let Some(index) = self.open_item() {
            self.items[index].state = State::Cut;
        }
        let mut response = self.object(None, None, None);
        response["status"] = "failed".into();
        response["error"] = json!({"code": "server_error", "message": error.message});
        self.event("response.failed", json!({ "response": response }), out);
    }

    fn whole(mut self, choices: Vec<Whole>, usage: Usage) -> Value {
        let Some(whole) = choices.into_iter().next() else { return Value::Null };
        // The events build the items; nobody reads them here.
        let mut unread = Events::default();
        self.take(&whole.delta, &mut unread);
        self.finish(&whole.end, &mut unread);
        let response = self.object(Some(&whole.end), Some(&usage), whole.timings);
        self.keep(&response);
        response
    }
}
