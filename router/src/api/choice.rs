//! One answer in the making: tokens go in, text, tool calls and log probabilities come out. Detokenizes, watches for stop
//! strings, separates tool calls. Pure; `answer` drives it, `reply` reads what it gives out.

use std::sync::Arc;

use super::params::Params;
use crate::inference::{FinishReason, Token};
use crate::text::pieces::Pieces;
use crate::text::{Beginning, Detokenizer, StopMatcher, StopStrings, ToolCall, ToolParser};

/// How tool calls are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolMode {
    /// There are no tools: all is text.
    Off,
    /// Any number of calls.
    Parallel,
    /// The first call ends the answer.
    Single,
}

/// What is new since the last look.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Delta {
    /// Text.
    pub text: String,
    /// Complete calls.
    pub calls: Vec<ToolCall>,
    /// One entry per token, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Calls before those in `calls`.
    pub calls_before: usize,
}

impl Delta {
    /// Nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.calls.is_empty() && self.logprobs.is_empty()
    }

    /// Told. Keeps the allocations.
    pub fn clear(&mut self) {
        self.text.clear();
        self.calls_before += self.calls.len();
        self.calls.clear();
        self.logprobs.clear();
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
    tools: Option<ToolParser>,
    single_call: bool,
    include_stop: bool,
    logprobs: bool,
    min_tokens: u32,
    stop_ids: Arc<[u32]>,
    stop_ids_given: Arc<[u32]>,
    tokens: u32,
    ended_by: Option<u32>,
    /// Text of one token, before the stop strings and after.
    raw: String,
    clean: String,
    delta: Delta,
}

impl Choice {
    /// `beginning`: a chat's answer is a text of its own, a completion goes on after its prompt.
    pub fn new(
        params: &Params,
        pieces: Arc<Pieces>,
        beginning: Beginning,
        tools: ToolMode,
        logprobs: bool,
    ) -> Self {
        Self {
            detokenizer: Detokenizer::new(pieces, params.skip_special, beginning),
            strings: params.stop.clone(),
            stop: StopMatcher::new(params.stop.clone(), params.include_stop),
            tools: (tools != ToolMode::Off).then(ToolParser::default),
            single_call: tools == ToolMode::Single,
            include_stop: params.include_stop,
            logprobs,
            min_tokens: params.min_tokens,
            stop_ids: params.stop_ids.as_slice().into(),
            stop_ids_given: params.stop_ids_given.as_slice().into(),
            tokens: 0,
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

    /// What is new.
    pub fn delta(&mut self) -> &mut Delta {
        &mut self.delta
    }

    /// Takes the next token. `Some`: the answer is at its end here, whatever else the cluster would send.
    pub fn token(&mut self, token: Token) -> Option<End> {
        self.tokens += 1;
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
            None if self.single_call && !self.delta.calls.is_empty() => Some(End::ToolCalls),
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
        self.delta.calls_before + self.delta.calls.len() > 0
    }

    fn stop_end(&self, index: usize) -> End {
        if self.called() { End::ToolCalls } else { End::StopString(self.strings.get(index).to_string()) }
    }

    /// Moves clean text into the delta, through the tool parser if there is one.
    fn take_clean(&mut self, last: bool) {
        match &mut self.tools {
            None => self.delta.text.push_str(&self.clean),
            Some(parser) => {
                parser.push(&self.clean, &mut self.delta.text, &mut self.delta.calls);
                if last {
                    parser.finish(&mut self.delta.text, &mut self.delta.calls);
                }
                if self.single_call {
                    self.delta.calls.truncate(1);
                }
            }
        }
        self.clean.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::config::Limits;
    use crate::api::fields::Fields;
    use crate::api::params::Rules;
    use crate::text::Defaults;
    use serde_json::json;

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
        let params = Params::read(&mut fields, &rules, &["max_tokens"]).expect("valid");
        Choice::new(&params, pieces, Beginning::Text, tools, true)
    }

    fn token(id: u32) -> Token {
        Token { index: 0, id, logprob: Some(-0.5), top: Vec::new() }
    }

    /// The text out, and why it ended; `reason` is what the cluster says after all ids.
    fn run(choice: &mut Choice, ids: &[u32], reason: FinishReason) -> (String, End) {
        let early = ids.iter().find_map(|&id| choice.token(token(id)));
        let end = early.unwrap_or_else(|| choice.finish(reason));
        (choice.delta().text.clone(), end)
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
        assert_eq!(c.delta().calls.len(), 2);
        let mut c = choice("{}", ToolMode::Single);
        assert_eq!(run(&mut c, &ids, FinishReason::Stop), ("Hi".into(), End::ToolCalls));
        assert_eq!((c.delta().calls.len(), c.tokens()), (1, 5));
        let mut c = choice("{}", ToolMode::Off);
        assert_eq!(
            run(&mut c, &ids[..5], FinishReason::Length).0,
            "Hi\n<tool_call>{\"name\":\"f\"}</tool_call>"
        );
    }
}
