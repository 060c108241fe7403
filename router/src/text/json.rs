//! JSON as Python's `json.dumps` writes it: what chat templates were trained with. Called by `template` (`tojson`) and by
//! `answer` (arguments of calls).

use std::fmt::Write;

use serde_json::Value;

/// The arguments of `json.dumps` that templates use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Style {
    /// Spaces per level; `None`: one line.
    pub indent: Option<usize>,
    /// Between items, and between a key and its value.
    pub separators: (String, String),
    /// Everything above U+007F as `\u` and four hexadecimal digits.
    pub ensure_ascii: bool,
    /// Keys in order of their code points.
    pub sort_keys: bool,
}

impl Style {
    /// `json.dumps(x, ensure_ascii=False, indent=indent)`, which is what `tojson` of Hugging Face's templates does.
    pub fn python(indent: Option<usize>) -> Self {
        let item = if indent.is_some() { "," } else { ", " };
        Self { indent, separators: (item.into(), ": ".into()), ensure_ascii: false, sort_keys: false }
    }
}

/// `json.dumps(value, ensure_ascii=False)`.
pub fn dumps(value: &Value) -> String {
    dumps_with(value, &Style::python(None))
}

/// `json.dumps(value, ...)`.
pub fn dumps_with(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &Style, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(out, number),
        Value::String(text) => write_string(out, text, style.ensure_ascii),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                begin_item(out, i, style, depth + 1);
                write_value(out, item, style, depth + 1);
            }
            end(out, style, depth);
            out.push(']');
        }
        Value::Object(map) if map.is_empty() => out.push_str("{}"),
        Value::Object(map) => {
            out.push('{');
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| *key);
            }
            for (i, (key, item)) in entries.into_iter().enumerate() {
                begin_item(out, i, style, depth + 1);
                write_string(out, key, style.ensure_ascii);
                out.push_str(&style.separators.1);
                write_value(out, item, style, depth + 1);
            }
            end(out, style, depth);
            out.push('}');
        }
    }
}

fn begin_item(out: &mut String, index: usize, style: &Style, depth: usize) {
    if index > 0 {
        out.push_str(&style.separators.0);
    }
    new_line(out, style, depth);
}

fn end(out: &mut String, style: &Style, depth: usize) {
    new_line(out, style, depth);
}

fn new_line(out: &mut String, style: &Style, depth: usize) {
    if let Some(indent) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * depth));
    }
}

fn write_number(out: &mut String, number: &serde_json::Number) {
    match (number.as_i64(), number.as_u64(), number.as_f64()) {
        (Some(integer), _, _) => _ = write!(out, "{integer}"),
        (_, Some(integer), _) => _ = write!(out, "{integer}"),
        (_, _, Some(float)) => write_float(out, float),
        // serde_json holds nothing else without arbitrary precision.
        _ => _ = write!(out, "{number}"),
    }
}

/// `repr(float)`: the shortest digits that read back the same; an exponent below 1e-4 and from 1e16 on.
fn write_float(out: &mut String, float: f64) {
    let scientific = format!("{float:e}");
    let exponent = scientific.split_once('e').and_then(|(digits, e)| Some((digits, e.parse::<i32>().ok()?)));
    match exponent {
        Some((digits, e)) if float != 0.0 && !(-4..16).contains(&e) => {
            let sign = if e < 0 { '-' } else { '+' };
            _ = write!(out, "{digits}e{sign}{:02}", e.abs());
        }
        _ => _ = write!(out, "{float:?}"),
    }
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => _ = write!(out, "\\u{:04x}", u32::from(c)),
            c if ensure_ascii && c > '~' => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Expectations are what CPython 3.11 prints.
    #[test]
    fn writes_what_python_writes() {
        let value = json!({"a": [1, -2, 1.0, 1e16, 1e-5, 0.0001, 123456789012345.6, 1.5e300, 0.0], "ü": null, "e": {}, "l": []});
        assert_eq!(
            dumps(&value),
            r#"{"a": [1, -2, 1.0, 1e+16, 1e-05, 0.0001, 123456789012345.6, 1.5e+300, 0.0], "ü": null, "e": {}, "l": []}"#
        );
        assert_eq!(dumps(&json!("<&'\"\\\n\u{1f}\u{7f}🙂>")), "\"<&'\\\"\\\\\\n\\u001f\u{7f}🙂>\"");
        assert_eq!(dumps(&json!(u64::MAX)), "18446744073709551615");
    }

    #[test]
    fn indents_sorts_and_escapes_as_python() {
        let value = json!({"b": [1, {"c": true}], "a": "é🙂"});
        let style = Style { sort_keys: true, ensure_ascii: true, ..Style::python(Some(2)) };
        assert_eq!(
            dumps_with(&value, &style),
            "{\n  \"a\": \"\\u00e9\\ud83d\\ude42\",\n  \"b\": [\n    1,\n    {\n      \"c\": true\n    }\n  ]\n}"
        );
    }
}
