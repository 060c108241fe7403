//! Calls of GLM 4.5: `<tool_call>NAME`, then `<arg_key>k</arg_key><arg_value>v</arg_value>` per argument, `</tool_call>`.

use super::tagged::State::{BeforeValue, Body, Key, Name, Text, Value};
use super::tagged::Table;

/// The family.
pub static TABLE: Table = Table {
    steps: &[
        (Text, "<tool_call>", Name),
        (Name, "<arg_key>", Key),
        (Name, "</tool_call>", Text),
        (Key, "</arg_key>", BeforeValue),
        (BeforeValue, "<arg_value>", Value),
        (Value, "</arg_value>", Body),
        (Body, "<arg_key>", Key),
        (Body, "</tool_call>", Text),
    ],
    value_lines: false,
};

#[cfg(test)]
mod tests {
    use super::super::check::{call, called, text};
    use super::super::{Family, Part, Types};
    use serde_json::json;

    fn run(answer: &str) -> Vec<Part> {
        let tool =
            json!({"function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}});
        called(Family::Glm, &Types::new(&[tool]), answer)
    }

    #[test]
    fn keys_and_values_alternate() {
        let answer = "Ok.\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>7</arg_value>\n<arg_key>days</arg_key>\n\
                      <arg_value>[2]</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>";
        let expected =
            [vec![text("Ok.")], call("f", r#"{"city": "7", "days": [2]}"#), call("g", "{}")].concat();
        assert_eq!(run(answer), expected);
    }

    #[test]
    fn what_breaks_off_in_its_name_is_text() {
        assert_eq!(run("<tool_call>ge"), [text("<tool_call>ge")]);
    }
}
