//! One answer in the making: tokens go in, text, reasoning, tool calls and log probabilities come out. Detokenizes, watches
//! for stop strings, reads markup. Pure; `answer` drives it, `reply` reads what it gives out.

use std::sync::Arc;

use super::params::Params;
use super::run::Reading;
use crate::inference::{FinishReason, Score, Token};
use crate::text::answer::{AnswerReader, Part, append};
use crate::text::pieces::Pieces;
use crate::text::{Detokenizer, StopMatcher, StopStrings};

/// What is new since the last look.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Delta {
    /// Words, reasoning and calls, in order.
    pub parts: Vec<Part>,
    /// Of the prompt's tokens from the second on, if asked for.
    pub prompt: Vec<Score>,
    /// One entry per token, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Calls that began before those in `parts`.
    pub calls_before: usize,
}

impl Delta {
    /// Nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.logprobs.is_empty() && self.prompt.is_empty()
    }

    /// Told. Keeps the allocations.
    pub fn clear(&mut self) {
        self.calls_before += self.calls();
        self.parts.clear();
        self.prompt.clear();
        self.logprobs.clear();
    }

    /// All words for the user.
    pub fn text(&self) -> String {
        let text = |part: &Part| if let Part::Text(text) = part { Some(text.clone()) } else { None };
        self.parts.iter().filter_map(text).collect()
    }

    fn calls(&self) -> usize {
        self.parts.iter().filter(|part| matches!(part, Part::Call { .. })).count()
    }
}

/// A token's log probability, and those of the likeliest, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The chosen id.
    pub id: u32,
    /// Of it.
    pub logprob: f32,
    /// The likeliest ids.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The model's own end of text.
    Stop,
    /// A stop string of the client.
    StopString(String),
    /// An id among the client's `stop_token_ids`.
    StopId(u32),
    /// `max_tokens`, or the context is full.
    Length,
    /// The model waits for results of its calls.
    ToolCalls,
}

impl End {
    /// OpenAI's `finish_reason`.
    pub fn as_str(&self) -> &'static str {
        match self {
            End::Stop | End::StopString(_) | End::StopId(_) => "stop",
            End::Length => "length",
            End::ToolCalls => "tool_calls",
        }
    }
}

/// One answer.
#[derive(Debug)]
pub struct Choice {
    detokenizer: Detokenizer,
    strings: StopStrings,
    stop: StopMatcher,
    reader: Option<AnswerReader>,
    single_call: bool,
    hide_reasoning: bool,
    include_stop: bool,
    logprobs: bool,
    min_tokens: u32,
    stop_ids: Arc<[u32]>,
    stop_ids_given: Arc<[u32]>,
    tokens: u32,
    /// Of all tokens, where the cluster tells.
    logprob_sum: f64,
    reasoning_tokens: u32,
    /// Of a prediction: those that saved a step, and all.
    predicted: u32,
    prediction: u32,
    ended_by: Option<u32>,
    /// Text of one token, before the stop strings and after.
    raw: String,
    clean: String,
    delta: Delta,
}

impl Choice {
    /// `reading`: how the request wants its answers read; `prediction`: tokens that it expects.
    pub fn new(params: &Params, pieces: Arc<Pieces>, reading: &Reading, prediction: u32) -> Self {
        let detokenizer = Detokenizer::new(pieces, params.skip_special, reading.beginning);
        Self {
            detokenizer: detokenizer.keeping(Arc::clone(&reading.marks)),
            strings: params.stop.clone(),
            stop: StopMatcher::new(params.stop.clone(), params.include_stop),
            reader: reading.answer.reader(),
            single_call: reading.single_call,
            hide_reasoning: reading.hide_reasoning,
            include_stop: params.include_stop,
            logprobs: reading.logprobs.is_some(),
            min_tokens: params.min_tokens,
            stop_ids: params.stop_ids.as_slice().into(),
            stop_ids_given: params.stop_ids_given.as_slice().into(),
            tokens: 0,
            logprob_sum: 0.0,
            reasoning_tokens: 0,
            predicted: 0,
            prediction,
            ended_by: None,
            raw: String::new(),
            clean: String::new(),
            delta: Delta::default(),
        }
    }

    /// Tokens taken.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Log probability per token.
    pub fn mean_logprob(&self) -> f64 {
        self.logprob_sum / f64::from(self.tokens.max(1))
    }

    /// Of those, tokens of reasoning.
    pub fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    /// Tokens of the client's prediction that came without a step of their own, and the others of it.
    pub fn predicted_tokens(&self) -> (u32, u32) {
        (self.predicted, self.prediction.saturating_sub(self.predicted))
    }

    /// What is new.
    pub fn delta(&mut self) -> &mut Delta {
        &mut self.delta
    }

    /// Takes the next scores of the prompt.
    pub fn scored(&mut self, mut scores: Vec<Score>) {
        self.delta.prompt.append(&mut scores);
    }

    /// Takes the next token. `Some`: the answer is at its end here, whatever else the cluster would send.
    pub fn token(&mut self, token: Token) -> Option<End> {
        self.tokens += 1;
        self.predicted += u32::from(token.predicted);
        self.logprob_sum += f64::from(token.logprob.unwrap_or(0.0));
        let reasoned = self.is_reasoning();
        let end = self.take(token);
        self.reasoning_tokens += u32::from(reasoned || self.is_reasoning());
        end
    }

    fn is_reasoning(&self) -> bool {
        self.reader.as_ref().is_some_and(AnswerReader::is_reasoning)
    }

    fn take(&mut self, token: Token) -> Option<End> {
        if self.logprobs {
            let logprob = token.logprob.unwrap_or(f32::NEG_INFINITY);
            self.delta.logprobs.push(TokenLogprob { id: token.id, logprob, top: token.top });
        }
        if self.stop_ids.contains(&token.id) {
            // The cluster ends the sequence with it; a stop id below `min_tokens` is never drawn.
            self.ended_by = Some(token.id);
            if !self.include_stop {
                return None;
            }
        }
        self.detokenizer.push(token.id, &mut self.raw);
        if self.raw.is_empty() {
            return None;
        }
        let end = if self.tokens <= self.min_tokens {
            self.stop.pass(&self.raw, &mut self.clean);
            None
        } else {
            self.stop.push(&self.raw, &mut self.clean)
        };
        self.raw.clear();
        self.take_clean(end.is_some());
        match end {
            Some(index) => Some(self.stop_end(index)),
            None if self.single_call && self.delta.parts.contains(&Part::CallEnd) => Some(End::ToolCalls),
            None => None,
        }
    }

    /// The cluster has ended the sequence. Gives out all that was held back.
    pub fn finish(&mut self, reason: FinishReason) -> End {
        self.detokenizer.finish(&mut self.raw);
        let stopped = self.stop.push(&self.raw, &mut self.clean);
        self.raw.clear();
        self.stop.finish(&mut self.clean);
        self.take_clean(true);
        match (stopped, reason) {
            (Some(index), _) => self.stop_end(index),
            (None, FinishReason::Length) => End::Length,
            (None, FinishReason::Stop) if self.called() => End::ToolCalls,
            (None, FinishReason::Stop) => {
                let given = self.ended_by.filter(|id| self.stop_ids_given.contains(id));
                given.map_or(End::Stop, End::StopId)
            }
        }
    }

    fn called(&self) -> bool {
        self.delta.calls_before + self.delta.calls() > 0
    }

    fn stop_end(&self, index: usize) -> End {
        if self.called() { End::ToolCalls } else { End::StopString(self.strings.get(index).to_string()) }
    }

    /// Moves clean text into the delta, through the reader if there is one.
    fn take_clean(&mut self, last: bool) {
        let clean = std::mem::take(&mut self.clean);
        let parts = &mut self.delta.parts;
        let Some(reader) = &mut self.reader else { return append(parts, Part::Text(clean)) };
        reader.push(&clean, parts);
        if last {
            reader.finish(parts);
        }
        if self.single_call
            && let Some(end) = parts.iter().position(|part| *part == Part::CallEnd)
        {
            parts.truncate(end + 1);
        }
        if self.hide_reasoning {
            parts.retain(|part| !matches!(part, Part::Reasoning(_)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::config::Limits;
    use crate::api::fields::Fields;
    use crate::api::params::Rules;
    use crate::text::answer::{Family, Opening, Types};
    use crate::text::{Beginning, Defaults, answer};
    use serde_json::json;

    #[derive(PartialEq)]
    enum ToolMode {
        Off,
        Parallel,
        Single,
    }

    /// Ids: 0 is the special end of text, the others are these texts.
    const TEXTS: [&str; 8] = ["<end>", "Hi", " the", "re", "\n", "User", "<tool_call>", "</tool_call>"];

    fn choice(params: &str, tools: ToolMode) -> Choice {
        let names = TEXTS.iter().enumerate().map(|(id, text)| Some((text.to_string(), id == 0)));
        let call = Some(("{\"name\":\"f\"}".to_string(), false));
        let names: Vec<_> = names.chain([call]).collect();
        let decoder = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]});
        let pieces = Arc::new(Pieces::new(&names, &decoder).expect("supported"));
        let defaults = Defaults { eos_ids: vec![0], ..Defaults::default() };
        let limits = Limits::for_context(100);
        let rules = Rules { defaults: &defaults, vocab: 9, limits: &limits };
        let mut fields = Fields::parse(params.as_bytes()).expect("an object");
        let params = Params::read(&mut fields, &rules, &["max_tokens"], 1).expect("valid");
        let family = (tools != ToolMode::Off).then_some((Family::Hermes, Types::default()));
        let reading = Reading {
            answer: answer::Reading { tools: family, ..Default::default() },
            single_call: tools == ToolMode::Single,
            ..Reading::plain(Beginning::Text, Some(0))
        };
        Choice::new(&params, pieces, &reading, 0)
    }

    fn token(id: u32) -> Token {
        Token { index: 0, id, logprob: Some(-0.5), top: Vec::new(), predicted: false }
    }

    /// The text out, and why it ended; `reason` is what the cluster says after all ids.
    fn run(choice: &mut Choice, ids: &[u32], reason: FinishReason) -> (String, End) {
        let early = ids.iter().find_map(|&id| choice.token(token(id)));
        let end = early.unwrap_or_else(|| choice.finish(reason));
        (choice.delta().text(), end)
    }

    #[test]
    fn the_end_of_text_is_no_text_but_a_token() {
        let mut c = choice("{}", ToolMode::Off);
        assert_eq!(run(&mut c, &[1, 2, 3, 0], FinishReason::Stop), ("Hi there".into(), End::Stop));
        assert_eq!((c.tokens(), c.delta().logprobs.len()), (4, 4));
    }

    #[test]
    fn a_stop_string_over_tokens_ends_the_answer_before_it() {
        let mut c = choice(r#"{"stop": ["e\nUs"]}"#, ToolMode::Off);
        assert_eq!(
            run(&mut c, &[1, 2, 4, 5, 1], FinishReason::Length),
            ("Hi th".into(), End::StopString("e\nUs".into()))
        );
        let mut c = choice(r#"{"stop": ["e\nUs"], "include_stop_str_in_output": true}"#, ToolMode::Off);
        assert_eq!(run(&mut c, &[1, 2, 4, 5], FinishReason::Length).0, "Hi the\nUs");
        let mut c = choice(r#"{"stop": ["\nX"]}"#, ToolMode::Off);
        assert_eq!(run(&mut c, &[1, 4], FinishReason::Length), ("Hi\n".into(), End::Length));
    }

    #[test]
    fn before_min_tokens_nothing_stops() {
        let mut c = choice(r#"{"stop": ["Hi"], "min_tokens": 2}"#, ToolMode::Off);
        assert_eq!(
            run(&mut c, &[1, 1, 2, 1], FinishReason::Length),
            ("HiHi the".into(), End::StopString("Hi".into()))
        );
    }

    #[test]
    fn a_clients_stop_id_is_named_and_left_out() {
        let mut c = choice(r#"{"stop_token_ids": [2]}"#, ToolMode::Off);
        assert_eq!(run(&mut c, &[1, 2], FinishReason::Stop), ("Hi".into(), End::StopId(2)));
        let mut c = choice(r#"{"stop_token_ids": [2], "include_stop_str_in_output": true}"#, ToolMode::Off);
        assert_eq!(run(&mut c, &[1, 2], FinishReason::Stop), ("Hi the".into(), End::StopId(2)));
    }

    #[test]
    fn with_ignore_eos_the_end_of_text_is_passed_over() {
        let mut c = choice(r#"{"ignore_eos": true}"#, ToolMode::Off);
        assert_eq!(run(&mut c, &[1, 0, 1], FinishReason::Length), ("HiHi".into(), End::Length));
    }

    #[test]
    fn calls_are_separated_and_may_end_the_answer() {
        let ids = [1, 4, 6, 8, 7, 4, 6, 8, 7, 0];
        let mut c = choice("{}", ToolMode::Parallel);
        assert_eq!(run(&mut c, &ids, FinishReason::Stop), ("Hi".into(), End::ToolCalls));
        assert_eq!(c.delta().calls(), 2);
        let mut c = choice("{}", ToolMode::Single);
        assert_eq!(run(&mut c, &ids, FinishReason::Stop), ("Hi".into(), End::ToolCalls));
        assert_eq!((c.delta().calls(), c.tokens()), (1, 5));
        let mut c = choice("{}", ToolMode::Off);
        assert_eq!(
            run(&mut c, &ids[..5], FinishReason::Length).0,
            "Hi\n<tool_call>{\"name\":\"f\"}</tool_call>"
        );
    }

    #[test]
    fn reasoning_is_counted_and_can_be_hidden() {
        let run = |hide_reasoning: bool| {
            let reading = Reading {
                answer: answer::Reading { reasoning: Some(Opening::Open), ..Default::default() },
                hide_reasoning,
                ..Reading::plain(Beginning::Text, None)
            };
            let names: Vec<_> = ["a", "</think>", "b"].map(|text| Some((text.to_string(), false))).into();
            let decoder = json!({"type": "ByteLevel"});
            let pieces = Arc::new(Pieces::new(&names, &decoder).expect("supported"));
            let limits = Limits::for_context(100);
            let rules = Rules { defaults: &Defaults::default(), vocab: 3, limits: &limits };
            let params =
                Params::read(&mut Fields::parse(b"{}").expect("an object"), &rules, &[], 1).expect("valid");
            let mut c = Choice::new(&params, pieces, &reading, 0);
            (0..3).for_each(|id| _ = c.token(token(id)));
            (c.reasoning_tokens(), c.delta().parts.clone())
        };
        let both = vec![Part::Reasoning("a".into()), Part::Text("b".into())];
        assert_eq!(run(false), (2, both.clone()));
        assert_eq!(run(true), (2, both[1..].to_vec()));
    }
}
