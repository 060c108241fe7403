//! Reasoning, which models put between `<think>` and `</think>`. Who opens it differs: the model itself (Qwen3, GLM 4.5,
//! first DeepSeek R1), or its chat template, so that the answer begins inside (later R1, DeepSeek V3.1 and Qwen3 when asked
//! to think, MiniMax M2). MiniMax M2 may think again between calls; Kimi K2 may go over to calls without closing.

use super::tags::{Buffer, Found};
use super::{Family, harmony};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// What ends Kimi's reasoning beside its closing tag.
const KIMI_SECTION: &str = "<|tool_calls_section_begin|>";

/// Who opens the reasoning of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// The model, if it wants to.
    ByModel,
    /// The template has: the answer begins inside.
    Open,
    /// The template has closed it again: there is none.
    Closed,
}

impl Opening {
    /// From the end of the rendered prompt.
    pub fn of_prompt(prompt: &str, family: Option<Family>) -> Self {
        if family == Some(Family::Harmony) {
            return harmony::opening(prompt);
        }
        let prompt = prompt.trim_end();
        match () {
            () if prompt.ends_with(OPEN) => Self::Open,
            () if prompt.ends_with(CLOSE) => Self::Closed,
            () => Self::ByModel,
        }
    }
}

/// A part of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Not for the user.
    Reasoning(String),
    /// The rest.
    Content(String),
}

/// Separates reasoning from the rest.
#[derive(Debug)]
pub struct Reasoning {
    state: State,
    buffer: Buffer,
    /// White space that is reasoning if more reasoning follows.
    held: String,
    /// Something was given out of this stretch.
    begun: bool,
    interleaved: bool,
    kimi: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far.
    Start,
    Inside,
    Outside,
}

impl Reasoning {
    /// `family`: of the model's calls, which tells its habits.
    pub fn new(opening: Opening, family: Option<Family>) -> Self {
        let state = match opening {
            Opening::ByModel => State::Start,
            Opening::Open => State::Inside,
            Opening::Closed => State::Outside,
        };
        Self {
            state,
            buffer: Buffer::default(),
            held: String::new(),
            begun: false,
            interleaved: family == Some(Family::MiniMax),
            kimi: family == Some(Family::Kimi),
        }
    }

    /// The model is reasoning.
    pub fn is_inside(&self) -> bool {
        self.state == State::Inside
    }

    /// Takes the next piece of text; appends what is certain.
    pub fn push(&mut self, text: &str, out: &mut Vec<Segment>) {
        self.buffer.push(text);
        loop {
            match self.state {
                State::Start => {
                    let text = self.buffer.rest();
                    let words = text.trim_start();
                    // A template that opens may be followed by a model that opens again.
                    if let Some(rest) = words.strip_prefix(OPEN) {
                        self.buffer.push(rest);
                        self.state = State::Inside;
                    } else if OPEN.starts_with(words) {
                        self.buffer.push(&text);
                        return;
                    } else {
                        self.buffer.push(&text);
                        self.state = State::Outside;
                    }
                }
                State::Inside => {
                    let tags: &[&str] = if self.kimi { &[CLOSE, KIMI_SECTION] } else { &[CLOSE] };
                    match self.buffer.until(tags) {
                        Found::Text(text) => {
                            self.reason(&text, out);
                            return;
                        }
                        Found::Tag(text, which) => {
                            self.reason(&text, out);
                            self.held.clear();
                            self.begun = false;
                            // Says that there was some, even of no words.
                            out.push(Segment::Reasoning(String::new()));
                            self.state = State::Outside;
                            if which > 0 {
                                content(tags[which].to_string(), out);
                            }
                        }
                    }
                }
                State::Outside if self.interleaved => match self.buffer.until(&[OPEN]) {
                    Found::Text(text) => {
                        content(text, out);
                        return;
                    }
                    Found::Tag(text, _) => {
                        content(text, out);
                        self.state = State::Inside;
                    }
                },
                State::Outside => {
                    content(self.buffer.rest(), out);
                    return;
                }
            }
        }
    }

    /// The text has ended.
    pub fn finish(&mut self, out: &mut Vec<Segment>) {
        let rest = self.buffer.rest();
        match self.state {
            State::Inside => self.reason(&rest, out),
            State::Start | State::Outside => content(rest, out),
        }
    }

    /// White space around reasoning is layout.
    fn reason(&mut self, text: &str, out: &mut Vec<Segment>) {
        let text = if self.begun { text } else { text.trim_start() };
        let words = text.trim_end();
        if !words.is_empty() {
            self.begun = true;
            out.push(Segment::Reasoning(format!("{}{words}", std::mem::take(&mut self.held))));
        }
        if self.begun {
            self.held.push_str(&text[words.len()..]);
        }
    }
}

fn content(text: String, out: &mut Vec<Segment>) {
    if !text.is_empty() {
        out.push(Segment::Content(text));
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{call, parts, reasoning, text};
    use super::super::{Reading, Types};
    use super::*;

    fn read(opening: Opening, family: Option<Family>, answer: &str) -> Vec<super::super::Part> {
        parts(&Reading { tools: None, reasoning: Some(opening), family }, answer)
    }

    #[test]
    fn who_opens_is_seen_at_the_end_of_the_prompt() {
        for (prompt, opening) in [
            ("<|im_start|>assistant\n", Opening::ByModel),
            ("<｜Assistant｜><think>\n", Opening::Open),
            ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Opening::Closed),
            ("<｜Assistant｜></think>", Opening::Closed),
        ] {
            assert_eq!(Opening::of_prompt(prompt, None), opening, "{prompt}");
        }
    }

    #[test]
    fn each_opening_has_its_rule() {
        let both = [reasoning("a\n b"), text("c ")];
        assert_eq!(read(Opening::ByModel, None, "\n<think>\na\n b\n\n</think>\n\nc "), both);
        assert_eq!(read(Opening::Open, None, "a\n b\n</think>c "), both);
        assert_eq!(read(Opening::Open, None, "only a"), [reasoning("only a")]);
        assert_eq!(read(Opening::ByModel, None, " c <think>"), [text(" c <think>")]);
        assert_eq!(read(Opening::ByModel, None, "<thi"), [text("<thi")]);
        assert_eq!(read(Opening::Closed, None, "<think>a</think>"), [text("<think>a</think>")]);
        assert_eq!(read(Opening::ByModel, None, "<think>\n\n</think>\n\nc"), [text("c")]);
    }

    #[test]
    fn minimax_thinks_again_and_kimi_calls_while_it_thinks() {
        let twice = "a</think>b<think>c</think>d";
        let four = [reasoning("a"), text("b"), reasoning("c"), text("d")];
        assert_eq!(read(Opening::Open, Some(Family::MiniMax), twice), four);
        assert_eq!(read(Opening::Open, None, twice), [reasoning("a"), text("b<think>c</think>d")]);
        let kimi = Reading {
            tools: Some((Family::Kimi, Types::default())),
            reasoning: Some(Opening::Open),
            family: Some(Family::Kimi),
        };
        let answer = "a<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}\
                      <|tool_call_end|><|tool_calls_section_end|>";
        let mut expected = vec![reasoning("a")];
        expected.extend(call("f", "{}"));
        expected[1] = super::super::Part::Call { id: Some("functions.f:0".into()), name: "f".into() };
        assert_eq!(parts(&kimi, answer), expected);
    }
}
