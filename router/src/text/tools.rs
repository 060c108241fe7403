//! Tool calls in the text of a model: the form of Hermes and Qwen, `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.
//! Pure and incremental. Called by `api::choice` when a request has tools.
//!
//! A call is reported when it is complete. What looks like a call and is none stays text, so nothing a model wrote is lost.

use serde_json::Value;

use super::json::dumps;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// One call that the model asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Of the function.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// True if models of this chat template write their calls in this form: tags around JSON, not tags around XML.
pub fn template_is_hermes(source: &str) -> bool {
    source.contains(OPEN)
        && source.contains("arguments")
        && !source.contains("<function=")
        && !source.contains("<arg_key>")
}

/// Separates calls from text.
#[derive(Debug, Default)]
pub struct ToolParser {
    state: State,
    /// Text: white space and the beginning of a tag, held back. In a call: its inside.
    buffer: String,
    /// A call was found; white space around calls is layout.
    called: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Outside of calls.
    #[default]
    Text,
    /// After `<tool_call>`.
    Call,
}

impl ToolParser {
    /// Takes the next piece of text; appends what is certainly text, and calls that are complete.
    pub fn push(&mut self, text: &str, out: &mut String, calls: &mut Vec<ToolCall>) {
        self.buffer.push_str(text);
        loop {
            match self.state {
                State::Text => match self.buffer.find(OPEN) {
                    Some(at) => {
                        let before = self.buffer[..at].trim_end().to_string();
                        self.emit(&before, out);
                        self.buffer.drain(..at + OPEN.len());
                        self.state = State::Call;
                    }
                    None => {
                        let certain = self.buffer.len() - held_back(&self.buffer);
                        let text: String = self.buffer.drain(..certain).collect();
                        self.emit(&text, out);
                        return;
                    }
                },
                State::Call => {
                    let Some(at) = self.buffer.find(CLOSE) else { return };
                    match parse(&self.buffer[..at]) {
                        Some(call) => {
                            calls.push(call);
                            self.called = true;
                        }
                        None => self.emit(&format!("{OPEN}{}{CLOSE}", &self.buffer[..at]), out),
                    }
                    self.buffer.drain(..at + CLOSE.len());
                    self.state = State::Text;
                }
            }
        }
    }

    /// The text has ended. A call whose closing tag is missing counts if its JSON is complete.
    pub fn finish(&mut self, out: &mut String, calls: &mut Vec<ToolCall>) {
        let rest = std::mem::take(&mut self.buffer);
        match self.state {
            State::Text if self.called && rest.trim().is_empty() => {}
            State::Text => self.emit(&rest, out),
            State::Call => match parse(&rest) {
                Some(call) => calls.push(call),
                None => self.emit(&format!("{OPEN}{rest}"), out),
            },
        }
        self.state = State::Text;
    }

    fn emit(&mut self, text: &str, out: &mut String) {
        let text = if self.called { text.trim_start() } else { text };
        if !text.is_empty() {
            self.called = false;
            out.push_str(text);
        }
    }
}

/// Bytes at the end of `text` that cannot be given out yet: white space (layout, if a call follows), then perhaps a part
/// of the opening tag.
fn held_back(text: &str) -> usize {
    let tag = (1..OPEN.len()).rev().find(|&n| text.ends_with(&OPEN[..n])).unwrap_or(0);
    text.len() - text[..text.len() - tag].trim_end().len()
}

fn parse(inside: &str) -> Option<ToolCall> {
    let Ok(Value::Object(mut call)) = serde_json::from_str(inside.trim()) else { return None };
    let Some(Value::String(name)) = call.remove("name") else { return None };
    let arguments = match call.remove("arguments").or_else(|| call.remove("parameters")) {
        Some(Value::String(text)) => text,
        Some(object @ Value::Object(_)) => dumps(&object),
        None | Some(Value::Null) => "{}".to_string(),
        Some(_) => return None,
    };
    (!name.is_empty()).then_some(ToolCall { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result may not depend on where the text is cut: whole, and one character at a time.
    fn run(text: &str) -> (String, Vec<ToolCall>) {
        let mut results = Vec::new();
        let characters: Vec<String> = text.chars().map(String::from).collect();
        for pieces in [vec![text.to_string()], characters] {
            let (mut out, mut calls) = (String::new(), Vec::new());
            let mut parser = ToolParser::default();
            for piece in &pieces {
                parser.push(piece, &mut out, &mut calls);
            }
            parser.finish(&mut out, &mut calls);
            results.push((out, calls));
        }
        assert_eq!(results[0], results[1], "whole and by characters");
        results.remove(0)
    }

    fn call(name: &str, arguments: &str) -> ToolCall {
        ToolCall { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn separates_text_and_calls() {
        let (text, calls) = run(
            "Let me look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Zürich\",\"days\":2}}\n</tool_call>\n\
             <tool_call>{\"name\": \"now\"}</tool_call>\n",
        );
        assert_eq!(text, "Let me look.");
        assert_eq!(calls, [call("get_weather", r#"{"city": "Zürich", "days": 2}"#), call("now", "{}")]);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "a < b, <tool> and <tool_call",
            "ends in space \n",
            "",
            "<tool_call>no json</tool_call>!",
            "<tool_call>{\"a\"",
        ] {
            assert_eq!(run(text), (text.to_string(), Vec::new()));
        }
        assert_eq!(run("<tool_call>{\"name\": 1}</tool_call>").1, []);
    }

    #[test]
    fn a_complete_call_without_its_closing_tag_counts() {
        let (text, calls) = run("<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n");
        assert_eq!((text.as_str(), calls), ("", vec![call("f", "{}")]));
    }

    #[test]
    fn text_after_a_call_is_kept() {
        let (text, calls) = run("<tool_call>{\"name\": \"f\"}</tool_call>\nDone.  ");
        assert_eq!((text.as_str(), calls.len()), ("Done.  ", 1));
    }

    #[test]
    fn only_json_between_tags_is_hermes() {
        assert!(template_is_hermes("<tool_call>\\n{\"name\": .., \"arguments\": ..}</tool_call>"));
        assert!(!template_is_hermes("<minimax:tool_call> arguments"));
        assert!(!template_is_hermes("<tool_call><function=f> arguments"));
        assert!(!template_is_hermes("<tool_call>f<arg_key> arguments"));
    }
}
