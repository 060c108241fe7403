//! Calls of Llama 3: the answer is `{"name": .., "parameters": {..}}`, several joined by `;`; after `<|python_tag|>` the
//! same, or `tool.call(key="value")` of its built-in tools.

use serde_json::{Map, Value};

use super::json::JsonCall;
use super::{Part, ToolParser, append};
use crate::text::json::dumps;

const TAG: &str = "<|python_tag|>";

/// The parser.
#[derive(Debug, Default)]
pub struct Llama {
    state: State,
    buffer: String,
}

#[derive(Debug, Default)]
enum State {
    /// The first word decides.
    #[default]
    Start,
    /// In an object.
    Json(JsonCall),
    /// After an object: another one, or text.
    Between,
    /// After the tag.
    Tagged,
    /// Python: read as a whole.
    Python,
    Text,
}

impl ToolParser for Llama {
    fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.buffer.push_str(text);
        loop {
            match std::mem::take(&mut self.state) {
                State::Start => {
                    let words = self.buffer.trim_start();
                    if let Some(rest) = words.strip_prefix(TAG) {
                        self.buffer = rest.to_string();
                        self.state = State::Tagged;
                    } else if words.starts_with('{') {
                        self.state = State::Json(JsonCall::default());
                    } else if TAG.starts_with(words) {
                        return;
                    } else {
                        self.state = State::Text;
                    }
                }
                State::Tagged => match self.buffer.trim_start().chars().next() {
                    None => {
                        self.state = State::Tagged;
                        return;
                    }
                    Some('{') => self.state = State::Json(JsonCall::default()),
                    Some(_) => self.state = State::Python,
                },
                State::Json(mut call) => {
                    let text = std::mem::take(&mut self.buffer);
                    let Some(end) = call.push(&text, parts) else {
                        self.state = State::Json(call);
                        return;
                    };
                    self.buffer = text[end..].to_string();
                    self.state = match call.finish(parts) {
                        Ok(()) => State::Between,
                        Err(raw) => {
                            append(parts, Part::Text(raw));
                            State::Text
                        }
                    };
                }
                State::Between => match self.buffer.trim_start_matches([' ', '\n', '\t', ';', ',']) {
                    "" => {
                        self.state = State::Between;
                        return;
                    }
                    words if words.starts_with('{') => self.state = State::Json(JsonCall::default()),
                    words if words.starts_with(TAG) => {
                        self.buffer = words[TAG.len()..].to_string();
                        self.state = State::Tagged;
                    }
                    words if TAG.starts_with(words) => {
                        self.state = State::Between;
                        return;
                    }
                    _ => self.state = State::Text,
                },
                State::Python => {
                    self.state = State::Python;
                    return;
                }
                State::Text => {
                    self.state = State::Text;
                    return append(parts, Part::Text(std::mem::take(&mut self.buffer)));
                }
            }
            if let State::Json(_) = self.state {
                let layout = self.buffer.find('{').unwrap_or(0);
                self.buffer.drain(..layout);
            }
        }
    }

    fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = std::mem::take(&mut self.buffer);
        match std::mem::take(&mut self.state) {
            State::Json(call) => {
                if let Err(raw) = call.finish(parts) {
                    append(parts, Part::Text(raw));
                }
            }
            State::Python => match python(rest.trim()) {
                Some((name, arguments)) => {
                    append(parts, Part::Call { id: None, name });
                    append(parts, Part::Arguments(arguments));
                    append(parts, Part::CallEnd);
                }
                None => append(parts, Part::Text(format!("{TAG}{rest}"))),
            },
            State::Tagged => append(parts, Part::Text(format!("{TAG}{rest}"))),
            State::Between if rest.trim_matches([' ', '\n', '\t', ';', ',']).is_empty() => {}
            State::Start | State::Between | State::Text => append(parts, Part::Text(rest)),
        }
    }
}

/// `name.call(key="value", other=1)`.
fn python(code: &str) -> Option<(String, String)> {
    let (name, rest) = code.split_once(".call(")?;
    let mut rest = rest.strip_suffix(')')?.trim();
    let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_');
    if !plain(name) {
        return None;
    }
    let mut arguments = Map::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=')?;
        let key = key.trim();
        let mut values = serde_json::Deserializer::from_str(after.trim_start()).into_iter::<Value>();
        let value = values.next()?.ok()?;
        rest = after.trim_start()[values.byte_offset()..].trim_start();
        if !plain(key) || !(rest.is_empty() || rest.starts_with(',')) {
            return None;
        }
        rest = rest.trim_start_matches(',').trim_start();
        arguments.insert(key.to_string(), value);
    }
    Some((name.to_string(), dumps(&Value::Object(arguments))))
}

#[cfg(test)]
mod tests {
    use super::super::check::{call, called, text};
    use super::super::{Family, Part, Types};

    fn run(answer: &str) -> Vec<Part> {
        called(Family::Llama, &Types::default(), answer)
    }

    #[test]
    fn an_object_is_a_call() {
        let one = call("get_weather", "{\"city\": \"Bern\"}");
        for answer in [
            "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Bern\"}}",
            "\n<|python_tag|>{\"type\": \"function\", \"name\": \"get_weather\", \"parameters\": {\"city\": \"Bern\"}}\n",
            "<|python_tag|>get_weather.call(city=\"Bern\")",
        ] {
            assert_eq!(run(answer), one, "{answer}");
        }
        let two = "{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {\"a\": [1]}}";
        assert_eq!(run(two), [call("f", "{}"), call("g", "{\"a\": [1]}")].concat());
    }

    #[test]
    fn other_answers_are_text() {
        for answer in
            ["Hi {\"name\": 1}", "{\"answer\": 42} it is", "{\"a\": ", "<|python_tag|>print(1)", "<|py"]
        {
            assert_eq!(run(answer), [text(answer)]);
        }
    }
}
