//! Calls of MiniMax M2: `<invoke name="f"><parameter name="k">v</parameter></invoke>` between `<minimax:tool_call>` tags.

use super::tagged::State::{Body, Key, Name, Section, Text, Value};
use super::tagged::Table;

/// The family.
pub static TABLE: Table = Table {
    steps: &[
        (Text, "<minimax:tool_call>", Section),
        (Section, "<invoke name=", Name),
        (Section, "</minimax:tool_call>", Text),
        (Name, ">", Body),
        (Body, "<parameter name=", Key),
        (Body, "</invoke>", Section),
        (Key, ">", Value),
        (Value, "</parameter>", Body),
    ],
    value_lines: true,
};

#[cfg(test)]
mod tests {
    use super::super::check::{call, called, text};
    use super::super::{Family, Part, Types};
    use serde_json::json;

    fn run(answer: &str) -> Vec<Part> {
        let tool = json!({"function": {"name": "f", "parameters": {"properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}}}}});
        called(Family::MiniMax, &Types::new(&[tool]), answer)
    }

    #[test]
    fn values_take_the_types_of_the_schema() {
        let answer = "Ok.\n<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"city\">7 \"a\"</parameter>\n\
                      <parameter name=\"days\">2</parameter>\n</invoke>\n<invoke name=\"g\">\n</invoke>\n</minimax:tool_call>\n";
        let expected =
            [vec![text("Ok.")], call("f", r#"{"city": "7 \"a\"", "days": 2}"#), call("g", "{}")].concat();
        assert_eq!(run(answer), expected);
    }

    #[test]
    fn other_answers_are_text_and_a_broken_call_keeps_what_it_had() {
        assert_eq!(run("a <minimax: b"), [text("a <minimax: b")]);
        let cut = "<minimax:tool_call><invoke name=\"f\"><parameter name=\"days\">2</parameter><parameter name=\"ci";
        assert_eq!(run(cut), call("f", "{\"days\": 2}"));
    }
}
