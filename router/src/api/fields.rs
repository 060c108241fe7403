//! Reads a JSON object field by field: every value is checked, a wrong one is named, and what nobody asked for is refused
//! at the end. A parameter that is ignored in silence is a defect.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of an object that have not been read yet. `null` counts as absent.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Before every name in errors: empty, or `stream_options.`.
    path: String,
}

impl Fields {
    /// The body of a request.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map, path: String::new() }),
            Ok(other) => Err(ApiError::wrong_type("body", "an object", &other)),
            // What cut a string between the two escapes of one character sends this.
            Err(error) if error.to_string().contains("hex escape") => {
                let place = format!("line {} column {}", error.line(), error.column());
                Err(ApiError::no_json(format!(
                    "a \\u escape is half of a character (a lone surrogate) at {place}"
                )))
            }
            Err(error) => Err(ApiError::no_json(error)),
        }
    }

    /// A request made of other parts.
    pub fn top(map: Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    /// A look at a field that stays.
    pub fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The object at `path`.
    pub fn of(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path: format!("{path}.") }),
            other => Err(ApiError::wrong_type(path, "an object", &other)),
        }
    }

    /// The name of a field in errors.
    pub fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The value as it is.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        // Order does not matter any more once reading has begun.
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::wrong_type(&self.name(name), "a string", &other)),
        }
    }

    /// True or false.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::wrong_type(&self.name(name), "a boolean", &other)),
        }
    }

    /// A list.
    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(ApiError::wrong_type(&self.name(name), "an array", &other)),
        }
    }

    /// An object within.
    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let path = self.name(name);
        self.take(name).map(|value| Fields::of(&path, value)).transpose()
    }

    /// An integer of a range; `5.0` is one.
    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        integer(&self.name(name), &value, range).map(Some)
    }

    /// A number for which `good` holds. `expected` says so in words, with article.
    pub fn number(
        &mut self,
        name: &str,
        expected: &str,
        good: impl Fn(f64) -> bool,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        number(&self.name(name), &value, expected, good).map(Some)
    }

    /// A string that one of `words` must equal.
    pub fn word(&mut self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        match words.iter().find(|word| **word == text) {
            Some(word) => Ok(Some(word)),
            None => Err(ApiError::wrong_value(
                &self.name(name),
                format!("one of {}", words.join(", ")),
                quoted(&text),
            )),
        }
    }

    /// Refuses those of `names` that ask for something. Many clients send what they do not ask for as `false` or empty.
    pub fn refuse(&mut self, names: &[&str], why: &str) -> Result<(), ApiError> {
        let asks = |value: Value| match value {
            Value::Bool(value) => value,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            _ => true,
        };
        match names.iter().find(|name| self.take(name).is_some_and(asks)) {
            Some(name) => Err(ApiError::unsupported(self.name(name), why)),
            None => Ok(()),
        }
    }

    /// Refuses `name` unless it has the value that changes nothing.
    pub fn only(&mut self, name: &str, neutral: &Value, why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !same(&value, neutral) => Err(ApiError::unsupported(self.name(name), why)),
            _ => Ok(()),
        }
    }

    /// The fields that are left, for what takes free names.
    pub fn rest(self) -> Map<String, Value> {
        self.map
    }

    /// Refuses what has not been read.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(ApiError::unknown(format!("{}{}", self.path, clipped(name)))),
            None => Ok(()),
        }
    }
}

/// Equal; 1 is 1.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// An integer of a range, of the parameter `name`.
pub fn integer(name: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let whole = |x: f64| x.fract() == 0.0;
    // A float says which integer it is.
    let exact = |x: f64| whole(x) && x.abs() < 9e15;
    let Value::Number(number) = value else { return Err(ApiError::wrong_type(name, "an integer", value)) };
    let out = |got: &dyn Display| {
        let expected = match (*range.start(), *range.end()) {
            (min, i64::MAX) if number.as_f64() < Some(min as f64) => format!("an integer of at least {min}"),
            (min, max) => format!("an integer from {min} to {max}"),
        };
        ApiError::wrong_value(name, expected, got)
    };
    match (number.as_i64(), number.as_f64()) {
        (Some(integer), _) if range.contains(&integer) => Ok(integer),
        (None, Some(float)) if number.is_f64() && exact(float) && range.contains(&(float as i64)) => {
            Ok(float as i64)
        }
        (None, Some(float)) if number.is_f64() && !whole(float) => {
            Err(ApiError::wrong_type(name, "an integer", value))
        }
        _ => Err(out(number)),
    }
}

/// A number for which `good` holds, of the parameter `name`.
pub fn number(
    name: &str,
    value: &Value,
    expected: &str,
    good: impl Fn(f64) -> bool,
) -> Result<f32, ApiError> {
    match value.as_f64() {
        Some(number) if good(number) && (number as f32).is_finite() => Ok(number as f32),
        Some(_) => Err(ApiError::wrong_value(name, expected, value)),
        None => Err(ApiError::wrong_type(name, "a number", value)),
    }
}

/// A client's words in an error: quoted, and not all of a megabyte.
pub fn quoted(text: &str) -> String {
    format!("'{}'", clipped(text))
}

fn clipped(text: &str) -> String {
    const CHARS_MAX: usize = 64;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).expect("an object")
    }

    #[test]
    fn wrong_types_and_values_name_the_field() {
        let error = fields(r#"{"seed": "7"}"#).integer("seed", 0..=9).unwrap_err();
        assert_eq!(error.message, "Invalid type for 'seed': expected an integer, but got a string.");
        assert_eq!((error.param.as_deref(), error.code), (Some("seed"), Some("invalid_type")));
        let error = fields(r#"{"n": 17}"#).integer("n", 1..=16).unwrap_err();
        assert_eq!(error.message, "Invalid value for 'n': expected an integer from 1 to 16, but got 17.");
        let error = fields(r#"{"n": 1.5}"#).integer("n", 1..=16).unwrap_err();
        assert_eq!(error.message, "Invalid type for 'n': expected an integer, but got a decimal number.");
        let error = fields(r#"{"n": 1e30}"#).integer("n", 1..=16).unwrap_err();
        assert_eq!(error.message, "Invalid value for 'n': expected an integer from 1 to 16, but got 1e+30.");
        let error = fields(r#"{"n": -99999999999999999999}"#).integer("n", 1..=16).unwrap_err();
        assert_eq!(error.code, Some("invalid_value"));
        let error = fields(r#"{"seed": 9223372036854775808}"#).integer("seed", 0..=i64::MAX).unwrap_err();
        assert!(error.message.contains("from 0 to 9223372036854775807"), "{}", error.message);
        let error = fields(r#"{"p": 1e300}"#).number("p", "a number", |_| true).unwrap_err();
        assert_eq!(error.code, Some("invalid_value"));
        let error = fields(r#"{"a": {"b": 1}}"#).object("a").unwrap().unwrap().string("b").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("a.b"));
    }

    #[test]
    fn null_is_absent_and_five_point_zero_is_five() {
        let mut f = fields(r#"{"a": null, "b": 5.0, "c": null}"#);
        assert_eq!((f.string("a"), f.integer("b", 0..=9)), (Ok(None), Ok(Some(5))));
        assert_eq!(f.finish(), Ok(()));
    }

    #[test]
    fn what_is_not_read_is_refused() {
        let mut f = fields(r#"{"model": "m", "temprature": 1}"#);
        assert_eq!(f.string("model"), Ok(Some("m".into())));
        assert_eq!(f.finish().unwrap_err().message, "Unknown parameter: 'temprature'.");
    }

    #[test]
    fn what_asks_for_nothing_is_not_refused() {
        let mut f = fields(r#"{"a": false, "b": [], "c": "", "d": 1, "e": {}, "f": true}"#);
        assert_eq!(f.refuse(&["a", "b", "c"], "is not supported"), Ok(()));
        assert_eq!(f.only("d", &serde_json::json!(1.0), "is not supported"), Ok(()));
        for name in ["e", "f"] {
            let error = f.refuse(&[name], "is not supported").unwrap_err();
            assert_eq!((error.param.as_deref(), error.code), (Some(name), Some("unsupported_parameter")));
        }
    }

    #[test]
    fn no_json_and_no_object_are_told_apart() {
        assert_eq!(Fields::parse(b"{").unwrap_err().code, Some("invalid_json"));
        assert_eq!(Fields::parse(b"[1]").unwrap_err().code, Some("invalid_type"));
        for half in [r#"{"a": "\ud83d"}"#, r#"{"a": "\ud83d\n"}"#, r#"{"a": "x\ude00"}"#] {
            let message = Fields::parse(half.as_bytes()).unwrap_err().message;
            assert!(message.contains("lone surrogate"), "{half}: {message}");
        }
        assert!(Fields::parse(br#"{"a": "\ud83d\ude00"}"#).is_ok());
        assert!(!Fields::parse(br#"{"a": "\u12x4"}"#).unwrap_err().message.contains("surrogate"));
    }
}
