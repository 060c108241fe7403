//! Calls of Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{..}<|tool_call_end|>` between
//! `<|tool_calls_section_begin|>` and `<|tool_calls_section_end|>`. The head is the call's id, which the template wants back.

use super::json::Object;
use super::tags::{Buffer, Found};
use super::{Part, ToolParser, append};

const SECTION: &str = "<|tool_calls_section_begin|>";
const SECTION_END: &str = "<|tool_calls_section_end|>";
const CALL: &str = "<|tool_call_begin|>";
const CALL_END: &str = "<|tool_call_end|>";
const ARGUMENTS: &str = "<|tool_call_argument_begin|>";

/// The parser.
#[derive(Debug, Default)]
pub struct Kimi {
    state: State,
    buffer: Buffer,
    head: String,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// Between calls.
    Section,
    /// The id.
    Head,
    Arguments(Object),
}

impl ToolParser for Kimi {
    fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.buffer.push(text);
        loop {
            let tags: &[&str] = match self.state {
                State::Text => &[SECTION, CALL],
                State::Section => &[CALL, SECTION_END],
                State::Head => &[ARGUMENTS],
                State::Arguments(_) => &[CALL_END],
            };
            let (text, tag) = match self.buffer.until(tags) {
                Found::Text(text) => (text, None),
                Found::Tag(text, which) => (text, Some(tags[which])),
            };
            match &mut self.state {
                State::Text => append(parts, Part::Text(text)),
                State::Section => {}
                State::Head => self.head.push_str(&text),
                State::Arguments(object) => object.push(&text, parts),
            }
            let Some(tag) = tag else { return };
            self.state = match std::mem::take(&mut self.state) {
                State::Text | State::Section if tag == CALL => State::Head,
                State::Text => State::Section,
                State::Section => State::Text,
                State::Head => {
                    let id = std::mem::take(&mut self.head).trim().to_string();
                    let name = name(&id).to_string();
                    append(parts, Part::Call { id: Some(id), name });
                    State::Arguments(Object::default())
                }
                State::Arguments(mut object) => {
                    object.finish(parts);
                    append(parts, Part::CallEnd);
                    State::Section
                }
            };
        }
    }

    fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = self.buffer.rest();
        match &mut self.state {
            State::Text => append(parts, Part::Text(rest)),
            State::Arguments(object) => {
                object.push(&rest, parts);
                append(parts, Part::CallEnd);
            }
            State::Head => append(parts, Part::Text(format!("{CALL}{}{rest}", self.head))),
            State::Section => {}
        }
        self.state = State::Section;
    }
}

/// `get_weather` of `functions.get_weather:0`.
fn name(id: &str) -> &str {
    let name = id.strip_prefix("functions.").unwrap_or(id);
    match name.rsplit_once(':') {
        Some((name, number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{called, text};
    use super::super::{Family, Part, Types};

    fn run(answer: &str) -> Vec<Part> {
        called(Family::Kimi, &Types::default(), answer)
    }

    #[test]
    fn the_id_is_the_models_own() {
        let answer = "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.f.g:0<|tool_call_argument_begin|>{\"a\": 1}\
                      <|tool_call_end|><|tool_call_begin|>functions.h:1<|tool_call_argument_begin|><|tool_call_end|>\
                      <|tool_calls_section_end|>";
        let expected = [
            text("Ok."),
            Part::Call { id: Some("functions.f.g:0".into()), name: "f.g".into() },
            Part::Arguments("{\"a\": 1}".into()),
            Part::CallEnd,
            Part::Call { id: Some("functions.h:1".into()), name: "h".into() },
            Part::Arguments("{}".into()),
            Part::CallEnd,
        ];
        assert_eq!(run(answer), expected);
    }

    #[test]
    fn other_answers_are_text() {
        for answer in ["a <|tool", "b ", "<|tool_call_begin|>f"] {
            assert_eq!(run(answer), [text(answer)]);
        }
    }
}
