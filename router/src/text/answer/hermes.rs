//! Calls of Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.

use super::json::JsonCall;
use super::tags::{Buffer, Found};
use super::{Part, ToolParser, append};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The parser.
#[derive(Debug, Default)]
pub struct Hermes {
    buffer: Buffer,
    /// Between the tags.
    call: Option<JsonCall>,
}

impl ToolParser for Hermes {
    fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.buffer.push(text);
        loop {
            match self.call.take() {
                None => match self.buffer.until(&[OPEN]) {
                    Found::Text(text) => return append(parts, Part::Text(text)),
                    Found::Tag(text, _) => {
                        append(parts, Part::Text(text));
                        self.call = Some(JsonCall::default());
                    }
                },
                Some(mut call) => match self.buffer.until(&[CLOSE]) {
                    Found::Text(text) => {
                        call.push(&text, parts);
                        self.call = Some(call);
                        return;
                    }
                    Found::Tag(text, _) => {
                        call.push(&text, parts);
                        if let Err(raw) = call.finish(parts) {
                            append(parts, Part::Text(format!("{OPEN}{raw}{CLOSE}")));
                        }
                    }
                },
            }
        }
    }

    /// A call whose closing tag is missing counts if its JSON is complete.
    fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = self.buffer.rest();
        match self.call.take() {
            None => append(parts, Part::Text(rest)),
            Some(mut call) => {
                call.push(&rest, parts);
                if let Err(raw) = call.finish(parts) {
                    append(parts, Part::Text(format!("{OPEN}{raw}")));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{call, called, text};
    use super::super::{Family, Part, Types};

    fn run(answer: &str) -> Vec<Part> {
        called(Family::Hermes, &Types::default(), answer)
    }

    #[test]
    fn separates_text_and_calls() {
        let answer = "Let me look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Zürich\",\"days\":2}}\n\
                      </tool_call>\n<tool_call>{\"name\": \"now\"}</tool_call>\n";
        let expected = [
            vec![text("Let me look.")],
            call("get_weather", r#"{"city":"Zürich","days":2}"#),
            call("now", "{}"),
        ];
        assert_eq!(run(answer), expected.concat());
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for answer in [
            "a < b, <tool> and <tool_call",
            "ends in space \n",
            "<tool_call>no json</tool_call>!",
            "<tool_call>{\"a\"",
            "<tool_call>{\"name\": 1}</tool_call>",
        ] {
            assert_eq!(run(answer), [text(answer)]);
        }
        assert_eq!(run(""), []);
    }

    #[test]
    fn a_call_without_its_closing_tag_counts() {
        assert_eq!(run("<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n"), call("f", "{}"));
        let broken = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"b";
        assert_eq!(run(broken), call("f", "{\"a\": \"b"));
    }

    #[test]
    fn text_after_a_call_is_kept() {
        let expected = [call("f", "{}"), vec![text("Done.  ")]].concat();
        assert_eq!(run("<tool_call>{\"name\": \"f\"}</tool_call>\nDone.  "), expected);
    }
}
