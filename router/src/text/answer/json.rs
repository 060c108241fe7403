//! JSON as it is written: where an object ends, and the calls `{"name": .., "arguments": {..}}` of Hermes and Llama, whose
//! arguments are given out while they grow.

use serde_json::{Map, Value};

use super::{Part, append};
use crate::text::json::dumps;

/// Follows braces and strings.
#[derive(Debug, Default)]
struct Depth {
    level: usize,
    in_string: bool,
    escaped: bool,
}

impl Depth {
    fn push(&mut self, c: char) {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.level += 1,
            '}' | ']' => self.level = self.level.saturating_sub(1),
            _ => {}
        }
    }
}

/// One object, given out as it comes; what stands around it is layout.
#[derive(Debug, Default)]
pub struct Object {
    depth: Depth,
    begun: bool,
}

impl Object {
    /// Takes the next piece; appends what is of the object.
    pub fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        let mut out = String::new();
        for c in text.chars() {
            if !self.begun && c != '{' {
                continue;
            }
            if self.begun && self.depth.level == 0 {
                break;
            }
            self.begun = true;
            self.depth.push(c);
            out.push(c);
        }
        append(parts, Part::Arguments(out));
    }

    /// The place for it has ended: no object is an empty one.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
        if !self.begun {
            append(parts, Part::Arguments("{}".into()));
        }
    }
}

/// One call as JSON.
#[derive(Debug, Default)]
pub struct JsonCall {
    /// All of it, until it is known to be a call.
    raw: String,
    depth: Depth,
    stage: Stage,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the arguments.
    #[default]
    Head,
    /// In the arguments, which go out.
    Arguments,
    /// The arguments are complete.
    Tail,
}

impl JsonCall {
    /// Takes the next piece. `Some`: the object was complete after this many bytes of it.
    pub fn push(&mut self, text: &str, parts: &mut Vec<Part>) -> Option<usize> {
        let mut out = String::new();
        let mut complete = None;
        for (at, c) in text.char_indices() {
            let (before, quoted) = (self.depth.level, self.depth.in_string);
            self.depth.push(c);
            match self.stage {
                Stage::Head => {
                    self.raw.push(c);
                    if c == '{'
                        && !quoted
                        && self.depth.level == 2
                        && let Some(name) = head(&self.raw)
                    {
                        append(parts, Part::Call { id: None, name });
                        self.stage = Stage::Arguments;
                        out.push('{');
                    }
                }
                Stage::Arguments => {
                    out.push(c);
                    if self.depth.level == 1 {
                        self.stage = Stage::Tail;
                    }
                }
                Stage::Tail => {}
            }
            if self.depth.level == 0 && before == 1 {
                complete = Some(at + c.len_utf8());
                break;
            }
        }
        append(parts, Part::Arguments(out));
        complete
    }

    /// It has ended. `Err`: it was no call, but this text.
    pub fn finish(self, parts: &mut Vec<Part>) -> Result<(), String> {
        if self.stage == Stage::Head {
            let Some((name, arguments)) = whole(&self.raw) else { return Err(self.raw) };
            append(parts, Part::Call { id: None, name });
            append(parts, Part::Arguments(arguments));
        }
        append(parts, Part::CallEnd);
        Ok(())
    }
}

/// The name, if `raw` is a call up to the opening brace of its arguments.
fn head(raw: &str) -> Option<String> {
    let object: Map<String, Value> = serde_json::from_str(&format!("{raw}}}}}")).ok()?;
    let (last, _) = object.iter().next_back()?;
    let name = object.get("name")?.as_str()?;
    (matches!(last.as_str(), "arguments" | "parameters") && !name.is_empty()).then(|| name.to_string())
}

/// Name and arguments of a complete call in whatever order.
fn whole(raw: &str) -> Option<(String, String)> {
    let Ok(Value::Object(mut call)) = serde_json::from_str(raw.trim()) else { return None };
    let Some(Value::String(name)) = call.remove("name") else { return None };
    let arguments = match call.remove("arguments").or_else(|| call.remove("parameters")) {
        Some(Value::String(text)) => text,
        Some(object @ Value::Object(_)) => dumps(&object),
        None | Some(Value::Null) => "{}".to_string(),
        Some(_) => return None,
    };
    (!name.is_empty()).then_some((name, arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_in_strings_are_no_braces() {
        let mut parts = Vec::new();
        let mut object = Object::default();
        object.push(" \n{\"a\": \"}\\\"{\", \"b\": {\"c\": [1]}} tail {", &mut parts);
        assert_eq!(parts, [Part::Arguments("{\"a\": \"}\\\"{\", \"b\": {\"c\": [1]}}".into())]);
    }

    #[test]
    fn arguments_go_out_before_the_call_is_complete() {
        let mut parts = Vec::new();
        let mut call = JsonCall::default();
        assert_eq!(call.push("{\"name\": \"f{\", \"arguments\": {\"a\": ", &mut parts), None);
        let begun = [Part::Call { id: None, name: "f{".into() }, Part::Arguments("{\"a\": ".into())];
        assert_eq!(parts, begun);
        assert_eq!(call.push("1}} x", &mut parts), Some(3));
        assert_eq!(call.finish(&mut parts), Ok(()));
        assert_eq!(parts[1..], [Part::Arguments("{\"a\": 1}".into()), Part::CallEnd]);
    }

    #[test]
    fn other_orders_and_forms_are_calls_too() {
        for raw in [
            "{\"arguments\": {\"a\": 1}, \"name\": \"f\"}",
            "{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}",
            "{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}",
        ] {
            let (mut parts, mut call) = (Vec::new(), JsonCall::default());
            call.push(raw, &mut parts);
            assert_eq!(call.finish(&mut parts), Ok(()), "{raw}");
            assert_eq!(parts[1], Part::Arguments("{\"a\": 1}".into()), "{raw}");
        }
        let mut call = JsonCall::default();
        call.push("{\"name\": 1}", &mut Vec::new());
        assert_eq!(call.finish(&mut Vec::new()), Err("{\"name\": 1}".into()));
    }
}
