//! The wire form of `/v1/completions`: `text_completion`, streamed or not.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::answer::Usage;
use super::choice::{Delta, End, TokenLogprob};
use super::head::{FINGERPRINT, Head};
use super::logprobs::token_text;
use super::params::UsageIn;
use super::prompt_scores::{self, LegacyLogprobs, ScoresWanted};
use super::reply::{Events, Format, Whole};
use crate::inference::Score;
use crate::text::pieces::Pieces;

/// What a choice tells of its prompt.
#[derive(Debug, Clone)]
pub struct Echo {
    /// What `echo` puts before the answer.
    pub text: Option<Arc<str>>,
    /// The prompt.
    pub tokens: Arc<[u32]>,
    /// How its tokens are scored.
    pub scores: ScoresWanted,
}

/// Writes completions.
pub struct CompletionFormat {
    head: Head,
    pieces: Arc<Pieces>,
    usage: UsageIn,
    so_far: Option<Usage>,
    /// Per choice.
    echo: Vec<Echo>,
    /// Per choice of a stream: scores of the prompt that wait for the rest of them.
    scores: Vec<Vec<Score>>,
    /// Per choice: characters told, for `text_offset`.
    offsets: Vec<usize>,
}

impl CompletionFormat {
    /// `echo`: of each choice.
    pub fn new(head: Head, pieces: Arc<Pieces>, usage: UsageIn, echo: Vec<Echo>) -> Self {
        let width = |echo: &Echo| echo.text.as_ref().map_or(0, |text| text.chars().count());
        let offsets = echo.iter().map(width).collect();
        let scores = vec![Vec::new(); echo.len()];
        Self { head, pieces, usage, so_far: None, echo, scores, offsets }
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

    fn logprobs(&mut self, index: usize, entries: &[TokenLogprob], out: &mut LegacyLogprobs) {
        for entry in entries {
            let offset = self.offsets[index];
            self.offsets[index] += token_text(&self.pieces, entry.id).chars().count();
            out.push(&self.pieces, entry.id, Some(entry.logprob), &entry.top, offset);
        }
    }

    /// The scores of the prompt before those of the answer, where `echo` wants them.
    fn prompt_logprobs(&self, index: usize, scores: &[Score], out: &mut LegacyLogprobs) {
        let Echo { text, tokens, scores: wanted } = &self.echo[index];
        if let (Some(text), Some(top)) = (text, wanted.echo) {
            out.push_prompt(&self.pieces, tokens, text, scores, top);
        }
    }

    /// The prompt of a streamed choice, as soon as all of it is scored that is to be.
    fn echoed(&mut self, index: usize, scores: &[Score], out: &mut Events) {
        let echo = self.echo[index].clone();
        let Some(text) = &echo.text else { return };
        let known = &mut self.scores[index];
        known.extend_from_slice(scores);
        if echo.scores.echo.is_some() && known.len() + 1 < echo.tokens.len() {
            return;
        }
        let known = std::mem::take(known);
        let mut logprobs = LegacyLogprobs::default();
        self.prompt_logprobs(index, &known, &mut logprobs);
        let choice = ChunkChoice { logprobs: logprobs.into_value(), ..ChunkChoice::new(index, text) };
        self.chunk(&[choice], None, out);
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
        self.echoed(index, &[], out);
    }

    fn delta(&mut self, index: usize, delta: &Delta, out: &mut Events) {
        if !delta.prompt.is_empty() {
            self.echoed(index, &delta.prompt, out);
        }
        if delta.parts.is_empty() && delta.logprobs.is_empty() {
            return;
        }
        let mut logprobs = LegacyLogprobs::default();
        self.logprobs(index, &delta.logprobs, &mut logprobs);
        let logprobs = logprobs.into_value();
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
            let mut logprobs = LegacyLogprobs::default();
            self.prompt_logprobs(index, &whole.delta.prompt, &mut logprobs);
            self.logprobs(index, &whole.delta.logprobs, &mut logprobs);
            let text = match &self.echo[index].text {
                Some(echo) => format!("{echo}{}", whole.delta.text()),
                None => whole.delta.text(),
            };
            let mut choice = json!({
                "index": index,
                "text": text,
                "logprobs": logprobs.into_value(),
                "finish_reason": whole.end.as_str(),
                "stop_reason": whole.end.stop_reason(),
            });
            let Echo { tokens, scores, .. } = &self.echo[index];
            if let Some(top) = scores.list {
                choice["prompt_logprobs"] =
                    prompt_scores::list(&self.pieces, tokens, &whole.delta.prompt, top);
            }
            if let Some(timings) = whole.timings {
                choice["baton"] = timings;
            }
            values.push(choice);
        }
        self.head.object("text_completion", values, usage)
    }
}
