//! Calls whose arguments are bare text between tags. A family is a table: in which state which tag leads where.

use super::tags::{Buffer, Found};
use super::types::Types;
use super::{Part, ToolParser, append};

/// Where in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Outside of calls.
    Text,
    /// Between calls.
    Section,
    /// Reading a function's name.
    Name,
    /// Between arguments.
    Body,
    /// Reading an argument's name.
    Key,
    /// Between an argument's name and its value.
    BeforeValue,
    /// Reading a value.
    Value,
}

/// A family.
#[derive(Debug)]
pub struct Table {
    /// In the first state, the tag leads to the second.
    pub steps: &'static [(State, &'static str, State)],
    /// A line break after the tag that opens a value, and before the one that closes it, is layout.
    pub value_lines: bool,
}

/// The parser.
#[derive(Debug)]
pub struct Tagged {
    table: &'static Table,
    types: Types,
    state: State,
    buffer: Buffer,
    /// Of the state, up to its end; with the tag that led to it, in case it is no call.
    inside: String,
    opened: &'static str,
    name: String,
    key: String,
    arguments: usize,
    in_call: bool,
}

impl Tagged {
    /// `types`: of the request's tools.
    pub fn new(table: &'static Table, types: Types) -> Self {
        Self {
            table,
            types,
            state: State::Text,
            buffer: Buffer::default(),
            inside: String::new(),
            opened: "",
            name: String::new(),
            key: String::new(),
            arguments: 0,
            in_call: false,
        }
    }

    /// Leaves `self.state` for `next` by `tag`.
    fn step(&mut self, tag: &'static str, next: State, parts: &mut Vec<Part>) {
        let inside = std::mem::take(&mut self.inside);
        match self.state {
            State::Name => {
                self.name = inside.trim().trim_matches(['"', '\'']).to_string();
                append(parts, Part::Call { id: None, name: self.name.clone() });
                (self.in_call, self.arguments) = (true, 0);
            }
            State::Key => self.key = inside.trim().trim_matches(['"', '\'']).to_string(),
            State::Value => self.argument(&inside, parts),
            State::Text | State::Section | State::Body | State::BeforeValue => {}
        }
        if matches!(next, State::Text | State::Section) {
            self.end(parts);
        }
        (self.state, self.opened) = (next, tag);
    }

    fn argument(&mut self, value: &str, parts: &mut Vec<Part>) {
        let mut value = value;
        if self.table.value_lines {
            value = value.strip_prefix('\n').unwrap_or(value);
            value = value.strip_suffix('\n').unwrap_or(value);
        }
        let before = if self.arguments == 0 { "{" } else { ", " };
        self.arguments += 1;
        let key = serde_json::Value::from(self.key.as_str());
        let value = self.types.json(&self.name, &self.key, value);
        append(parts, Part::Arguments(format!("{before}{key}: {value}")));
    }

    fn end(&mut self, parts: &mut Vec<Part>) {
        if self.in_call {
            append(parts, Part::Arguments(if self.arguments == 0 { "{}" } else { "}" }.into()));
            append(parts, Part::CallEnd);
            self.in_call = false;
        }
    }
}

impl ToolParser for Tagged {
    fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.buffer.push(text);
        loop {
            let steps: Vec<_> = self.table.steps.iter().filter(|(from, ..)| *from == self.state).collect();
            let tags: Vec<&str> = steps.iter().map(|(_, tag, _)| *tag).collect();
            let (text, found) = match self.buffer.until(&tags) {
                Found::Text(text) => (text, None),
                Found::Tag(text, which) => (text, Some(steps[which])),
            };
            match self.state {
                State::Text => append(parts, Part::Text(text)),
                State::Name | State::Key | State::Value => self.inside.push_str(&text),
                State::Section | State::Body | State::BeforeValue => {}
            }
            let Some(&(_, tag, next)) = found else { return };
            self.step(tag, next, parts);
        }
    }

    /// A call that broke off keeps its complete arguments.
    fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = self.buffer.rest();
        match self.state {
            State::Text => append(parts, Part::Text(rest)),
            State::Name => append(parts, Part::Text(format!("{}{}{rest}", self.opened, self.inside))),
            _ => self.end(parts),
        }
        self.state = State::Section;
    }
}
