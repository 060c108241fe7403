//! What a model means by its text: reasoning, words for the user, calls of tools. One file per family of markup; which one
//! a model writes is told from its chat template. Pure and incremental: the parts do not depend on how the text was cut.
//! Called by `api::choice`.
//!
//! What looks like a call and is none stays text, so nothing that a model wrote is lost.

mod deepseek;
mod family;
pub mod forced;
mod frame;
mod glm;
mod harmony;
mod hermes;
mod json;
mod kimi;
mod llama;
mod minimax;
mod qwen_xml;
mod reasoning;
mod tagged;
mod tags;
mod types;

#[cfg(test)]
mod check;

pub use family::Family;
pub use frame::Frame;
pub use reasoning::Opening;
pub use types::Types;

use harmony::Harmony;
use reasoning::{Reasoning, Segment};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Words for the user.
    Text(String),
    /// Words that the model wrote to itself.
    Reasoning(String),
    /// A call begins.
    Call {
        /// The model's own name of the call, where its form has one.
        id: Option<String>,
        /// Of the function.
        name: String,
    },
    /// The next piece of the last call's arguments, a JSON object as text.
    Arguments(String),
    /// The last call is complete.
    CallEnd,
}

/// Appends a part; text joins text.
pub fn append(parts: &mut Vec<Part>, part: Part) {
    match (parts.last_mut(), part) {
        (_, Part::Text(new) | Part::Reasoning(new) | Part::Arguments(new)) if new.is_empty() => {}
        (Some(Part::Text(last)), Part::Text(new))
        | (Some(Part::Reasoning(last)), Part::Reasoning(new))
        | (Some(Part::Arguments(last)), Part::Arguments(new)) => last.push_str(&new),
        (_, part) => parts.push(part),
    }
}

/// Finds the calls of one family in text.
trait ToolParser: Send + Sync + std::fmt::Debug {
    /// Takes the next piece of text; appends what is certain.
    fn push(&mut self, text: &str, parts: &mut Vec<Part>);
    /// The text has ended.
    fn finish(&mut self, parts: &mut Vec<Part>);
    /// The model is reasoning, where the family's calls and its reasoning are one form.
    fn is_reasoning(&self) -> bool {
        false
    }
}

/// How the answers of one request are read.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// The form of calls, and what their arguments are; `None`: there are no tools, markup of calls is text.
    pub tools: Option<(Family, Types)>,
    /// Whether the answer begins with reasoning; `None`: marks of reasoning are text.
    pub reasoning: Option<Opening>,
    /// The form of the model's answers, tools or not: which marks reasoning has beside `<think>`.
    pub family: Option<Family>,
}

impl Reading {
    /// Reads one answer; `None`: all of it is text as it is.
    pub fn reader(&self) -> Option<AnswerReader> {
        if self.family == Some(Family::Harmony) {
            let tools = self.tools.as_ref().map(|(_, types)| types.clone());
            let harmony = Harmony::new(tools, self.reasoning.unwrap_or(Opening::ByModel));
            return Some(AnswerReader::new(None, Some(Box::new(harmony)), None));
        }
        if self.tools.is_none() && self.reasoning.is_none() {
            return None;
        }
        let reasoning = self.reasoning.map(|opening| Reasoning::new(opening, self.family));
        let tools = self.tools.as_ref().map(|(family, types)| family.parser(types));
        Some(AnswerReader::new(reasoning, tools, Some(Layout::default())))
    }
}

/// Reads one answer.
#[derive(Debug)]
pub struct AnswerReader {
    reasoning: Option<Reasoning>,
    tools: Option<Box<dyn ToolParser>>,
    /// `None`: no white space is layout.
    layout: Option<Layout>,
    segments: Vec<Segment>,
    raw: Vec<Part>,
}

impl AnswerReader {
    fn new(reasoning: Option<Reasoning>, tools: Option<Box<dyn ToolParser>>, layout: Option<Layout>) -> Self {
        Self { reasoning, tools, layout, segments: Vec::new(), raw: Vec::new() }
    }

    /// Takes the next piece of text; appends what is certain.
    pub fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        match &mut self.reasoning {
            Some(reasoning) => reasoning.push(text, &mut self.segments),
            None => self.segments.push(Segment::Content(text.to_string())),
        }
        self.take_segments(parts);
    }

    /// The text has ended: gives out all that was held back.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
        if let Some(reasoning) = &mut self.reasoning {
            reasoning.finish(&mut self.segments);
        }
        self.take_segments(parts);
        if let Some(tools) = &mut self.tools {
            tools.finish(&mut self.raw);
        }
        self.take_raw(parts);
        if let Some(layout) = &mut self.layout {
            layout.finish(parts);
        }
    }

    /// The model is reasoning at this moment.
    pub fn is_reasoning(&self) -> bool {
        self.reasoning.as_ref().is_some_and(Reasoning::is_inside)
            || self.tools.as_ref().is_some_and(|tools| tools.is_reasoning())
    }

    fn take_segments(&mut self, parts: &mut Vec<Part>) {
        for segment in std::mem::take(&mut self.segments) {
            match (segment, &mut self.tools) {
                (Segment::Reasoning(text), _) => {
                    if let Some(layout) = &mut self.layout {
                        layout.after_reasoning();
                    }
                    append(parts, Part::Reasoning(text));
                }
                (Segment::Content(text), Some(tools)) => {
                    tools.push(&text, &mut self.raw);
                    self.take_raw(parts);
                }
                (Segment::Content(text), None) => {
                    // Without tools no white space is layout of calls: nothing is held back.
                    let text = self.layout.as_mut().map_or(&*text, |layout| layout.begin(&text));
                    append(parts, Part::Text(text.to_string()));
                }
            }
        }
    }

    fn take_raw(&mut self, parts: &mut Vec<Part>) {
        for part in std::mem::take(&mut self.raw) {
            match (part, &mut self.layout) {
                (Part::Text(text), Some(layout)) => layout.text(&text, parts),
                (part @ Part::Call { .. }, Some(layout)) => {
                    layout.call();
                    parts.push(part);
                }
                (part, _) => append(parts, part),
            }
        }
    }
}

/// White space around calls and after reasoning is layout; elsewhere it is text.
#[derive(Debug, Default)]
struct Layout {
    /// White space that is text if text follows.
    held: String,
    /// After reasoning or a call: what comes before the next word is layout.
    skip: bool,
}

impl Layout {
    fn after_reasoning(&mut self) {
        self.skip = true;
    }

    fn call(&mut self) {
        self.held.clear();
        self.skip = true;
    }

    /// Without leading layout.
    fn begin<'a>(&mut self, text: &'a str) -> &'a str {
        if !self.skip {
            return text;
        }
        let text = text.trim_start();
        self.skip = text.is_empty();
        text
    }

    fn text(&mut self, text: &str, parts: &mut Vec<Part>) {
        let text = self.begin(text);
        let words = text.trim_end();
        if words.is_empty() {
            self.held.push_str(text);
            return;
        }
        let mut certain = std::mem::take(&mut self.held);
        certain.push_str(words);
        append(parts, Part::Text(certain));
        self.held.push_str(&text[words.len()..]);
    }

    fn finish(&mut self, parts: &mut Vec<Part>) {
        append(parts, Part::Text(std::mem::take(&mut self.held)));
    }
}

#[cfg(test)]
mod tests {
    use super::check::{call, parts, reasoning, text};
    use super::*;

    fn reading(tools: bool, opening: Opening) -> Reading {
        Reading {
            tools: tools.then(|| (Family::Hermes, Types::default())),
            reasoning: Some(opening),
            family: Some(Family::Hermes),
        }
    }

    #[test]
    fn reasoning_words_and_calls_are_told_apart() {
        let answer = "<think>\nHm, 2 < 3.\n</think>\n\nLet me look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n";
        let expected =
            [vec![reasoning("Hm, 2 < 3."), text("Let me look.")], call("f", "{\"a\": 1}")].concat();
        assert_eq!(parts(&reading(true, Opening::ByModel), answer), expected);
    }

    #[test]
    fn without_tools_calls_are_text_and_spaces_stay() {
        let answer = "<think>a</think>\n\nb <tool_call> \n";
        let expected = [reasoning("a"), text("b <tool_call> \n")];
        assert_eq!(parts(&reading(false, Opening::ByModel), answer), expected);
        assert!(Reading::default().reader().is_none());
    }

    #[test]
    fn the_reader_knows_when_it_reasons() {
        let mut reader = reading(false, Opening::Open).reader().expect("a reader");
        let mut parts = Vec::new();
        assert!(reader.is_reasoning());
        reader.push("a</think>", &mut parts);
        assert!(!reader.is_reasoning());
    }
}
