//! The wire form of `/v1/completions`: `text_completion`, streamed or not.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::answer::Usage;
use super::choice::{Delta, End, TokenLogprob};
use super::head::{FINGERPRINT, Head};
use super::logprobs::{finite, token_text};
use super::params::UsageIn;
use super::reply::{Events, Format, Whole};
use crate::text::pieces::Pieces;

/// Writes completions.
pub struct CompletionFormat {
    head: Head,
    pieces: Arc<Pieces>,
    usage: UsageIn,
    so_far: Option<Usage>,
    /// Per choice: what `echo` puts before the text.
    echo: Vec<Option<Arc<str>>>,
    /// Per choice: characters told, for `text_offset`.
    offsets: Vec<usize>,
}

impl CompletionFormat {
    /// `echo`: of each choice.
    pub fn new(head: Head, pieces: Arc<Pieces>, usage: UsageIn, echo: Vec<Option<Arc<str>>>) -> Self {
        let offsets = echo.iter().map(|echo| echo.as_ref().map_or(0, |text| text.chars().count())).collect();
        Self { head, pieces, usage, so_far: None, echo, offsets }
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>, out: &mut Events) {
        out.push(&Chunk {
            id: &self.head.id,
            object: "text_completion",
            created: self.head.created,
            model: &self.head.model,
            choices,
            system_fingerprint: FINGERPRINT,
            usage: (self.usage != UsageIn::No).then_some(usage.or(self.so_far)),
        });
    }

    fn logprobs(&mut self, index: usize, entries: &[TokenLogprob]) -> Option<Value> {
        if entries.is_empty() {
            return None;
        }
        let (mut tokens, mut logprobs, mut tops, mut offsets) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for entry in entries {
            let text = token_text(&self.pieces, entry.id);
            offsets.push(self.offsets[index]);
            self.offsets[index] += text.chars().count();
            let mut top = Map::new();
            for &(id, logprob) in &entry.top {
                // Parts of characters look alike; the likeliest of them is kept.
                top.entry(token_text(&self.pieces, id)).or_insert_with(|| finite(logprob));
            }
            top.entry(text.clone()).or_insert_with(|| finite(entry.logprob));
            tokens.push(text);
            logprobs.push(finite(entry.logprob));
            tops.push(if entry.top.is_empty() { Value::Null } else { Value::Object(top) });
        }
        Some(
            json!({"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}),
        )
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    baton: Option<Value>,
}

impl<'a> ChunkChoice<'a> {
    fn new(index: usize, text: &'a str) -> Self {
        Self { index, text, logprobs: None, finish_reason: None, stop_reason: None, baton: None }
    }
}

impl Format for CompletionFormat {
    fn wants_usage(&self) -> bool {
        self.usage == UsageIn::All
    }

    fn so_far(&mut self, usage: Usage) {
        self.so_far = Some(usage);
    }

    fn open(&mut self, index: usize, out: &mut Events) {
        if let Some(echo) = self.echo[index].clone() {
            self.chunk(&[ChunkChoice::new(index, &echo)], None, out);
        }
    }

    fn delta(&mut self, index: usize, delta: &Delta, out: &mut Events) {
        let logprobs = self.logprobs(index, &delta.logprobs);
        self.chunk(&[ChunkChoice { logprobs, ..ChunkChoice::new(index, &delta.text()) }], None, out);
    }

    fn end(&mut self, index: usize, end: &End, timings: Option<Value>, out: &mut Events) {
        let choice = ChunkChoice {
            finish_reason: Some(end.as_str()),
            stop_reason: end.stop_reason(),
            baton: timings,
            ..ChunkChoice::new(index, "")
        };
        self.chunk(&[choice], None, out);
    }

    fn close(&mut self, usage: Usage, out: &mut Events) {
        if self.usage != UsageIn::No {
            self.chunk(&[], Some(usage), out);
        }
        out.done();
    }

    fn whole(mut self, choices: Vec<Whole>, usage: Usage) -> Value {
        let mut values = Vec::with_capacity(choices.len());
        for (index, whole) in choices.into_iter().enumerate() {
            let text = match &self.echo[index] {
                Some(echo) => format!("{echo}{}", whole.delta.text()),
                None => whole.delta.text(),
            };
            let mut choice = json!({
                "index": index,
                "text": text,
                "logprobs": self.logprobs(index, &whole.delta.logprobs),
                "finish_reason": whole.end.as_str(),
                "stop_reason": whole.end.stop_reason(),
            });
            if let Some(timings) = whole.timings {
                choice["baton"] = timings;
            }
            values.push(choice);
        }
        self.head.object("text_completion", values, usage)
    }
}
