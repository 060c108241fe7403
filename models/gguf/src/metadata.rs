//! The metadata of a GGUF file: keys and typed values.

use std::collections::BTreeMap;

use crate::GgufError;
use crate::cursor::Cursor;
use crate::header::Fault;

/// Longest key in bytes; the format's own limit.
const KEY_BYTES_MAX: u64 = (1 << 16) - 1;

/// Longest text in bytes; the largest known is a whole tokenizer.json of 30 MB.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Most items of one list, and of all lists of a file together; the largest known vocabulary has 262,144 tokens.
const ITEMS_MAX: u64 = 1 << 24;
const ITEMS_TOTAL: u64 = 1 << 25;

/// Lists within lists; nobody writes them, the format allows them.
const DEPTH_MAX: usize = 3;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `u8` to `u64`.
    Unsigned(u64),
    /// `i8` to `i64`.
    Signed(i64),
    /// `f64`, or the shortest decimal of an `f32` (0.1 is 0.1).
    Float(f64),
    /// `true` or `false`.
    Flag(bool),
    /// A text.
    Text(String),
    /// Values of one type.
    List(List),
}

/// Values of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum List {
    /// Of `u8` to `u64`.
    Unsigned(Vec<u64>),
    /// Of `i8` to `i64`.
    Signed(Vec<i64>),
    /// Of `f32` or `f64`.
    Float(Vec<f64>),
    /// Of flags.
    Flag(Vec<bool>),
    /// Of texts.
    Text(Vec<String>),
    /// Of lists.
    List(Vec<List>),
}

/// The metadata of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Metadata {
    pub(crate) path: String,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Reads `count` keys and values; `path` is for messages of the typed getters.
    pub(crate) fn parse(path: &str, cursor: &mut Cursor<'_>, count: u64) -> Result<Metadata, Fault> {
        let mut values = BTreeMap::new();
        let mut items = 0;
        for index in 0..count {
            cursor.field = format!("metadata {index}");
            let key = cursor.text(KEY_BYTES_MAX)?;
            cursor.field = short(&key);
            let kind = cursor.u32()?;
            let value = value(cursor, kind, &mut items)?;
            if values.contains_key(&key) {
                return Err(cursor.wrong("is there twice"));
            }
            values.insert(key, value);
        }
        Ok(Metadata { path: path.into(), values })
    }

    /// The file, for messages.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys and values, in order of key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> GgufError {
        GgufError::format(&self.path, short(key), reason)
    }

    fn typed<'v, T>(
        &'v self,
        key: &str,
        expected: &str,
        read: impl Fn(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let wrong = || self.error(key, format!("{} is not {expected}", value.short()));
        read(value).map(Some).ok_or_else(wrong)
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A whole number from 0 on.
    pub fn count(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a whole number", Value::as_count)
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", Value::as_number)
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "a list of texts", |value| match value {
            Value::List(List::Text(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        self.typed(key, "a list of numbers", |value| match value {
            Value::List(List::Unsigned(list)) => Some(list.iter().map(|number| *number as f64).collect()),
            Value::List(List::Signed(list)) => Some(list.iter().map(|number| *number as f64).collect()),
            Value::List(List::Float(list)) => Some(list.clone()),
            _ => None,
        })
    }
}

impl Value {
    pub(crate) fn as_count(&self) -> Option<u64> {
        match self {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    pub(crate) fn as_number(&self) -> Option<f64> {
        match self {
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            Value::Float(number) => Some(*number).filter(|number| number.is_finite()),
            _ => None,
        }
    }

    /// In a message: at most 60 characters of a text, the length of a list.
    pub(crate) fn short(&self) -> String {
        match self {
            Value::Unsigned(number) => number.to_string(),
            Value::Signed(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(text) => format!("{:?}", short(text)),
            Value::List(list) => format!("a list of {}", list.len()),
        }
    }
}

impl List {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            List::Unsigned(list) => list.len(),
            List::Signed(list) => list.len(),
            List::Float(list) => list.len(),
            List::Flag(list) => list.len(),
            List::Text(list) => list.len(),
            List::List(list) => list.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// At most 60 characters of `text`.
pub(crate) fn short(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

const LIST: u32 = 9;

fn value(cursor: &mut Cursor<'_>, kind: u32, items: &mut u64) -> Result<Value, Fault> {
    Ok(match kind {
        0 => Value::Unsigned(cursor.u8()?.into()),
        1 => Value::Signed((cursor.u8()? as i8).into()),
        2 => Value::Unsigned(cursor.u16()?.into()),
        3 => Value::Signed((cursor.u16()? as i16).into()),
        4 => Value::Unsigned(cursor.u32()?.into()),
        5 => Value::Signed((cursor.u32()? as i32).into()),
        6 => Value::Float(decimal(f32::from_bits(cursor.u32()?))),
        7 => Value::Flag(flag(cursor)?),
        8 => Value::Text(cursor.text(TEXT_BYTES_MAX)?),
        LIST => Value::List(list(cursor, items, DEPTH_MAX)?),
        10 => Value::Unsigned(cursor.u64()?),
        11 => Value::Signed(cursor.u64()? as i64),
        12 => Value::Float(f64::from_bits(cursor.u64()?)),
        other => return Err(cursor.wrong(format!("value type {other} is unknown"))),
    })
}

fn list(cursor: &mut Cursor<'_>, items: &mut u64, depth: usize) -> Result<List, Fault> {
    let kind = cursor.u32()?;
    let count = cursor.u64()?;
    if count > ITEMS_MAX {
        return Err(cursor.wrong(format!("a list of {count} items, at most {ITEMS_MAX}")));
    }
    *items += count;
    if *items > ITEMS_TOTAL {
        return Err(cursor.wrong(format!("more than {ITEMS_TOTAL} items in lists")));
    }
    let each = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        LIST => 12,
        other => return Err(cursor.wrong(format!("value type {other} is unknown"))),
    };
    cursor.room(count, each, "list items")?;
    // Grown as items come: what the header says costs nothing.
    let whole = 0..count;
    Ok(match kind {
        0 => List::Unsigned(whole.map(|_| cursor.u8().map(u64::from)).collect::<Result<_, _>>()?),
        1 => List::Signed(whole.map(|_| cursor.u8().map(|n| (n as i8).into())).collect::<Result<_, _>>()?),
        2 => List::Unsigned(whole.map(|_| cursor.u16().map(u64::from)).collect::<Result<_, _>>()?),
        3 => List::Signed(whole.map(|_| cursor.u16().map(|n| (n as i16).into())).collect::<Result<_, _>>()?),
        4 => List::Unsigned(whole.map(|_| cursor.u32().map(u64::from)).collect::<Result<_, _>>()?),
        5 => List::Signed(whole.map(|_| cursor.u32().map(|n| (n as i32).into())).collect::<Result<_, _>>()?),
        6 => List::Float(
            whole.map(|_| cursor.u32().map(|n| f32::from_bits(n).into())).collect::<Result<_, _>>()?,
        ),
        7 => List::Flag(whole.map(|_| flag(cursor)).collect::<Result<_, _>>()?),
        8 => List::Text(whole.map(|_| cursor.text(TEXT_BYTES_MAX)).collect::<Result<_, _>>()?),
        10 => List::Unsigned(whole.map(|_| cursor.u64()).collect::<Result<_, _>>()?),
        11 => List::Signed(whole.map(|_| cursor.u64().map(|n| n as i64)).collect::<Result<_, _>>()?),
        12 => List::Float(whole.map(|_| cursor.u64().map(f64::from_bits)).collect::<Result<_, _>>()?),
        _ if depth == 0 => return Err(cursor.wrong("lists are nested too deep")),
        _ => List::List(whole.map(|_| list(cursor, items, depth - 1)).collect::<Result<_, _>>()?),
    })
}

fn flag(cursor: &mut Cursor<'_>) -> Result<bool, Fault> {
    match cursor.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(cursor.wrong(format!("{other} is neither true nor false"))),
    }
}

/// The shortest decimal that reads back as `number`: what the writer meant by 1e-6.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(number.into())
}
