//! Calls of Qwen3-Coder: `<tool_call><function=NAME><parameter=k>v</parameter></function></tool_call>`.

use super::tagged::State::{Body, Key, Name, Section, Text, Value};
use super::tagged::Table;

/// The family.
pub static TABLE: Table = Table {
    steps: &[
        (Text, "<tool_call>", Section),
        // The model forgets the outer tag at times.
        (Text, "<function=", Name),
        (Section, "<function=", Name),
        (Section, "</tool_call>", Text),
        (Name, ">", Body),
        (Body, "<parameter=", Key),
        (Body, "</function>", Section),
        (Key, ">", Value),
        (Value, "</parameter>", Body),
    ],
    value_lines: true,
};

#[cfg(test)]
mod tests {
    use super::super::check::{call, called, text};
    use super::super::{Family, Types};

    #[test]
    fn values_are_lines_of_their_own() {
        let answer = "Ok.\n<tool_call>\n<function=f>\n<parameter=code>\na\n b\n</parameter>\n<parameter=n>\n1\n</parameter>\n\
                      </function>\n</tool_call>";
        let expected = [vec![text("Ok.")], call("f", r#"{"code": "a\n b", "n": 1}"#)].concat();
        assert_eq!(called(Family::QwenXml, &Types::default(), answer), expected);
    }
}
