//! Calls of DeepSeek. V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, then the arguments in a fence of JSON;
//! V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{..}`. Both between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.

use super::json::Object;
use super::tags::{Buffer, Found};
use super::{Part, ToolParser, append};

const SECTION: &str = "<｜tool▁calls▁begin｜>";
const SECTION_END: &str = "<｜tool▁calls▁end｜>";
const CALL: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";

/// The parser.
#[derive(Debug, Default)]
pub struct DeepSeek {
    state: State,
    buffer: Buffer,
    /// Of a tag's inside, up to its end.
    head: String,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// Between calls.
    Section,
    /// Before the separator.
    Head,
    /// V3: the line with the name.
    Name,
    Arguments(Object),
}

impl ToolParser for DeepSeek {
    fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.buffer.push(text);
        loop {
            let tags: &[&str] = match self.state {
                State::Text => &[SECTION, CALL],
                State::Section => &[CALL, SECTION_END],
                State::Head => &[SEPARATOR],
                State::Name => &["\n", CALL_END],
                State::Arguments(_) => &[CALL_END],
            };
            let (text, tag) = match self.buffer.until(tags) {
                Found::Text(text) => (text, None),
                Found::Tag(text, which) => (text, Some(tags[which])),
            };
            match &mut self.state {
                State::Text => append(parts, Part::Text(text)),
                State::Section => {}
                State::Head | State::Name => self.head.push_str(&text),
                State::Arguments(object) => object.push(&text, parts),
            }
            let Some(tag) = tag else { return };
            self.state = match std::mem::take(&mut self.state) {
                State::Text | State::Section if tag == CALL => State::Head,
                State::Text => State::Section,
                State::Section => State::Text,
                State::Head => {
                    let head = std::mem::take(&mut self.head);
                    if head.trim() == "function" { State::Name } else { begin(&head, parts) }
                }
                State::Name => {
                    let mut next = begin(&std::mem::take(&mut self.head), parts);
                    if tag == CALL_END {
                        end(&mut next, parts);
                        next = State::Section;
                    }
                    next
                }
                mut state @ State::Arguments(_) => {
                    end(&mut state, parts);
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
            State::Name => append(parts, Part::Text(format!("{CALL}function{SEPARATOR}{}{rest}", self.head))),
            State::Section => {}
        }
        self.state = State::Section;
    }
}

fn begin(name: &str, parts: &mut Vec<Part>) -> State {
    append(parts, Part::Call { id: None, name: name.trim().to_string() });
    State::Arguments(Object::default())
}

fn end(state: &mut State, parts: &mut Vec<Part>) {
    if let State::Arguments(object) = state {
        object.finish(parts);
        append(parts, Part::CallEnd);
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{call, called, text};
    use super::super::{Family, Part, Types};

    fn run(answer: &str) -> Vec<Part> {
        called(Family::DeepSeek, &Types::default(), answer)
    }

    #[test]
    fn v3_and_r1_fence_their_arguments() {
        let answer = "Hm.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": \"`}\"}\n```\
                      <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>\
                      <｜tool▁calls▁end｜>";
        assert_eq!(run(answer), [vec![text("Hm.")], call("f", "{\"a\": \"`}\"}"), call("g", "{}")].concat());
    }

    #[test]
    fn v3_1_does_not() {
        let answer = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        assert_eq!(run(answer), call("f", "{\"a\": 1}"));
        let cut = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\"";
        assert_eq!(run(cut), call("f", "{\"a\""));
    }

    #[test]
    fn other_answers_are_text() {
        for answer in ["a <｜tool", "b ", "<｜tool▁call▁begin｜>f"] {
            assert_eq!(run(answer), [text(answer)]);
        }
    }
}
